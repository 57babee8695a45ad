"""An ascent whose radius is measured along the gradient."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_vasso as ov
from experiments.harness.methods import METHODS, Method, Range

# Of the newest cosine in its average, and ρ's largest multiple of r.
WEIGHT, MOST = 0.05, 6.0


class ProjectedState(NamedTuple):
    """The average of cos(d, g), and the state of what makes d."""

    cosine: jax.Array
    smoothing_state: Any


def projected_perturb(
    r: Any, smoothing: optax.GradientTransformation
) -> optax.GradientTransformation:
    """ε = ρ d/‖d‖ of the length ρ = r/c at which it is r long along the gradient g.

    c is a moving average of cos(d, g) that starts at 1. To first order the loss of the
    batch rises by r‖g‖, as for SAM with the radius r. In pure noise, with
    :func:`optax_vasso.vasso_ema`, ρ tends to r/√(θ(2 − θ)).

    Args:
      r: the length, >= 0; may be traced.
      smoothing: from g to d.
    """
    unit_of = ov.sam_perturb(1.0)

    def unit(tree: Any) -> Any:
        return unit_of.update(tree, unit_of.init(tree))[0]

    def init(params: Any) -> ProjectedState:
        return ProjectedState(jnp.ones(()), smoothing.init(params))

    def update(
        g: Any, state: ProjectedState, params: Any = None
    ) -> tuple[Any, ProjectedState]:
        d, smoothing_state = smoothing.update(g, state.smoothing_state, params)
        direction = unit(d)
        newest = optax.tree.vdot(direction, unit(g))
        cosine = state.cosine + WEIGHT * (newest - state.cosine)
        rho = r / jnp.clip(cosine, 1 / MOST, 1.0)
        return optax.tree.scale(rho, direction), ProjectedState(cosine, smoothing_state)

    return optax.GradientTransformation(init, update)


@functools.cache
def projected_vasso() -> Method:
    """VaSSO whose ρ is the length of ε along the gradient."""

    def make(base: Any, h: dict[str, Any], seed: Any) -> Any:
        ascent = projected_perturb(h["rho"], ov.vasso_ema(h["theta"]))
        return ov.sharpness_aware(base, ascent)

    space = dict.fromkeys(("rho", "theta"), Range(0.0, 1.0))
    return dataclasses.replace(METHODS["vasso"], own=space, make=make)
