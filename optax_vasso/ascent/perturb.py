"""Direction → perturbation: the last part of an ascent chain.

An ascent chain is any :class:`optax.GradientTransformation` whose output is *added*
to the parameters: filters first (:func:`vasso_ema`, :func:`friendly_noise`,
:func:`optax.ema`, ...), then one perturbation (:func:`sam_perturb`,
:func:`asam_perturb`, :func:`fisher_perturb`) that gives the direction its length.

A filter has to keep the sign of the gradient, as :func:`optax.trace` and ``scale_by_*``
do. An optimizer, such as :func:`optax.adam` or :func:`optax.contrib.muon`, returns a
descent step and needs ``optax.scale(-1.0)`` after it, or the perturbation lowers the
loss: the ``cosine`` of :func:`optax_vasso.metrics.track` is then negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import checks, numerics
from optax_vasso._internal.checks import Hyperparameter, value_at
from optax_vasso._internal.trees import find_states

PyTree = Any
Mask = PyTree | Callable[[PyTree], PyTree]


class PerturbState(NamedTuple):
    """State of a perturbation: the step at which a schedule of rho is read.

    Attributes:
      step: calls so far, an int32 scalar.
    """

    step: jax.Array


def sam_perturb(rho: Hyperparameter, *, p: float = 2) -> optax.GradientTransformation:
    """Scale a direction to the length ρ: the perturbation of SAM.

    ε = ρ d/‖d‖₂ with the norm over the whole tree. For another order p,
    ε = ρ sign(d) abs(d)^{q−1} / (‖d‖_q^q)^{1/p} with 1/p + 1/q = 1, the maximizer of
    ⟨d, ε⟩ under ‖ε‖_p ≤ ρ; for p = ∞, ε = ρ sign(d). A zero direction gives a zero
    perturbation.

    Args:
      rho: radius, >= 0, in the units of the parameters: a number, a schedule of the
        step, or a traced scalar.
      p: order of the norm, a number in (1, ∞].

    Returns:
      A :class:`optax.GradientTransformation` whose output ε_t is to be *added* to the
      parameters and has the dtypes of its input.

    Raises:
      ValueError: if rho is negative or not finite, or p is outside (1, ∞]; at
        ``init``, if the parameters have no leaves or an integer leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_vasso import sam_perturb
      >>> params, grads = jnp.zeros(2), jnp.array([3.0, 4.0])
      >>> ascent = sam_perturb(rho=0.1)
      >>> perturbation, _ = ascent.update(grads, ascent.init(params), params)
      >>> print(perturbation)
      [0.06 0.08]

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021, equation 2.
    """
    checks.check_number("p", p, "in (1, inf]", lambda v: v > 1)

    return _perturb(
        rho, lambda updates, radius, *_: numerics.dual_direction(updates, p, radius)
    )


def asam_perturb(
    rho: Hyperparameter, eta: Hyperparameter = 0.01, rescaled: Mask | None = None
) -> optax.GradientTransformation:
    """Scale the perturbation of each weight by its size: adaptive SAM.

    ε = ρ T² d/‖T d‖₂ with T = abs(x) + η, the maximizer of ⟨d, ε⟩ under ‖T⁻¹ ε‖₂ ≤ ρ.
    With η = 0 it is invariant: rescaling layers without changing the network rescales
    their perturbation alike.

    Args:
      rho: radius in the rescaled parameters, >= 0: a number, a schedule of the step,
        or a traced scalar.
      eta: offset added to abs(x), >= 0: a number, a schedule, or traced.
      rescaled: a tree of booleans, a prefix of one, or a function of the parameters
        that returns one, like the mask of :func:`optax.masked`; T = 1 on the leaves
        that are ``False``. The authors rescale kernels only. Choose them by name: where
        layers are stacked for :func:`jax.lax.scan`, a bias has two axes as well::

            lambda params: jax.tree_util.tree_map_with_path(
                lambda path, _: path[-1].key == "kernel", params
            )

    Returns:
      A :class:`optax.GradientTransformation` whose output is added to the parameters
      and has the dtypes of its input; ``update`` needs ``params``.

    Raises:
      ValueError: if rho or eta is negative or not finite; at ``init`` and ``update``,
        if rescaled has another structure than the parameters or chooses none of them.

    Examples:
      With equal gradients, a weight of 4 moves further than a weight of 3:

      >>> import jax.numpy as jnp
      >>> from optax_vasso import asam_perturb
      >>> params, grads = jnp.array([3.0, 4.0]), jnp.ones(2)
      >>> ascent = asam_perturb(rho=0.1, eta=0.0)
      >>> perturbation, _ = ascent.update(grads, ascent.init(params), params)
      >>> print(*perturbation)
      0.18 0.32

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, 2021.
    """
    checks.check_not_negative("eta", eta)

    def perturbation(
        updates: PyTree, radius: jax.Array, step: jax.Array, params: PyTree
    ) -> PyTree:
        checks.require_params(params, "asam_perturb")
        checks.check_structure(updates, params, "asam_perturb")

        def scale(d: jax.Array, x: jax.Array, is_rescaled: bool) -> jax.Array:
            if not is_rescaled:
                return jnp.ones((), d.dtype)
            dtype = jnp.abs(d).dtype
            return jnp.abs(x).astype(dtype) + jnp.asarray(value_at(eta, step), dtype)

        # No entry exceeds one, so its product with a weight cannot overflow.
        unit = numerics.scale_to_one(updates)
        chosen = checks.broadcast_mask(rescaled, params, "rescaled")
        scales = numerics.map_updates(scale, unit, params, chosen)
        return _diagonal_direction(unit, scales, radius)

    def check(params: PyTree) -> None:
        # False is meant; a tree or a function that chooses nothing is a mistake.
        if rescaled is not False:
            checks.check_mask(rescaled, params, "rescaled")

    return _perturb(rho, perturbation, check)


def fisher_perturb(
    rho: Hyperparameter, eta: Hyperparameter = 1.0
) -> optax.GradientTransformation:
    """Measure the ball by the diagonal Fisher information: Fisher SAM.

    ε = ρ F⁻¹d/√(dᵀF⁻¹d) with F⁻¹ = 1/(1 + η d²), where the squared gradient of the
    batch approximates the diagonal of the Fisher information.

    Args:
      rho: radius, >= 0: a number, a schedule of the step, or a traced scalar.
      eta: weight of the Fisher information, >= 0; 0 is SAM. A number, a schedule, or
        traced.

    Returns:
      A :class:`optax.GradientTransformation` whose output is added to the parameters
      and has the dtypes of its input.

    Raises:
      ValueError: if rho or eta is negative or not finite.

    References:
      Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware Minimisation
      <https://arxiv.org/abs/2206.04920>`_, 2022.
    """
    checks.check_not_negative("eta", eta)

    def perturbation(
        updates: PyTree, radius: jax.Array, step: jax.Array, params: PyTree
    ) -> PyTree:
        del params
        dtype = numerics.accumulation_dtype(updates)
        root = jnp.sqrt(jnp.asarray(value_at(eta, step), dtype))
        # 1/√(1 + η d²), by hypot: the square of a large gradient is never formed.
        scales = jax.tree.map(
            lambda d: (
                1 / jnp.hypot(jnp.ones((), dtype), root * jnp.abs(d).astype(dtype))
            ),
            updates,
        )
        return _diagonal_direction(numerics.widen_tree(updates), scales, radius)

    return _perturb(rho, perturbation)


def _perturb(
    rho: Hyperparameter,
    perturbation: Callable[[PyTree, jax.Array, jax.Array, PyTree], PyTree],
    check: Callable[[PyTree], Any] = lambda params: None,
) -> optax.GradientTransformation:
    """A perturbation with the checks, schedules and dtypes that all of them share.

    Args:
      rho: the radius.
      perturbation: (updates, radius, step, params) -> the tree to add, in the
        accumulation dtype.
      check: called with the parameters at ``init``.
    """
    checks.check_not_negative("rho", rho)

    def init_fn(params: PyTree) -> PerturbState:
        checks.check_params(params)
        check(params)
        return PerturbState(step=jnp.zeros((), jnp.int32))

    def update_fn(
        updates: PyTree, state: PerturbState, params: PyTree = None
    ) -> tuple[PyTree, PerturbState]:
        checks.check_state(state, PerturbState, "the perturbation")
        radius = jnp.asarray(
            value_at(rho, state.step), numerics.accumulation_dtype(updates)
        )
        added = perturbation(updates, radius, state.step, params)
        return numerics.cast_updates(added, updates), PerturbState(
            optax.safe_increment(state.step)
        )

    return optax.GradientTransformation(init_fn, update_fn)


def _diagonal_direction(direction: PyTree, scales: PyTree, radius: jax.Array) -> PyTree:
    """ρ S² d/‖S d‖₂ for a diagonal S."""
    scaled = numerics.normalize(jax.tree.map(jnp.multiply, scales, direction), radius)
    return jax.tree.map(jnp.multiply, scales, scaled)


def check_not_swapped(ascent: PyTree, optimizer: PyTree) -> None:
    """Raise a ValueError for the state of a perturbation in that of the optimizer."""
    if find_states(optimizer, PerturbState) and not find_states(ascent, PerturbState):
        raise ValueError(
            "optimizer contains a perturbation and ascent none, so that training would "
            "climb: pass the optimizer first, as in sharpness_aware(optax.sgd(0.1), "
            "sam_perturb(0.05))."
        )
