"""From a gradient to a perturbation.

An ascent chain is any :class:`optax.GradientTransformation` whose output is *added* to
the parameters: filters of the gradient first, then one perturbation that gives the
direction its length. Transformations that select parameters, tune the radius or guard
training wrap a whole chain.
"""

from __future__ import annotations

from optax_vasso.ascent.perturb import asam_perturb, fisher_perturb, sam_perturb
from optax_vasso.ascent.radius import hold_rise
from optax_vasso.ascent.select import masked_ascent, per_layer
from optax_vasso.ascent.smoothing import friendly_noise, vasso_ema
from optax_vasso.ascent.trained import trained_by
from optax_vasso.ascent.until import until

__all__ = [
    "asam_perturb",
    "fisher_perturb",
    "friendly_noise",
    "hold_rise",
    "masked_ascent",
    "per_layer",
    "sam_perturb",
    "trained_by",
    "until",
    "vasso_ema",
]
