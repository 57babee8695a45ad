"""Finding things inside an optimizer's state.

States are found by their type, never by the name of a field: the parameters of users,
and with them moments and averages, have fields of every name.
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
# Types of states, with those of their fields that belong to an ascent.
_ASCENDING: dict[type, tuple[str, ...]] = {}


class Report(NamedTuple):
    """What a state says of the last step: the metrics that a train step returns.

    Put one into any field of a state, and :func:`optax_vasso.make_train_step` returns
    its metrics.

    Attributes:
      metrics: arrays by name, usually scalars. In a new state they are zero, and so are
        those of a step in which the transformation was not called.
    """

    metrics: dict[str, Any]


def displaced(params: PyTree, perturbation: PyTree) -> PyTree:
    """The sum x + ε in the dtypes of x, and x itself where there is no ε."""
    return jax.tree.map(
        lambda e, x: x if is_left_out(e) else optax.apply_updates(x, e),
        perturbation,
        params,
        is_leaf=is_left_out,
    )


class FollowsLoss:
    """A state of an ascent chain that is told the perturbed loss, after the ascent."""

    __slots__ = ()

    def after(self, perturbed_loss: jax.Array) -> Any:
        """The state after an ascent that led to this loss."""
        raise NotImplementedError


def follows_loss(tree: PyTree) -> bool:
    """Whether a state in the tree is to be told the perturbed loss."""
    return bool(find_states(tree, FollowsLoss))


def tell_loss(tree: PyTree, perturbed_loss: jax.Array) -> PyTree:
    """The tree after an ascent, with the perturbed loss told to all who follow it."""
    return _map_states(lambda state: state.after(perturbed_loss), FollowsLoss, tree)


def find_states(tree: PyTree, kind: type[State]) -> list[State]:
    """The states of one kind in a tree, outermost first, also those inside others."""
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

    Reports of one name in several groups of a partition are told apart by the labels of
    the groups, as ``name/label``: the parts of a recipe cannot be named by their user.
    Raises a ValueError if two metrics still have one name.
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
    """The tree with all metrics at zero: what they say of a step that was not taken."""
    return map_metrics(jnp.zeros_like, tree)


def of_ascent(*fields: str) -> Callable[[type[State]], type[State]]:
    """Register the fields of a NamedTuple that hold what belongs to an ascent.

    A local ascent has them once for each group. What has a field ``ascent_state`` among
    them perturbs the parameters.
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
    """The states of what perturbs the parameters, outermost first."""
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
