"""Every public name stands in the reference of the site, and only once."""

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import optax_vasso
from optax_vasso import (
    ascent,
    descent,
    factors,
    gate,
    metrics,
    sharpness,
    steps,
    train,
    wrappers,
)
from optax_vasso.train import checkpoint

API = Path(__file__).parent.parent / "docs" / "api"
ENTRY = re.compile(r"^\.\. auto(?:function|class|data):: (\S+)$", re.MULTILINE)
DOCUMENTED = [
    name for page in API.glob("*.md") for name in ENTRY.findall(page.read_text())
]
MODULES = (
    optax_vasso,
    ascent,
    checkpoint,
    descent,
    factors,
    gate,
    metrics,
    sharpness,
    steps,
    train,
    wrappers,
)


def _public(module):
    """What a module offers: its ``__all__``, or what it has of this package."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "").startswith(module.__name__)
    ]
    return [name for name in names if not isinstance(getattr(module, name), ModuleType)]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module):
    names = _public(module)
    assert len(names) >= 2  # or the search above has found nothing
    for name in names:
        places = {f"{module.__name__}.{name}", f"optax_vasso.{name}"}
        assert places & set(DOCUMENTED), name


def test_no_name_is_in_the_reference_twice():
    assert sorted(DOCUMENTED) == sorted(set(DOCUMENTED))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_has_a_docstring(module):
    for name in _public(module):
        assert inspect.getdoc(getattr(module, name)), name


def test_the_public_names_are_few():
    assert len(optax_vasso.__all__) <= 40


@pytest.mark.parametrize("module", [optax_vasso, gate], ids=lambda m: m.__name__)
def test_every_public_function_is_in_the_index_of_the_reference(module):
    index = (API / "index.md").read_text()
    prefix = "gate." if module is gate else ""
    for name in _public(module):
        if inspect.isfunction(getattr(module, name)):
            assert f"`{prefix}{name}`" in index, name


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_signature_is_readable(module):
    for name in _public(module):
        function = getattr(module, name)
        if inspect.isfunction(function):
            for parameter in inspect.signature(function).parameters.values():
                assert len(inspect.formatannotation(parameter.annotation)) < 80, name
