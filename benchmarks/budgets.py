"""Exact figures of every recipe's step by XLA's analysis, kept in ``budgets.json``.

    python -m benchmarks.budgets            # compare; exit code 1 if anything differs
    python -m benchmarks.budgets --update   # rewrite the file

A perceptron of 128 × 128 layers in float32, base optimizer SGD with momentum: two
layers over eight forced devices, with data parallelism and with parameters divided over
the devices (fsdp), and three layers for what another leaf adds. Operations, bytes and
memory are those of one device. Sixteen layers in one scan, on one device, show how
often a step holds the activations of all of them. The rows of :mod:`benchmarks.peaks`
are those of larger networks, those of :mod:`benchmarks.forms` of adapters and of
Functional SAM. ``tests/scale/test_budgets.py`` holds all of them.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    # The counts are the same with LLVM's optimizations, which take most of the time.
    jax.config.update("jax_disable_most_optimizations", True)

import jax.numpy as jnp
import optax
from jax.sharding import AxisType, PartitionSpec as P

import optax_vasso as ov
from benchmarks import forms, hlo, measuring, peaks
from benchmarks.optimizers import BASE, RECIPES, RHO
from experiments.harness import files

PyTree = Any
PATH = Path(__file__).with_name("budgets.json")
DEVICES, WIDTH, EXAMPLES = 8, 128, 32
# Each of the eight devices has four examples, of which one is for the ascent.
SPLIT = ov.train.split_batch(1 / 4)
METHODS = {
    "SGD": lambda base: base,
    **RECIPES,
    "split SAM": lambda base: ov.sam(base, RHO),
    "split SAM, held rise": lambda base: ov.sharpness_aware(
        base, ov.ascent.hold_rise(ov.sam_perturb(1.0))
    ),
}
MAKERS = {"split SAM": SPLIT, "split SAM, held rise": SPLIT}
# The others are divided over devices as one of these is, and compiling takes long.
SHARDED = ("SGD", "SAM", "VaSSO", "lagged VaSSO", "Friendly SAM", "GSAM")
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute")
# What the mathematics and the sharding decide; the rest is XLA's choice as well.
FIRM = ("operations", "evaluations", "state", "buffers", *KINDS)
TOLERANCE = 0.02  # of the same XLA: the number of cores moves a few instructions
OTHER_TOLERANCE = 0.05  # of another XLA, for what is FIRM


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Number and bytes of the results of each kind of collective in a program."""
    found = dict.fromkeys(KINDS, (0, 0))
    pattern = rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\("
    for shapes, kind in re.findall(pattern, text):
        number, total = found[kind]
        sizes = hlo.arrays(shapes)
        total += sum(size for _, size in sizes)
        found[kind] = number + len(sizes), total
    return found


def loss_fn(params: PyTree, batch: PyTree) -> jax.Array:
    """A perceptron without biases, mean squared error."""
    x, y = batch
    for name in sorted(params):
        x = jnp.tanh(x @ params[name])
    return jnp.mean((x - y) ** 2)


def program(
    optimizer: optax.GradientTransformation,
    layers: int,
    layout: str,
    devices: int = DEVICES,
    **makers: Any,
) -> tuple[Any, PyTree, int]:
    """A compiled step, its optimizer state, and the bytes of its parameters."""
    params = {f"layer{i}": jnp.ones((WIDTH, WIDTH)) / WIDTH for i in range(layers)}
    mesh = jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    example = jnp.ones((EXAMPLES, WIDTH))
    batch = ov.train.shard_batch((example, example), mesh)
    if layout == "local":
        state = ov.train.init_local_state(params, optimizer, devices, mesh=mesh)
        step = ov.train.make_local_train_step(loss_fn, optimizer, mesh=mesh)
    else:
        specs = ov.train.fsdp_specs(params, mesh) if layout == "fsdp" else P()
        state = ov.init_train_state(params, optimizer)
        state = ov.train.shard_state(state, optimizer, mesh, specs)
        shardings = ov.train.state_shardings(state, optimizer, mesh, specs)
        step = ov.make_train_step(
            loss_fn, optimizer, state_shardings=shardings, **makers
        )
    compiled = step.lower(state, batch).compile()
    return compiled, state.opt_state, measuring.tree_bytes(params)


def scanned(
    optimizer: optax.GradientTransformation, **options: Any
) -> measuring.Measures:
    """A step of a perceptron whose layers are stacked, and its activations' bytes."""
    layers, examples = 16, 1024

    def loss_fn(params: PyTree, batch: PyTree) -> jax.Array:
        def layer(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ weights), None

        return jnp.mean((jax.lax.scan(layer, batch, params)[0] - 1) ** 2)

    params = jnp.ones((layers, WIDTH, WIDTH)) / WIDTH
    batch = jnp.ones((examples, WIDTH))
    state = ov.init_train_state(params, optimizer)
    step = ov.make_train_step(loss_fn, optimizer, **options)
    row = measuring.counts(step.lower(state, batch).compile())
    stack = layers * measuring.tree_bytes(batch)
    return row | {"activations": round(row["temporary_bytes"] / stack, 4)}


def sent(compiled: Any, size: int, layout: str) -> measuring.Measures:
    """What a step sends, in collectives and in bytes of one gradient."""
    row = {}
    for kind, (number, total) in collectives(compiled.as_text()).items():
        row[f"{layout} {kind}: number"] = number
        row[f"{layout} {kind}: gradients"] = round(total / size, 4)
    return row


def measure(
    without: str = "", deeper: bool = True
) -> Iterator[tuple[str, measuring.Measures]]:
    """Every recipe and its figures.

    ``without`` is how the names of networks of ``peaks`` begin that are left out;
    ``deeper`` is whether three layers are compiled as well, for the instructions that
    another leaf adds.
    """
    for name, make in METHODS.items():
        makers = MAKERS.get(name, {})
        compiled, state, size = program(make(BASE), 2, "data", **makers)
        row = measuring.counts(compiled)
        if deeper:
            text = program(make(BASE), 3, "data", **makers)[0].as_text()
            row["instructions_per_leaf"] = text.count(" = ") - row["instructions"]
        row |= {
            "state": round(measuring.tree_bytes(state) / size, 4),
            "buffers": len(jax.tree.leaves(state)),
        }
        row |= sent(compiled, size, "data")
        if name in SHARDED:
            fsdp, _, _ = program(make(BASE), 2, "fsdp")
            row |= sent(fsdp, size, "fsdp")
        yield name, row
    averaged = ov.train.average_over(BASE, "data")
    local, _, size = program(ov.vasso(averaged), 2, "local")
    yield "VaSSO, local ascent", sent(local, size, "local")
    yield "SGD, scanned layers", scanned(BASE)
    apart = ov.train.apart()
    yield "SAM, scanned layers", scanned(RECIPES["SAM"](BASE), gradient=apart)
    yield from peaks.measure(without)
    yield from forms.measure()


def differences(
    old: dict[str, Any], new: dict[str, Any]
) -> Iterator[tuple[str, str, float, float]]:
    """(row, measure, budget, figure) of all that is not within the tolerance."""
    same = old["environment"]["jaxlib"] == new["environment"]["jaxlib"]
    tolerance = TOLERANCE if same else OTHER_TOLERANCE
    for name in old["rows"].keys() | new["rows"].keys():
        before, after = old["rows"].get(name, {}), new["rows"].get(name, {})
        for key in before.keys() | after.keys():
            if same or any(firm in key for firm in FIRM):
                a, b = before.get(key), after.get(key)
                if a is None or b is None or abs(b - a) > tolerance * abs(a):
                    yield name, key, a, b


def main(arguments: list[str] | None = None) -> int:
    """Measure, compare with the file or rewrite it."""
    parser = measuring.parser("budgets", __doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help=f"rewrite {PATH.name}")
    parser.add_argument("--json", action="store_true", help="print the figures alone")
    parser.add_argument("--without", default="", help="with --json: networks of peaks")
    parser.add_argument(
        "--two-layers", action="store_true", help="with --json: no third layer"
    )
    options = parser.parse_args(arguments)
    rows = dict(
        measure(options.without, not options.two_layers) if options.json else measure()
    )
    new = {"environment": measuring.environment(), "rows": rows}
    if options.json:
        print(json.dumps(new))
        return 0
    if options.update:
        files.write_json(PATH, new)
        print(f"Wrote {PATH}")
        return 0
    old = files.read_json(PATH) or {"environment": {"jaxlib": ""}, "rows": {}}
    found = sorted(differences(old, new))
    for name, key, before, after in found:
        print(f"{name}: {key}: {before} in {PATH.name}, {after} now")
    print(f"{len(found)} figures differ (--update rewrites the file)", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
