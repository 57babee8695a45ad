"""Measuring what training found: curvature, sharpness, adversaries, landscapes.

Every measure takes ``loss_fn(params, batch)``, a scalar that is the mean over the
batch, and the data in batches. What the network keeps besides parameters, as the
statistics of batch normalization, is closed over, frozen.
"""

# The adversary in stochastic training.
from optax_vasso.sharpness.adversary import (
    Friendliness,
    TrackState,
    friendliness,
    squared_error,
    track,
)

# How far the loss rises in a ball.
from optax_vasso.sharpness.ball import (
    MSharpness,
    Sharpness,
    adaptive_scale,
    ascent_sharpness,
    average_sharpness,
    keskar_sharpness,
    m_sharpness,
    worst_sharpness,
)
from optax_vasso.sharpness.batches import Estimate, split_batches
from optax_vasso.sharpness.directions import filter_normalized

# Curvature: matrix-vector products.
from optax_vasso.sharpness.hessian import (
    gauss_newton,
    hessian,
    hessian_by_differences,
)

# The loss along lines and planes.
from optax_vasso.sharpness.landscape import (
    Line,
    Plane,
    along,
    between,
    on_plane,
)

# Curvature: what is measured of the products.
from optax_vasso.sharpness.spectrum import (
    Eigenpairs,
    SpectralDensity,
    largest_eigenpairs,
    smallest_eigenpairs,
    spectral_density,
    trace,
)

__all__ = [
    "Eigenpairs",
    "Estimate",
    "Friendliness",
    "Line",
    "MSharpness",
    "Plane",
    "Sharpness",
    "SpectralDensity",
    "TrackState",
    "adaptive_scale",
    "along",
    "ascent_sharpness",
    "average_sharpness",
    "between",
    "filter_normalized",
    "friendliness",
    "gauss_newton",
    "hessian",
    "hessian_by_differences",
    "keskar_sharpness",
    "largest_eigenpairs",
    "m_sharpness",
    "on_plane",
    "smallest_eigenpairs",
    "spectral_density",
    "split_batches",
    "squared_error",
    "trace",
    "track",
    "worst_sharpness",
]
