"""Which cases of a product of parameters run every time, and which with ``--all``.

Every kind of behaviour has a case that always runs; where a case takes a program of its
own, the others of its kind run every night.
"""

import pytest


def every(values, always):
    """The values for ``parametrize``; those not ``always`` run with ``--all``."""
    values, always = list(values), set(always)
    assert always <= set(values), always - set(values)
    return [value if value in always else exhaustive(value) for value in values]


def in_turn(names, values):
    """Pairs for ``parametrize``: each name with one of the values, in turn.

    The others of the product run with ``--all``.
    """
    names, values = list(names), list(values)
    return [
        (name, value) if turn == i % len(values) else exhaustive(name, value)
        for i, name in enumerate(names)
        for turn, value in enumerate(values)
    ]


def exhaustive(*values, **options):
    """One case for ``parametrize`` that runs with ``--all``."""
    return pytest.param(*values, marks=pytest.mark.exhaustive, **options)
