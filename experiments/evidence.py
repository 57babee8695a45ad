"""The evidence: every method on every task, searched alike and compared in pairs.

Each unit is one method on one task: a search on noisy validation labels, then tests at
equal gradients and at equal epochs. A unit is saved when it is finished and never done
again, so the run may be stopped and resumed at any time.
"""

import argparse
import math
import statistics
import textwrap
import time
from pathlib import Path
from typing import Any

from experiments import harness, tasks
from experiments.harness import command_line, files
from experiments.harness.progress import duration

PUBLISHED = Path(__file__).parents[1] / "results"
# Those that choose their own radius are measured by ``experiments.automatic``, those on
# split batches by ``experiments.rise``.
APART = ("auto_vasso", "auto_lagged_vasso", "split_sam", "held_rise")
COMPARED = [name for name in command_line.METHOD_LABELS if name not in APART]
# The simpler tasks leave out the methods that are least like the others.
FEWER = (
    "sgd",
    "sam",
    "friendly_sam",
    "vasso",
    "lagged_vasso",
    "momentum_sam",
)
SIMPLER = ("digits-0", "digits-25", "convnet-50")
# Seconds per gradient of one training, with both of two quiet cores at work, and
# seconds to compile one method for one network.
SECONDS = {
    "digits": 2.4e-4,
    "convnet": 4.5e-4,
    "cancer": 2e-5,
    "wine": 2e-5,
    "text": 8e-5,
    "teacher": 4e-5,
}
COMPILING = 5.0


def main(arguments: list[str] | None = None) -> int:
    """Do the units that are missing; print, write."""
    options = parsed(arguments)
    units, plan = units_of(options), plan_of(options)
    missing = missing_of(options)
    if not options.list:
        harness.rows.use_all_cores(options.runs / "compiled")
    estimates = estimate(units, plan)
    pace = measured_pace(options, estimates)
    left = sum(estimates[unit] for unit in missing) * pace
    print(
        f"{len(units) - len(missing)} of {len(units)} units are finished; the others "
        f"take about {duration(left)}"
        + (" on two quiet cores." if pace == 1 else " at the pace of those.")
    )
    if options.list:
        for unit in units:
            state = "finished" if unit not in missing else duration(estimates[unit])
            print(f"  {unit[0]:<18} {unit[1]:<16} {state}")
        return 0
    began, done = time.monotonic(), []
    try:
        with harness.progress.over("evidence", left) as progress:
            for unit in missing:
                if time.monotonic() - began > 60 * getattr(
                    options, "minutes", math.inf
                ):
                    break
                with harness.progress.part_of(progress, estimates[unit] * pace):
                    do(options, *unit, plan)
                done.append(unit)
    finally:
        report(options, units, show={task for task, _ in done})
    return 0


def parsed(arguments: list[str] | None) -> Any:
    """The command line."""
    parser = command_line.experiment_parser(
        "evidence",
        __doc__,
        seeds=24,
        methods=COMPARED,
        tasks=tasks.TITLES,
    )
    parser.add_argument(
        "--minutes",
        type=command_line.positive_number,
        default=argparse.SUPPRESS,
        help="begin no unit after so long (default: finish all)",
    )
    parser.add_argument(
        "--list", action="store_true", help="say what is finished, and do nothing"
    )
    options = command_line.parse(parser, arguments)
    if options.smoke:
        options.tasks, options.methods = ["wine-50"], options.methods[:2]
    return options


def units_of(options: Any) -> list[tuple[str, str]]:
    """Task and method of every unit."""
    return [
        (task, method)
        for task in options.tasks
        for method in options.methods
        if method in FEWER or task not in SIMPLER
    ]


def missing_of(options: Any) -> list[tuple[str, str]]:
    """The units that are not saved with as many seeds."""
    return [
        (task, method)
        for task, method in units_of(options)
        if not harness.units.saved(unit_folder(options, task), method, plan_of(options))
    ]


def plan_of(options: Any) -> Any:
    """How much is trained per unit."""
    plan = harness.units.SMOKE if options.smoke else harness.units.Plan()
    return plan._replace(seeds=options.seeds)


def seconds_left(options: Any) -> float:
    """How long the units that are missing take."""
    estimates = estimate(units_of(options), plan_of(options))
    left = sum(estimates[unit] for unit in missing_of(options))
    return left * measured_pace(options, estimates)


def read(parser: command_line.Parser, options: Any) -> dict[str, Any]:
    """The results: those of the runs if they are there, else the published ones.

    A smoke run takes the published ones: its own evidence is too little to compare.
    """
    own, published = options.runs / "evidence.json", PUBLISHED / "evidence.json"
    path = published if options.smoke or not own.exists() else own
    found = files.read_json(path)
    if found is None:
        parser.error(f"no {path}: run python -m experiments.evidence first")
    return found


