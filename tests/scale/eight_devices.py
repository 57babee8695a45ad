"""What eight devices give, compared with one: run as a program, prints JSON.

The number of host devices has to be set before JAX starts, so this cannot share the
process of the tests.
"""
# ruff: noqa: E402

import json
import sys

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, PartitionSpec as P, reshard

import optax_vasso as ov
from optax_vasso._internal.description import digest

STEPS = 8
RNG = np.random.default_rng(0)
PARAMS = {
    "in": jnp.asarray(RNG.normal(size=(8, 16)) * 0.3),
    "bias": jnp.zeros(16),
    "out": jnp.asarray(RNG.normal(size=(16, 8)) * 0.3),
}
BATCHES = [(RNG.normal(size=(32, 8)), RNG.normal(size=(32, 8))) for _ in range(STEPS)]
BASE = optax.sgd(0.1, momentum=0.9)
RECIPES = {
    "vasso": ov.vasso(BASE, 0.1, theta=0.4),
    "friendly": ov.friendly_sam(BASE, 0.1),
    "evasso": ov.evasso(BASE, 0.1, probability=0.5),
    "lagged": ov.lagged_vasso(BASE, 0.1, theta=0.4),
    "adam": ov.vasso(optax.adamw(0.01), 0.1, theta=0.4),
}
RESULTS: dict[str, float] = {}


def loss_fn(params, batch, model_state):
    x, y = batch
    hidden = jnp.tanh(x @ params["in"] + params["bias"][None])
    mean = 0.9 * model_state["mean"] + 0.1 * jnp.mean(x, axis=0)
    return jnp.mean((hidden @ params["out"] - y) ** 2), {"mean": mean}


def gathered_loss(params, batch, model_state):
    """The same for explicit axes, where the model says when weights are gathered."""
    params = jax.tree.map(lambda w: reshard(w, P()), params)
    return loss_fn(params, batch, model_state)


def initial(optimizer, init=ov.init_train_state, **kwargs):
    return init(PARAMS, optimizer, model_state={"mean": jnp.zeros(8)}, **kwargs)


def flat(*trees):
    leaves = jax.tree.leaves(trees)
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in leaves])


def train(step, state, place=lambda batch: batch):
    trajectory = []
    for batch in BATCHES:
        state, metrics = step(state, place(batch))
        trajectory.append(flat(state.params, state.model_state, metrics["loss"]))
    return np.stack(trajectory), state, metrics


def compare(name, trajectory, reference):
    RESULTS[name] = float(np.max(np.abs(trajectory - reference)))


def synchronized():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    grid = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    tensor = {"in": P(None, "model"), "bias": P("model"), "out": P("model", None)}
    references = {}
    for recipe, optimizer in RECIPES.items():
        step = ov.make_train_step(loss_fn, optimizer)
        reference, _, _ = train(step, initial(optimizer))
        references[recipe] = reference
        layouts = {
            "data": (mesh, P()),
            "fsdp": (mesh, ov.train.fsdp_specs(PARAMS, mesh)),
        }
        if recipe == "vasso":
            layouts["tensor"] = (grid, tensor)
        for layout, (devices, specs) in layouts.items():
            state = ov.train.shard_state(initial(optimizer), optimizer, devices, specs)
            shardings = ov.train.state_shardings(state, optimizer, devices, specs)
            trajectory, state, _ = train(
                ov.make_train_step(loss_fn, optimizer, state_shardings=shardings),
                state,
                lambda batch, devices=devices: ov.train.shard_batch(batch, devices),
            )
            compare(f"{recipe} {layout}", trajectory, reference)
            same = jax.tree.map(
                lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, shardings
            )
            RESULTS[f"{recipe} {layout} shardings lost"] = float(
                sum(not kept for kept in jax.tree.leaves(same))
            )
    optimizer, reference = RECIPES["vasso"], references["vasso"]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        for layout, specs in (
            ("data", P()),
            ("fsdp", ov.train.fsdp_specs(PARAMS, mesh)),
        ):
            trajectory, state, _ = train(
                ov.make_train_step(gathered_loss, optimizer),
                ov.train.shard_state(initial(optimizer), optimizer, mesh, specs),
                lambda batch: ov.train.shard_batch(batch, mesh),
            )
            compare(f"vasso explicit {layout}", trajectory, reference)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    trajectory, _, _ = train(
        ov.make_train_step(loss_fn, optimizer, gradient=ov.train.microbatched(2)),
        ov.train.shard_state(initial(optimizer), optimizer, mesh),
        lambda batch: ov.train.shard_batch(batch, mesh),
    )
    compare("vasso data microbatched", trajectory, reference)
    # Every device splits its own four examples.
    split_step = ov.make_train_step(loss_fn, optimizer, **ov.train.split_batch(0.25))
    alone, _, _ = train(split_step, initial(optimizer))
    trajectory, _, _ = train(
        split_step,
        ov.train.shard_state(initial(optimizer), optimizer, mesh),
        lambda batch: ov.train.shard_batch(batch, mesh),
    )
    compare("vasso data split", trajectory, alone)
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit):
        trajectory, _, _ = train(
            ov.make_train_step(gathered_loss, optimizer, **ov.train.split_batch(0.25)),
            ov.train.shard_state(initial(optimizer), optimizer, explicit),
            lambda batch: ov.train.shard_batch(batch, explicit),
        )
    compare("vasso explicit split", trajectory, alone)
    pmapped = jax.pmap(
        ov.make_train_step(loss_fn, optimizer, gradient=ov.train.synchronized("data")),
        axis_name="data",
    )
    trajectory, _, _ = train(
        lambda state, batch: pmapped(state, batch), copies(initial(optimizer)), split
    )
    # Every device holds the whole result.
    compare("vasso pmap", unstack(trajectory), np.repeat(reference[None], 8, 0))
    return reference


