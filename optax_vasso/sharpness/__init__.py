"""Measure a trained solution: curvature, sharpness, perturbations, landscapes.

Every measure takes ``loss_fn(params, batch)``, a scalar that is the mean over the
batch; the parameters; and the data, one batch (a tuple, a dictionary or an array with
one row per example) or several, as :func:`split_batches` and :func:`stack_batches` make
them. Bind what else the network needs, such as batch statistics, to the loss by
``jax.tree_util.Partial(loss_fn, batch_stats=...)``, which passes it to the compiled
program as data; a new closure would be compiled again. Compiled programs live as long
as the loss that they measure.

Accelerators round the factors of a matrix product by default: GPUs in float32 to
TensorFloat-32, TPUs to bfloat16. The measures' own products are in full precision, but
those of the loss are not, and the curvature of a rounded loss is mostly rounding. So
measure in full precision there::

    with jax.default_matmul_precision("highest"):
        curvature = sharpness.hessian(loss_fn, params, data)
        top = sharpness.eigenpairs(curvature, params)

:mod:`optax_vasso.sharpness.plot` draws the results.
"""

from __future__ import annotations

from optax_vasso.sharpness import plot

# The adversary in stochastic training.
from optax_vasso.sharpness.adversary import (
    Friendliness as Friendliness,
    friendliness,
    squared_error,
)

# How far the loss rises in a ball.
from optax_vasso.sharpness.ball import (
    MSharpness as MSharpness,
    Sharpness as Sharpness,
    ascent_sharpness,
    average_sharpness,
    keskar_sharpness,
    m_sharpness,
    worst_sharpness,
)
from optax_vasso.sharpness.batches import (
    Batches as Batches,
    Estimate as Estimate,
    split_batches,
    stack_batches,
)

# Curvature: matrix-vector products.
from optax_vasso.sharpness.curvature import gauss_newton, hessian
from optax_vasso.sharpness.directions import filter_normalized

# The loss along lines and planes.
from optax_vasso.sharpness.landscape import (
    Line as Line,
    Plane as Plane,
    along,
    on_plane,
)

# Curvature: what is measured of the products.
from optax_vasso.sharpness.spectrum import (
    Eigenpairs as Eigenpairs,
    SpectralDensity as SpectralDensity,
    eigenpairs,
    spectral_density,
    trace,
)

__all__ = [
    "along",
    "ascent_sharpness",
    "average_sharpness",
    "eigenpairs",
    "filter_normalized",
    "friendliness",
    "gauss_newton",
    "hessian",
    "keskar_sharpness",
    "m_sharpness",
    "on_plane",
    "plot",
    "spectral_density",
    "split_batches",
    "squared_error",
    "stack_batches",
    "trace",
    "worst_sharpness",
]
