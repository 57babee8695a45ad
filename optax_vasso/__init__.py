"""Variance-suppressed sharpness-aware training as pure Optax transforms.

An adversary is an Optax chain that turns a gradient into a perturbation; what is done
with the perturbation is written once.
"""

# When to ascend; what the adversary did; what training found.
from __future__ import annotations

from optax_vasso import gate, sharpness, tracking

# Direction → perturbation: what stands last in an ascent chain.
from optax_vasso.ascent import (
    asam_perturb,
    fisher_perturb,
    masked_ascent,
    per_layer,
    sam_perturb,
)

# θ and ρ that follow the gradients: a filter, and a whole ascent chain.
from optax_vasso.automatic import projected_perturb, self_tuned_ema

# (Clean, perturbed) gradient → descent gradient: chain before the base optimizer.
from optax_vasso.descent import gsam_descent, looksam_descent, weighted_descent

# Loss → gradient: which examples.
from optax_vasso.gradients import microbatched, on_batch, part_of_batch, whole_batch

# A perturbation in proportion to what the model has learned.
from optax_vasso.guard import collapse_guard

# Whether a lagged perturbation arrives, and leads uphill.
from optax_vasso.lagged_checks import check_uphill, track_arrival

# The methods of the papers, of one gradient per step and of two.
from optax_vasso.lagged_recipes import (
    auto_lagged_vasso,
    lagged_vasso,
    momentum_sam,
    single_step_sam,
)

# Bad batches, loss scales, parameters with few bits.
from optax_vasso.nonfinite import check_finite, skip_nonfinite

# One gradient per step.
from optax_vasso.one_gradient import LaggedState, eval_params, lagged

# Meshes of devices and mapped axes.
from optax_vasso.parallel import (
    average_over,
    fsdp_specs,
    init_local_state,
    make_local_train_step,
    shard_batch,
    shard_state,
    state_shardings,
    synchronized,
)

# Two gradients per step that do not wait for each other.
from optax_vasso.parallel_gradients import clean_gradient, sampa
from optax_vasso.precision import in_float32
from optax_vasso.recipes import (
    ae_sam,
    asam,
    auto_vasso,
    evasso,
    fisher_sam,
    friendly_sam,
    gsam,
    looksam,
    sam,
    vasso,
    wsam,
)

# Gradient → direction, over steps: what stands first in an ascent chain.
from optax_vasso.smoothing import friendly_noise, vasso_ema
from optax_vasso.tracking import track

# A compiled step with model state, keys and metrics.
from optax_vasso.train_step import TrainState, init_train_state, make_train_step

# Two gradients per step.
from optax_vasso.two_gradients import SharpnessAwareState, sharpness_aware

__version__ = "0.1.0"

__all__ = [
    "LaggedState",
    "SharpnessAwareState",
    "TrainState",
    "ae_sam",
    "asam",
    "asam_perturb",
    "auto_lagged_vasso",
    "auto_vasso",
    "average_over",
    "check_finite",
    "check_uphill",
    "clean_gradient",
    "collapse_guard",
    "eval_params",
    "evasso",
    "fisher_perturb",
    "fisher_sam",
    "friendly_noise",
    "friendly_sam",
    "fsdp_specs",
    "gate",
    "gsam",
    "gsam_descent",
    "in_float32",
    "init_local_state",
    "init_train_state",
    "lagged",
    "lagged_vasso",
    "looksam",
    "looksam_descent",
    "make_local_train_step",
    "make_train_step",
    "masked_ascent",
    "microbatched",
    "momentum_sam",
    "on_batch",
    "part_of_batch",
    "per_layer",
    "projected_perturb",
    "sam",
    "sam_perturb",
    "sampa",
    "self_tuned_ema",
    "shard_batch",
    "shard_state",
    "sharpness",
    "sharpness_aware",
    "single_step_sam",
    "skip_nonfinite",
    "state_shardings",
    "synchronized",
    "track",
    "track_arrival",
    "tracking",
    "vasso",
    "vasso_ema",
    "weighted_descent",
    "whole_batch",
    "wsam",
]


def __dir__() -> list[str]:
    return __all__
