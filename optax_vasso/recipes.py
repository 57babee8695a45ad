"""The methods of the papers, each a few lines of composition.

Every recipe takes an Optax optimizer, then the radius, and returns a transformation to
use in the optimizer's place. To change a method, copy the function's body; nothing else
is involved. The argument ``mask`` chooses the leaves that are perturbed, as in
:func:`optax_vasso.ascent.masked_ascent`; by default they are those that the optimizer
trains, as :func:`optax_vasso.ascent.trained_by` finds them.

Methods that take a second gradient on all or some steps come first, then those of one
gradient per step, during whose training the loop's parameters are perturbed: evaluate
:func:`optax_vasso.eval_params`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_vasso import gate
from optax_vasso._internal import checks
from optax_vasso._internal.checks import Hyperparameter
from optax_vasso.ascent.perturb import asam_perturb, fisher_perturb, sam_perturb
from optax_vasso.ascent.select import Mask, masked_ascent
from optax_vasso.ascent.smoothing import carried_ema, friendly_noise, vasso_ema
from optax_vasso.ascent.trained import trained_by
from optax_vasso.descent import decoupled_descent, gsam_descent, looksam_descent
from optax_vasso.steps.one_gradient import lagged
from optax_vasso.steps.two_gradients import sharpness_aware


def sam(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.05,
    *,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-aware minimization: ε = ρ g/‖g‖.

    Args:
      optimizer: any Optax optimizer; it sees the perturbed gradient at x_t.
      rho: radius, >= 0: a number, a schedule of the step, or a traced scalar.
      mask: which leaves are perturbed; by default those that are trained.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; ``update`` needs ``grad_fn``, as
      in :func:`sharpness_aware`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso import sam
      >>> grad_fn = jax.grad(lambda x: jnp.sum(x**2) / 2)
      >>> params = jnp.array([3.0, 4.0])
      >>> optimizer = sam(optax.sgd(0.1), rho=0.5)
      >>> updates, state = optimizer.update(
      ...     grad_fn(params), optimizer.init(params), params, grad_fn=grad_fn
      ... )
      >>> print(updates)  # −0.1 times the gradient at (3.3, 4.4)
      [-0.33 -0.44]

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021.
    """
    return sharpness_aware(optimizer, _perturbing(sam_perturb(rho), mask, optimizer))


