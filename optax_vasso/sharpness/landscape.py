"""The loss along lines and planes, every grid in one compiled program.

The loss of a landscape is any scalar function of parameters and a batch, averaged over
the data, such as an error rate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_vasso._internal import numerics
from optax_vasso._internal.checks import shown
from optax_vasso.sharpness import batches, checks, programs

PyTree = Any


class Line(NamedTuple):
    """Losses along a line.

    Attributes:
      steps: positions in units of the direction, shape ``(num_steps,)``.
      losses: of the same shape.
    """

    steps: jax.Array
    losses: jax.Array


class Plane(NamedTuple):
    """Losses on a plane.

    Attributes:
      x_steps: shape ``(nx,)``, in units of the first direction.
      y_steps: shape ``(ny,)``, in units of the second direction.
      losses: shape ``(ny, nx)``: rows are y.
    """

    x_steps: jax.Array
    y_steps: jax.Array
    losses: jax.Array


def along(
    loss_fn: batches.LossFn,
    params: PyTree,
    data: batches.Batch | batches.Batches,
    direction: PyTree,
    steps: jax.typing.ArrayLike,
) -> Line:
    """The loss at x + s·v: along an eigenvector, a perturbation, a random direction.

    The line between two solutions is the one along their difference, as Keskar et al.
    draw it for s from −1 to 2.

    Args:
      loss_fn: ``loss_fn(params, batch)``, a scalar, the mean over the batch.
      params: x, a tree of float32 or float64 arrays.
      data: as for :func:`hessian`.
      direction: v, a tree like ``params``.
      steps: s, an array of shape ``(num_steps,)``.

    Returns:
      :class:`Line`. One loss of all data per point.

    Raises:
      ValueError: as :func:`hessian`, for a direction of another structure, and for
        steps that are no vector of numbers.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_vasso import sharpness
      >>> def loss_fn(params, batch):
      ...     return jnp.sum(params**2)
      >>> start, end = jnp.zeros(1), jnp.array([2.0])
      >>> direction = optax.tree.sub(end, start)
      >>> print(sharpness.along(loss_fn, start, None, direction, [0, 0.5, 1]).losses)
      [0. 1. 4.]

    References:
      Keskar et al., `On Large-Batch Training for Deep Learning: Generalization Gap and
      Sharp Minima <https://arxiv.org/abs/1609.04836>`_, 2017
    """
    loss = batches.prepare(loss_fn, params, data)
    checks.check_like("direction", direction, params)
    steps = _vector("steps", steps)
    return Line(steps, _along(loss, params, direction, steps))


def on_plane(
    loss_fn: batches.LossFn,
    params: PyTree,
    data: batches.Batch | batches.Batches,
    x_direction: PyTree,
    y_direction: PyTree,
    x_steps: jax.typing.ArrayLike,
    y_steps: jax.typing.ArrayLike,
) -> Plane:
    """The loss at x + s·u + t·v.

    Args:
      loss_fn: as for :func:`along`.
      params: x, a tree of float32 or float64 arrays.
      data: as for :func:`hessian`.
      x_direction: u, a tree like ``params``, as of
        :func:`~optax_vasso.sharpness.filter_normalized`.
      y_direction: v, a tree like ``params``.
      x_steps: s, an array of shape ``(nx,)``.
      y_steps: t, an array of shape ``(ny,)``.

    Returns:
      :class:`Plane`. One loss of all data per point.

    Raises:
      ValueError: as :func:`along`.
    """
    loss = batches.prepare(loss_fn, params, data)
    checks.check_like("x_direction", x_direction, params)
    checks.check_like("y_direction", y_direction, params)
    x_steps, y_steps = _vector("x_steps", x_steps), _vector("y_steps", y_steps)
    losses = _on_plane(loss, params, x_direction, y_direction, x_steps, y_steps)
    return Plane(x_steps, y_steps, losses)


def _vector(name: str, values: jax.typing.ArrayLike) -> jax.Array:
    if not isinstance(values, jax.Array):
        values = np.asarray(values)
    if values.ndim != 1 or not values.size or values.dtype.kind not in "iuf":
        raise ValueError(
            f"{name} must be a vector of numbers, got {shown(values)}: pass one"
            " such as jnp.linspace(-1, 1, 21)."
        )
    return jnp.asarray(values, jnp.result_type(float))


@programs.compiled
def _along(
    loss: batches.Loss, params: PyTree, direction: PyTree, steps: jax.Array
) -> jax.Array:
    def at(step: jax.Array) -> jax.Array:
        return batches.mean_loss(loss, numerics.add_scaled(params, step, direction))

    # In turn, since in parallel the points would need the memory of all.
    return jax.lax.map(at, steps)


@programs.compiled
def _on_plane(
    loss: batches.Loss,
    params: PyTree,
    x_direction: PyTree,
    y_direction: PyTree,
    x_steps: jax.Array,
    y_steps: jax.Array,
) -> jax.Array:
    def along(step: jax.Array) -> jax.Array:
        start = numerics.add_scaled(params, step, y_direction)
        return _along(loss, start, x_direction, x_steps)

    return jax.lax.map(along, y_steps)