def unit_folder(options: Any, task: str) -> Path:
    """Where the units of a task are saved."""
    return options.runs / "evidence" / task


def unit_path(options: Any, task: str, method: str) -> Path:
    """Where a unit is saved."""
    return unit_folder(options, task) / f"{method}.json"


def loaded(options: Any, name: str) -> tasks.Task:
    """A task; a short one for a smoke run."""
    task = tasks.load(name)
    return task._replace(epochs=2 * task.epochs_per_call) if options.smoke else task


def estimate(units: list[tuple[str, str]], plan: Any) -> dict[tuple[str, str], float]:
    """Seconds that each unit takes on two quiet cores."""
    seconds: dict[tuple[str, str], float] = {}
    compiled = set()
    for task_name, method_name in units:
        task, method = tasks.load(task_name), harness.methods.METHODS[method_name]
        kind = task_name.partition("-")[0]
        work = harness.units.work_of(task, method, plan)
        program = (task.network, task.gradient_noise > 0, method_name)
        seconds[task_name, method_name] = SECONDS[kind] * work
        if program not in compiled:
            seconds[task_name, method_name] += COMPILING
            compiled.add(program)
    return seconds


def measured_pace(options: Any, estimates: dict[tuple[str, str], float]) -> float:
    """Seconds per estimated second, from the units that are finished."""
    found = {unit: files.read_json(unit_path(options, *unit)) for unit in estimates}
    paces = [u["unit_seconds"] / estimates[unit] for unit, u in found.items() if u]
    return statistics.median(paces) if paces else 1.0


def do(options: Any, task_name: str, method_name: str, plan: Any) -> None:
    """Run one unit and save it."""
    task, method = loaded(options, task_name), harness.methods.METHODS[method_name]
    work = harness.units.work_of(task, method, plan)
    with harness.progress.over(task_name, work) as progress:
        harness.units.run_and_save(
            unit_folder(options, task_name), method_name, task, method, plan, progress
        )


def report(options: Any, units: list[tuple[str, str]], show: set[str]) -> None:
    """Save the comparisons of all units that are there; print those of some tasks."""
    summary: dict[str, Any] = {}
    for task in dict.fromkeys(task for task, _ in units):
        found = {
            method: unit
            for name, method in units
            if name == task
            and (unit := files.read_json(unit_path(options, task, method)))
        }
        if not found:
            continue
        content = {"task": tasks.TITLES[task], "seeds": options.seeds}
        for budget in ("gradients", "epochs", "gradients_clean"):
            rows = {method: unit[budget] for method, unit in found.items()}
            content[budget] = harness.tables.compare(rows)
        content["search"] = {method: unit["search"] for method, unit in found.items()}
        content["unit_seconds"] = {m: unit["unit_seconds"] for m, unit in found.items()}
        for budget in ("gradients", "epochs") if task in show else ():
            title = f"{tasks.TITLES[task]}, {options.seeds} seeds, equal {budget}"
            lines = harness.tables.summary_cells(content[budget])
            harness.tables.show(title, *lines)
        summary[task] = content
    done = sum(len(content["gradients"]) for content in summary.values())
    size = sum(
        (files.read_json(unit_path(options, *unit)) or {"size": 0})["size"]
        for unit in units
    )
    command_line.save(
        options,
        "evidence",
        {"seeds": options.seeds, "tasks": summary},
        size=size,
        done=done,
        of=len(units),
        unit="units",
        draw=draw,
    )


def draw(path: Path, content: dict[str, Any]) -> None:
    """A panel per task: filled at equal gradients, hollow at equal epochs."""
    figures, found = harness.figures, content["tasks"]
    columns = min(3, len(found))
    figure, axes = figures.panels(-(-len(found) // columns), columns, width=5)
    for ax, task in zip(axes.flat, found.values(), strict=False):
        # At one gradient per step both budgets are one.
        longer = {
            name: row
            for name, row in task["epochs"].items()
            if row["last"] != task["gradients"][name]["last"]
        }
        figures.ranking(ax, task["gradients"], longer)
        ax.set_title(textwrap.fill(task["task"], 40), fontsize=9)
    for ax in axes.flat[len(found) :]:
        ax.set_visible(False)
    figure.suptitle(
        f"Filled: equal gradients; hollow: equal epochs; |: at the epoch that noisy "
        f"validation picks. Mean ± standard error, {content['seeds']} seeds",
        fontsize=10,
    )
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
