"""What training has found: the sharpness of a solution on its own training set.

Losses are in nats and without weight decay. Training and test labels are equally noisy
here, so that a gap between them is one of generalization.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments import tasks
from experiments.harness.networks import Network, cross_entropy
from experiments.tasks import Task
from optax_vasso import sharpness

Batch = tuple[jax.Array, jax.Array]
Params = Any


def of_row(tree: Any, row: int) -> Any:
    """One training of what several have."""
    return jax.tree.map(lambda leaf: leaf[row], tree)


@functools.cache
def loss_of(network: Network) -> Callable[[Params, Batch], jax.Array]:
    """(params, batch) -> mean cross-entropy; one function, which compiles once."""

    def loss_fn(params: Params, batch: Batch) -> jax.Array:
        return cross_entropy(network.logits(params, batch[0]), batch[1])

    return loss_fn


def data_of(task: Task, seed: int) -> tuple[Batch, Batch]:
    """Training and test set of a seed, with the labels that were given to it."""
    split = tasks.split(task, seed)

    def batch(examples: Any) -> Batch:
        return jnp.asarray(task.inputs[examples]), jnp.asarray(
            split.given_labels[examples]
        )

    return batch(split.training), batch(task.test)


def measure(task: Task, params: Params, seed: int) -> dict[str, float]:
    """Losses, accuracies, and how sharp the solution of a seed is.

    Returns:
      ``train_loss`` and ``train_accuracy`` (in percent, of the given labels),
      ``loss_gap``, test minus training loss, ``lambda_max`` of the Hessian and
      ``keskar``, Keskar's sharpness in percent.
    """
    loss_fn = loss_of(task.network)
    training, test = data_of(task, seed)
    train_loss = loss_fn(params, training)
    predicted = jnp.argmax(task.network.logits(params, training[0]), axis=-1)
    curvature = sharpness.hessian(loss_fn, params, training)
    top = sharpness.eigenpairs(curvature, params, num_matvecs=24)
    keskar = sharpness.keskar_sharpness(
        loss_fn, params, training, num_steps=20, num_restarts=1
    )
    return {
        "train_loss": float(train_loss),
        "train_accuracy": 100 * float(jnp.mean(predicted == training[1])),
        "loss_gap": float(loss_fn(params, test) - train_loss),
        "lambda_max": float(top.values[0]),
        "keskar": float(keskar),
    }
