"""Sharpness-aware training as pure Optax transforms: SAM, VaSSO and their relatives.

The recipes (:func:`sam`, :func:`vasso`, :func:`lagged_vasso`, ...) wrap any Optax
optimizer. They are composed of ``ascent`` (from a gradient to a perturbation), ``gate``
(when to perturb), ``descent`` (from two gradients to one) and ``steps``, which joins
these. ``train`` has a compiled train step, ``metrics`` measures the perturbation,
``wrappers`` handle non-finite batches and low precision, ``factors`` balances low-rank
adapters, and ``sharpness`` measures solutions.
"""

from __future__ import annotations

from optax_vasso import (
    ascent,
    descent,
    factors,
    gate,
    metrics,
    sharpness,
    steps,
    train,
    wrappers,
)
from optax_vasso.ascent import (
    asam_perturb,
    fisher_perturb,
    friendly_noise,
    sam_perturb,
    vasso_ema,
)
from optax_vasso.recipes import (
    ae_sam,
    asam,
    evasso,
    fisher_sam,
    friendly_sam,
    gsam,
    lagged_vasso,
    looksam,
    momentum_sam,
    sam,
    single_step_sam,
    vasso,
    wsam,
)
from optax_vasso.steps import (
    clean_gradient,
    eval_params,
    lagged,
    sampa,
    sharpness_aware,
)
from optax_vasso.train import TrainState, init_train_state, make_train_step

__version__ = "0.1.0"

__all__ = [
    "TrainState",
    "ae_sam",
    "asam",
    "asam_perturb",
    "ascent",
    "clean_gradient",
    "descent",
    "eval_params",
    "evasso",
    "factors",
    "fisher_perturb",
    "fisher_sam",
    "friendly_noise",
    "friendly_sam",
    "gate",
    "gsam",
    "init_train_state",
    "lagged",
    "lagged_vasso",
    "looksam",
    "make_train_step",
    "metrics",
    "momentum_sam",
    "sam",
    "sam_perturb",
    "sampa",
    "sharpness",
    "sharpness_aware",
    "single_step_sam",
    "steps",
    "train",
    "vasso",
    "vasso_ema",
    "wrappers",
    "wsam",
]


def __dir__() -> list[str]:
    return __all__
