"""Apply a perturbation, with two gradients per step or one."""

from __future__ import annotations

from optax_vasso.steps.evaluation import eval_params
from optax_vasso.steps.one_gradient import LaggedState, lagged
from optax_vasso.steps.side_by_side import clean_gradient, sampa
from optax_vasso.steps.two_gradients import SharpnessAwareState, sharpness_aware

__all__ = [
    "LaggedState",
    "SharpnessAwareState",
    "clean_gradient",
    "eval_params",
    "lagged",
    "sampa",
    "sharpness_aware",
]
