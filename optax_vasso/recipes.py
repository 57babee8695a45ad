"""The methods of the papers, each a few lines of composition.

Every recipe takes any Optax optimizer first and returns a transformation to use in its
place. To change a part, copy the lines: they are all there is.
"""

from typing import Any

import jax
import optax

from optax_vasso import gate
from optax_vasso.ascent import asam_perturb, fisher_perturb, sam_perturb
from optax_vasso.descent import gsam_descent, looksam_descent
from optax_vasso.lagged import lagged
from optax_vasso.sharpness_aware import sharpness_aware
from optax_vasso.smoothing import friendly_noise, unbuffered_vasso_ema, vasso_ema
from optax_vasso.validation import Hyperparameter


def sam(
    optimizer: optax.GradientTransformation, rho: Hyperparameter = 0.05
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-aware minimization: ε = ρ g/‖g‖.

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021.
    """
    return sharpness_aware(optimizer, sam_perturb(rho))


def vasso(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.1,
    theta: Hyperparameter = 0.4,
    *,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM with variance suppression: ε = ρ d/‖d‖, d a moving average of g.

    References:
      Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance
      Suppression <https://arxiv.org/abs/2309.15639>`_, 2023.
    """
    ascent = optax.chain(
        vasso_ema(theta, accumulator_dtype=accumulator_dtype), sam_perturb(rho)
    )
    return sharpness_aware(optimizer, ascent)


def evasso(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.1,
    theta: Hyperparameter = 0.4,
    probability: Hyperparameter = 0.3,
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """VaSSO on a random share of the steps: 1 + probability gradients a step.

    References:
      Li et al., `VASSO: Variance Suppression for Sharpness-Aware Minimization
      <https://arxiv.org/abs/2509.02433>`_, 2025.
    """
    return sharpness_aware(
        optimizer,
        optax.chain(vasso_ema(theta), sam_perturb(rho)),
        gate=gate.bernoulli(probability, seed),
    )


def lagged_vasso(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.1,
    theta: Hyperparameter = 0.4,
) -> optax.GradientTransformationExtraArgs:
    """VaSSO at one gradient a step; see :func:`optax_vasso.lagged`.

    Between steps the loop's parameters are perturbed: evaluate
    :func:`optax_vasso.lagged_eval_params`.
    """
    return lagged(optimizer, optax.chain(unbuffered_vasso_ema(theta), sam_perturb(rho)))


def friendly_sam(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.2,
    sigma: Hyperparameter = 1.0,
    lmbda: Hyperparameter = 0.6,
    *,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM along the noise of the batch: ε = ρ n/‖n‖, n = g − σ m.

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, 2024.
    """
    ascent = optax.chain(
        friendly_noise(sigma, lmbda, accumulator_dtype=accumulator_dtype),
        sam_perturb(rho),
    )
    return sharpness_aware(optimizer, ascent)


def asam(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.5,
    eta: Hyperparameter = 0.01,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM in proportion to the weights: ε = ρ T² g/‖T g‖, T = abs(x) + η.

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, 2021.
    """
    return sharpness_aware(optimizer, asam_perturb(rho, eta, mask))


def fisher_sam(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.1,
    eta: Hyperparameter = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """SAM in the metric of the diagonal Fisher information.

    References:
      Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware Minimisation
      <https://arxiv.org/abs/2206.04920>`_, 2022.
    """
    return sharpness_aware(optimizer, fisher_perturb(rho, eta))


def gsam(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.1,
    alpha: Hyperparameter = 0.3,
) -> optax.GradientTransformationExtraArgs:
    """SAM that also descends the surrogate gap.

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, 2022.
    """
    return sharpness_aware(
        optax.chain(gsam_descent(alpha), optimizer), sam_perturb(rho)
    )


def looksam(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.1,
    alpha: Hyperparameter = 0.7,
    k: int = 5,
) -> optax.GradientTransformationExtraArgs:
    """SAM every k steps, its slow component reused between: 1 + 1/k gradients a step.

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022.
    """
    return sharpness_aware(
        optax.chain(looksam_descent(alpha), optimizer),
        sam_perturb(rho),
        gate=gate.every(k),
    )
