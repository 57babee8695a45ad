"""What training has found: the sharpness of a solution on its own training set.

Losses are in nats and without weight decay. Training and test labels are equally noisy
here, so that a gap between them is one of generalization.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import tasks
from experiments.harness.networks import Network, cross_entropy
from experiments.tasks import Task
from optax_vasso import sharpness

Batch = tuple[jax.Array, jax.Array]
Params = Any
PLANE = 31  # points of a landscape along each direction


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


def worst(task: Task, params: Params, seed: int, rho: float, **options: Any) -> float:
    """The largest rise of the training loss that ascent finds within a radius."""
    training, _ = data_of(task, seed)
    found = sharpness.worst_sharpness(
        loss_of(task.network),
        params,
        training,
        rho,
        num_steps=30,
        num_restarts=1,
        **options,
    )
    return float(found.rise)


def measure_more(task: Task, params: Params, seed: int, rho: float) -> dict[str, float]:
    """Beside :func:`measure`, both ends of the spectrum and the ball in all its forms.

    Rises of the training loss in nats, within ``rho``. The average over directions is
    measured in float64: it is lost in the digits of float32.
    """
    loss_fn, key = loss_of(task.network), jax.random.key(seed)
    training, _ = data_of(task, seed)
    curvature = sharpness.hessian(loss_fn, params, training)
    smallest = sharpness.eigenpairs(
        curvature, params, num_matvecs=40, which="smallest", key=key
    )
    batches = sharpness.split_batches(training, task.batch)
    with jax.enable_x64(True):
        average = sharpness.average_sharpness(
            loss_fn,
            jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params),
            (training[0].astype(jnp.float64), training[1]),
            rho,
            num_samples=32,
            key=key,
        )
    scale = jax.tree.map(jnp.abs, params)
    return {
        "lambda_min": float(smallest.values[0]),
        "trace": float(sharpness.trace(curvature, params, key=key).mean),
        "ascent": float(
            sharpness.ascent_sharpness(loss_fn, params, training, rho).rise
        ),
        "worst": worst(task, params, seed, rho, key=key),
        "adaptive_worst": worst(task, params, seed, rho, key=key, scale=scale),
        "average": float(average.mean),
        "m_sharpness": float(sharpness.m_sharpness(loss_fn, params, batches, rho).mean),
    }


def adversary(
    task: Task, params: Params, perturbation: Params, slope: Params | None, seed: int
) -> dict[str, float]:
    """A perturbation, and the slope it came from, against every batch of a seed.

    Returns:
      ``lowered``, the share of batches whose loss it lowers, ``misaligned``, the share
      to whose gradient it is at more than a right angle, cosines to the gradients, and
      ``squared_error``, of the slope to the gradient of all examples, where that of a
      batch's gradient is 1; that is left out without a slope.
    """
    loss_fn = loss_of(task.network)
    training, _ = data_of(task, seed)
    batches = sharpness.split_batches(training, task.batch)
    of_batches = sharpness.friendliness(loss_fn, params, batches, perturbation)
    of_all = sharpness.friendliness(loss_fn, params, training, perturbation)

    def squared_error(slope: Params) -> float:
        return float(sharpness.squared_error(loss_fn, params, training, slope))

    errors = [
        squared_error(jax.grad(loss_fn)(params, (inputs, labels)))
        for inputs, labels in zip(
            *(np.split(np.asarray(x), task.training // task.batch) for x in training),
            strict=True,
        )
    ]
    return {
        "lowered": float(of_batches.lowered),
        "misaligned": float(of_batches.misaligned),
        "cosine_to_batch": float(of_batches.cosines.mean()),
        "cosine_to_full_gradient": float(of_all.cosines[0]),
    } | (
        {"squared_error": squared_error(slope) / float(np.mean(errors))}
        if slope is not None
        else {}
    )


def landscape(task: Task, params: Params, seed: int) -> dict[str, Any]:
    """For pictures: ``plane``, rises of the loss on a plane, and ``spectrum``.

    The plane is spanned by the same two random, filter-normalized directions for all
    solutions, from −1 to 1; the spectrum is a pair of eigenvalues and their density.
    """
    loss_fn = loss_of(task.network)
    training, _ = data_of(task, seed)
    steps = np.linspace(-1, 1, PLANE)
    directions = [
        sharpness.filter_normalized(key, params)
        for key in jax.random.split(jax.random.key(1))
    ]
    losses = sharpness.on_plane(
        loss_fn, params, training, *directions, steps, steps
    ).losses
    density = sharpness.spectral_density(
        sharpness.hessian(loss_fn, params, training),
        params,
        num_samples=4,
        bandwidth=0.02,
        num_points=1024,
    )
    shown = np.asarray(density.density) > 1e-7 * np.max(density.density)
    return {
        "plane": np.round(losses - losses[PLANE // 2, PLANE // 2], 4).tolist(),
        "spectrum": [
            np.round(density.grid[shown], 4).tolist(),
            [float(f"{value:.3g}") for value in density.density[shown]],
        ],
    }
