"""What the text of a compiled program says: collectives, and waits for the host.

XLA's own analysis knows neither. An instruction in a loop counts as often as the loop
runs where XLA knows that.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

SIZES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
_HOST_CALL = re.compile(
    r" (infeed|outfeed|send|recv)\(|custom_call_target=\"[^\"]*callback"
)


class Collective(NamedTuple):
    """One collective instruction.

    Attributes:
      kind: one of COLLECTIVES.
      tensors: arrays of its result with more than one entry.
      scalars: those of one entry.
      bytes: of its result, on one device.
      times: how often a step runs it.
    """

    kind: str
    tensors: int
    scalars: int
    bytes: int
    times: int


def arrays(shapes: str) -> list[tuple[int, int]]:
    """(entries, bytes) of each array in the text of a type."""
    return [
        (entries, entries * SIZES[dtype])
        for dtype, dims in _ARRAY.findall(shapes)
        for entries in (math.prod(int(size) for size in dims.split(",") if size),)
    ]


def computations(text: str) -> dict[str, list[str]]:
    """Name -> instructions; that of the entry is "ENTRY"."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head:
            lines = found.setdefault("ENTRY" if head[1] else head[2], [])
        elif " = " in line:
            lines.append(line)
    return found


def collectives(text: str) -> list[Collective]:
    """Every collective of a program that a step runs.

    A loop of which XLA does not know how often it runs is either the second pass of a
    norm, which sends only scalars and runs only where the first leaves its range: that
    is left out. Or it is a gradient of :func:`optax_vasso.train.apart`: it runs once.
    """
    known = computations(text)
    pattern = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")

    def of(name: str, times: int) -> Iterator[Collective]:
        for line in known.get(name, ()):
            match = pattern.search(line)
            if match:
                sizes = arrays(match[1])
                tensors = sum(entries > 1 for entries, _ in sizes)
                yield Collective(
                    match[2],
                    tensors,
                    len(sizes) - tensors,
                    sum(size for _, size in sizes),
                    times,
                )
            count = trip_count(line)
            inside = [c for n in called(line) for c in of(n, times * (count or 1))]
            if count is None and not any(c.tensors for c in inside):
                continue
            yield from inside

    return list(of("ENTRY", 1))


def host_waits(text: str) -> dict[str, int]:
    """Instructions of a program for which a GPU's host waits, by their kind.

    ``while``: a loop of which XLA does not know how often it runs. XLA's runtime for
    GPUs copies its condition to the host before each round and waits for it.
    ``conditional``: the same for the index of the branch. ``host calls``: infeed,
    outfeed and callbacks.
    """
    found = {"while": 0, "conditional": 0, "host calls": 0}
    for lines in computations(text).values():
        for line in lines:
            found["while"] += trip_count(line) is None
            found["conditional"] += " conditional(" in line
            found["host calls"] += bool(_HOST_CALL.search(line))
    return found


def trip_count(line: str) -> int | None:
    """How often a loop runs, 1 for what is no loop, None where XLA does not know."""
    if " while(" not in line:
        return 1
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    return int(known[1]) if known else None


def called(line: str) -> list[str]:
    """The computations that an instruction runs."""
    return [
        name.lstrip("%")
        for one, several in _CALLED.findall(line)
        for name in (one or several).split(", ")
    ]
