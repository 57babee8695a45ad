"""Steps that train a part of a network, and gradients of another form.

Adapters of rank 4 on two layers of 256 × 256, which are in the same tree and frozen by
Optax; and Functional SAM on a perceptron of ten layers of 128 × 128, in one part and in
four microbatches. All on one device, in float32, around SGD with momentum.
:mod:`benchmarks.budgets` keeps the figures.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_vasso as ov
from benchmarks import measuring
from benchmarks.optimizers import BASE, RECIPES

PyTree = Any
RANK = 4
ADAPTED: dict[str, Callable[..., optax.GradientTransformation]] = {
    "SGD": lambda base: base,
    "SAM": RECIPES["SAM"],
    "lagged VaSSO": RECIPES["lagged VaSSO"],
    "balanced SGD": lambda base: ov.factors.balanced(
        base, learning_rate=0.01, alpha=1.0
    ),
}


def measure() -> Iterator[tuple[str, measuring.Measures]]:
    """(row, figures) of every step."""
    for name, make in ADAPTED.items():
        yield f"adapters: {name}", adapted(make)
    for how, parts in {"": 1, ", 4 microbatches": 4}.items():
        plain, row = (functional(name, parts) for name in ("SGD", "SAM"))
        # XLA counts the body of a loop once: both sides have the same loop.
        gradients = round(row["operations"] / plain["operations"], 4)
        yield f"Functional SAM{how}", row | {"operations in gradients": gradients}


def adapted(
    make: Callable[..., optax.GradientTransformation],
) -> measuring.Measures:
    """A step that trains adapters; what it holds in copies of them."""
    width, examples = 256, 1024
    layer = {
        "frozen": jnp.ones((width, width)),
        "lora_a": jnp.ones((width, RANK)),
        "lora_b": jnp.ones((RANK, width)),
    }
    params = {"layer0": layer, "layer1": layer}
    labels = {name: {key: key for key in layer} for name in params}
    train = {"lora_a": BASE, "lora_b": BASE}
    base = optax.partition({"frozen": optax.set_to_zero(), **train}, labels)
    optimizer = make(base)

    def loss_fn(params: PyTree, batch: PyTree) -> jax.Array:
        x, y = batch
        for layer in params.values():
            low_rank = x @ layer["lora_a"] @ layer["lora_b"]
            x = jnp.tanh(x @ layer["frozen"] + low_rank)
        return jnp.mean((x - y) ** 2)

    example = jnp.ones((examples, width))
    state = ov.init_train_state(params, optimizer)
    step = ov.make_train_step(loss_fn, optimizer)
    row = measuring.counts(step.lower(state, (example, example)).compile())
    adapters = [layer[name] for layer in params.values() for name in train]
    size = measuring.tree_bytes(adapters)
    return row | {
        "state in adapters": round(measuring.tree_bytes(state.opt_state) / size, 4),
        "temporary in adapters": round(row["temporary_bytes"] / size, 4),
        "evaluations": round(row["operations"] / (4 * examples * width**2), 4),
    }


def functional(name: str, parts: int) -> measuring.Measures:
    """A step of Functional SAM, or of SGD on the same loss.

    The batch is so large that passes over the parameters do not count.
    """
    width, examples = 128, 16_384
    params = [jnp.ones((width, width)) / width] * 10
    batch = (jnp.ones((examples, width)), jnp.ones((examples, width)))

    def network(params: PyTree, batch: PyTree) -> jax.Array:
        x, _ = batch
        for weights in params:
            x = jnp.tanh(x @ weights)
        return x

    def head(outputs: jax.Array, batch: PyTree) -> jax.Array:
        return jnp.mean((outputs - batch[1]) ** 2)

    def loss_fn(params: PyTree, batch: PyTree) -> jax.Array:
        return head(network(params, batch), batch)

    optimizer, loss, gradient = (
        (BASE, loss_fn, ov.train.whole_batch)
        if name == "SGD"
        else (RECIPES["SAM"](BASE), head, ov.train.functional(network))
    )
    if parts > 1:
        gradient = ov.train.microbatched(parts, gradient)
    state = ov.init_train_state(params, optimizer)
    step = ov.make_train_step(loss, optimizer, gradient=gradient)
    return measuring.counts(step.lower(state, batch).compile())
