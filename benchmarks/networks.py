"""The networks on which steps are compared: pure functions of their parameters.

:mod:`benchmarks.in_torch` has the perceptron and the byte-level transformer as well,
:mod:`benchmarks.plain_networks` the larger ones, which do not need Flax.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.plain_networks import Problem
from benchmarks.transformer import transformer_problem
from experiments.harness.networks import cross_entropy, mlp
from experiments.vision import models


def perceptron(batch: int = 50, width: int = 256) -> Problem:
    """The perceptron of the digits experiment, 64-256-256-10, on random inputs."""
    random = np.random.default_rng(0)
    network = mlp(64, width, width, 10)
    params = jax.tree.map(jnp.asarray, network.init(random))
    data = (
        jnp.asarray(random.standard_normal((batch, 64), np.float32)),
        jnp.asarray(random.integers(0, 10, batch)),
    )

    def loss_fn(params, batch):
        return cross_entropy(network.logits(params, batch[0]), batch[1])

    return Problem(f"perceptron, batch {batch}", params, data, loss_fn)


def resnet(batch: int = 16) -> Problem:
    """ResNet-18 for images of 32 × 32, with the statistics of the batch."""
    random = np.random.default_rng(0)
    model = models.create("resnet18", 10)
    images = jnp.asarray(random.standard_normal((batch, 32, 32, 3), np.float32))
    variables = jax.jit(model.init, static_argnames="train")(
        jax.random.key(0), images[:1], train=False
    )

    def loss_fn(params, batch):
        logits, _ = model.apply(
            {**variables, "params": params}, batch[0], True, mutable=["batch_stats"]
        )
        return cross_entropy(logits, batch[1])

    data = images, jnp.asarray(random.integers(0, 10, batch))
    name = f"ResNet-18, batch {batch}, float32"
    return Problem(name, variables["params"], data, loss_fn)


def transformer(width: int, batch: int, length: int, blocks: int = 4) -> Problem:
    """The byte-level transformer."""
    return transformer_problem(width, batch, length, blocks)
