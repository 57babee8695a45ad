"""Extra arguments of ``update``: Optax passes all of them to every transformation.

A line search is the exception: it takes what it does not know for an argument of
``value_fn`` and refuses the rest.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

PyTree = Any
ValueFn = Callable[..., jax.Array]
# What sharpness_aware and lagged tell the base optimizer, and make_train_step beside
# the arguments that line searches know.
OURS = ("clean_grads", "ascended", "perturbation", "grad_fn", "obj_fn", "axis_name")


def ignore_ours(value_fn: ValueFn) -> ValueFn:
    """The function, with a signature that takes our extra arguments and drops them."""
    signature = inspect.signature(value_fn)
    known = list(signature.parameters.values())
    names = [name for name in OURS if name not in signature.parameters]

    @functools.wraps(value_fn)
    def without_ours(*args: Any, **kwargs: Any) -> jax.Array:
        return value_fn(*args, **{k: v for k, v in kwargs.items() if k not in names})

    ours = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    rest = [p for p in known if p.kind is inspect.Parameter.VAR_KEYWORD]
    first = [p for p in known if p not in rest]
    without_ours.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*first, *ours, *rest]
    )
    return without_ours


def bind(value_fn: ValueFn, extra_args: dict[str, Any]) -> ValueFn:
    """``value_fn`` as a function of the parameters alone, as a line search calls it."""
    _, *names = inspect.signature(value_fn).parameters
    return functools.partial(
        value_fn, **{name: extra_args[name] for name in names if name in extra_args}
    )
