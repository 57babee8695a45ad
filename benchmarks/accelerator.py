"""Everything that needs an accelerator, in one command of at most nine minutes.

    python -m benchmarks.accelerator --out results/accelerator.json

Steps of all recipes and of ``optax.contrib.sam`` on networks like GPT-2 of 124 M,
ResNet-50 and ViT-B with synthetic data, computed in float32 and in bfloat16: times in
turns with SGD, peak memory, compilation; the share of the memory's bandwidth; images
per second of the vision trainer, fed and with one batch that is there already; PyTorch,
eager and compiled, where it is installed. Parts that time does not allow, or that
fail, are left out and named in the file, which is written after each part.
"""

import concurrent.futures
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import limits, measuring, networks
from benchmarks.optimizers import ALL, BASE, RHO, THETA, Running, make_step
from experiments.harness import files
from experiments.harness.command_line import positive_number

Rows = dict[str, measuring.Measures]


def network(kind: str, dtype: str, smoke: bool) -> Any:
    """A network by its kind, large or of toy size."""
    if kind == "gpt":
        sizes = (16, 2, 64, 2, 8) if smoke else (768, 12, 50_257, 8, 1024)
        return networks.gpt(*sizes, dtype)
    if kind == "vit":
        sizes = (16, 2, 4, 8, 2) if smoke else (768, 12, 16, 224, 64)
        return networks.vit(*sizes, dtype)
    return networks.resnet50(*((2, 8) if smoke else (64, 224)), dtype, smoke)


def steps(kind: str, dtype: str, smoke: bool, left: Callable[[], float]) -> Rows:
    """All methods on one network: compiled side by side, then each beside SGD."""
    problem = network(kind, dtype, smoke)
    names = ["SGD", "VaSSO"] if smoke else list(ALL)

    def compiled(name: str) -> tuple[Any, measuring.Measures]:
        optimizer = ALL[name](BASE)
        step = make_step(optimizer, problem.loss_fn)
        state = jax.eval_shape(optimizer.init, problem.params)
        start = time.perf_counter()
        program, counted = measuring.compiled(
            step, problem.params, state, problem.batch, donate=(0, 1)
        )
        return program, counted | {"compile_s": time.perf_counter() - start}

    def running(name: str, program: Any) -> Running:
        params = measuring.copied(problem.params)
        state = measuring.copied(ALL[name](BASE).init(params))
        return Running(program, params, state, problem.batch)

    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    futures = {name: pool.submit(compiled, name) for name in names}
    rows: Rows = {}
    try:
        concurrent.futures.wait(futures.values(), max(0, 0.6 * left()))
        base = running("SGD", futures["SGD"].result(0)[0])
        for name, future in futures.items():
            if not future.done() or left() < 20:
                continue
            program, counted = future.result()
            both = {"SGD": base, name: running(name, program)}
            seconds = measuring.interleaved(both, 1 if smoke else 7)
            rows[f"{problem.name}: {name}"] = {
                "milliseconds": 1e3 * min(seconds[name]),
                "time / SGD": measuring.ratios(seconds[name], seconds["SGD"]),
                "peak_bytes": counted["peak_bytes"],
                "compile_s, side by side": counted["compile_s"],
                "instructions": counted["instructions"],
            }
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return rows


def bandwidth(smoke: bool, left: Callable[[], float]) -> Rows:
    """Shares of the limit, on more parameters than a cache holds."""
    size, rounds = (4000, 1) if smoke else (64_000_000, 10)
    rows: Rows = {"device": {"GB_per_s": limits.bandwidth(size, rounds)}}
    for leaves in (4,) if smoke else (4, 100, 1000):
        for name, (least, share, _) in limits.shares(size, leaves, rounds).items():
            rows[f"{name}, {leaves} leaves"] = {"share": share, "milliseconds": least}
    return rows


