"""A student that learns from a teacher of its own shape, with everything known.

Inputs are Gaussian with the covariance diag(1, 1/2, …, 1/32), scaled to a mean of 1.
The teacher is an MLP 32-64-64-8, and a label is drawn from its probabilities p(x), so
that at the teacher's parameters the Hessian of the expected loss is the Fisher
information, which :func:`fisher_information` gives without any sampling of labels. The
true label, which the test set is scored with, is the most probable one.

Two dials of noise: a share of the labels is uniformly random, or Gaussian noise of a
known norm is added to the gradients of otherwise clean labels.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from experiments.harness.networks import mlp
from experiments.tasks import Task

FEATURES, HIDDEN, CLASSES = 32, 64, 8
EXAMPLES = 2200
SPREAD = 3.0  # standard deviation of each of the teacher's logits over the inputs
TILT = 1.0  # norm of the noise that "tilt" adds to the gradients


def load(name: str, variant: str) -> Task:
    """A percentage of random labels, or ``tilt`` for noise in the gradients."""
    inputs = teacher_inputs(EXAMPLES)
    network = mlp(FEATURES, HIDDEN, HIDDEN, CLASSES)
    logits = np.asarray(network.logits(teacher(), jnp.asarray(inputs)))
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    tilted = variant == "tilt"
    share = 0.0 if tilted else int(variant) / 100
    cumulative = np.cumsum((1 - share) * probabilities + share / CLASSES, axis=1)

    def given_labels(random: np.random.Generator) -> np.ndarray:
        draws = random.random((EXAMPLES, 1))
        return np.minimum((draws > cumulative).sum(1), CLASSES - 1)

    return Task(
        name=name,
        inputs=inputs,
        labels=probabilities.argmax(1).astype(np.int32),
        given_labels=given_labels,
        pool=np.arange(1200),
        test=np.arange(1200, EXAMPLES),
        groups=np.arange(EXAMPLES),
        training=1000,
        validation=200,
        classes=CLASSES,
        network=network,
        epochs=30,
        batch=50,
        epochs_per_call=3,
        gradient_noise=TILT if tilted else 0.0,
    )


def teacher_inputs(count: int) -> np.ndarray:
    """Gaussian inputs (count, FEATURES) float32, always the same."""
    variances = 1 / np.arange(1, FEATURES + 1)
    variances /= variances.mean()
    normal = np.random.RandomState(0).standard_normal((count, FEATURES))
    return (normal * np.sqrt(variances)).astype(np.float32)


def teacher() -> Any:
    """The parameters of the teacher, whose classes are about equally frequent."""
    network = mlp(FEATURES, HIDDEN, HIDDEN, CLASSES)
    *hidden, last = network.init(np.random.default_rng(2023))
    logits = np.asarray(
        network.logits([*hidden, last], jnp.asarray(teacher_inputs(EXAMPLES)))
    )
    scale = SPREAD / logits.std(0)
    kernel, bias = scale * last["kernel"], scale * (last["bias"] - logits.mean(0))
    return [*hidden, {"kernel": kernel, "bias": bias}]


def fisher_information(params: Any, inputs: jax.Array) -> tuple[float, float]:
    """Trace and largest eigenvalue of the Fisher information, over the inputs given.

    At the teacher's parameters this is the Hessian of the expected loss of a student.
    """
    network = mlp(FEATURES, HIDDEN, HIDDEN, CLASSES)
    flat, unravel = ravel_pytree(params)

    def roots(example: jax.Array) -> jax.Array:
        """(classes, parameters): the rows √p_k ∇ log p_k."""

        def log_probabilities(flat: jax.Array) -> jax.Array:
            return jax.nn.log_softmax(network.logits(unravel(flat), example[None])[0])

        weights = jnp.exp(log_probabilities(flat) / 2)
        return weights[:, None] * jax.jacrev(log_probabilities)(flat)

    rows = jax.jit(lambda x: jax.lax.map(roots, x))(inputs).reshape(
        -1, len(flat)
    ) / jnp.sqrt(len(inputs))
    vector = jnp.ones(len(flat)) / jnp.sqrt(len(flat))
    for _ in range(50):
        vector = rows.T @ (rows @ vector)
        vector /= jnp.linalg.norm(vector)
    return float(jnp.sum(rows**2)), float(jnp.sum((rows @ vector) ** 2))
