"""Finding things inside an optimizer's state.

A state reports on the last step in a field ``metrics``, a dictionary of scalars. That
is the whole protocol: readers look for the field, and need not know the type of a
state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

PyTree = Any
State = TypeVar("State")
_METRICS = jax.tree_util.GetAttrKey("metrics")


def find_states(tree: PyTree, kind: type[State]) -> list[State]:
    """The states of one kind in a tree, outermost first, also those inside others."""
    return _find(tree, lambda node: isinstance(node, kind))


def collect_metrics(tree: PyTree) -> dict[str, jax.Array]:
    """The metrics of all states in a tree by name; of equal names the innermost."""
    return {
        "/".join(map(_name, path[path.index(_METRICS) + 1 :])): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
        if _METRICS in path
    }


def map_metrics(function: Callable[[jax.Array], jax.Array], tree: PyTree) -> PyTree:
    """The tree with a function applied to all metrics."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(leaf) if _METRICS in path else leaf, tree
    )


def clear_metrics(tree: PyTree) -> PyTree:
    """The tree with all metrics at zero: what they say of a step that was not taken."""
    return map_metrics(jnp.zeros_like, tree)


def check_not_nested(**states: PyTree) -> None:
    """Raise a ValueError if one of the states is that of a perturbed optimizer."""
    for name, state in states.items():
        found = _find(state, lambda node: hasattr(node, "ascent_state"))
        if found:
            what = type(found[0]).__name__.removesuffix("State")
            raise ValueError(
                f"{name} contains a sharpness-aware optimizer already ({what}), "
                "and a perturbation of a perturbed step has no meaning: pass a base "
                "optimizer and an ascent chain, of which each perturbs nothing itself."
            )


def _find(tree: PyTree, is_wanted: Callable[[Any], bool]) -> list[Any]:
    found: list[Any] = []

    def collect(node: Any) -> bool:
        if is_wanted(node):
            found.append(node)
        return False

    jax.tree.leaves(tree, is_leaf=collect)
    return found


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", key)))
