"""The methods of one gradient per step, each an ascent chain inside of ``lagged``.

Between steps the loop's parameters are perturbed: evaluate
:func:`optax_vasso.eval_params`. The argument ``mask`` says which leaves are perturbed,
as in :func:`optax_vasso.masked_ascent`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_vasso.ascent import Mask, masked_ascent, sam_perturb
from optax_vasso.guard import automatic_ascent
from optax_vasso.one_gradient import lagged
from optax_vasso.smoothing import vasso_ema
from optax_vasso.unbuffered import unbuffered_vasso
from optax_vasso.validation import Hyperparameter, check_hyperparameter


def lagged_vasso(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.1,
    theta: Hyperparameter = 0.4,
    *,
    accumulator_dtype: Any = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """VaSSO at one gradient per step; see :func:`optax_vasso.lagged`.

    ε_t = ρ d_t/‖d_t‖ with d_t = (1 − θ) d_{t−1} + θ g_t, where g_t is the gradient at
    x_t + ε_{t−1}. With θ = 1 it is :func:`single_step_sam`. With θ = 1 − μ, in front of
    SGD with the momentum μ, the perturbation points along the momentum, that is, along
    the last step backwards, as in PSATT; :func:`momentum_sam` has the opposite sign.
    Here θ is a hyperparameter of its own, whatever the base optimizer averages.

    Between steps the loop's parameters are perturbed: evaluate
    :func:`optax_vasso.eval_params`.

    Args:
      optimizer: any Optax optimizer; it sees the perturbed gradient at x_t.
      rho: radius, >= 0: a number, a schedule of the step, or a traced scalar.
      theta: weight of the newest gradient, in (0, 1], as in :func:`vasso_ema`.
      accumulator_dtype: dtype of an average of its own. By default there is none, and
        the perturbation carries the average: one buffer like the parameters in all.
        Parameters of fewer than 32 bits cannot carry it.
      mask: which leaves are perturbed; by default all.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs no extra argument.

    Raises:
      ValueError: if a hyperparameter is out of its range; at ``init``, if parameters
        have fewer than 32 bits and there is no accumulator_dtype.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso import eval_params, lagged_vasso
      >>> grad_fn = jax.grad(lambda x: jnp.sum(x**2) / 2)
      >>> params = jnp.array([3.0, 4.0])
      >>> optimizer = lagged_vasso(optax.sgd(0.1), rho=0.5, theta=0.4)
      >>> state = optimizer.init(params)
      >>> for _ in range(2):
      ...     updates, state = optimizer.update(grad_fn(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params, eval_params(state, params))
      [2.7 3.6] [2.4 3.2]
    """
    ascent: optax.GradientTransformation = unbuffered_vasso(rho, theta)
    if accumulator_dtype is not None:
        ascent = optax.chain(
            vasso_ema(theta, accumulator_dtype=accumulator_dtype), sam_perturb(rho)
        )
    return lagged(optimizer, masked_ascent(ascent, mask))


def auto_lagged_vasso(
    optimizer: optax.GradientTransformation,
    ceiling: Hyperparameter,
    rho: Hyperparameter = 0.3,
    theta: Hyperparameter = 0.4,
    *,
    accumulator_dtype: Any = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """VaSSO at one gradient per step, with a radius that needs no search.

    What :func:`auto_vasso` is to :func:`vasso`, this is to :func:`lagged_vasso`. The
    perturbation, which the guard may shorten to zero, cannot carry the average, so the
    state has two buffers like the parameters.

    Args:
      optimizer: any Optax optimizer; it sees the perturbed gradient at x_t.
      ceiling: the loss of the best constant prediction, as in :func:`collapse_guard`.
      rho: the largest radius, as in :func:`sam_perturb`.
      theta: weight of the newest gradient, in (0, 1], as in :func:`vasso_ema`.
      accumulator_dtype: dtype of the average; by default that of the parameters.
      mask: which leaves are perturbed; by default all.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; ``update`` needs the loss as
      ``value``, which :func:`make_train_step` passes. ``guard`` is among the
      metrics.

    Raises:
      ValueError: if a hyperparameter is out of its range; at ``update``, if ``value``
        is missing.
    """
    ascent = automatic_ascent(ceiling, rho, theta, accumulator_dtype)
    return lagged(optimizer, masked_ascent(ascent, mask))


def single_step_sam(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.05,
    *,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM along the last perturbed gradient: ε_t = ρ g_t/‖g_t‖, one gradient per step.

    It is :func:`lagged_vasso` with θ = 1, for parameters of any dtype. The authors take
    two gradients in the first step; here the first step is unperturbed.

    Args:
      optimizer: any Optax optimizer; it sees the perturbed gradient at x_t.
      rho: radius, >= 0: a number, a schedule of the step, or a traced scalar.
      mask: which leaves are perturbed; by default all.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs no extra argument.

    References:
      Ji et al., `A Single-Step, Sharpness-Aware Minimization is All You Need to Achieve
      Efficient and Accurate Sparse Training
      <https://openreview.net/forum?id=MJgMMqMDu4>`_, 2024.
    """
    return lagged(optimizer, masked_ascent(sam_perturb(rho), mask))


def momentum_sam(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 3.0,
    momentum: float | jax.Array = 0.9,
    *,
    accumulator_dtype: Any = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM against the momentum: ε_t = −ρ v_t/‖v_t‖, v_t = μ v_{t−1} + g_t.

    **The sign is minus**: the perturbation points where the optimizer is heading, as in
    Nesterov's method, and not back to where it came from. The authors observe that the
    loss rises in this direction, because steps overshoot. For :func:`optax.adamw`, μ is
    its ``b1``: the direction of its average is the same. (The authors add weight decay
    to the gradient at the perturbed point, and it enters v; here it is whatever the
    base optimizer does at x_t.)

    Args:
      optimizer: any Optax optimizer; it sees the perturbed gradient at x_t.
      rho: radius, >= 0: a number, a schedule of the step, or a traced scalar. The
        authors use about 3, ten times a good radius of SAM.
      momentum: μ, in [0, 1): the momentum of the base optimizer, for their method.
      accumulator_dtype: dtype of a momentum of its own. By default there is none, and
        the perturbation carries the momentum: one buffer like the parameters in all.
        Parameters of fewer than 32 bits cannot carry it.
      mask: which leaves are perturbed; by default all.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs no extra argument.

    Raises:
      ValueError: if a hyperparameter is out of its range; at ``init``, if parameters
        have fewer than 32 bits and there is no accumulator_dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso import momentum_sam
      >>> params = jnp.array([3.0, 4.0])
      >>> optimizer = momentum_sam(optax.sgd(0.1, momentum=0.9), rho=0.5)
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> print(state.perturbation)
      [-0.3 -0.4]

    References:
      Becker et al., `Momentum-SAM: Sharpness Aware Minimization without Computational
      Overhead <https://arxiv.org/abs/2401.12033>`_, 2024.
    """
    check_hyperparameter("momentum", momentum, "in [0, 1)", lambda v: 0 <= v < 1)

    def theta(step: jax.Array) -> jax.Array:
        """The weights with which vasso_ema is v_t over the sum of its weights."""
        decay = jnp.asarray(momentum)
        return (1 - decay) / (1 - decay ** (step + 1).astype(decay.dtype))

    ascent: optax.GradientTransformation = unbuffered_vasso(rho, theta, sign=-1)
    if accumulator_dtype is not None:
        ascent = optax.chain(
            vasso_ema(theta, accumulator_dtype=accumulator_dtype),
            sam_perturb(rho),
            optax.scale(-1.0),
        )
    return lagged(optimizer, masked_ascent(ascent, mask))
