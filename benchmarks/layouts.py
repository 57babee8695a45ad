"""What a step sends and holds on a pod, by method and layout, without any pod.

    python -m benchmarks.layouts --publish

A decoder of GPT-2's shape with its layers in a scan and rematerialized, in float32,
around AdamW: 3.4 M parameters on 8 devices (FSDP), on 4 × 2 and on 16 × 4 (FSDP ×
tensor parallel), in one part and in four microbatches, and 1.0 billion parameters on
16 × 4. Steps are compiled for simulated CPU devices and never run, so that nothing
varies.

Bytes are megabytes of one device. ``collectives`` of tensors stand in the program, that
is, once for all layers of the scan and all microbatches; ``sent`` are the bytes of
their results as often as the step runs them. A collective of scalars is one that moves
nothing else. What the second pass of a norm would send, which runs only where the sum
of squares leaves the range of float32, is not in either. The backends of GPUs and TPUs
merge collectives and turn some of them into others; the ratios are those of the
methods.
"""

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 64)
    # The counts are the same with LLVM's optimizations, which take most of the time.
    jax.config.update("jax_disable_most_optimizations", True)

import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import optax_vasso as ov
from benchmarks import hlo, measuring, plain_networks
from experiments.harness.command_line import some_of
from optax_vasso._internal.trees import map_ascent

PyTree = Any
BASE = optax.adamw(1e-3)
CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), BASE)


class Size(NamedTuple):
    """A network and its batch: tokens are (batch, length + 1)."""

    width: int
    blocks: int
    vocabulary: int
    batch: int
    length: int


class Layout(NamedTuple):
    """Devices along the axes of data (FSDP) and of the model (tensor parallel)."""

    size: Size
    data: int
    model: int
    microbatches: int = 1


SMALL = Size(width=256, blocks=4, vocabulary=1024, batch=64, length=64)
BILLION = Size(width=2048, blocks=18, vocabulary=50_304, batch=64, length=1024)
LAYOUTS = {
    "8": Layout(SMALL, 8, 1),
    "8 in 4 parts": Layout(SMALL, 8, 1, 4),
    "4 × 2": Layout(SMALL, 4, 2),
    "4 × 2 in 4 parts": Layout(SMALL, 4, 2, 4),
    "16 × 4": Layout(SMALL, 16, 4),
    "16 × 4 in 4 parts": Layout(SMALL, 16, 4, 4),
    "1 B on 16 × 4": Layout(BILLION, 16, 4),
}


# Of the matrices one side lies along each axis; the model's alternates, so that two
# products need one sum over it.
SPECS = {
    "tokens": P("model", "data"),
    "positions": P(None, "data"),
    "blocks": {
        "qkv": P(None, "data", None, "model"),
        "out": P(None, "model", "data"),
        "up": P(None, "data", "model"),
        "down": P(None, "model", "data"),
        "up_bias": P(None, "model"),
        "norms": P(),
    },
    "norm": P(),
}


class Method(NamedTuple):
    """An optimizer, how its gradients are taken, and whether each device ascends."""

    optimizer: optax.GradientTransformation
    gradient: Any = ov.train.whole_batch
    is_local: bool = False


APART = ov.train.apart()
BFLOAT16 = {"accumulator_dtype": jnp.bfloat16}
METHODS = {
    "AdamW": Method(BASE),
    "clipped AdamW": Method(CLIPPED),
    "SAM": Method(ov.sam(BASE)),
    "SAM apart": Method(ov.sam(BASE), APART),
    "VaSSO": Method(ov.vasso(BASE)),
    "VaSSO apart": Method(ov.vasso(BASE), APART),
    "VaSSO apart in bfloat16": Method(ov.vasso(BASE, **BFLOAT16), APART),
    "lagged VaSSO": Method(ov.lagged_vasso(BASE)),
    "Momentum-SAM": Method(ov.momentum_sam(BASE)),
    "local SAM": Method(ov.sam(ov.train.average_over(BASE, "data")), is_local=True),
}


