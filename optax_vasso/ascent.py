"""Direction → perturbation: what stands last in an ascent chain.

An ascent chain is any :class:`optax.GradientTransformation` whose output is *added*
to the parameters: filters first (:func:`vasso_ema`, :func:`friendly_noise`,
:func:`optax.ema`, ...), then one perturbation (:func:`sam_perturb`,
:func:`asam_perturb`, :func:`fisher_perturb`) that gives the direction its length.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso import numerics
from optax_vasso.validation import (
    Hyperparameter,
    broadcast_mask,
    check_hyperparameter,
    check_not_negative,
    check_params,
    require_params,
    value_at,
)

PyTree = Any
Mask = PyTree | Callable[[PyTree], PyTree]


class PerturbState(NamedTuple):
    """State of a perturbation: the step at which a schedule of rho is read.

    Attributes:
      step: calls so far, an int32 scalar.
    """

    step: jax.Array


class StabilityState(NamedTuple):
    """State of :func:`track_stability`.

    Attributes:
      stability: ‖ε_t − ε_{t−1}‖₂/‖ε_t‖₂, a float32 (under x64 float64) scalar; 1 after
        the first step, where ε_{−1} = 0.
      previous: the last perturbation, like the parameters.
      ascent_state: the state of the ascent chain.
    """

    stability: jax.Array
    previous: PyTree
    ascent_state: optax.OptState


def sam_perturb(rho: Hyperparameter, *, p: float = 2) -> optax.GradientTransformation:
    """Give a direction the length ρ: the perturbation of SAM.

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
    check_hyperparameter("p", p, "in (1, inf]", lambda v: v > 1)

    def direction(updates: PyTree, step: jax.Array, params: PyTree) -> PyTree:
        del step, params
        if p == 2:
            return numerics.normalize(updates)
        return numerics.dual_direction(updates, p)

    return _perturb(rho, direction)


def asam_perturb(
    rho: Hyperparameter, eta: Hyperparameter = 0.01, mask: Mask | None = None
) -> optax.GradientTransformation:
    """Perturb each weight in proportion to its size: adaptive SAM.

    ε = ρ T² d/‖T d‖₂ with T = abs(x) + η, the maximizer of ⟨d, ε⟩ under
    ‖T⁻¹ ε‖₂ ≤ ρ. With η = 0 the ball has no scale of its own: a layer that is rescaled
    without changing the network is perturbed in the same proportion.

    Args:
      rho: radius in the rescaled parameters, >= 0: a number, a schedule of the step,
        or a traced scalar.
      eta: what is added to abs(x), >= 0: a number, a schedule, or traced.
      mask: a tree of booleans, a prefix of one, or a function of the parameters that
        returns one, as in :func:`optax.masked`; T = 1 on the leaves that are
        ``False``. The authors rescale kernels only: ``mask=lambda params:
        jax.tree.map(lambda x: x.ndim > 1, params)``.

    Returns:
      A :class:`optax.GradientTransformation` whose output is added to the parameters
      and has the dtypes of its input; ``update`` needs ``params``.

    Raises:
      ValueError: if rho or eta is negative or not finite; at ``init`` and ``update``,
        if the mask has another structure than the parameters.

    Examples:
      A weight of 4 is moved further than a weight of 3 by the same gradient:

      >>> import jax.numpy as jnp
      >>> from optax_vasso import asam_perturb
      >>> params, grads = jnp.array([3.0, 4.0]), jnp.ones(2)
      >>> ascent = asam_perturb(rho=0.1, eta=0.0)
      >>> perturbation, _ = ascent.update(grads, ascent.init(params), params)
      >>> print(perturbation)
      [0.18 0.32]

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, 2021.
    """
    check_not_negative("eta", eta)

    def direction(updates: PyTree, step: jax.Array, params: PyTree) -> PyTree:
        require_params(params, "asam_perturb")

        def scale(d: jax.Array, x: jax.Array, rescaled: bool) -> jax.Array:
            if not rescaled:
                return jnp.ones((), d.dtype)
            dtype = jnp.abs(d).dtype
            return jnp.abs(x).astype(dtype) + jnp.asarray(value_at(eta, step), dtype)

        scaled, _ = numerics.scale_to_one(updates)
        chosen = broadcast_mask(mask, params)
        scales = numerics.map_updates(scale, scaled, params, chosen)
        return _diagonal_direction(scaled, scales)

    return _perturb(
        rho,
        direction,
        check=lambda params: broadcast_mask(mask, params),
    )


