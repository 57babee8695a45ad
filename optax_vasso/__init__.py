"""Variance-suppressed sharpness-aware training as pure Optax transforms.

An adversary is an Optax chain that turns a gradient into a perturbation; what is done
with the perturbation is written once.
"""

from optax_vasso import gate as gate, numerics as numerics

# Gradient → direction → perturbation: chain a filter and a perturbation.
from optax_vasso.ascent import (
    asam_perturb as asam_perturb,
    fisher_perturb as fisher_perturb,
    per_layer as per_layer,
    sam_perturb as sam_perturb,
    track_stability as track_stability,
)

# (Clean, perturbed) gradient → descent gradient: chain before the base optimizer.
from optax_vasso.descent import (
    gsam_descent as gsam_descent,
    looksam_descent as looksam_descent,
    weighted_descent as weighted_descent,
)

# Loss → gradient: microbatches, parts of a batch, mapped axes.
from optax_vasso.gradients import (
    average_over as average_over,
    local_gradient as local_gradient,
    microbatched as microbatched,
    on_batch as on_batch,
    part_of_batch as part_of_batch,
    synchronized as synchronized,
    whole_batch as whole_batch,
)

# One gradient a step.
from optax_vasso.lagged import (
    LaggedState as LaggedState,
    lagged as lagged,
    lagged_eval_params as lagged_eval_params,
)

# Bad batches, loss scales, parameters with few bits.
from optax_vasso.nonfinite import (
    SkipState as SkipState,
    check_finite as check_finite,
    skip_nonfinite as skip_nonfinite,
)

# Meshes of devices.
from optax_vasso.parallel import (
    fsdp_specs as fsdp_specs,
    init_local_state as init_local_state,
    make_local_train_step as make_local_train_step,
    shard_batch as shard_batch,
    shard_state as shard_state,
    state_shardings as state_shardings,
)
from optax_vasso.precision import (
    in_float32 as in_float32,
    track_arrival as track_arrival,
)

# The methods of the papers.
from optax_vasso.recipes import (
    asam as asam,
    evasso as evasso,
    fisher_sam as fisher_sam,
    friendly_sam as friendly_sam,
    gsam as gsam,
    lagged_vasso as lagged_vasso,
    looksam as looksam,
    sam as sam,
    vasso as vasso,
)

# Two gradients a step.
from optax_vasso.sharpness_aware import (
    AscentMetrics as AscentMetrics,
    SharpnessAwareState as SharpnessAwareState,
    sharpness_aware as sharpness_aware,
)
from optax_vasso.smoothing import (
    friendly_noise as friendly_noise,
    unbuffered_vasso_ema as unbuffered_vasso_ema,
    vasso_ema as vasso_ema,
)

# A compiled step with model state, keys and metrics.
from optax_vasso.train_step import (
    TrainState as TrainState,
    eval_params as eval_params,
    init_train_state as init_train_state,
    make_train_step as make_train_step,
    needs_grad_fn as needs_grad_fn,
)

__version__ = "0.1.0"
