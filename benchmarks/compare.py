"""What got worse between two result files; exit code 1 if anything did.

python -m benchmarks.compare results/step_cost.json runs/step_cost.json

A measure with quartiles got worse if its median lies outside the old quartiles, the
two ranges do not meet, and it moved by more than ``--tolerance``; a count if it moved
by more than 1 %; a single time, which has no spread, if it moved by more than half.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measuring import HIGHER_IS_BETTER, written
from experiments.harness import files

COUNTS, TIMES = 0.01, 0.5
TIMED = ("_s", "(s)", "seconds", "milliseconds", "compile / contrib")


def worse(key: str, old: Any, new: Any, tolerance: float) -> bool:
    """Whether a measure got worse by more than its tolerance."""
    sign = -1 if key.startswith(HIGHER_IS_BETTER) else 1
    if isinstance(old, list) and isinstance(new, list):
        (low, before, high), (new_low, after, new_high) = old, new
        apart = new_low > high if sign > 0 else new_high < low
        return apart and sign * (after - before) > tolerance * abs(before)
    before, after = (x[1] if isinstance(x, list) else x for x in (old, new))
    allowed = TIMES if key.endswith(TIMED) else COUNTS
    return sign * (after - before) > allowed * abs(before)


def changes(
    old: dict[str, Any], new: dict[str, Any], tolerance: float
) -> Iterator[tuple[str, str, Any, Any]]:
    """(row, measure, old, new) of all that got worse or is measured no more."""
    for name, row in old["rows"].items():
        for key, before in row.items():
            after = new["rows"].get(name, {}).get(key)
            if before is None or key.startswith("exponent"):
                continue
            if after is None or worse(key, before, after, tolerance):
                yield name, key, before, after


def main(arguments: list[str] | None = None) -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare")
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--tolerance", type=float, default=0.03, help="share by which a ratio may move"
    )
    options = parser.parse_args(arguments)
    contents = []
    for path in (options.old, options.new):
        content = files.read_json(path)
        if content is None or "rows" not in content:
            parser.error(f"{path} is no result file of a benchmark")
        contents.append(content)
    old, new = contents
    for key, value in old["environment"].items():
        other = new["environment"].get(key)
        if other != value:
            print(f"{key}: {value} -> {other}")
    found = list(changes(old, new, options.tolerance))
    for name, key, before, after in found:
        print(f"worse: {name}: {key}: {written(before)} -> {written(after)}")
    print(f"{len(found)} of the measures got worse or are missing.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
