"""What all benchmarks share: XLA's counts, interleaved times, result files.

A result file has ``rows``: name -> measure -> a number, or ``[lower quartile, median,
upper quartile]`` where it varies between rounds, or ``None`` where it was not measured.
:mod:`benchmarks.compare` compares two of them.
"""

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jaxlib

from experiments.harness import command_line, files

PyTree = Any
Measures = dict[str, Any]
# Of these more is better, of all others less.
HIGHER_IS_BETTER = ("share", "cosine", "speedup", "GB_per_s", "GFLOP_per_s", "images")


def parser(name: str, description: str) -> command_line.Parser:
    """A parser with ``--runs``, ``--publish`` and ``--smoke``, as experiments have."""
    made = command_line.experiment_parser(name, description)
    made.prog = f"python -m benchmarks.{name}"
    return made


def parse(made: command_line.Parser, arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked; a smoke run is never published."""
    return command_line.parse(made, arguments)


def environment() -> dict[str, Any]:
    """Device, versions and date, for a result file."""
    return files.environment() | {
        "jaxlib": jaxlib.__version__,
        "date": datetime.date.today().isoformat(),
    }


def save(
    options: argparse.Namespace, name: str, rows: dict[str, Measures], **content: Any
) -> None:
    """Write ``name.json`` to the folder of runs and, if asked to, to the published."""
    content = {"benchmark": name, "environment": environment()} | content
    for folder in filter(None, (options.runs, options.publish)):
        path = folder / f"{name}.json"
        files.write_json(path, content | {"rows": rows})
        print(f"Wrote {path}", file=sys.stderr)


def show(rows: Mapping[str, Measures]) -> None:
    """Print a table: one line per row, one column per measure."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    width = max(map(len, rows)) + 2
    print(" " * width + "".join(f"{column:>{len(column) + 3}}" for column in columns))
    for name, row in rows.items():
        cells = (f"{written(row.get(c)):>{len(c) + 3}}" for c in columns)
        print(f"{name:{width}}" + "".join(cells), flush=True)


def written(value: Any) -> str:
    """A measure in four digits, its median if it has quartiles."""
    if isinstance(value, list):
        value = value[1]
    return "–" if value is None else f"{value:.4g}"


def tree_bytes(tree: PyTree) -> int:
    """Bytes that the arrays of a tree hold."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def tree_size(tree: PyTree) -> int:
    """Entries that the arrays of a tree hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def copied(tree: PyTree) -> PyTree:
    """The same with buffers of its own, to be donated."""
    return jax.tree.map(lambda leaf: leaf.copy(), tree)


def compiled(
    function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()
) -> tuple[Any, Measures]:
    """Compile a function; the program, and XLA's counts and the seconds that it took.

    Seconds are those of the process, so that they depend less on what else runs.
    """
    if not hasattr(function, "lower"):
        function = jax.jit(function, donate_argnums=donate)
    start = time.process_time()
    lowered = function.lower(*arguments)
    traced = time.process_time()
    program = lowered.compile()
    seconds = {"trace_s": traced - start, "compile_s": time.process_time() - traced}
    return program, counts(program) | seconds


def counts(program: Any) -> Measures:
    """XLA's own analysis of a compiled program; it does not vary between runs.

    ``peak_bytes`` is what XLA allots, arguments and outputs included, less what is
    donated; XLA counts both sides of a branch and the body of a loop once.
    """
    cost, memory = program.cost_analysis(), program.memory_analysis()
    return {
        "operations": cost["flops"],
        "bytes": cost["bytes accessed"],
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "instructions": program.as_text().count(" = "),
    }


def interleaved(
    programs: Mapping[str, Callable[[], Any]], rounds: int, steps: int = 1
) -> dict[str, list[float]]:
    """Seconds per call of each program, round by round, the order turned each round.

    What else the machine does falls on all alike; compare them by :func:`ratios`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        jax.block_until_ready(program())
    for i in range(rounds):
        for name in list(programs)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            for _ in range(steps):
                jax.block_until_ready(programs[name]())
            seconds[name].append((time.perf_counter() - start) / steps)
    return seconds


def quartiles(values: Iterable[float]) -> list[float]:
    """[lower quartile, median, upper quartile]."""
    values = list(values)
    if len(values) < 2:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def ratios(seconds: Iterable[float], unit: Iterable[float]) -> list[float]:
    """Quartiles of the ratios of two columns of times, paired by round."""
    return quartiles(a / b for a, b in zip(seconds, unit, strict=True))
