"""Eight devices: a bad batch on one, and the scalars that a step reduces; prints JSON.

The number of host devices has to be set before JAX starts, so this cannot share the
process of the tests.
"""
# ruff: noqa: E402

import itertools
import json
import re
import sys

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

import optax_vasso as ov

MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
FOUR = jax.make_mesh(
    (4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]
)
METHODS = {
    "sam": ov.sam,
    "vasso": ov.vasso,
    "lagged_vasso": ov.lagged_vasso,
    "asam": ov.asam,
}


def skipping():
    from test_local_skip import BAD, GOOD, OPTIMIZER, loss_fn

    state = ov.train.init_local_state(
        jnp.asarray([1.0, 2.0]), OPTIMIZER, groups=4, mesh=FOUR
    )
    step = ov.train.make_local_train_step(loss_fn, OPTIMIZER, mesh=FOUR)
    points, finite, difference = [np.asarray(state.params)], [], 0.0
    for batch in (GOOD, BAD, GOOD):
        state, metrics = step(state, ov.train.shard_batch(batch, FOUR))
        finite.append(bool(metrics["finite"]))
        base_state = state.opt_state.optimizer_state.optimizer_state
        for leaf in jax.tree.leaves((state.params, base_state)):
            copies = np.stack([np.asarray(s.data) for s in leaf.addressable_shards])
            # NaN would be no difference for max.
            difference = max(difference, float(not (copies == copies[0]).all()))
        points.append(np.asarray(state.params))
    moves = [float(np.abs(b - a).max()) for a, b in itertools.pairwise(points)]
    return {
        "finite": finite,
        "difference between devices": difference,
        "moved by the bad batch": moves[1],
        "moved by the good batches": min(moves[0], moves[2]),
    }


def network_loss(params, batch):
    x = batch
    for weights in params:
        x = jnp.tanh(x @ weights)
    return jnp.mean(x**2)


def scalar_all_reduces(optimizer, leaves):
    """All-reduces of a compiled step whose results are scalars or stacks of them."""
    params = [0.1 * jnp.ones((8, 8)) for _ in range(leaves)]
    specs = ov.train.fsdp_specs(params, MESH)
    state = ov.train.shard_state(
        ov.init_train_state(params, optimizer), optimizer, MESH, specs
    )
    shardings = ov.train.state_shardings(state, optimizer, MESH, specs)
    step = ov.make_train_step(network_loss, optimizer, state_shardings=shardings)
    batch = ov.train.shard_batch(jnp.ones((16, 8)), MESH)
    hlo = step.lower(state, batch).compile().as_text()
    count = 0
    for shapes in re.findall(r"= (.*?) all-reduce(?:-start)?\(", hlo):
        sizes = [
            int(np.prod([int(n) for n in dims.split(",") if n]))
            for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)
        ]
        count += max(sizes) < 64  # less than a leaf
    return count


if __name__ == "__main__":
    results = skipping()
    base = optax.sgd(0.1, momentum=0.9)
    results["scalar all-reduces"] = {
        f"{name} {leaves}": scalar_all_reduces(method(base), leaves)
        for name, method in METHODS.items()
        for leaves in (6, 12)
    }
    json.dump(results, sys.stdout, indent=1)
