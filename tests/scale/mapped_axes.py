"""Four devices under the default checks of shard_map; prints JSON.

The number of host devices has to be set before JAX starts, so this cannot share the
process of the tests.
"""
# ruff: noqa: E402

import functools
import json
import sys
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, PartitionSpec as P

import optax_vasso as ov
from optax_vasso._internal.mapped import vary

sys.path.insert(0, str(Path(__file__).parents[1]))
import test_common as common

STEPS = 4
MESH = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
GRID = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
RNG = np.random.default_rng(0)
BATCH = jnp.asarray(RNG.normal(size=(16, 3)))
STARTS = jax.tree.map(
    lambda leaf: leaf[None] + 0.1 * RNG.normal(size=(4, *leaf.shape)), common.start()
)
SGD = optax.sgd(0.05, momentum=0.9)
DESCENTS = {
    "gsam": ov.descent.gsam_descent(0.3),
    "weighted": ov.descent.weighted_descent(0.7),
    "looksam": ov.descent.looksam_descent(0.3),
}


def loss_fn(params, batch):
    """A bowl whose minimum every example pulls elsewhere."""
    pulls = jnp.mean(batch * params["bias"][0][None], axis=1)
    return common.loss(params) + jnp.mean(jnp.cosh(pulls))


def over_devices(function, in_specs, out_specs, mesh=MESH):
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    )


def largest_difference(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    differences = [
        np.abs(np.asarray(a, float) - np.asarray(b, float)).ravel()
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    ]
    return float(np.max(np.concatenate(differences)))


def train(optimizer, loss, params, state):
    """Some steps of a loop that knows nothing of devices, in one scan."""
    value_and_grad = jax.value_and_grad(loss)

    def step(carry, _):
        params, state = carry
        value, grads = value_and_grad(params)
        updates, state = optimizer.update(
            grads, state, params, grad_fn=value_and_grad, value=value
        )
        return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, state), length=STEPS)


def invariant(name):
    """Shared parameters and a divided batch, against the whole batch at once."""
    optimizer = common.make(name)

    def on_device(params, state, batch):
        def loss(params):
            return jax.lax.pmean(loss_fn(params, batch), "data")

        return train(optimizer, loss, params, state)

    def alone(params, state, batch):
        return train(optimizer, lambda p: loss_fn(p, batch), params, state)

    args = common.start(), optimizer.init(common.start()), BATCH
    mapped = over_devices(on_device, (P(), P(), P("data")), P())
    return largest_difference(mapped(*args), jax.jit(alone)(*args))


def varying(name):
    """A training of its own on each device, against the same ones under vmap."""
    optimizer = common.make(name)

    def alone(params, batch):
        return train(
            optimizer, lambda p: loss_fn(p, batch), params, optimizer.init(params)
        )

    def on_device(*trees):
        one = alone(*jax.tree.map(lambda leaf: leaf[0], trees))
        return jax.tree.map(lambda leaf: leaf[None], one)

    args = STARTS, BATCH.reshape(4, 4, 3)
    mapped = over_devices(on_device, P("data"), P("data"))
    return largest_difference(mapped(*args), jax.jit(jax.vmap(alone))(*args))


def run(step, state, batch=BATCH):
    """Some steps of a train step: the parameters after them, and the last metrics."""
    for _ in range(STEPS):
        state, metrics = step(state, batch)
    return state.params, metrics


def synchronized(optimizer, axis="data", mesh=MESH, inner=ov.train.whole_batch):
    """The train step inside shard_map, against the same on one device."""
    step = ov.make_train_step(
        loss_fn, optimizer, gradient=ov.train.synchronized(axis, inner)
    )
    actual = run(
        over_devices(step, (P(), P(axis)), P(), mesh),
        ov.init_train_state(common.start(), optimizer),
    )
    plain = ov.make_train_step(loss_fn, optimizer)
    return largest_difference(
        actual, run(plain, ov.init_train_state(common.start(), optimizer))
    )


def pmapped(optimizer):
    """The same under pmap, where JAX does not track what varies."""
    step = ov.make_train_step(
        loss_fn, optimizer, gradient=ov.train.synchronized("data")
    )
    state = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (4, *leaf.shape)),
        ov.init_train_state(common.start(), optimizer),
    )
    actual, _ = run(jax.pmap(step, axis_name="data"), state, BATCH.reshape(4, 4, 3))
    plain = ov.make_train_step(loss_fn, optimizer)
    expected, _ = run(plain, ov.init_train_state(common.start(), optimizer))
    repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (4, *x.shape)), expected)
    return largest_difference(actual, repeated)


