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
