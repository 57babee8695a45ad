"""Weights rounded to few bits, to the nearest of levels that lie around zero."""

from typing import Any

import jax
import jax.numpy as jnp


def round_weights(params: Any, levels: Any, *, per_channel: bool) -> Any:
    """All weight matrices rounded; biases, norms and positions stay as they are.

    Args:
      params: of :class:`experiments.harness.transformer.Transformer`.
      levels: how many levels there are on each side of zero: 2^(b−1) − 1 for b bits; a
        number or a traced scalar.
      per_channel: a scale for each output channel, or for each row of an embedding;
        else one for each tensor.
    """

    def rounded(path: Any, leaf: jax.Array) -> jax.Array:
        axes = _summed_over(path, leaf)
        if axes is None:
            return leaf
        return nearest(leaf, levels, axes if per_channel else None)

    return jax.tree.map_with_path(rounded, params)


def nearest(weights: jax.Array, levels: Any, axes: tuple[int, ...] | None) -> jax.Array:
    """Rounded to the nearest of 2 levels + 1 values, of which the largest is max |w|.

    Args:
      weights: any array.
      levels: how many there are on each side of zero.
      axes: those that share one scale; ``None`` for all.
    """
    largest = jnp.max(jnp.abs(weights), axis=axes, keepdims=True)
    scale = jnp.where(largest > 0, largest / levels, 1.0)
    return scale * jnp.clip(jnp.round(weights / scale), -levels, levels)


def levels_of(bits: int) -> int:
    """How many levels a signed integer of so many bits has on each side of zero."""
    return 2 ** (bits - 1) - 1


def _summed_over(path: Any, leaf: jax.Array) -> tuple[int, ...] | None:
    """The axes that one output channel sums over; ``None`` of what is no matrix."""
    name, layer = path[-1].key, path[-2].key if len(path) > 1 else ""
    if name == "embedding":
        return (1,)  # each row is looked up alone
    if name != "kernel":
        return None
    # The heads' outputs are summed over heads and their width.
    return tuple(range(leaf.ndim - 1)) if layer == "out" else (0,)