def fisher_perturb(
    rho: Hyperparameter, eta: Hyperparameter = 1.0
) -> optax.GradientTransformation:
    """Measure the ball by the diagonal Fisher information: Fisher SAM.

    ε = ρ F⁻¹d/√(dᵀF⁻¹d) with F⁻¹ = 1/(1 + η d²), the squared gradient of the batch
    standing for the diagonal of the Fisher information.

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
    check_not_negative("eta", eta)

    def direction(updates: PyTree, step: jax.Array, params: PyTree) -> PyTree:
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
        return _diagonal_direction(numerics.widen_tree(updates), scales)

    return _perturb(rho, direction)


def per_layer(
    ascent: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Run an ascent chain on every leaf by itself.

    ``per_layer(sam_perturb(rho))`` gives each leaf a perturbation of norm ρ, where
    ``sam_perturb(rho)`` gives one to the tree.

    Args:
      ascent: a chain that depends on updates, state and params alone.

    Returns:
      A :class:`optax.GradientTransformation` whose state is that of ``ascent`` with a
      tree like the parameters in place of each leaf, one entry a layer.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_vasso import per_layer, sam_perturb
      >>> grads = {"bias": jnp.array([2.0]), "kernel": jnp.array([3.0, 4.0])}
      >>> ascent = per_layer(sam_perturb(rho=0.1))
      >>> perturbation, _ = ascent.update(grads, ascent.init(grads), grads)
      >>> print(perturbation["bias"], perturbation["kernel"])
      [0.1] [0.06 0.08]

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022, section 4.3.
    """

    # Optax finds buffers in a state where init puts params, so the state is one of the
    # chain with trees in it and not a tree with a state of the chain at each leaf.
    def state_structure(leaf: Any) -> Any:
        return jax.tree.structure(jax.eval_shape(ascent.init, leaf))

    def init_fn(params: PyTree) -> PyTree:
        check_params(params)
        layers: Any = jax.tree.structure(params)
        leaves = jax.tree.leaves(params)
        if not leaves:
            return ascent.init(params)
        states = layers.unflatten([ascent.init(leaf) for leaf in leaves])
        return jax.tree.transpose(layers, state_structure(leaves[0]), states)

    def update_fn(
        updates: PyTree, state: PyTree, params: PyTree = None
    ) -> tuple[PyTree, PyTree]:
        require_params(params, "per_layer")
        layers: Any = jax.tree.structure(params)
        leaves = jax.tree.leaves(params)
        inner = state_structure(leaves[0])
        states = layers.flatten_up_to(jax.tree.transpose(inner, layers, state))
        pairs = [
            (None, old) if update is None else ascent.update(update, old, leaf)
            for update, old, leaf in zip(
                layers.flatten_up_to(updates), states, leaves, strict=True
            )
        ]
        perturbation = layers.unflatten([part for part, _ in pairs])
        new_states = layers.unflatten([new_state for _, new_state in pairs])
        return perturbation, jax.tree.transpose(layers, inner, new_states)

    return optax.GradientTransformation(init_fn, update_fn)


def track_stability(
    ascent: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Measure how far the adversary moves from step to step.

    The output is that of ``ascent``; the state holds ‖ε_t − ε_{t−1}‖₂/‖ε_t‖₂, which for
    :func:`sam_perturb` is the instability in units of ρ, between 0 and 2. It costs a
    buffer like the parameters. The papers bound it by O(√θ σ) for VaSSO where SAM has
    O(σ).

    Args:
      ascent: any ascent chain.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; read the number with
      ``optax.tree.get(state, "stability")``, or among the metrics of
      :func:`optax_vasso.make_train_step`.

    Examples:
      An adversary that turns about moves by twice its own length:

      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso import sam_perturb, track_stability
      >>> params = jnp.zeros(2)
      >>> ascent = track_stability(sam_perturb(rho=0.1))
      >>> state = ascent.init(params)
      >>> for grads in (jnp.array([1.0, 0.0]), jnp.array([-1.0, 0.0])):
      ...     _, state = ascent.update(grads, state, params)
      >>> print(optax.tree.get(state, "stability"))
      2.0
    """
    ascent = optax.with_extra_args_support(ascent)

    def init_fn(params: PyTree) -> StabilityState:
        dtype = jax.dtypes.canonicalize_dtype(float)
        return StabilityState(
            stability=jnp.zeros((), dtype),
            previous=optax.tree.zeros_like(params),
            ascent_state=ascent.init(params),
        )

    def update_fn(
        updates: PyTree, state: StabilityState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, StabilityState]:
        perturbation, ascent_state = ascent.update(
            updates, state.ascent_state, params, **extra_args
        )
        length = numerics.norm(perturbation)
        move = numerics.norm(
            numerics.map_updates(jnp.subtract, perturbation, state.previous)
        )
        stability = move / jnp.where(length == 0, 1, length)
        return perturbation, StabilityState(
            stability.astype(state.stability.dtype),
            numerics.fill_none(perturbation, state.previous),
            ascent_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _perturb(
    rho: Hyperparameter,
    direction: Callable[[PyTree, jax.Array, PyTree], PyTree],
    check: Callable[[PyTree], Any] = lambda params: None,
) -> optax.GradientTransformation:
    """Times ρ, and everything about a perturbation that is not its direction."""
    check_not_negative("rho", rho)

    def init_fn(params: PyTree) -> PerturbState:
        check_params(params)
        check(params)
        return PerturbState(step=jnp.zeros((), jnp.int32))

    def update_fn(
        updates: PyTree, state: PerturbState, params: PyTree = None
    ) -> tuple[PyTree, PerturbState]:
        radius = jnp.asarray(
            value_at(rho, state.step), numerics.accumulation_dtype(updates)
        )
        perturbation = numerics.map_updates(
            lambda g, d: (radius * d).astype(g.dtype),
            updates,
            direction(updates, state.step, params),
        )
        return perturbation, PerturbState(optax.safe_increment(state.step))

    return optax.GradientTransformation(init_fn, update_fn)


def _diagonal_direction(direction: PyTree, scales: PyTree) -> PyTree:
    """S² d/‖S d‖₂ for a diagonal S."""
    unit = numerics.normalize(jax.tree.map(jnp.multiply, scales, direction))
    return jax.tree.map(jnp.multiply, scales, unit)
