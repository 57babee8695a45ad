"""What all experiments share: training rows, tuning, statistics, tables, figures.

The modules are imported on first use (``harness.training`` and so on), so that
``--help`` does not wait for JAX or Matplotlib.
"""

import importlib
from typing import Any

MODULES = (
    "annealing",
    "ascents",
    "command_line",
    "figures",
    "files",
    "grids",
    "language",
    "language_methods",
    "methods",
    "networks",
    "progress",
    "rounding",
    "rows",
    "searches",
    "solutions",
    "statistics",
    "tables",
    "training",
    "transformer",
    "tuning",
    "units",
    "verdicts",
)


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
