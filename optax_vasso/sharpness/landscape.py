"""The loss along lines and planes, every grid in one compiled program.

The loss of a landscape is any scalar function of parameters and a batch, averaged over
the data: an error rate draws as well as a loss.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from optax_vasso.sharpness import batches as data

PyTree = Any


class Line(NamedTuple):
    """Losses along a line.

    Attributes:
      steps: where, shape ``(num_steps,)``: in units of the direction.
      losses: of the same shape.
    """

    steps: jax.Array
    losses: jax.Array


class Plane(NamedTuple):
    """Losses on a plane.

    Attributes:
      x_steps: shape ``(nx,)``, in units of the first direction.
      y_steps: shape ``(ny,)``, in units of the second direction.
      losses: shape ``(ny, nx)``, as pictures are: rows are y.
    """

    x_steps: jax.Array
    y_steps: jax.Array
    losses: jax.Array


def along(
    loss_fn: data.LossFn,
    params: PyTree,
    direction: PyTree,
    batches: data.Batch | Iterable[data.Batch],
    steps: jax.typing.ArrayLike,
) -> Line:
    """The loss at x + s·v: along an eigenvector, a perturbation, a random direction.

    Args:
      loss_fn: ``loss_fn(params, batch)``, a scalar, the mean over the batch.
      params: x, a tree of float32 or float64 arrays.
      direction: v, a tree like ``params``.
      batches: a list or an iterator of batches, or one batch (a tuple, a dictionary or
        an array).
      steps: s, an array of shape ``(num_steps,)``.

    Returns:
      :class:`Line`.

    Raises:
      ValueError: for a loss that is not a scalar, no batches, parameters that are not
        finite, steps that are no vector.
    """
    groups = data.checked_batches(loss_fn, params, batches)
    steps = _vector("steps", steps)
    return Line(steps, _along(Partial(loss_fn), params, direction, groups, steps))


def between(
    loss_fn: data.LossFn,
    start: PyTree,
    end: PyTree,
    batches: data.Batch | Iterable[data.Batch],
    alphas: jax.typing.ArrayLike | None = None,
) -> Line:
    """The loss at (1 − α)·start + α·end, on a line between two solutions.

    Args:
      loss_fn: as for :func:`along`.
      start: a tree of parameters, at α = 0; Keskar's small-batch solution.
      end: a tree like it, at α = 1; the large-batch solution.
      batches: as for :func:`along`.
      alphas: α, an array; None for 61 values from −1 to 2, as in the paper.

    Returns:
      :class:`Line`.

    Raises:
      ValueError: as :func:`along`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_vasso import sharpness
      >>> def loss_fn(params, batch):
      ...     return jnp.sum(params**2)
      >>> start, end = jnp.zeros(1), jnp.array([2.0])
      >>> print(sharpness.between(loss_fn, start, end, None, alphas=[0, 0.5, 1]).losses)
      [0. 1. 4.]

    References:
      Keskar et al., `On Large-Batch Training for Deep Learning: Generalization Gap and
      Sharp Minima <https://arxiv.org/abs/1609.04836>`_, 2017
    """
    data.check_params(end)
    alphas = jnp.linspace(-1, 2, 61) if alphas is None else alphas
    direction = jax.tree.map(jnp.subtract, end, start)
    return along(loss_fn, start, direction, batches, alphas)


def on_plane(
    loss_fn: data.LossFn,
    params: PyTree,
    x_direction: PyTree,
    y_direction: PyTree,
    batches: data.Batch | Iterable[data.Batch],
    x_steps: jax.typing.ArrayLike,
    y_steps: jax.typing.ArrayLike,
) -> Plane:
    """The loss at x + s·u + t·v.

    Args:
      loss_fn: as for :func:`along`.
      params: x, a tree of float32 or float64 arrays.
      x_direction: u, a tree like ``params``, as of
        :func:`~optax_vasso.sharpness.filter_normalized`.
      y_direction: v, a tree like ``params``.
      batches: as for :func:`along`.
      x_steps: s, an array of shape ``(nx,)``.
      y_steps: t, an array of shape ``(ny,)``.

    Returns:
      :class:`Plane`. One loss of all data a point.

    Raises:
      ValueError: as :func:`along`.
    """
    groups = data.checked_batches(loss_fn, params, batches)
    x_steps, y_steps = _vector("x_steps", x_steps), _vector("y_steps", y_steps)
    losses = _on_plane(
        Partial(loss_fn), params, x_direction, y_direction, groups, x_steps, y_steps
    )
    return Plane(x_steps, y_steps, losses)


def _vector(name: str, values: jax.typing.ArrayLike) -> jax.Array:
    array = jnp.asarray(values, jnp.result_type(float))
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must be a vector, got the shape {array.shape}.")
    return array


def _moved(params: PyTree, direction: PyTree, step: jax.Array) -> PyTree:
    return jax.tree.map(
        lambda x, v: x + step.astype(x.dtype) * v.astype(x.dtype), params, direction
    )


@jax.jit
def _along(
    loss_fn: Partial,
    params: PyTree,
    direction: PyTree,
    groups: tuple[data.Batch, ...],
    steps: jax.Array,
) -> jax.Array:
    # One point after the other: side by side they would need the memory of them all.
    return jax.lax.map(
        lambda s: data.mean_loss(loss_fn, _moved(params, direction, s), groups), steps
    )


@jax.jit
def _on_plane(
    loss_fn: Partial,
    params: PyTree,
    x_direction: PyTree,
    y_direction: PyTree,
    groups: tuple[data.Batch, ...],
    x_steps: jax.Array,
    y_steps: jax.Array,
) -> jax.Array:
    return jax.lax.map(
        lambda t: _along(
            loss_fn, _moved(params, y_direction, t), x_direction, groups, x_steps
        ),
        y_steps,
    )
