"""Variance-suppressed sharpness-aware training as pure Optax transforms."""

__version__ = "0.1.0"
