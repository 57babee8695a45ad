"""The perturbation of a batch: its effect on other batches, and its noise.

SAM's perturbation ε comes from one batch. On other batches it may lower the loss
instead of raising it. VaSSO averages gradients over steps to suppress the variance that
causes this. These measures quantify that argument.

References:
  Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance Suppression
  <https://arxiv.org/abs/2309.15639>`_, 2023
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import numerics
from optax_vasso.sharpness import batches, checks, programs

PyTree = Any


class Friendliness(NamedTuple):
    """The effect of one perturbation on other data.

    Attributes:
      lowered: the share of batches on which the perturbation lowers the loss.
      misaligned: the share of batches with a cosine of 0 or less.
      rises: f_B(x + ε) − f_B(x) of each batch, shape ``(num_batches,)``.
      cosines: cosine of the angle between ε and ∇f_B(x), shape ``(num_batches,)``; for
        SAM that is the angle between the two batches' gradients.
    """

    lowered: jax.Array
    misaligned: jax.Array
    rises: jax.Array
    cosines: jax.Array


def friendliness(
    loss_fn: batches.LossFn,
    params: PyTree,
    data: batches.Batch | batches.Batches,
    perturbation: PyTree,
) -> Friendliness:
    """Whether the perturbation of one batch raises the loss of others.

    The perturbation of SAM from a batch is
    ``ascent_sharpness(loss_fn, params, batch, rho).perturbation``; in training it is
    what the ascent chain returns. The cost is one gradient and one loss per batch.

    Args:
      loss_fn: ``loss_fn(params, batch)``, a scalar, the mean over the batch.
      params: x, a tree of float32 or float64 arrays.
      data: the other batches, as for :func:`hessian`.
      perturbation: ε, a tree like ``params``.

    Returns:
      :class:`Friendliness`; every batch counts the same.

    Raises:
      ValueError: as :func:`hessian`, and for a perturbation of another structure.

    Examples:
      What raises the loss of the batch at −1 lowers that of the batch at 1:

      >>> import jax.numpy as jnp
      >>> from optax_vasso import sharpness
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((params - batch) ** 2)
      >>> others = sharpness.stack_batches([-jnp.ones(1), jnp.ones(1)])
      >>> found = sharpness.friendliness(
      ...     loss_fn, jnp.zeros(()), others, jnp.array(0.1)
      ... )
      >>> print(found.lowered, found.rises)
      0.5 [ 0.21 -0.19]
    """
    loss = batches.prepare(loss_fn, params, data)
    checks.check_like("perturbation", perturbation, params)
    return _friendliness(loss, params, perturbation)


def squared_error(
    loss_fn: batches.LossFn,
    params: PyTree,
    data: batches.Batch | batches.Batches,
    direction: PyTree,
) -> jax.Array:
    """‖d − ∇f(x)‖², the error of a direction d as an estimate of the full gradient.

    Its mean over the steps of a run is the mean squared error that variance suppression
    lowers. For fixed parameters and gradients of variance σ² it is σ² for SAM and
    σ²θ/(2 − θ) for VaSSO. The cost is one gradient of all data.

    Args:
      loss_fn: ``loss_fn(params, batch)``, a scalar, the mean over the batch.
      params: x, a tree of float32 or float64 arrays.
      data: all data, as for :func:`hessian`.
      direction: d, a tree like ``params``: a gradient, or what
        :func:`optax_vasso.vasso_ema` returns.

    Returns:
      A scalar, in squared units of the gradient.

    Raises:
      ValueError: as :func:`hessian`, and for a direction of another structure.
    """
    loss = batches.prepare(loss_fn, params, data)
    checks.check_like("direction", direction, params)
    return _squared_error(loss, params, direction)


@programs.compiled
def _friendliness(
    loss: batches.Loss, params: PyTree, perturbation: PyTree
) -> Friendliness:
    perturbed = optax.apply_updates(params, perturbation)

    def of_batch(batch: batches.Batch) -> tuple[jax.Array, jax.Array]:
        value, gradient = jax.value_and_grad(loss.loss_fn)(params, batch)
        rise = loss.loss_fn(perturbed, batch) - value
        return rise, numerics.cosine(perturbation, gradient)

    rises, cosines = batches.map_over_batches(of_batch, loss.groups)
    return Friendliness(jnp.mean(rises < 0), jnp.mean(cosines <= 0), rises, cosines)


@programs.compiled
def _squared_error(loss: batches.Loss, params: PyTree, direction: PyTree) -> jax.Array:
    gradient = batches.mean_loss_and_grad(loss, params)[1]
    error = jax.tree.map(lambda d, g: d.astype(g.dtype) - g, direction, gradient)
    return numerics.dot(error, error)
