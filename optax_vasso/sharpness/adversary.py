"""The adversary in stochastic training: whose enemy is it, and how noisy is it?

SAM's perturbation ε comes from one batch. On other batches it may lower the loss
instead of raising it: a friendly adversary. VaSSO averages the slope d over steps to
suppress the variance that is behind this. Here are the numbers of that argument, and
:func:`track`, which takes them inside of a running training loop. How far ε moves
from step to step is :func:`optax_vasso.track_stability`.

References:
  Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance Suppression
  <https://arxiv.org/abs/2309.15639>`_, 2023
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from optax_vasso import numerics
from optax_vasso.sharpness import batches as data

PyTree = Any
# (what an ascent transform put out, params) -> a tree of scalars
Measure = Callable[[PyTree, PyTree], PyTree]


class Friendliness(NamedTuple):
    """What one perturbation does to other batches.

    Attributes:
      lowered: the share of batches on which the perturbation lowers the loss.
      misaligned: the share of batches with a cosine of 0 or less.
      rises: f_B(x + ε) − f_B(x) of each batch, shape ``(num_batches,)``.
      cosines: of the angle between ε and ∇f_B(x), shape ``(num_batches,)``; for SAM
        that is the angle between the two batches' gradients.
    """

    lowered: jax.Array
    misaligned: jax.Array
    rises: jax.Array
    cosines: jax.Array


class TrackState(NamedTuple):
    """State of :func:`track`.

    Attributes:
      step: updates so far, an int32 scalar.
      measured: what the measure returned last; zeros before the first step.
      tracked_state: the state of the tracked transform.
    """

    step: jax.Array
    measured: PyTree
    tracked_state: optax.OptState


def friendliness(
    loss_fn: data.LossFn,
    params: PyTree,
    perturbation: PyTree,
    batches: data.Batch | Iterable[data.Batch],
) -> Friendliness:
    """Whether an adversary is one on other batches, too.

    The perturbation of SAM from a batch is
    ``ascent_sharpness(loss_fn, params, batch, rho).perturbation``; in training it is
    what the ascent chain puts out. One gradient and one loss of each batch.

    Args:
      loss_fn: ``loss_fn(params, batch)``, a scalar, the mean over the batch.
      params: x, a tree of float32 or float64 arrays.
      perturbation: ε, a tree like ``params``.
      batches: the other batches, a list or an iterator.

    Returns:
      :class:`Friendliness`; every batch counts the same.

    Raises:
      ValueError: for a loss that is not a scalar, no batches, parameters that are not
        finite.

    Examples:
      What raises the loss of the batch at −1 lowers that of the batch at 1:

      >>> import jax.numpy as jnp
      >>> from optax_vasso import sharpness
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((params - batch) ** 2)
      >>> found = sharpness.friendliness(
      ...     loss_fn, jnp.zeros(()), jnp.array(0.1), [-jnp.ones(1), jnp.ones(1)]
      ... )
      >>> print(found.lowered, found.rises)
      0.5 [ 0.21 -0.19]
    """
    groups = data.checked_batches(loss_fn, params, batches)
    return _friendliness(Partial(loss_fn), params, perturbation, groups)


def squared_error(
    loss_fn: data.LossFn,
    params: PyTree,
    direction: PyTree,
    batches: data.Batch | Iterable[data.Batch],
) -> jax.Array:
    """‖d − ∇f(x)‖² of a slope d against the gradient over all batches.

    Its mean over the steps of a run is the mean squared error that variance suppression
    lowers. At a point that stays fixed and gradients of variance σ² it is σ² for SAM
    and σ²θ/(2 − θ) for VaSSO. One gradient of all data.

    Args:
      loss_fn: ``loss_fn(params, batch)``, a scalar, the mean over the batch.
      params: x, a tree of float32 or float64 arrays.
      direction: d, a tree like ``params``: a gradient, or what
        :func:`optax_vasso.vasso_ema` puts out.
      batches: all data, as a list or an iterator of batches, or one batch.

    Returns:
      A scalar, in squared units of the gradient.

    Raises:
      ValueError: as :func:`friendliness`.
    """
    groups = data.checked_batches(loss_fn, params, batches)
    return _squared_error(Partial(loss_fn), params, direction, groups)


def track(
    ascent: optax.GradientTransformation, measure: Measure, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Measure what an ascent transform puts out, inside of the training loop.

    The output is that of ``ascent``. Wrap the part that is to be measured:
    ``track(sam_perturb(rho), ...)`` sees the perturbation ε,
    ``optax.chain(track(vasso_ema(theta), ...), sam_perturb(rho))`` sees the slope d.

    Args:
      ascent: any ascent transform or chain.
      measure: ``measure(output, params)``, a tree of arrays of fixed shapes, as a
        closure over :func:`friendliness` or :func:`squared_error` and over batches.
      every: measure at steps 0, ``every``, 2 ``every``... and keep the numbers in
        between. (Under :func:`jax.vmap` the measure is computed at every step.)

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; read the numbers with
      ``optax.tree.get(state, "measured")``.

    Raises:
      ValueError: if ``every`` is below 1.
    """
    data.check_at_least("every", every, 1)
    ascent = optax.with_extra_args_support(ascent)

    def init_fn(params: PyTree) -> TrackState:
        shapes = jax.eval_shape(measure, params, params)
        return TrackState(
            step=jnp.zeros((), jnp.int32),
            measured=jax.tree.map(
                lambda like: jnp.zeros(like.shape, like.dtype), shapes
            ),
            tracked_state=ascent.init(params),
        )

    def update_fn(
        updates: PyTree, state: TrackState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, TrackState]:
        if params is None:
            raise ValueError("track needs params: pass them to update.")
        output, tracked_state = ascent.update(
            updates, state.tracked_state, params, **extra_args
        )
        measured = jax.lax.cond(
            state.step % every == 0,
            lambda: measure(output, params),
            lambda: state.measured,
        )
        step = optax.safe_increment(state.step)
        return output, TrackState(step, measured, tracked_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@jax.jit
def _friendliness(
    loss_fn: Partial,
    params: PyTree,
    perturbation: PyTree,
    groups: tuple[data.Batch, ...],
) -> Friendliness:
    perturbed = jax.tree.map(lambda x, e: x + e.astype(x.dtype), params, perturbation)

    def of_batch(batch: data.Batch) -> tuple[jax.Array, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_fn)(params, batch)
        return loss_fn(perturbed, batch) - loss, numerics.cosine(perturbation, gradient)

    rises, cosines = data.map_over_batches(of_batch, groups)
    return Friendliness(jnp.mean(rises < 0), jnp.mean(cosines <= 0), rises, cosines)


@jax.jit
def _squared_error(
    loss_fn: Partial, params: PyTree, direction: PyTree, groups: tuple[data.Batch, ...]
) -> jax.Array:
    gradient = data.mean_loss_and_grad(loss_fn, params, groups)[1]
    error = jax.tree.map(lambda d, g: d.astype(g.dtype) - g, direction, gradient)
    return numerics.dot(error, error)
