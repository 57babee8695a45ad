"""Measures of the perturbation, computed inside the training loop on request."""

from __future__ import annotations

from optax_vasso._internal.trees import Report
from optax_vasso.metrics.arrival import check_uphill, track_arrival
from optax_vasso.metrics.tracking import (
    Measure,
    Seen,
    arrival,
    cosine,
    grad_norm,
    perturbation_norm,
    running_mean,
    stability,
    track,
)

__all__ = [
    "Measure",
    "Report",
    "Seen",
    "arrival",
    "check_uphill",
    "cosine",
    "grad_norm",
    "perturbation_norm",
    "running_mean",
    "stability",
    "track",
    "track_arrival",
]
