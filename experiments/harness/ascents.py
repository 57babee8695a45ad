"""Methods whose every setting is traced: candidates for a radius, and guards."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_vasso as ov
from experiments.harness import adaptive_ascents
from experiments.harness.methods import METHODS, MOMENTUM, Method, Range

# The length of ε, with a constant c. σ is the noise, from how far a gradient is from
# the average before it; m the momentum; η the learning rate, which falls from η₀; t the
# step of T.
RADII = (
    "c",
    "c/cos(d, g)",
    "c σ/‖g‖",
    "c η‖m‖",
    "c η/η₀",
    "c t/T",
    "c ‖x‖ per leaf",
)


class TracedState(NamedTuple):
    """What the lengths are made of."""

    step: jax.Array
    smoothing_state: Any
    cosine: jax.Array
    variance: jax.Array
    momentum: Any


def traced_ascent(h: dict[str, Any]) -> optax.GradientTransformation:
    """ε = ρ d/‖d‖ with the ρ of RADII[h["radius"]].

    Args:
      h: scalars, traced or not: ``radius``, its constant ``c``, ``theta`` and ``speed``
        of :func:`adaptive_ascents.self_tuned_ema`, ``learning_rate`` and ``steps``.
    """
    smoothing = adaptive_ascents.self_tuned_ema(h["theta"], speed=h["speed"])
    norm, tiny = optax.tree.norm, 1e-12

    def init(params: Any) -> TracedState:
        return TracedState(
            step=jnp.zeros((), jnp.int32),
            smoothing_state=smoothing.init(params),
            cosine=jnp.ones(()),
            variance=jnp.zeros(()),
            momentum=optax.tree.zeros_like(params),
        )

    def update(
        g: Any, state: TracedState, params: Any = None
    ) -> tuple[Any, TracedState]:
        is_first = state.step == 0
        surprise = norm(optax.tree.sub(g, state.smoothing_state.ema)) ** 2
        variance = _followed(state.variance, surprise, state.step == 1)
        d, smoothing_state = smoothing.update(g, state.smoothing_state)
        cosine = optax.tree.vdot(d, g) / (norm(d) * norm(g) + tiny)
        cosine = _followed(state.cosine, cosine, is_first)
        momentum = optax.tree.add_scale(g, MOMENTUM, state.momentum)
        gone = jnp.minimum(state.step / h["steps"], 1.0)
        rate = 0.5 * (1 + jnp.cos(jnp.pi * gone))
        lengths = {
            "c": 1.0,
            "c/cos(d, g)": 1 / jnp.clip(cosine, 1 / 6, 1.0),
            "c σ/‖g‖": jnp.where(is_first, 0.0, jnp.sqrt(variance) / (norm(g) + tiny)),
            "c η‖m‖": h["learning_rate"] * rate * norm(momentum),
            "c η/η₀": rate,
            "c t/T": gone,
            "c ‖x‖ per leaf": 0.0,
        }
        length = jnp.stack([lengths[name] for name in RADII])
        whole = h["c"] * length[h["radius"].astype(int)] / (norm(d) + tiny)
        by_leaf = h["c"] * (h["radius"] == RADII.index("c ‖x‖ per leaf"))

        def perturbation(d: jax.Array, x: jax.Array) -> jax.Array:
            own = jnp.linalg.norm(x) / (jnp.linalg.norm(d) + tiny)
            return (whole + by_leaf * own) * d

        return jax.tree.map(perturbation, d, params), TracedState(
            step=state.step + 1,
            smoothing_state=smoothing_state,
            cosine=cosine,
            variance=variance,
            momentum=momentum,
        )

    return optax.GradientTransformation(init, update)


def _followed(average: jax.Array, newest: jax.Array, starts: jax.Array) -> jax.Array:
    """A moving average over about twenty steps."""
    return jnp.where(starts, newest, 0.95 * average + 0.05 * newest)


def as_numbers(candidate: dict[str, Any]) -> dict[str, float]:
    """A candidate as hyperparameters; its ``radius`` is one of RADII."""
    return candidate | {"radius": float(RADII.index(candidate["radius"]))}


@functools.cache
def traced_method(name: str) -> Method:
    """A method with the ascent of :func:`traced_ascent` behind a guard."""

    def make(base: Any, h: dict[str, Any], seed: Any) -> Any:
        wrap = ov.lagged if METHODS[name].gradients == 1 else ov.sharpness_aware
        ceiling = h["ceiling"] * h["guessing"]
        ascent = ov.ascent.collapse_guard(
            traced_ascent(h), ceiling, margin=h["margin"], patience=h["patience"]
        )
        return wrap(base, ascent)

    own = ("radius", "c", "theta", "speed", "ceiling", "margin", "patience")
    return _traced(name, make, *own)


@functools.cache
def guarded_vasso() -> Method:
    """VaSSO with a guard, which a high ceiling turns off."""

    def make(base: Any, h: dict[str, Any], seed: Any) -> Any:
        ascent = optax.chain(ov.vasso_ema(h["theta"]), ov.sam_perturb(h["rho"]))
        ceiling = h["ceiling"] * h["guessing"]
        return ov.sharpness_aware(base, ov.ascent.collapse_guard(ascent, ceiling))

    return _traced("vasso", make, "rho", "theta", "ceiling")


@functools.cache
def projected_vasso() -> Method:
    """VaSSO whose ρ is the length of ε along the gradient."""

    def make(base: Any, h: dict[str, Any], seed: Any) -> Any:
        ascent = adaptive_ascents.projected_perturb(h["rho"], ov.vasso_ema(h["theta"]))
        return ov.sharpness_aware(base, ascent)

    return _traced("vasso", make, "rho", "theta")


def _traced(name: str, make: Any, *own: str) -> Method:
    """A method that looks like another and is never searched."""
    space = dict.fromkeys(own, Range(0.0, 1.0))
    return dataclasses.replace(METHODS[name], own=space, make=make)
