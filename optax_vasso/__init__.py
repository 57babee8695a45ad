"""Variance-suppressed sharpness-aware training as pure Optax transforms.

An adversary is an Optax chain that turns a gradient into a perturbation; what is done
with the perturbation is written once.
"""

from optax_vasso import gate as gate
from optax_vasso import numerics as numerics

# Gradient → direction → perturbation: chain a filter and a perturbation.
from optax_vasso.ascent import (
    asam_perturb as asam_perturb,
)
from optax_vasso.ascent import (
    fisher_perturb as fisher_perturb,
)
from optax_vasso.ascent import (
    per_layer as per_layer,
)
from optax_vasso.ascent import (
    sam_perturb as sam_perturb,
)
from optax_vasso.ascent import (
    track_stability as track_stability,
)

# (Clean, perturbed) gradient → descent gradient: chain before the base optimizer.
from optax_vasso.descent import (
    gsam_descent as gsam_descent,
)
from optax_vasso.descent import (
    looksam_descent as looksam_descent,
)
from optax_vasso.descent import (
    weighted_descent as weighted_descent,
)

# Loss → gradient: microbatches, parts of a batch, mapped axes.
from optax_vasso.gradients import (
    average_over as average_over,
)
from optax_vasso.gradients import (
    local_gradient as local_gradient,
)
from optax_vasso.gradients import (
    microbatched as microbatched,
)
from optax_vasso.gradients import (
    on_batch as on_batch,
)
from optax_vasso.gradients import (
    part_of_batch as part_of_batch,
)
from optax_vasso.gradients import (
    synchronized as synchronized,
)
from optax_vasso.gradients import (
    whole_batch as whole_batch,
)

# One gradient a step.
from optax_vasso.lagged import (
    LaggedState as LaggedState,
)
from optax_vasso.lagged import (
    lagged as lagged,
)
from optax_vasso.lagged import (
    lagged_eval_params as lagged_eval_params,
)

# Bad batches, loss scales, parameters with few bits.
from optax_vasso.nonfinite import (
    SkipState as SkipState,
)
from optax_vasso.nonfinite import (
    check_finite as check_finite,
)
from optax_vasso.nonfinite import (
    skip_nonfinite as skip_nonfinite,
)

# Meshes of devices.
from optax_vasso.parallel import (
    fsdp_specs as fsdp_specs,
)
from optax_vasso.parallel import (
    init_local_state as init_local_state,
)
from optax_vasso.parallel import (
    make_local_train_step as make_local_train_step,
)
from optax_vasso.parallel import (
    shard_batch as shard_batch,
)
from optax_vasso.parallel import (
    shard_state as shard_state,
)
from optax_vasso.parallel import (
    state_shardings as state_shardings,
)
from optax_vasso.precision import (
    in_float32 as in_float32,
)
from optax_vasso.precision import (
    track_arrival as track_arrival,
)

# The methods of the papers.
from optax_vasso.recipes import (
    asam as asam,
)
from optax_vasso.recipes import (
    evasso as evasso,
)
from optax_vasso.recipes import (
    fisher_sam as fisher_sam,
)
from optax_vasso.recipes import (
    friendly_sam as friendly_sam,
)
from optax_vasso.recipes import (
    gsam as gsam,
)
from optax_vasso.recipes import (
    lagged_vasso as lagged_vasso,
)
from optax_vasso.recipes import (
    looksam as looksam,
)
from optax_vasso.recipes import (
    sam as sam,
)
from optax_vasso.recipes import (
    vasso as vasso,
)

# Two gradients a step.
from optax_vasso.sharpness_aware import (
    AscentMetrics as AscentMetrics,
)
from optax_vasso.sharpness_aware import (
    SharpnessAwareState as SharpnessAwareState,
)
from optax_vasso.sharpness_aware import (
    sharpness_aware as sharpness_aware,
)
from optax_vasso.smoothing import (
    friendly_noise as friendly_noise,
)
from optax_vasso.smoothing import (
    unbuffered_vasso_ema as unbuffered_vasso_ema,
)
from optax_vasso.smoothing import (
    vasso_ema as vasso_ema,
)

# A compiled step with model state, keys and metrics.
from optax_vasso.train_step import (
    TrainState as TrainState,
)
from optax_vasso.train_step import (
    eval_params as eval_params,
)
from optax_vasso.train_step import (
    init_train_state as init_train_state,
)
from optax_vasso.train_step import (
    make_train_step as make_train_step,
)
from optax_vasso.train_step import (
    needs_grad_fn as needs_grad_fn,
)

__version__ = "0.1.0"
