"""Finding the states of one kind inside an optimizer's state."""

from typing import Any, TypeVar

import jax

State = TypeVar("State")


def find_states(tree: Any, kind: type[State]) -> list[State]:
    """The states of one kind in a tree, outermost first."""

    def is_kind(node: Any) -> bool:
        return isinstance(node, kind)

    return [node for node in jax.tree.leaves(tree, is_leaf=is_kind) if is_kind(node)]