def local(optimizer, mesh=None):
    """Parameters and metrics after a local training, whose replicas agree."""
    state = ov.train.init_local_state(
        common.start(), optimizer, mesh.shape["data"] if mesh else 4, mesh=mesh
    )
    step = ov.train.make_local_train_step(loss_fn, optimizer, mesh=mesh)
    batch = BATCH if mesh is None else ov.train.shard_batch(BATCH, mesh)
    for _ in range(STEPS):
        state, metrics = step(state, batch)
    for leaf in jax.tree.leaves((state.params, metrics)):
        copies = np.stack([np.asarray(s.data) for s in leaf.addressable_shards])
        # To the bit: what drifts apart begins with the last.
        assert (copies == copies[0]).all(), copies
    return state.params, metrics


def local_groups(optimizer):
    """A local training on four devices, against four groups on one."""
    return largest_difference(local(optimizer, MESH), local(optimizer))


def local_descent(name):
    """Local SAM with a descent transform, against a loop over the parts."""
    descent = DESCENTS[name]
    base = optax.chain(descent, SGD)
    averaged = ov.train.average_over(base, "data")
    actual, _ = local(ov.sharpness_aware(averaged, ov.sam_perturb(0.1)), MESH)
    grad_fn = jax.jit(jax.grad(loss_fn))
    params = common.start()
    state = base.init(params)
    for _ in range(STEPS):
        clean, perturbed = [], []
        for part in jnp.split(BATCH, 4):
            clean.append(grad_fn(params, part))
            scale = 0.1 / optax.tree.norm(clean[-1])
            point = jax.tree.map(lambda x, g, s=scale: x + s * g, params, clean[-1])
            perturbed.append(grad_fn(point, part))
        clean, perturbed = (
            jax.tree.map(lambda *parts: sum(parts) / 4, *grads)
            for grads in (clean, perturbed)
        )
        updates, state = base.update(
            perturbed, state, params, clean_grads=clean, ascended=True
        )
        params = optax.apply_updates(params, updates)
    return largest_difference(actual, params)


def own_loop():
    """average_over in a user's loop that differentiates at varying parameters."""
    optimizer = ov.sam(ov.train.average_over(SGD, "data"), 0.1)

    def step(params, state, batch):
        grad_fn = jax.grad(lambda p: loss_fn(p, batch))
        own = vary(params, frozenset({"data"}))
        updates, state = optimizer.update(grad_fn(own), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    params, state = common.start(), optimizer.init(common.start())
    mapped = over_devices(step, (P(), P(), P("data")), P())
    for _ in range(STEPS):
        params, state = mapped(params, state, BATCH)
    return largest_difference(params, local(optimizer)[0])


def mesh_with_another_axis():
    optimizer = ov.vasso(ov.train.average_over(SGD, "data"), 0.1)
    state = ov.train.init_local_state(common.start(), optimizer, 2, mesh=GRID)
    spread = jax.NamedSharding(GRID, P("model"))
    kernel = jax.device_put(state.params["kernel"], spread)
    state = state._replace(params=state.params | {"kernel": kernel})
    step = ov.train.make_local_train_step(loss_fn, optimizer, mesh=GRID)
    actual = run(step, state, ov.train.shard_batch(BATCH, GRID))
    groups = ov.train.init_local_state(common.start(), optimizer, 2)
    return largest_difference(
        actual, run(ov.train.make_local_train_step(loss_fn, optimizer), groups)
    )


def local_with(base, **kwargs):
    averaged = ov.train.average_over(base, "data")
    chain = optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(0.1))
    return ov.sharpness_aware(averaged, chain, **kwargs)


SAM = ov.sam(SGD, 0.1)
# The default search takes ten times as long to compile; local training has it.
SEARCH = optax.scale_by_backtracking_linesearch(max_backtracking_steps=9)
CASES = {
    **{f"invariant {n}": functools.partial(invariant, n) for n in common.EVERY},
    **{f"varying {n}": functools.partial(varying, n) for n in common.EVERY},
    "synchronized": lambda: synchronized(SAM),
    "synchronized, microbatches": lambda: synchronized(
        SAM, inner=ov.train.microbatched(2)
    ),
    "synchronized, apart": lambda: synchronized(SAM, inner=ov.train.apart()),
    "synchronized, two axes": lambda: synchronized(SAM, ("data", "model"), GRID),
    "pmap, line search": lambda: pmapped(ov.sam(optax.lbfgs(linesearch=SEARCH), 0.1)),
    **{f"local {n}": functools.partial(local_descent, n) for n in DESCENTS},
    "local, line search": lambda: local_groups(local_with(optax.lbfgs())),
    "local, adaptive gate": lambda: local_groups(
        local_with(SGD, gate=ov.gate.adaptive(0.1))
    ),
    "local, tracked": lambda: local_groups(
        local_with(optax.chain(ov.metrics.track(*common.MEASURES, every=3), SGD))
    ),
    "local, skipping": lambda: local_groups(
        ov.wrappers.skip_nonfinite(local_with(SGD))
    ),
    "own loop": own_loop,
    "mesh with another axis": mesh_with_another_axis,
}

if __name__ == "__main__":
    chosen = sys.argv[1:] or CASES
    json.dump({name: CASES[name]() for name in chosen}, sys.stdout, indent=1)
