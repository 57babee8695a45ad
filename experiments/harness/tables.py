"""The table of a comparison: what it holds, in a terminal and in Markdown.

A comparison is a dictionary of rows by name, as :func:`row` makes them; a name is that
of a method. What is compared stands in the columns, the same in all experiments.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import tasks
from experiments.harness.methods import Method, describe
from experiments.harness.statistics import (
    comparisons,
    early_stopped,
    standard_error,
    summary,
)
from experiments.harness.training import Trained
from experiments.tasks import Task

REFERENCES = ("sgd", "sam")
COLUMNS = (
    "method",
    "hyperparameters",
    "last epoch (%)",
    "collapsed",
    "epoch picked (%)",
)

Row = dict[str, Any]
Cells = list[str]


def row(
    task: Task, method: Method, hyperparameters: dict[str, float], trained: Trained
) -> Row:
    """What a results file says of the test trainings of one method.

    The epoch is picked by the noisy labels of the validation examples, and, for
    comparison, by the true ones.
    """
    if trained.test is None:
        raise ValueError("trained.test is None: train with test=True.")
    limit = tasks.collapsed_below(task)
    return {
        "label": method.label,
        "hyperparameters": hyperparameters,
        "epochs": int(trained.epochs[-1]),
        "gradients": round(float(trained.gradients.mean()), 1),
        "last": summary(trained.test[:, -1], limit),
        "picked": summary(early_stopped(trained.noisy_validation, trained.test), limit),
        "picked_clean": summary(
            early_stopped(trained.clean_validation, trained.test), limit
        ),
        "validation": {
            "noisy": round(float(trained.noisy_validation[:, -1].mean()), 3),
            "clean": round(float(trained.clean_validation[:, -1].mean()), 3),
        },
        "curve": {
            "epochs": trained.epochs.tolist(),
            "mean": trained.test.mean(0).round(3).tolist(),
            "standard_error": (
                (trained.test.std(0, ddof=1) if len(trained.test) > 1 else trained.test)
                / np.sqrt(len(trained.test))
            )
            .round(4)
            .tolist(),
        },
    }


def compare(
    rows: dict[str, Row], references: Sequence[str] = REFERENCES
) -> dict[str, Row]:
    """The rows with paired differences at the last epoch."""
    found = comparisons(
        {name: row["last"]["values"] for name, row in rows.items()}, references
    )
    return {name: row | {"differences": found[name]} for name, row in rows.items()}


def cells(
    rows: dict[str, Row], references: Sequence[str] = REFERENCES
) -> tuple[Cells, list[Cells]]:
    """Header and cells of a comparison."""
    known = [name for name in references if name in rows]
    header = [*COLUMNS, *(f"− {rows[name]['label']}" for name in known)]
    lines = []
    for found in rows.values():
        last, picked = found["last"], found["picked"]
        line = [
            found["label"],
            describe(found["hyperparameters"]),
            mean_and_error(last),
            f"{last['collapsed']} of {len(last['values'])}",
            mean_and_error(picked),
        ]
        for name in known:
            line += difference_cells(found.get("differences", {}).get(name))
        lines.append(line)
    return header, lines


def signed(value: float, digits: int = 1) -> str:
    """A difference with its sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def mean_and_error(summary: dict[str, float], digits: int = 1) -> str:
    """A mean with its standard error."""
    return f"{summary['mean']:.{digits}f} ± {summary['standard_error']:.{digits}f}"


def to_its_error(values: Sequence[float] | np.ndarray) -> str:
    """Mean ± standard error of some values, to two digits of the error."""
    mean, error = float(np.mean(values)), standard_error(values)
    digits = max(0, 1 - int(np.floor(np.log10(error)))) if error else 2
    return f"{mean:.{digits}f} ± {error:.{digits}f}".replace("-", "−")


def plus_minus(difference: dict[str, float], digits: int = 1) -> str:
    """A difference with its sign and its standard error."""
    mean = signed(difference["mean"], digits)
    return f"{mean} ± {difference['standard_error']:.{digits}f}"


def difference_cells(difference: dict[str, float] | None, digits: int = 1) -> Cells:
    """The cell of a comparison; empty where a row is not compared."""
    return [plus_minus(difference, digits) if difference else ""]


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table of GitHub's Markdown."""
    header = list(header)
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in rows)


# Where a page has a table: between its name and an end, both in comments.
PLACE = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def fill(page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """A page of Markdown with its tables as the result files have them now.

    Args:
      page: the text, with a :data:`PLACE` for each of its tables.
      tables: makes the table of a name; a FileNotFoundError says that there is no
        measurement of it.
    """

    def made(match: re.Match) -> str:
        try:
            text = tables[match[2]]()
        except FileNotFoundError:
            text = "Not measured yet."
        return f"{match[1]}\n{text}\n\n{match[4]}"

    return PLACE.sub(made, page)


def show(title: str, header: Iterable[str], lines: Iterable[Iterable[str]]) -> None:
    """Print a table to standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(header):
        table.add_column(column, justify="right" if number > 1 else "left")
    for line in lines:
        table.add_row(*line)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)
