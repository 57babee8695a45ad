"""Training that goes on from a checkpoint on another mesh: a program, prints JSON.

From a checkpoint of ours, and from one that Orbax writes in the background. The
arguments are a folder for them, and the meshes as ``2x4``. The number of host devices
has to be set before JAX starts, so this cannot share the process of the tests.
"""
# ruff: noqa: E402

import json
import sys
import threading
from unittest import mock

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import AxisType, PartitionSpec as P

import optax_vasso as ov
from optax_vasso.train.checkpoint import checkpoints

BEFORE, AFTER = 3, 3
RNG = np.random.default_rng(0)
PARAMS = {
    "in": jnp.asarray(RNG.normal(size=(8, 16)) * 0.3),
    "bias": jnp.zeros(16),
    "out": jnp.asarray(RNG.normal(size=(16, 8)) * 0.3),
}
BATCHES = [
    (RNG.normal(size=(32, 8)), RNG.normal(size=(32, 8))) for _ in range(BEFORE + AFTER)
]
TENSOR = {
    "in": P("data", "model"),
    "bias": P("model"),
    "out": P("model", "data"),
}
# Of (data, model): saved on the first, continued on others.
FIRST, SECOND = (8, 1), (4, 2)
BASE = optax.adamw(0.01)
OPTIMIZERS = {
    "vasso": ov.vasso(BASE, 0.1, theta=0.4),
    "lagged": ov.lagged_vasso(BASE, 0.1, theta=0.4),
}


def loss_fn(params, batch, key):
    x, y = batch
    hidden = jnp.tanh(x @ params["in"] + params["bias"][None])
    hidden *= jax.random.bernoulli(key, 0.9, hidden.shape)
    return jnp.mean((hidden @ params["out"] - y) ** 2)


class Placed:
    """A state on a mesh, its shardings, and the step for both."""

    def __init__(self, optimizer, shape):
        count = shape[0] * shape[1]
        self.mesh = jax.make_mesh(
            shape,
            ("data", "model"),
            axis_types=(AxisType.Auto,) * 2,
            devices=jax.devices()[:count],
        )
        specs = TENSOR if shape[1] > 1 else ov.train.fsdp_specs(PARAMS, self.mesh)
        state = ov.init_train_state(PARAMS, optimizer, key=jax.random.key(0))
        self.shardings = ov.train.state_shardings(state, optimizer, self.mesh, specs)
        self.state = ov.train.shard_state(state, optimizer, self.mesh, specs)
        self.step = ov.make_train_step(
            loss_fn, optimizer, state_shardings=self.shardings
        )

    def trained(self, state, batches):
        for batch in batches:
            state, _ = self.step(state, ov.train.shard_batch(batch, self.mesh))
        return state


def values(state):
    state = state._replace(key=jax.random.key_data(state.key))
    return [np.array(leaf) for leaf in jax.tree.leaves(state)]


class Unwritten:
    """While it is open, whoever is about to write to a file waits."""

    def __enter__(self):
        self.may_write, open_file = threading.Event(), tensorstore.open

        def waiting(*args, **kwargs):
            assert self.may_write.wait(300), "the thread that trains is writing"
            return open_file(*args, **kwargs)

        self.patch = mock.patch.object(tensorstore, "open", waiting)
        self.patch.start()

    def __exit__(self, *exception):
        self.may_write.set()
        self.patch.stop()


def compared(restored, other, kept, whole):
    """A restored state with that which was saved, and what both become."""
    found = {
        "same bits": all(
            np.array_equal(a, b) for a, b in zip(kept, values(restored), strict=True)
        ),
        "placed": all(
            leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            for leaf, sharding in zip(
                jax.tree.leaves(restored),
                jax.tree.leaves(other.shardings),
                strict=True,
            )
        ),
    }
    after = values(other.trained(restored, BATCHES[BEFORE:]))
    return found | {
        "difference": max(
            float(np.max(np.abs(a - b), initial=0.0))
            for a, b in zip(whole, after, strict=True)
            if a.dtype.kind == "f"
        )
    }


def main(folder, *others):
    meshes = [tuple(map(int, mesh.split("x"))) for mesh in others]
    results = {}
    for name, optimizer in OPTIMIZERS.items():
        first = Placed(optimizer, FIRST)
        store = checkpoints(f"{folder}/{name}", {"recipe": name})
        manager = ocp.CheckpointManager(f"{folder}/{name} in the background")
        saved = first.trained(first.state, BATCHES[:BEFORE])
        store.save(saved)
        kept = values(saved)
        with Unwritten():
            manager.save(BEFORE, args=ocp.args.StandardSave(saved))
            # The step donates its state.
            whole = values(first.trained(saved, BATCHES[BEFORE:]))
            unwritten = manager.is_saving_in_progress()
        manager.wait_until_finished()
        for shape in meshes:
            case = f"{name}, {shape[0]} × {shape[1]}"
            other = Placed(optimizer, shape)
            restored = store.restore(other.state)
            results[case] = compared(restored, other, kept, whole)
            if shape == SECOND:
                like = jax.tree.map(
                    lambda leaf, sharding: jax.ShapeDtypeStruct(
                        leaf.shape, leaf.dtype, sharding=sharding
                    ),
                    other.state,
                    other.shardings,
                )
                restored = manager.restore(BEFORE, args=ocp.args.StandardRestore(like))
                found = compared(restored, other, kept, whole)
                results[f"{case}, in the background"] = found | {"unwritten": unwritten}
        store.close()
        manager.close()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
