"""Read trees by the names of their nodes, whatever containers hold them.

A checkpoint restored without a target has dictionaries and lists in place of tuples and
states, and a wrapper may copy the fields of a state into its own node. The names on the
path to a leaf survive both.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_vasso._internal.checks import is_left_out

PyTree = Any


class PathError(ValueError):
    """Two trees differ."""


def children(node: PyTree) -> dict[str, Any]:
    """The children of a node by name; none for a leaf or an empty node.

    The node may be of any type that JAX knows, a mapping whose keys cannot be sorted,
    or a dataclass that is not registered.
    """
    if isinstance(node, Mapping):
        return {str(key): child for key, child in node.items()}
    below, _ = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda child: child is not node
    )
    if below and below[0][0]:
        return {_name(path[0]): child for path, child in below}
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        fields = dataclasses.fields(node)
        return {field.name: getattr(node, field.name) for field in fields}
    return {}


def names_on(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names on a path of :func:`jax.tree.leaves_with_path`.

    The ``value`` of NNX's and Flax's boxes is left out.
    """
    found = tuple(map(_name, path))
    return found[:-1] if found[1:] and found[-1] == "value" else found


def nodes(tree: PyTree) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Every node of a tree with its children, outermost first."""
    below = children(tree)
    yield tree, below
    for child in below.values():
        yield from nodes(child)


def match(tree: PyTree, params: PyTree) -> list[Any]:
    """The leaves of a tree in the order of those of ``params``, matched by their names.

    Args:
      tree: like the parameters, in any containers; also one vector, as
        :func:`optax.flatten` makes it, or a list of all leaves.
      params: the parameters to which the leaves belong.

    Returns:
      A list with the leaf of each parameter, ``None`` where it was left out.

    Raises:
      PathError: if a name is in one of the trees only, or shapes differ.
    """
    leaves = jax.tree.leaves(params)
    structure: Any = jax.tree.structure(params)
    named = _plain(tree)
    if not isinstance(named, dict) and np.shape(named) == (_size(leaves),):
        ends = list(itertools.accumulate(np.size(leaf) for leaf in leaves))[:-1]
        parts = jnp.split(named, ends)
        return [
            part.reshape(np.shape(leaf))
            for part, leaf in zip(parts, leaves, strict=True)
        ]
    numbered = _plain(structure.unflatten(range(len(leaves))))
    row = {str(i): i for i in range(len(leaves))}
    if children(named).keys() == row.keys() != children(numbered).keys():
        numbered = row
    return _matched(numbered, named, leaves)


def match_names(tree: PyTree, params: PyTree) -> list[Any]:
    """:func:`match` of a tree whose leaves have the names of the parameters."""
    leaves = jax.tree.leaves(params)
    structure: Any = jax.tree.structure(params)
    numbered = _plain(structure.unflatten(range(len(leaves))))
    return _matched(numbered, _plain(tree), leaves)


def _matched(numbered: Any, named: Any, leaves: list[Any]) -> list[Any]:
    found: list[Any] = [None] * len(leaves)
    for i, leaf in _pairs(numbered, named, ""):
        shapes = np.shape(leaf), np.shape(leaves[i])
        if shapes[0] != shapes[1]:
            raise PathError(f"a leaf of shape {shapes[1]} in place of {shapes[0]}")
        found[i] = leaf
    return found


def _pairs(numbered: Any, named: Any, path: str) -> Iterator[tuple[int, Any]]:
    """The leaves of two plain trees that have the same names."""
    if named is None:  # left out, perhaps with all that is below
        return
    if numbered is None or isinstance(numbered, dict) != isinstance(named, dict):
        raise PathError(f"other containers at {path or 'the root'}")
    if not isinstance(numbered, dict):
        yield numbered, named
        return
    for name in {**numbered, **named}:
        below, leaf = numbered.get(name), named.get(name)
        if below is None and leaf is not None:
            raise PathError(f"nothing at {path}/{name}")
        if below is not None and name not in named:
            raise PathError(f"an unknown leaf at {path}/{name}")
        yield from _pairs(below, leaf, f"{path}/{name}")


def _plain(tree: PyTree) -> Any:
    """Nested dictionaries by name, with ``None`` for what is empty or left out.

    A node whose only child is called ``value``, such as the boxes of NNX and Flax, is
    replaced by that child.
    """
    below = children(tree)
    if not below:
        return None if is_left_out(tree) or not jax.tree.leaves(tree) else tree
    if list(below) == ["value"]:
        return _plain(below["value"])
    return {name: _plain(child) for name, child in below.items()}


def _size(leaves: list[Any]) -> int:
    return sum(np.size(leaf) for leaf in leaves)


def _name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)
