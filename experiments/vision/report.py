"""Tables of image experiments beside what the papers report, and metrics for others."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.harness.files import write_atomically
from experiments.harness.methods import describe
from experiments.harness.statistics import standard_error
from experiments.vision.methods import METHODS, hyperparameters
from experiments.vision.presets import PRESETS
from experiments.vision.published import PUBLISHED, Published

COLUMNS = (
    *("run", "hyperparameters", "seeds", "last epoch", "best epoch", "gradients/step"),
    *("published", "source"),
)
NOTE = (
    "Accuracy in percent, mean ± standard error over seeds. Compare the last epoch: "
    "the best is picked on the images that it is reported on."
)


def finished(path: Path) -> bool:
    """Whether a results file is of a run that was trained to its end."""
    try:
        return not json.loads(path.read_text())["interrupted"]
    except (OSError, ValueError, KeyError):
        return False


def accuracy(epoch: dict[str, Any]) -> float:
    """The accuracy of an epoch on the images that the run was evaluated on."""
    what = "test" if "test_accuracy" in epoch else "validation"
    return epoch[f"{what}_accuracy"]


def with_summary(result: dict[str, Any]) -> dict[str, Any]:
    """A run with its last and best accuracy in front of its epochs."""
    epochs = result["epochs"]
    best = max(epochs, key=accuracy)
    summary = {
        "last": accuracy(epochs[-1]),
        "best": accuracy(best),
        "best_epoch": best["epoch"],
        "gradients_per_step": float(np.mean([e["gradients"] for e in epochs])),
    }
    rest = {name: value for name, value in result.items() if name != "epochs"}
    return rest | summary | {"epochs": epochs}


def rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each setting, its seeds together; interrupted runs are left out."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if not result["interrupted"]:
            by_name.setdefault(result["name"], []).append(with_summary(result))
    return [_row(name, runs) for name, runs in sorted(by_name.items())]


def _row(name: str, runs: list[dict[str, Any]]) -> tuple[str, ...]:
    settings = runs[0]["settings"]
    chosen = {k: settings[k] for k in hyperparameters(settings["method"])}
    published = PUBLISHED.get(runs[0]["preset"], [])
    source = "; ".join(f"{p.source} ({p.note})" for p in published)
    if published and runs[0]["changed"]:
        source += "; the settings here are others"
    return (
        name,
        ", ".join(filter(None, [METHODS[settings["method"]].label, describe(chosen)])),
        str(len({run["seed"] for run in runs})),
        _mean([run["last"] for run in runs]),
        _mean([run["best"] for run in runs]),
        f"{np.mean([run['gradients_per_step'] for run in runs]):.2f}",
        "; ".join(map(show, published)) or "not found",
        source,
    )


def _mean(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {standard_error(values):.2f}"


def show(published: Published) -> str:
    """A published accuracy, with how exactly it could be read."""
    if not published.within:
        return str(published.accuracy)
    return f"{published.accuracy} (within {published.within:g})"


def print_table(results: Sequence[dict[str, Any]]) -> None:
    """The table on the console."""
    table = Table(title=NOTE)
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for row in rows(results):
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 150).print(table)


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows(results)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{NOTE}\n\n{table}\n"


def report(folder: Path) -> int:
    """Print and write one table of all runs in a folder; 2 if there are none."""
    results, interrupted = [], 0
    for path in sorted(folder.glob("*.json")):
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            print(f"cifar.py: {path} cannot be read: {error}", file=sys.stderr)
            return 2
        if isinstance(found, dict) and {"name", "seed", "epochs"} <= found.keys():
            results.append(found)
            interrupted += found["interrupted"]
    if interrupted == len(results):
        print(f"cifar.py: {folder} has no results of finished runs", file=sys.stderr)
        return 2
    print_table(results)
    if interrupted:
        print(f"{interrupted} interrupted runs are left out.")
    path = folder / "report.md"
    text = markdown(results)
    write_atomically(path, lambda temporary: temporary.write_text(text))
    print(f"Wrote {path}")
    return 0


def print_presets() -> None:
    """Every preset with its settings, their sources and what is published."""
    for name, preset in PRESETS.items():
        print(name)
        for option, (value, source) in preset.settings.items():
            print(f"  {option} = {value}" + (f"  [{source}]" if source else ""))
        if preset.differs:
            print(f"  differs: {preset.differs}")
        for published in PUBLISHED.get(name, []):
            note = f"[{published.source}; {published.note}]"
            print(f"  published: {show(published)} %  {note}")


@contextlib.contextmanager
def metrics_writer(
    directory: Path | None, name: str
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes an epoch for TensorBoard and as a line of JSON.

    Both start anew: a run that goes on hands its earlier epochs in again.

    Args:
      directory: where a folder of this name is made; nothing is written if ``None``.
      name: of the run.
    """
    if directory is None:
        yield lambda epoch: None
        return
    from tensorboardX import SummaryWriter

    folder = directory / name
    # Steps of an earlier start are not shown twice.
    with (
        SummaryWriter(str(folder), purge_step=0) as writer,
        (folder / "metrics.jsonl").open("w") as lines,
    ):

        def write(epoch: dict[str, Any]) -> None:
            for key, value in epoch.items():
                writer.add_scalar(key, value, epoch["step"])
            lines.write(json.dumps(epoch) + "\n")
            lines.flush()

        yield write
