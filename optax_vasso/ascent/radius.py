"""A radius tuned online by the loss of examples that the ascent did not see."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import checks, numerics
from optax_vasso._internal.checks import Hyperparameter, value_at
from optax_vasso._internal.trees import FollowsLoss, Report

PyTree = Any
# The loss before training is the median of the means of the first three blocks of
# losses, on which neither an extreme block has an effect nor the fall from an
# initialization that is worse than a constant prediction.
BLOCK = 10
START = 3 * BLOCK
NEWEST = 0.03  # weight of a loss in the moving averages
FAR = 3.0  # bound on the distance of a loss from its average, in losses at the start
# log ρ moves by SPEED · log(wanted rise / rise) per step, within bounds: a harmful
# radius falls faster than a short one grows.
SPEED, FALL, GROWTH = 0.02, -2.0, 1.0
FIRST_RADIUS, LEAST, MOST = 0.05, 1e-3, 30.0


class _HeldRise(NamedTuple):
    held_state: optax.OptState
    step: jax.Array
    share: jax.Array
    radius: jax.Array
    newest: jax.Array
    blocks: tuple[jax.Array, jax.Array, jax.Array]
    clean: jax.Array
    perturbed: jax.Array
    report: Report


class HeldRiseState(_HeldRise, FollowsLoss):
    """State of :func:`hold_rise`; its floats are float32, under x64 float64.

    Attributes:
      held_state: the state of the ascent chain whose perturbation is multiplied.
      step: steps whose losses were finite, an int32 scalar.
      share: target of the rise, as a share of the loss removed by training.
      radius: ρ of the next step; the first 30 are not perturbed.
      newest: the loss at x_t, until that at x_t + ε_t is known.
      blocks: means of the first three blocks of losses.
      clean: the moving average of the loss at x_t, on the ascent's examples.
      perturbed: that of the loss at x_t + ε_t, on the descent's examples.
      report: ``rho``, the radius of the last step, and ``rise``, the perturbed loss
        minus the clean one, both averaged.
    """

    __slots__ = ()

    def after(self, perturbed_loss: jax.Array) -> HeldRiseState:
        """The state with the averages and the radius that follow from this loss."""
        newest = jnp.asarray(perturbed_loss).astype(self.clean.dtype)
        starts = self.step < START
        # Of the two losses this one averages more examples.
        block = self.step // BLOCK
        first, second, third = (
            mean + jnp.where(block == i, newest / BLOCK, 0)
            for i, mean in enumerate(self.blocks)
        )
        middle = jnp.minimum(jnp.maximum(first, second), third)
        start = jnp.maximum(jnp.minimum(first, second), middle)
        far = FAR * (jnp.abs(start) + jnp.abs(start - self.clean))

        def average(old: jax.Array, new: jax.Array) -> jax.Array:
            moved = old + NEWEST * jnp.clip(new - old, -far, far)
            return jnp.where(starts, start, moved)

        clean = average(self.clean, self.newest)
        perturbed = average(self.perturbed, newest)
        found, wanted = perturbed - clean, self.share * (start - clean)
        # The ratio depends on neither the scale of the losses nor a constant in them.
        least, most = jnp.exp(-GROWTH), jnp.exp(-FALL)
        ratio = jnp.clip(found / jnp.where(wanted > 0, wanted, 1), least, most)
        factor = jnp.where(starts, 1, jnp.where(wanted > 0, ratio, most) ** -SPEED)
        after = self._replace(
            step=optax.safe_increment(self.step),
            radius=jnp.clip(self.radius * factor, LEAST, MOST),
            blocks=(first, second, third),
            clean=clean,
            perturbed=perturbed,
            report=Report({**self.report.metrics, "rise": found}),
        )
        usable = jnp.isfinite(self.newest) & jnp.isfinite(newest)
        return optax.tree.where(usable, after, self)


def hold_rise(
    ascent: optax.GradientTransformation, rise: Hyperparameter = 0.25
) -> optax.GradientTransformationExtraArgs:
    """Tune the radius online by its effect on the loss of other examples.

    With split batches (:func:`optax_vasso.train.split_batch`) a step sees the loss
    f_a(x_t) of the ascent's examples and the loss f_b(x_t + ε_t) of other examples. The
    difference of their moving averages A and B is the *rise*: what the perturbation
    costs examples other than its own. The radius ρ grows or shrinks until that is a
    fixed share of the loss removed by training::

        B − A = rise · (S − A)

    where S is the loss at the start: the median of the mean losses of steps 1 to 10, 11
    to 20 and 21 to 30, which are not perturbed. Neither a constant added to the loss
    nor its scale matters. It takes a few hundred steps to find a radius.

    The perturbation of the chain should have length one, as that of
    :func:`optax_vasso.sam_perturb` with ``rho=1.0``. The two losses have to be of
    different examples: on one batch the rise is mostly ρ‖g‖, which says nothing about
    other examples.

    Args:
      ascent: any ascent chain. Its extra arguments are passed on.
      rise: the share of the removed loss that the perturbation may cost, >= 0: a
        number, a schedule of the step, or a traced scalar.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` for
      :func:`optax_vasso.sharpness_aware`, which tells it the perturbed loss, so
      ``grad_fn`` has to return ``(value, gradients)``; its ``update`` needs the loss as
      ``value``. :func:`optax_vasso.make_train_step` passes both. ``rho`` and ``rise``
      are among the metrics. One loss that is not finite is ignored, and a very large
      one counts as a few losses of the start.

    Raises:
      ValueError: if ascent is no transformation or rise is out of its range; at
        ``init``, if the parameters have no leaves or an integer leaf; at ``update``, if
        ``value`` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_vasso as ov
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((batch @ params - 1) ** 2)
      >>> optimizer = ov.sharpness_aware(
      ...     optax.sgd(0.01), ov.ascent.hold_rise(ov.sam_perturb(rho=1.0))
      ... )
      >>> step = ov.make_train_step(loss_fn, optimizer, **ov.train.split_batch())
      >>> state = ov.init_train_state(jnp.zeros(4), optimizer)
      >>> for _ in range(31):
      ...     state, metrics = step(state, jnp.eye(16, 4))
      >>> print(metrics["rho"])
      0.05

    References:
      Wang et al., `Enhancing Sharpness-Aware Minimization by Learning Perturbation
      Radius <https://arxiv.org/abs/2408.08222>`_, 2024, learn ρ by the gap between
      training and validation loss.
    """
    checks.check_transformation("ascent", ascent)
    checks.check_not_negative("rise", rise)
    ascent = optax.with_extra_args_support(ascent)

    def init_fn(params: PyTree) -> HeldRiseState:
        checks.check_params(params)
        scalar = numerics.state_scalar
        return HeldRiseState(
            held_state=ascent.init(params),
            step=jnp.zeros((), jnp.int32),
            share=scalar(),
            radius=scalar(FIRST_RADIUS),
            newest=scalar(),
            blocks=(scalar(), scalar(), scalar()),
            clean=scalar(),
            perturbed=scalar(),
            report=Report({"rho": scalar(), "rise": scalar()}),
        )

    def update_fn(
        updates: PyTree,
        state: HeldRiseState,
        params: PyTree = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, HeldRiseState]:
        checks.check_state(state, HeldRiseState, "hold_rise")
        if value is None:
            raise ValueError(
                "hold_rise needs the loss as value, got None: use make_train_step, or "
                "call update(grads, state, params, value=loss, grad_fn=grad_fn)."
            )
        checks.check_loss(value)
        perturbation, held_state = ascent.update(
            updates, state.held_state, params, value=value, **extra_args
        )
        dtype = state.radius.dtype
        # Without a perturbation both losses are those of the model itself.
        rho = jnp.where(state.step < START, 0, state.radius)
        return numerics.map_updates(
            lambda e: rho.astype(jnp.abs(e).dtype) * e, perturbation
        ), state._replace(
            held_state=held_state,
            share=jnp.asarray(value_at(rise, state.step)).astype(dtype),
            newest=jnp.asarray(value).astype(dtype),
            report=Report({**state.report.metrics, "rho": rho}),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
