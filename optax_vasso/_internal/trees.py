"""Finding things inside an optimizer's state.

States are found by their type, never by the name of a field, because users' parameters,
and with them moments and averages, may have fields of any name.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal.checks import is_left_out

PyTree = Any
State = TypeVar("State")
# The fields of each type of state that belong to an ascent.
_ASCENDING: dict[type, tuple[str, ...]] = {}


class Report(NamedTuple):
    """Metrics of the last step, in any field of an optimizer's state.

    :func:`optax_vasso.make_train_step` finds them there and returns them.

    Attributes:
      metrics: arrays by name, usually scalars. They are zero in a new state and after a
        step in which the transformation was not called.
    """

    metrics: dict[str, Any]


def displaced(params: PyTree, perturbation: PyTree) -> PyTree:
    """The sum x + ε in the dtypes of x; x itself where there is no ε."""
    return jax.tree.map(
        lambda e, x: x if is_left_out(e) else optax.apply_updates(x, e),
        perturbation,
        params,
        is_leaf=is_left_out,
    )


class FollowsLoss:
    """A state of an ascent chain that is told the perturbed loss after the ascent."""

    __slots__ = ()

    def after(self, perturbed_loss: jax.Array) -> Any:
        """The state after an ascent that led to this loss."""
        raise NotImplementedError


def follows_loss(tree: PyTree) -> bool:
    """Whether the tree contains a state that follows the perturbed loss."""
    return bool(find_states(tree, FollowsLoss))


def tell_loss(tree: PyTree, perturbed_loss: jax.Array) -> PyTree:
    """The tree after its states have been told the perturbed loss."""
    return _map_states(lambda state: state.after(perturbed_loss), FollowsLoss, tree)


def find_states(tree: PyTree, kind: type[State]) -> list[State]:
    """The states of one kind in a tree, outermost first, including nested ones."""
    return _find(tree, lambda node: isinstance(node, kind))


def _map_states(function: Callable[[Any], Any], kind: type, tree: PyTree) -> PyTree:
    """The tree with a function applied to the outermost states of one kind."""
    return jax.tree.map(
        lambda node: function(node) if isinstance(node, kind) else node,
        tree,
        is_leaf=lambda node: isinstance(node, kind),
    )


def collect_metrics(tree: PyTree) -> dict[str, jax.Array]:
    """The metrics of all reports in a tree by name, ``outer/inner`` where nested.

    If several groups of a partition report the same name, the labels of the groups are
    appended, as ``name/label``. Raises a ValueError if two names are still equal.
    """

    def is_report(node: Any) -> bool:
        return isinstance(node, Report)

    found = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), where, leaf)
        for where, report in jax.tree.leaves_with_path(tree, is_leaf=is_report)
        if is_report(report)
        for path, leaf in jax.tree.leaves_with_path(report.metrics)
    ]
    count = collections.Counter(name for name, _, _ in found)
    return merge_metrics(
        *(
            {name if count[name] == 1 else "/".join((name, *_labels(where))): leaf}
            for name, where, leaf in found
        )
    )


def merge_metrics(*parts: dict[str, Any]) -> dict[str, Any]:
    """All metrics in one dictionary; a ValueError if two of them have one name."""
    merged: dict[str, Any] = {}
    for part in parts:
        for name in part:
            if name in merged:
                raise ValueError(
                    f"two metrics of this train step have the name {name!r}: rename "
                    "one of them, as in track(other_name=measure)."
                )
        merged |= part
    return merged


def map_metrics(function: Callable[[jax.Array], jax.Array], tree: PyTree) -> PyTree:
    """The tree with a function applied to all metrics."""
    return _map_states(lambda report: jax.tree.map(function, report), Report, tree)


def clear_metrics(tree: PyTree) -> PyTree:
    """The tree with all metrics set to zero."""
    return map_metrics(jnp.zeros_like, tree)


def of_ascent(*fields: str) -> Callable[[type[State]], type[State]]:
    """Register the fields of a NamedTuple that belong to an ascent.

    In a local ascent each group has its own. A state with a registered field
    ``ascent_state`` is that of an optimizer that perturbs the parameters.
    """

    def register(kind: type[State]) -> type[State]:
        _ASCENDING[kind] = fields
        return kind

    return register


def map_ascent(
    tree: PyTree,
    on_ascent: Callable[[Any], Any],
    on_rest: Callable[[Any], Any] = lambda leaf: leaf,
) -> PyTree:
    """Map one function over the leaves of :func:`of_ascent`, another over the rest."""

    def at(node: Any) -> Any:
        if type(node) not in _ASCENDING:
            return on_rest(node)
        own = _ASCENDING[type(node)]
        return node._replace(
            **{
                name: (
                    jax.tree.map(on_ascent, part)
                    if name in own
                    else map_ascent(part, on_ascent, on_rest)
                )
                for name, part in node._asdict().items()
            }
        )

    return jax.tree.map(at, tree, is_leaf=lambda node: type(node) in _ASCENDING)


def perturbed_states(tree: PyTree) -> list[Any]:
    """The states of optimizers that perturb the parameters, outermost first."""
    return _find(tree, lambda node: "ascent_state" in _ASCENDING.get(type(node), ()))


def check_not_nested(**states: PyTree) -> None:
    """Raise a ValueError for the state of a perturbed optimizer in one of these."""
    for name, state in states.items():
        found = perturbed_states(state)
        if found:
            what = type(found[0]).__name__.removesuffix("State")
            raise ValueError(
                f"{name} contains a sharpness-aware optimizer already ({what}), and "
                "it cannot be perturbed again: pass a plain base optimizer and a plain "
                "ascent chain."
            )


def _find(tree: PyTree, is_wanted: Callable[[Any], bool]) -> list[Any]:
    found: list[Any] = []

    def collect(node: Any) -> bool:
        if is_wanted(node):
            found.append(node)
        return False

    jax.tree.leaves(tree, is_leaf=collect)
    return found


def _labels(path: Any) -> list[str]:
    """The keys of the dictionaries on a path, such as the groups of a partition."""
    return [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
