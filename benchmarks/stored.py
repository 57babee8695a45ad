"""The result files that the figures and tables of docs/cost.md are made from."""

from pathlib import Path
from typing import Any

from benchmarks import budgets
from experiments.harness import files

ROOT = Path(__file__).parents[1]
Rows = dict[str, dict[str, Any]]


def load(name: str) -> dict[str, Any]:
    """What a result file says."""
    path = ROOT / "results" / f"{name}.json"
    content = budgets.PATH if name == "budgets" else path
    found = files.read_json(content)
    if found is None:
        raise FileNotFoundError(content)
    return found
