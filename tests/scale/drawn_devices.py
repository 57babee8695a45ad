"""Drawn hyperparameters on one device and on eight, in one batch and in four.

    python tests/scale/drawn_devices.py 30 vasso lagged_vasso

The number of host devices has to be set before JAX starts, so this is a program of its
own. It prints as JSON how far, relative to the parameters, each route was from the
training on one device at most.
"""
# ruff: noqa: E402

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, PartitionSpec as P
from test_common import EVERY

import optax_vasso as ov

STEPS, EXAMPLES = 4, 32
SHAPES = {"in": (8, 16), "bias": (16,), "out": (16, 8)}


def loss_fn(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["in"] + params["bias"][None])
    return jnp.mean((hidden @ params["out"] - y) ** 2)


def draw(seed):
    """Parameters, batches, a radius and a rate."""
    rng = np.random.default_rng(seed)
    scale = 10 ** rng.uniform(-2, 0)
    params = {name: scale * rng.normal(size=size) for name, size in SHAPES.items()}
    batches = rng.normal(size=(STEPS, 2, EXAMPLES, 8))
    return params, batches, 10 ** rng.uniform(-4, 0), 10 ** rng.uniform(-3, -1)


def routes(optimizer):
    """Each route: its step, and what places a state and a batch."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shapes = {name: jnp.zeros(size) for name, size in SHAPES.items()}
    fsdp = ov.train.fsdp_specs(shapes, mesh)

    def on(specs):
        return (
            lambda state: ov.train.shard_state(state, optimizer, mesh, specs),
            lambda batch: ov.train.shard_batch(batch, mesh),
        )

    def alone(tree):
        return tree

    step = ov.make_train_step(loss_fn, optimizer)
    parts = ov.make_train_step(loss_fn, optimizer, gradient=ov.train.microbatched(4))
    return {
        "one device": (step, alone, alone),
        "eight devices": (step, *on(P())),
        "eight devices, divided parameters": (step, *on(fsdp)),
        "microbatches": (parts, alone, alone),
        "microbatches on eight devices": (parts, *on(fsdp)),
    }


def trained(optimizer, route, seed):
    step, place, place_batch = route
    params, batches, rho, rate = draw(seed)
    state = ov.init_train_state(params, optimizer)
    drawn = {"rho": jnp.asarray(rho), "rate": jnp.asarray(rate)}
    numbers = state.opt_state.hyperparams
    opt_state = state.opt_state._replace(hyperparams={**numbers, **drawn})
    state = place(state._replace(opt_state=opt_state))
    for x, y in batches:
        state, _ = step(state, place_batch((x, y)))
    clean = ov.eval_params(state.opt_state, state.params)
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, clean))]


def main(count, names):
    """The largest difference of each method and route."""
    apart = {}
    for name in names:

        @optax.inject_hyperparams
        def optimizer(rho, rate, name=name):
            return EVERY[name](optax.sgd(rate, momentum=0.9), rho=rho)

        made = optimizer(rho=0.1, rate=0.1)
        of_name = routes(made)
        for seed in range(count):
            expected, *others = (
                trained(made, route, seed) for route in of_name.values()
            )
            for route, found in zip(list(of_name)[1:], others, strict=True):
                pairs = zip(found, expected, strict=True)
                worst = max(np.max(abs(a - e)) / np.max(abs(e)) for a, e in pairs)
                key = f"{name}: {route}"
                apart[key] = max(apart.get(key, 0.0), float(worst))
    print(json.dumps(apart))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