def vision(smoke: bool, left: Callable[[], float]) -> Rows:
    """Images per second of the vision trainer, and of its step alone."""
    from experiments.vision import batches, image_folder, options, programs

    model = (
        ["resnet_tiny", "--batch", "16"] if smoke else ["resnet18", "--batch", "512"]
    )
    given = ["--dataset", "synthetic", "--dtype", "bfloat16", "--model", *model]
    chosen = options.parse_arguments(given)
    data = batches.synthetic(per_class=8 if smoke else 2000)
    images = batches.from_arrays(data, chosen, 0)
    run = programs.prepare(chosen, images, programs.data_mesh())
    count = 3 if smoke else 100

    def rate(fed: bool) -> float:
        state, source = run.init(0), image_folder.read_ahead(images.train(0), 0)
        batch = run.place(next(source))
        state, _ = jax.block_until_ready(run.step(state, batch))
        start = time.perf_counter()
        for _ in range(count):
            state, _ = run.step(state, run.place(next(source)) if fed else batch)
        jax.block_until_ready(state)
        return chosen.batch * count / (time.perf_counter() - start)

    held, fed = rate(False), rate(True)
    row = {"images_per_s": fed, "share of the step's own rate": fed / held}
    return {f"vision trainer, {chosen.model}, batch {chosen.batch}": row}


def pytorch(smoke: bool, left: Callable[[], float]) -> Rows:
    """VaSSO here and in PyTorch, on the byte-level transformer of width 768."""
    if importlib.util.find_spec("torch") is None:
        return {}
    from benchmarks import in_torch

    problem = networks.transformer(*((8, 2, 8, 1) if smoke else (768, 8, 1024, 12)))
    host = jax.tree.map(np.asarray, (problem.params, problem.batch))
    base = {"lr": 0.01, "momentum": 0.9}

    def make(params: Any) -> Any:
        return in_torch.SAM(params, RHO, THETA, **base)

    optimizer = ALL["VaSSO"](optax.sgd(0.01, momentum=0.9))
    params = measuring.copied(problem.params)
    state = measuring.copied(optimizer.init(params))
    step = jax.jit(make_step(optimizer, problem.loss_fn), donate_argnums=(0, 1))
    programs = {
        "optax_vasso": Running(step, params, state, problem.batch),
        "PyTorch, eager": in_torch.Running(*host, make),
    }
    if not smoke:
        programs["PyTorch, compiled"] = in_torch.Running(*host, make, compiled=True)
    seconds = measuring.interleaved(programs, 1 if smoke else 7)
    return {
        f"{problem.name}, float32: VaSSO in {name}": {
            "milliseconds": 1e3 * min(seconds[name]),
            "time / ours": measuring.ratios(seconds[name], seconds["optax_vasso"]),
        }
        for name in programs
    }


# Part, and the seconds that have to be left for it to begin. The most wanted first.
PARTS: dict[str, tuple[Callable[..., Rows], float]] = {
    "gpt, bfloat16": (steps, 60),
    "bandwidth": (bandwidth, 30),
    "vision": (vision, 30),
    "resnet50, bfloat16": (steps, 90),
    "vit, bfloat16": (steps, 60),
    "gpt, float32": (steps, 60),
    "pytorch": (pytorch, 60),
    "vit, float32": (steps, 60),
    "resnet50, float32": (steps, 90),
}


def main(arguments: list[str] | None = None) -> int:
    """Measure what time allows, write after each part."""
    parser = measuring.parser("accelerator", __doc__)
    parser.add_argument("--out", type=Path, help="file to write, in place of RUNS")
    parser.add_argument("--minutes", type=positive_number, default=9.0)
    options = measuring.parse(parser, arguments)
    out = options.out or options.runs / "accelerator.json"
    end = time.monotonic() + 60 * options.minutes
    rows: Rows = {}
    left_out: dict[str, str] = {}
    for name, (part, needed) in PARTS.items():
        kind = tuple(name.split(", ")) if part is steps else ()

        def left() -> float:
            return end - time.monotonic()

        if left() < needed and not options.smoke:
            left_out[name] = "no time was left"
            continue
        try:
            found = part(*kind, options.smoke, left)
            rows |= found
            measuring.show(found or {name: {}})
        except Exception as error:  # one part that fails must not lose the others
            left_out[name] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"{name}: {left_out[name]}", file=sys.stderr, flush=True)
        content = {"benchmark": "accelerator", "environment": measuring.environment()}
        files.write_json(out, content | {"left_out": left_out, "rows": rows})
    print(f"Wrote {out}", file=sys.stderr)
    return int(options.smoke and bool(left_out))


if __name__ == "__main__":
    sys.exit(main())