def copies(state):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), state)


def split(batch):
    return jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)


def unstack(trajectory):
    """(steps, leaves with the devices in front) -> (devices, steps, values)."""
    sizes = [16, 8 * 16, 16 * 8, 8, 1]
    blocks, start = [], 0
    for size in sizes:
        block = trajectory[:, start : start + 8 * size].reshape(STEPS, 8, size)
        blocks.append(block)
        start += 8 * size
    return np.moveaxis(np.concatenate(blocks, axis=2), 1, 0)


def loop_over_shards():
    """Local VaSSO with SGD with momentum, written out."""
    params, trace = PARAMS, jax.tree.map(jnp.zeros_like, PARAMS)
    mean, averages, trajectory = jnp.zeros(8), [None] * 8, []
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    for x, y in BATCHES:
        losses, means, descents = [], [], []
        for m in range(8):
            shard = (x[4 * m : 4 * m + 4], y[4 * m : 4 * m + 4])
            (loss, state), g = value_and_grad(params, shard, {"mean": mean})
            d = averages[m]
            d = g if d is None else jax.tree.map(lambda d, g: 0.6 * d + 0.4 * g, d, g)
            averages[m] = d
            scale = 0.1 / optax.tree.norm(d)
            point = jax.tree.map(lambda p, d, s=scale: p + s * d, params, d)
            _, descent = value_and_grad(point, shard, {"mean": mean})
            losses.append(loss)
            means.append(state["mean"])
            descents.append(descent)
        g = jax.tree.map(lambda *gs: sum(gs) / 8, *descents)
        trace = jax.tree.map(lambda t, g: 0.9 * t + g, trace, g)
        params = jax.tree.map(lambda p, t: p - 0.1 * t, params, trace)
        mean = sum(means) / 8
        trajectory.append(flat(params, mean, sum(losses) / 8))
    return np.stack(trajectory)


def local(vasso):
    reference = loop_over_shards()
    optimizer = ov.vasso(ov.train.average_over(BASE, "data"), 0.1, theta=0.4)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        state = initial(optimizer, ov.train.init_local_state, groups=8, mesh=mesh)
        step = ov.train.make_local_train_step(loss_fn, optimizer, mesh=mesh)
        trajectory, state, _ = train(
            step, state, lambda batch, mesh=mesh: ov.train.shard_batch(batch, mesh)
        )
        compare(f"local mesh {kind.name}", trajectory, reference)
    RESULTS["local averages per device"] = float(
        optax.tree.get(state, "ema")["in"].sharding.shard_shape((8, 8, 16))[0]
    )
    trajectory, _, _ = train(
        ov.train.make_local_train_step(loss_fn, optimizer),
        initial(optimizer, ov.train.init_local_state, groups=8),
    )
    compare("local groups on one device", trajectory, reference)
    # An axis that is mapped, and one that is left to the compiler.
    grid = jax.make_mesh((8, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    gradients = {"microbatched": ov.train.microbatched(2), "apart": ov.train.apart()}
    for name, gradient in gradients.items():
        trajectory, _, _ = train(
            ov.train.make_local_train_step(
                loss_fn, optimizer, mesh=grid, gradient=gradient
            ),
            initial(optimizer, ov.train.init_local_state, groups=8, mesh=grid),
            lambda batch: ov.train.shard_batch(batch, grid),
        )
        compare(f"local {name} on a grid", trajectory, reference)
    compare("local differs from synchronized", reference, vasso)


def one_perturbation_per_microbatch():
    """Under FSDP, against one device: m-sharpness without replicated parameters."""
    own = ov.train.microbatched(4, ov.train.perturbed(ov.sam_perturb(0.1)))
    step = ov.make_train_step(loss_fn, BASE, gradient=own)
    reference, _, _ = train(step, initial(BASE))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    state = initial(BASE)
    state = ov.train.shard_state(
        state, BASE, mesh, ov.train.fsdp_specs(state.params, mesh)
    )
    batch = ov.train.shard_batch(BATCHES[0], mesh)
    memory = step.lower(state, batch).compile().memory_analysis()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((state, BATCHES[0])))
    RESULTS["fsdp arguments per device"] = memory.argument_size_in_bytes / held
    trajectory, _, _ = train(
        step, state, lambda batch: ov.train.shard_batch(batch, mesh)
    )
    compare("a perturbation per microbatch, fsdp", trajectory, reference)


def digests():
    """How many digests one array has on different meshes."""
    found = {int(digest(PARAMS["in"]))}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
        for spec in (P(), P("data"), P("model", "data"), P(None, ("data", "model"))):
            placed = jax.device_put(PARAMS["in"], jax.NamedSharding(mesh, spec))
            found.add(int(digest(placed)))
    RESULTS["layouts with a digest of their own"] = len(found)


if __name__ == "__main__":
    local(synchronized())
    one_perturbation_per_microbatch()
    digests()
    json.dump(RESULTS, sys.stdout, indent=1)
