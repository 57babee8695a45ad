"""Random directions in the space of the parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from optax_vasso._internal import numerics
from optax_vasso.sharpness import checks

PyTree = Any


def standard_normal(key: jax.Array, params: PyTree) -> PyTree:
    """A tree like ``params`` of standard normal numbers.

    One draw for all leaves: one for each takes long to compile in a deep network.
    """
    flat, unravel = ravel_pytree(params)
    return unravel(jax.random.normal(key, flat.shape, flat.dtype))


def random_direction(key: jax.Array, params: PyTree, p: float) -> PyTree:
    """A standard normal tree like ``params``, scaled to a p-norm of 1."""
    normal = standard_normal(key, params)
    length = numerics.norm(normal, p)
    return jax.tree.map(lambda x: x / length.astype(x.dtype), normal)


def filter_normalized(key: jax.Array, params: PyTree) -> PyTree:
    """A random direction whose filters have the norms of the parameters' filters.

    Standard normal, then every filter (the inputs of one output: a slice along the last
    axis, as of Flax kernels) scaled to the norm of the same filter of ``params``, and
    zero for leaves of fewer than two axes (biases, scales). The loss along it compares
    between networks whose weights differ in size. Layers that are stacked for
    :func:`jax.lax.scan` have one more axis: unstack them, or a filter spans all layers.

    Args:
      key: random key of the normal numbers.
      params: a tree of float32 or float64 arrays.

    Returns:
      A tree like ``params``.

    Raises:
      ValueError: for what is not one random key or not such a tree.

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, 2018
    """
    checks.check_float_params("params", params)
    return _filter_normalized(checks.key_or_default(key), params)


@jax.jit
def _filter_normalized(key: jax.Array, params: PyTree) -> PyTree:
    def scale(normal: jax.Array, leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return jnp.zeros_like(leaf)

        def scale_filter(normal: jax.Array, own: jax.Array) -> jax.Array:
            ratio = numerics.norm(own) / numerics.norm(normal)
            return normal * ratio.astype(normal.dtype)

        return jax.vmap(scale_filter, in_axes=-1, out_axes=-1)(normal, leaf)

    return jax.tree.map(scale, standard_normal(key, params), params)
