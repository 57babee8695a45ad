"""Everything that needs an accelerator, in one command of at most eight minutes.

    python -m benchmarks.accelerator --out results/accelerator.json

It needs this repository, JAX and Optax, and nothing else. On ResNet-18, ViT-S and
GPT-2 of 124 M, in bfloat16 with synthetic data: the time of a step of each method, in
turns with SGD, its peak memory, and where the host waits for the device within a step.
The bandwidth of the ascent beside that of a copy. Lanczos in the matrix products'
default precision and in full precision. Parts that time does not allow, or that fail,
are left out and named in the file, which is written after each part.
"""

import concurrent.futures
import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import hlo, limits, measuring, plain_networks
from benchmarks.optimizers import ALL, BASE, Running, make_step
from experiments.harness import files
from experiments.harness.command_line import positive_number
from optax_vasso import sharpness

Rows = dict[str, measuring.Measures]
METHODS = ("SGD", "SAM", "VaSSO", "lagged VaSSO", "optax.contrib.sam, opaque")
MATVECS = 10


def network(kind: str, smoke: bool) -> plain_networks.Problem:
    """A network by its kind, large or of toy size."""
    if kind == "gpt":
        sizes = (16, 2, 64, 2, 8) if smoke else (768, 12, 50_304, 8, 1024)
        return plain_networks.gpt(*sizes, "bfloat16")
    if kind == "vit":
        sizes = (16, 2, 4, 8, 2) if smoke else (384, 12, 16, 224, 128)
        return plain_networks.vit(*sizes, "bfloat16")
    stages = plain_networks.SMALL_RESNET if smoke else plain_networks.RESNET18
    return plain_networks.resnet(stages, 2 if smoke else 512, "bfloat16")


def steps(kind: str, smoke: bool, left: Callable[[], float]) -> Rows:
    """The methods on one network: compiled side by side, then each beside SGD."""
    problem = network(kind, smoke)
    names = ("SGD", "VaSSO", "lagged VaSSO") if smoke else METHODS
    rounds, count = (1, 1) if smoke else (7, 10)

    def compiled(name: str) -> tuple[Any, measuring.Measures]:
        optimizer = ALL[name](BASE)
        step = make_step(optimizer, problem.loss_fn)
        state = jax.eval_shape(optimizer.init, problem.params)
        start = time.perf_counter()
        program, counted = measuring.compiled(
            step, problem.params, state, problem.batch, donate=(0, 1)
        )
        return program, counted | {"compile_s": time.perf_counter() - start}

    def running(name: str, program: Any) -> Callable[[], Any]:
        params = measuring.copied(problem.params)
        state = measuring.copied(ALL[name](BASE).init(params))
        step = Running(program, params, state, problem.batch)

        def several() -> Any:
            # Without waiting between them, as a training loop runs: a step in which the
            # host waits for the device cannot be sent ahead.
            return [step() for _ in range(count)][-1]

        return several

    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    futures = {name: pool.submit(compiled, name) for name in names}
    rows: Rows = {}
    try:
        concurrent.futures.wait(futures.values(), max(0, 0.6 * left()))
        base = running("SGD", futures["SGD"].result(0)[0])
        for name, future in futures.items():
            if not future.done() or (left() < 20 and not smoke):
                continue
            program, counted = future.result()
            both = {"SGD": base, name: running(name, program)}
            seconds = measuring.interleaved(both, rounds)
            waits = hlo.host_waits(program.as_text())
            rows[f"{problem.name}: {name}"] = {
                "milliseconds": 1e3 * min(seconds[name]) / count,
                "time / SGD": measuring.ratios(seconds[name], seconds["SGD"]),
                "peak_bytes": counted["peak_bytes"],
                "host waits": sum(waits.values()),
                "compile_s, side by side": counted["compile_s"],
                "instructions": counted["instructions"],
            }
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return rows


def bandwidth(smoke: bool, left: Callable[[], float]) -> Rows:
    """The ascent beside a copy, on more parameters than a cache holds."""
    size, rounds = (4000, 1) if smoke else (64_000_000, 10)
    copied = limits.copy_bandwidth(size, rounds)
    rows: Rows = {"copy": {"GB_per_s": copied}}
    for leaves in (4,) if smoke else (4, 100):
        for name, (least, _, _) in limits.shares(size, leaves, rounds).items():
            moved = 4e-9 * size * limits.CHAINS[name][1] / (1e-3 * least)
            rows[f"ascent of {name}, {leaves} leaves"] = {
                "GB_per_s": moved,
                "share": moved / copied[1],
                "milliseconds": least,
            }
    return rows


def lanczos(smoke: bool, left: Callable[[], float]) -> Rows:
    """The largest eigenvalue of a transformer's Hessian, in both precisions."""
    sizes = (16, 1, 64, 2, 8) if smoke else (512, 6, 8192, 8, 256)
    problem = plain_networks.gpt(*sizes, "float32")
    matvec = sharpness.hessian(problem.loss_fn, problem.params, problem.batch)
    rows: Rows = {}
    for name in ("default", "highest"):
        chosen = (
            jax.default_matmul_precision(name)
            if name != "default"
            else contextlib.nullcontext()
        )
        with chosen:

            def run() -> sharpness.Eigenpairs:
                return sharpness.eigenpairs(matvec, problem.params, num_matvecs=MATVECS)

            found = jax.block_until_ready(run())
            (seconds,) = measuring.interleaved({name: run}, 1 if smoke else 5).values()
        rows[f"Lanczos, {MATVECS} products, {name} precision"] = {
            "milliseconds": 1e3 * min(seconds),
            "largest eigenvalue": float(found.values[0]),
            "residual": float(jnp.asarray(found.residuals)[0]),
        }
    return rows


# Part, and the seconds that have to be left for it to begin. The most wanted first.
PARTS: dict[str, tuple[Callable[..., Rows], float]] = {
    "bandwidth": (bandwidth, 30),
    "gpt": (steps, 60),
    "resnet": (steps, 60),
    "vit": (steps, 60),
    "lanczos": (lanczos, 40),
}


def main(arguments: list[str] | None = None) -> int:
    """Measure what time allows, write after each part."""
    parser = measuring.parser("accelerator", __doc__)
    parser.add_argument("--out", type=Path, help="file to write, in place of RUNS")
    parser.add_argument("--minutes", type=positive_number, default=8.0)
    options = measuring.parse(parser, arguments)
    out = options.out or options.runs / "accelerator.json"
    end = time.monotonic() + 60 * options.minutes
    rows: Rows = {}
    left_out: dict[str, str] = {}

    def left() -> float:
        return end - time.monotonic()

    for name, (part, needed) in PARTS.items():
        if left() < needed and not options.smoke:
            left_out[name] = "no time was left"
            continue
        try:
            kind = (name,) if part is steps else ()
            found = part(*kind, options.smoke, left)
            rows |= found
            measuring.show(found)
        except Exception as error:  # one part that fails must not lose the others
            left_out[name] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"{name}: {left_out[name]}", file=sys.stderr, flush=True)
        content = {"benchmark": "accelerator", "environment": measuring.environment()}
        files.write_json(out, content | {"left_out": left_out, "rows": rows})
    print(f"Wrote {out}", file=sys.stderr)
    return int(options.smoke and bool(left_out))


if __name__ == "__main__":
    sys.exit(main())