def program(method: Method, layout: Layout) -> Any:
    """The compiled step of a method in a layout, from shapes alone."""
    size = layout.size
    mesh = jax.make_mesh(
        (layout.data, layout.model),
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: layout.data * layout.model],
    )
    params = parameters(size)
    gradient = method.gradient
    if layout.microbatches > 1:
        gradient = ov.train.microbatched(layout.microbatches, gradient)
    if method.is_local:
        state, shardings = local_state(method.optimizer, params, mesh)
        step = ov.train.make_local_train_step(
            loss_on(None), method.optimizer, mesh=mesh, gradient=gradient
        )
    else:
        specs = SPECS if layout.model > 1 else ov.train.fsdp_specs(params, mesh)
        state, shardings = global_state(method.optimizer, params, mesh, specs)
        step = ov.make_train_step(
            loss_on(mesh),
            method.optimizer,
            gradient=gradient,
            state_shardings=shardings,
        )
    tokens = jax.ShapeDtypeStruct(
        (size.batch, size.length + 1),
        jnp.int32,
        sharding=NamedSharding(mesh, P("data")),
    )
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        state,
        shardings,
    )
    return step.lower(state, tokens).compile()


def parameters(size: Size) -> PyTree:
    """Shapes of the parameters, in float32."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        plain_networks.gpt_shapes(
            size.width, size.blocks, size.vocabulary, size.length
        ),
        is_leaf=plain_networks.is_shape,
    )


def loss_on(mesh: Mesh | None) -> Callable[[PyTree, jax.Array], jax.Array]:
    """The loss, with the activations of each layer divided as the batch is."""

    def layer(block: Callable[..., Any]) -> Callable[..., Any]:
        def on_mesh(x: jax.Array, weights: PyTree) -> Any:
            if mesh is not None:
                sharding = NamedSharding(mesh, P("data"))
                x = jax.lax.with_sharding_constraint(x, sharding)
            return block(x, weights)

        return jax.checkpoint(on_mesh)

    def loss_fn(params: PyTree, batch: jax.Array) -> jax.Array:
        return plain_networks.gpt_loss(params, batch, layer=layer)

    return loss_fn


def global_state(
    optimizer: optax.GradientTransformation, params: PyTree, mesh: Mesh, specs: PyTree
) -> tuple[PyTree, PyTree]:
    """Shapes and shardings of the train state."""
    state = jax.eval_shape(lambda p: ov.init_train_state(p, optimizer), params)
    return state, ov.train.state_shardings(state, optimizer, mesh, specs)


def local_state(
    optimizer: optax.GradientTransformation, params: PyTree, mesh: Mesh
) -> tuple[PyTree, PyTree]:
    """The same of local ascents: over the data nothing but the ascents is divided."""
    specs = jax.tree.map(
        lambda spec: P(*(None if axis == "data" else axis for axis in spec)),
        SPECS,
        is_leaf=lambda node: isinstance(node, P),
    )
    _, shardings = global_state(optimizer, params, mesh, specs)
    groups = mesh.shape["data"]
    state = jax.eval_shape(
        lambda p: ov.train.init_local_state(p, optimizer, groups), params
    )
    return state, map_ascent(
        shardings,
        lambda sharding: NamedSharding(mesh, P("data", *sharding.spec)),
    )


def measure(method: Method, layout: Layout) -> measuring.Measures:
    """What the compiled step sends and holds."""
    compiled = program(method, layout)
    memory = compiled.memory_analysis()
    sent = hlo.collectives(compiled.as_text())
    whole = measuring.tree_size(parameters(layout.size)) * 4
    return {
        # An all-to-all is one of as many arrays as there are devices.
        "collectives": sum(
            1 if c.kind == "all-to-all" else c.tensors for c in sent if c.tensors
        ),
        "scalars": sum(not c.tensors for c in sent),
        "sent_MB": sum(c.times * c.bytes for c in sent) / 1e6,
        "arguments_MB": memory.argument_size_in_bytes / 1e6,
        "temporary_MB": memory.temp_size_in_bytes / 1e6,
        "shard_MB": whole / 1e6 / (layout.data * layout.model),
    }


def main(arguments: list[str] | None = None) -> None:
    """Compile, count, print, write."""
    parser = measuring.parser("layouts", __doc__)
    parser.add_argument(
        "--layouts", type=some_of(LAYOUTS), default="all", help="or some"
    )
    parser.add_argument(
        "--methods", type=some_of(METHODS), default="all", help="or some"
    )
    parser.add_argument("--json", action="store_true", help="print the figures alone")
    options = measuring.parse(parser, arguments)
    if options.smoke:
        options.layouts, options.methods = ["4 × 2"], ["AdamW", "SAM apart"]
    rows = {}
    for layout in options.layouts:
        for name in options.methods:
            rows[f"{layout}: {name}"] = measure(METHODS[name], LAYOUTS[layout])
            print(f"{layout}: {name}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(rows))
        return
    measuring.show(rows)
    measuring.save(options, "layouts", rows)


if __name__ == "__main__":
    sys.exit(main())