def vasso(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.1,
    *,
    theta: Hyperparameter = 0.4,
    accumulator_dtype: Any = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM with variance suppression: ε = ρ d/‖d‖, d a moving average of g.

    Args:
      optimizer: any Optax optimizer; it sees the perturbed gradient at x_t.
      rho: radius, >= 0: a number, a schedule of the step, or a traced scalar.
      theta: weight of the newest gradient, in (0, 1], as in :func:`vasso_ema`.
      accumulator_dtype: dtype of the average; by default that of the parameters.
      mask: which leaves are perturbed; by default those that are trained.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; ``update`` needs ``grad_fn``, as
      in :func:`sharpness_aware`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso import vasso
      >>> grad_fn = jax.grad(lambda x: jnp.sum(x**2) / 2)
      >>> params = jnp.array([3.0, 4.0])
      >>> optimizer = vasso(optax.sgd(0.1), rho=0.5, theta=0.4)
      >>> state = optimizer.init(params)
      >>> for _ in range(3):
      ...     updates, state = optimizer.update(
      ...         grad_fn(params), state, params, grad_fn=grad_fn
      ...     )
      ...     params = optax.apply_updates(params, updates)
      >>> print(params)
      [2.11 2.81]

    References:
      Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance
      Suppression <https://arxiv.org/abs/2309.15639>`_, 2023.
    """
    ascent = optax.chain(
        vasso_ema(theta, accumulator_dtype=accumulator_dtype), sam_perturb(rho)
    )
    return sharpness_aware(optimizer, _perturbing(ascent, mask, optimizer))


def evasso(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.1,
    *,
    theta: Hyperparameter = 0.4,
    probability: Hyperparameter = 0.3,
    seed: int | jax.Array = 0,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """VaSSO on a random share of the steps: 1 + probability gradients per step.

    Args:
      optimizer: any Optax optimizer; it sees the perturbed gradient at x_t.
      rho: radius, >= 0: a number, a schedule of the step, or a traced scalar.
      theta: weight of the newest gradient, in (0, 1], as in :func:`vasso_ema`.
      probability: probability that a step ascends, in (0, 1].
      seed: seed of the gate, as in :func:`optax_vasso.gate.bernoulli`.
      mask: which leaves are perturbed; by default those that are trained.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; ``update`` needs ``grad_fn``, as
      in :func:`sharpness_aware`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso import evasso
      >>> params = jnp.array([3.0, 4.0])
      >>> optimizer = evasso(optax.sgd(0.1), rho=0.5, theta=0.4, probability=0.5)
      >>> @jax.jit
      ... def step(state):
      ...     return optimizer.update(params, state, params, grad_fn=lambda x: x)[1]
      >>> state, ascended = optimizer.init(params), 0
      >>> for _ in range(20):
      ...     state = step(state)
      ...     ascended += int(state.report.metrics["ascended"])
      >>> 0 < ascended < 20
      True

    References:
      Li et al., `VASSO: Variance Suppression for Sharpness-Aware Minimization
      <https://arxiv.org/abs/2509.02433>`_, 2025.
    """
    return sharpness_aware(
        optimizer,
        _perturbing(optax.chain(vasso_ema(theta), sam_perturb(rho)), mask, optimizer),
        gate=gate.bernoulli(probability, seed),
    )


def friendly_sam(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.2,
    *,
    sigma: Hyperparameter = 1.0,
    lmbda: Hyperparameter = 0.6,
    accumulator_dtype: Any = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM along the noise of the batch: ε = ρ n/‖n‖, n = g − σ m.

    Args:
      optimizer: any Optax optimizer; it sees the perturbed gradient at x_t.
      rho: radius, >= 0: a number, a schedule of the step, or a traced scalar.
      sigma: share of the average to subtract, as in :func:`friendly_noise`.
      lmbda: decay of the average, in [0, 1).
      accumulator_dtype: dtype of the average; by default that of the parameters.
      mask: which leaves are perturbed; by default those that are trained.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; ``update`` needs ``grad_fn``, as
      in :func:`sharpness_aware`.

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, 2024.
    """
    ascent = optax.chain(
        friendly_noise(sigma, lmbda, accumulator_dtype=accumulator_dtype),
        sam_perturb(rho),
    )
    return sharpness_aware(optimizer, _perturbing(ascent, mask, optimizer))


def asam(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.5,
    *,
    eta: Hyperparameter = 0.01,
    rescaled: Mask | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM scaled by the size of each weight: ε = ρ T² g/‖T g‖, T = abs(x) + η.

    Args:
      optimizer: any Optax optimizer; it sees the perturbed gradient at x_t.
      rho: radius, >= 0: a number, a schedule of the step, or a traced scalar.
      eta: offset added to abs(x), >= 0, as in :func:`asam_perturb`.
      rescaled: which leaves have T = abs(x) + η; by default all. T = 1 elsewhere.
      mask: which leaves are perturbed; by default those that are trained.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; ``update`` needs ``grad_fn``, as
      in :func:`sharpness_aware`.

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, 2021.
    """
    ascent = asam_perturb(rho, eta, rescaled)
    return sharpness_aware(optimizer, _perturbing(ascent, mask, optimizer))


def fisher_sam(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.1,
    *,
    eta: Hyperparameter = 1.0,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM in the metric of the diagonal Fisher information.

    Args:
      optimizer: any Optax optimizer; it sees the perturbed gradient at x_t.
      rho: radius, >= 0: a number, a schedule of the step, or a traced scalar.
      eta: weight of the Fisher information, >= 0, as in :func:`fisher_perturb`.
      mask: which leaves are perturbed; by default those that are trained.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; ``update`` needs ``grad_fn``, as
      in :func:`sharpness_aware`.

    References:
      Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware Minimisation
      <https://arxiv.org/abs/2206.04920>`_, 2022.
    """
    return sharpness_aware(
        optimizer, _perturbing(fisher_perturb(rho, eta), mask, optimizer)
    )


def gsam(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.1,
    *,
    alpha: Hyperparameter = 0.3,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM that also minimizes the surrogate gap f(x + ε) − f(x).

    Args:
      optimizer: any Optax optimizer; it sees the perturbed gradient at x_t.
      rho: radius, >= 0: a number, a schedule of the step, or a traced scalar.
      alpha: weight of the surrogate gap, >= 0, as in
        :func:`~optax_vasso.descent.gsam_descent`.
      mask: which leaves are perturbed; by default those that are trained.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; ``update`` needs ``grad_fn``, as
      in :func:`sharpness_aware`.

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, 2022.
    """
    ascent = _perturbing(sam_perturb(rho), mask, optimizer)
    return sharpness_aware(optax.chain(gsam_descent(alpha), optimizer), ascent)


def wsam(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.05,
    *,
    learning_rate: Hyperparameter,
    gamma: Hyperparameter = 0.9,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Weighted SAM: sharpness as a weighted regularization term.

    The authors' decoupled form: the base optimizer steps along the clean gradient g_c,
    and −η γ/(1 − γ) (g_p − g_c) is added to its step, so that momentum and scaling do
    not see the sharpness (:func:`~optax_vasso.descent.decoupled_descent`). For the
    coupled form chain :func:`~optax_vasso.descent.weighted_descent` before the
    optimizer.

    Args:
      optimizer: any Optax optimizer; it sees the clean gradient at x_t.
      rho: radius, >= 0: a number, a schedule of the step, or a traced scalar.
      learning_rate: learning rate η of the optimizer, >= 0: a number, a schedule of the
        step, or a traced scalar.
      gamma: weight of the sharpness, in [0, 1); with 1/2, and an optimizer that is
        plain SGD, it is SAM.
      mask: which leaves are perturbed; by default those that are trained.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; ``update`` needs ``grad_fn``, as
      in :func:`sharpness_aware`.

    References:
      Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
      Regularization Term <https://arxiv.org/abs/2305.15817>`_, 2023.
    """
    return sharpness_aware(
        decoupled_descent(optimizer, learning_rate=learning_rate, gamma=gamma),
        _perturbing(sam_perturb(rho), mask, optimizer),
    )


def looksam(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.1,
    *,
    alpha: Hyperparameter = 0.7,
    k: int = 5,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM every k steps, reusing its slow component: 1 + 1/k gradients per step.

    Args:
      optimizer: any Optax optimizer; it sees the perturbed gradient at x_t.
      rho: radius, >= 0: a number, a schedule of the step, or a traced scalar.
      alpha: weight of the reused component, >= 0, as in
        :func:`~optax_vasso.descent.looksam_descent`.
      k: number of steps from one ascent to the next, >= 1.
      mask: which leaves are perturbed; by default those that are trained.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; ``update`` needs ``grad_fn``, as
      in :func:`sharpness_aware`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso import looksam
      >>> params = jnp.array([3.0, 4.0])
      >>> optimizer = looksam(optax.sgd(0.1), rho=0.5, k=3)
      >>> state = optimizer.init(params)
      >>> ascended = []
      >>> for _ in range(4):
      ...     _, state = optimizer.update(params, state, params, grad_fn=lambda x: x)
      ...     ascended.append(bool(state.report.metrics["ascended"]))
      >>> ascended
      [True, False, False, True]

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022.
    """
    ascent = _perturbing(sam_perturb(rho), mask, optimizer)
    base = optax.chain(looksam_descent(alpha), optimizer)
    return sharpness_aware(base, ascent, gate=gate.every(k))


def ae_sam(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.05,
    *,
    threshold: Hyperparameter = 0.0,
    decay: Hyperparameter = 0.9,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM on the batches whose gradient is large for its history.

    Args:
      optimizer: any Optax optimizer; it sees the perturbed gradient at x_t.
      rho: radius, >= 0: a number, a schedule of the step, or a traced scalar.
      threshold: number of deviations above the mean at which a step ascends, as in
        :func:`optax_vasso.gate.adaptive`; the authors let it fall from 1 to −1.
      decay: decay of the running mean and deviation, in [0, 1).
      mask: which leaves are perturbed; by default those that are trained.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; ``update`` needs ``grad_fn``, as
      in :func:`sharpness_aware`.

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, 2023.
    """
    return sharpness_aware(
        optimizer,
        _perturbing(sam_perturb(rho), mask, optimizer),
        gate=gate.adaptive(threshold, decay),
    )


def lagged_vasso(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.1,
    *,
    theta: Hyperparameter = 0.4,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """VaSSO at one gradient per step; see :func:`optax_vasso.lagged`.

    ε_t = ρ d_t/‖d_t‖ with d_t = (1 − θ) d_{t−1} + θ g_t, where g_t is the gradient at
    x_t + ε_{t−1}. With θ = 1 it is :func:`single_step_sam`. With θ = 1 − μ around SGD
    with the momentum μ, the perturbation points against the last step, as in PSATT;
    :func:`momentum_sam` has the opposite sign. θ is independent of the averages in the
    base optimizer.

    During training the loop's parameters are perturbed: evaluate
    :func:`optax_vasso.eval_params`.

    Args:
      optimizer: any Optax optimizer; it sees the perturbed gradient at x_t.
      rho: radius, >= 0: a number, a schedule of the step, or a traced scalar.
      theta: weight of the newest gradient, in (0, 1], as in :func:`vasso_ema`.
      mask: which leaves are perturbed; by default those that are trained.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs no extra argument.

    Raises:
      ValueError: if a hyperparameter is out of its range.

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
    return _lagged_along(carried_ema(theta), optimizer, rho, mask)


def momentum_sam(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 3.0,
    *,
    momentum: float | jax.Array = 0.9,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM against the momentum: ε_t = −ρ v_t/‖v_t‖, v_t = μ v_{t−1} + g_t.

    **The sign is negative**: the perturbation points where the optimizer is heading, as
    in Nesterov's method. The authors observe that the loss rises in this direction,
    because steps overshoot. For :func:`optax.adamw`, μ is its ``b1``. (The authors'
    weight decay acts at the perturbed point and enters v; here it acts at x_t.)

    Args:
      optimizer: any Optax optimizer; it sees the perturbed gradient at x_t.
      rho: radius, >= 0: a number, a schedule of the step, or a traced scalar. The
        authors use about 3, ten times a good radius of SAM.
      momentum: decay μ of the average, in [0, 1); the authors use the momentum of the
        base optimizer.
      mask: which leaves are perturbed; by default those that are trained.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs no extra argument.

    Raises:
      ValueError: if a hyperparameter is out of its range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso import momentum_sam
      >>> params = jnp.array([3.0, 4.0])
      >>> optimizer = momentum_sam(optax.sgd(0.1, momentum=0.9), rho=0.5)
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> print(state.scale * state.direction)
      [-0.3 -0.4]

    References:
      Becker et al., `Momentum-SAM: Sharpness Aware Minimization without Computational
      Overhead <https://arxiv.org/abs/2401.12033>`_, 2024.
    """
    checks.check_number("momentum", momentum, "in [0, 1)", lambda v: 0 <= v < 1)

    def theta(step: jax.Array) -> jax.Array:
        """The weights with which vasso_ema is v_t over the sum of its weights."""
        decay = jnp.asarray(momentum)
        return (1 - decay) / (1 - decay ** (step + 1).astype(decay.dtype))

    ascent = optax.chain(optax.scale(-1.0), carried_ema(theta))
    return _lagged_along(ascent, optimizer, rho, mask)


def single_step_sam(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.05,
    *,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM along the last perturbed gradient: ε_t = ρ g_t/‖g_t‖, one gradient per step.

    It is :func:`lagged_vasso` with θ = 1. The authors take two gradients in the first
    step; here the first step is unperturbed.

    Args:
      optimizer: any Optax optimizer; it sees the perturbed gradient at x_t.
      rho: radius, >= 0: a number, a schedule of the step, or a traced scalar.
      mask: which leaves are perturbed; by default those that are trained.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs no extra argument.

    References:
      Ji et al., `A Single-Step, Sharpness-Aware Minimization is All You Need to Achieve
      Efficient and Accurate Sparse Training
      <https://openreview.net/forum?id=MJgMMqMDu4>`_, 2024.
    """
    return _lagged_along(optax.identity(), optimizer, rho, mask)


def _lagged_along(
    direction: optax.GradientTransformation,
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter,
    mask: Mask | None,
) -> optax.GradientTransformationExtraArgs:
    """A lagged optimizer whose perturbation has a direction and a radius."""
    checks.check_not_negative("rho", rho)  # without one lagged takes any length
    return lagged(optimizer, _perturbing(direction, mask, optimizer), rho=rho)


def _perturbing(
    ascent: optax.GradientTransformation,
    mask: Mask | None,
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """An ascent chain on the leaves of the mask, or on those that are trained."""
    checks.check_transformation("optimizer", optimizer)
    return masked_ascent(ascent, trained_by(optimizer) if mask is None else mask)
