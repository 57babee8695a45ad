"""Write the tables of the pages on results from the JSON files in results/.

Run ``python docs/results_tables.py`` after a measurement. A table of a page stands
between ``<!-- table: NAME -->`` and ``<!-- end -->``, NAME being one of TABLES.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / "results.md", *sorted((ROOT / "docs/results").glob("*.md"))]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import experiment_tables  # noqa: E402

from experiments.harness.tables import fill, markdown  # noqa: E402


def environments() -> str:
    """Versions and devices, and which files have which."""
    files: dict[tuple[str, str], list[str]] = {}
    for path in sorted((ROOT / "results").glob("*.json")):
        found = json.loads(path.read_text())["environment"]
        versions = ", ".join(
            f"{name} {found[name]}" for name in ("jax", "optax", "python")
        )
        device = f"{found['device']}, {found['cpu_count']} cores"
        files.setdefault((versions, device), []).append(path.stem)
    most = max(map(len, files.values()))
    rows = [
        [*key, "all" if len(files) == 1 else "all others"]
        if len(names) == most
        else [*key, ", ".join(names)]
        for key, names in files.items()
    ]
    return markdown(["versions", "device", "files"], rows)


def sweep_cost() -> str:
    """One program against a step for each batch."""
    found = experiment_tables.load("sweep_cost")
    each = found["one_by_one_seconds_each"]
    rows = [
        ["trainings", str(found["trainings"])],
        ["one by one, seconds each", f"{min(each):.2f} to {max(each):.2f}"],
        ["all of them as one program, seconds", f"{found['sweep_seconds']:.1f}"],
        ["cores busy, one by one", f"{found['one_by_one_cores']:.2f}"],
        ["cores busy, one program", f"{found['sweep_cores']:.2f}"],
        ["ratio, both compiled", f"{found['ratio']:.2f}"],
        ["ratio, compilation included", f"{found['ratio_with_compilation']:.2f}"],
    ]
    return markdown(["", ""], rows)


TABLES: dict[str, Callable[[], str]] = {
    "environments": environments,
    "sweep_cost": sweep_cost,
    **experiment_tables.TABLES,
}


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text(), TABLES))
