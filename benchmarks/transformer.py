"""The problem of the benchmarks: a byte-level transformer without positions.

Next-byte cross-entropy on random bytes. Four blocks of width 128 have 0.86 M
parameters, of width 256 3.3 M.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.plain_networks import Problem
from experiments.harness.transformer import Transformer

PyTree = Any


def transformer_problem(
    width: int, batch: int, length: int, blocks: int = 4
) -> Problem:
    """A transformer of ``width`` on random bytes."""
    model = Transformer(width, blocks)
    tokens = jax.random.randint(jax.random.PRNGKey(1), (batch, length + 1), 0, 256)
    params = jax.jit(model.init)(jax.random.PRNGKey(0), tokens[:, :-1])["params"]

    def loss_fn(params: PyTree, tokens: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(losses)

    return Problem(f"width {width}, batch {batch} × {length}", params, tokens, loss_fn)


def small() -> Problem:
    """0.86 M parameters, batch 16 × 64."""
    return transformer_problem(128, 16, 64)


def large() -> Problem:
    """3.3 M parameters, batch 2 × 32: many parameters for the work of a gradient."""
    return transformer_problem(256, 2, 32)
