"""The evidence: every method on every task at equal gradients, searched five times.

Each unit is one method on one task: five searches, each with trials and seeds of its
own, each tested on seeds of its own. A unit is saved when it is finished and never done
again, so the run may be stopped and resumed at any time.
"""

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

from experiments import harness, tasks
from experiments.harness import command_line, files
from experiments.harness.progress import duration

PUBLISHED = Path(__file__).parents[1] / "results"
# Methods that contain another one try its best points, too.
CONTAINS = {"vasso": "sam", "friendly_sam": "sam"}
# In the order in which they are run.
TASKS = (
    "digits-75",
    "mnist1d-40",
    "mnist1d-0",
    "fashion-40",
    "fashion-0",
    "cancer-40",
    "wine-50",
    "teacher-60",
    "convnet-50",
    "digits-75-short",
    "mnist1d-40-short",
    "mnist1d-40-long",
    "fashion-40-short",
    "fashion-40-long",
    "mnist1d_cnn-40",
    "fashion_cnn-40",
    "fashion_cnn-0",
)
# The most searches of tasks that take long.
MOST_SEARCHES = {"mnist1d_cnn-40": 3, "fashion_cnn-40": 3, "fashion_cnn-0": 2}
# Seconds per gradient of one training, with both of two quiet cores at work, and
# seconds to compile one method for one network.
SECONDS = {
    "digits": 2.4e-4,
    "convnet": 4.5e-4,
    "mnist1d": 7e-5,
    "fashion": 1.3e-4,
    "mnist1d_cnn": 1.4e-4,
    "fashion_cnn": 5e-4,
    "cancer": 2e-5,
    "wine": 2e-5,
    "teacher": 4e-5,
}
COMPILING = 5.0


def main(arguments: list[str] | None = None) -> int:
    """Do the units that are missing; print, write."""
    options = parsed(arguments)
    units, missing = units_of(options), missing_of(options)
    if not options.list:
        harness.rows.use_all_cores(options.runs / "compiled")
    estimates = estimate(options)
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
            print(f"  {unit[0]:<18} {unit[1]:<18} {state}")
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
                    do(options, *unit)
                done.append(unit)
    finally:
        report(options, units, show={task for task, _ in done})
    return 0


def parsed(arguments: list[str] | None) -> Any:
    """The command line."""
    parser = command_line.experiment_parser(
        "evidence",
        __doc__,
        methods=command_line.METHOD_LABELS,
        default_methods=(*command_line.COMPARED, *command_line.SPLITS),
        tasks=(base + length for base in tasks.TITLES for length in tasks.LENGTHS),
        default_tasks=TASKS,
    )
    parser.add_argument(
        "--searches",
        type=command_line.positive_integer,
        default=5,
        help="how many searches per unit, fewer of large convolutional networks",
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
    """Task and method of every unit, the methods that others start from first."""
    return [
        (task, name)
        for task in options.tasks
        for name in options.methods
        if (name not in command_line.SPLITS or task in command_line.SPLIT_TASKS)
        and (name in command_line.CNN_METHODS or not tasks.is_cnn(task))
    ]


def missing_of(options: Any) -> list[tuple[str, str]]:
    """The units that are not saved with as many searches."""
    return [unit for unit in units_of(options) if not saved(options, *unit)]


def saved(options: Any, task: str, method: str) -> dict[str, Any] | None:
    """The searches of a unit that are asked for, if so many are saved."""
    found = files.read_json(unit_path(options, task, method))
    count = plan_of(options, task).searches
    if found is None or len(found["searches"]) < count:
        return None
    return found | {"searches": found["searches"][:count]}


def plan_of(options: Any, task: str) -> Any:
    """How much is trained per unit of a task."""
    if options.smoke:
        return harness.searches.SMOKE
    most = MOST_SEARCHES.get(task, options.searches)
    return harness.searches.Plan(searches=min(options.searches, most))


def unit_path(options: Any, task: str, method: str) -> Path:
    """Where a unit is saved."""
    return options.runs / "evidence" / task / f"{method}.json"


def loaded(options: Any, name: str) -> tasks.Task:
    """A task; a short one for a smoke run."""
    task = tasks.load(name)
    return task._replace(epochs=2 * task.epochs_per_call) if options.smoke else task


def estimate(options: Any) -> dict[tuple[str, str], float]:
    """Seconds that each unit takes on two quiet cores."""
    seconds: dict[tuple[str, str], float] = {}
    compiled = set()
    for task_name, method_name in units_of(options):
        try:
            task, method = tasks.load(task_name), harness.methods.METHODS[method_name]
        except SystemExit:  # its data are not here, as running it will say
            seconds[task_name, method_name] = 0.0
            continue
        kind = task_name.partition("-")[0]
        work = harness.searches.work_of(task, method, plan_of(options, task_name))
        program = (task.network, task.gradient_noise > 0, method_name)
        seconds[task_name, method_name] = SECONDS[kind] * work
        if program not in compiled:
            seconds[task_name, method_name] += COMPILING
            compiled.add(program)
    return seconds


def measured_pace(options: Any, estimates: dict[tuple[str, str], float]) -> float:
    """Seconds per estimated second, from the units that are finished."""
    found = {unit: files.read_json(unit_path(options, *unit)) for unit in estimates}
    paces = [
        u["unit_seconds"] / estimates[unit]
        for unit, u in found.items()
        if u and estimates[unit]
    ]
    return statistics.median(paces) if paces else 1.0


def seconds_left(options: Any) -> float:
    """How long the units that are missing take."""
    estimates = estimate(options)
    left = sum(estimates[unit] for unit in missing_of(options))
    return left * measured_pace(options, estimates)


def do(options: Any, task_name: str, method_name: str) -> None:
    """Run one unit and save it."""
    task, method = loaded(options, task_name), harness.methods.METHODS[method_name]
    plan = plan_of(options, task_name)
    contained = saved(options, task_name, CONTAINS.get(method_name, "sgd"))
    starts = [one["best"] for one in contained["searches"]] if contained else []
    work = harness.searches.work_of(task, method, plan)
    with harness.progress.over(task_name, work) as progress:
        begun = files.read_json(unit_path(options, task_name, method_name))
        unit = harness.searches.run(task, method, plan, starts, progress, begun)
    files.write_json(unit_path(options, task_name, method_name), unit)


def report(options: Any, units: list[tuple[str, str]], show: set[str]) -> None:
    """Save what the units that are there say; print the table of some tasks."""
    found: dict[str, Any] = {}
    for task, method in units:
        if unit := saved(options, task, method):
            row = harness.searches.row(
                tasks.load(task), harness.methods.METHODS[method], unit
            )
            content = found.setdefault(
                task, {"task": tasks.title(task), "gradients": budget(options, task)}
            )
            content.setdefault("methods", {})[method] = row
    for task in found.keys() & show:
        count = plan_of(options, task).searches
        title = f"{tasks.title(task)}, {count} searches per method"
        harness.tables.show(title, *harness.verdicts.cells(found[task]["methods"]))
    plan = plan_of(options, TASKS[0])
    content = {"searches": plan.searches, "tests": plan.tests, "tasks": found}
    command_line.save(
        options,
        "evidence",
        content,
        size=sum(
            round(
                harness.searches.work_of(
                    loaded(options, task),
                    harness.methods.METHODS[method],
                    plan_of(options, task),
                )
            )
            for task, one in found.items()
            for method in one["methods"]
        ),
        done=sum(len(one["methods"]) for one in found.values()),
        of=len(units),
        unit="units",
        # They show the tasks at their own length.
        draw=harness.verdicts.FIGURES if harness.verdicts.main_tasks(content) else None,
    )


def budget(options: Any, task: str) -> float:
    """The gradients of every training on a task."""
    sgd = harness.methods.METHODS["sgd"]
    return harness.training.gradients_of(loaded(options, task), sgd, "gradients")


def published() -> dict[str, Any]:
    """What the evidence that is published says."""
    found = files.read_json(PUBLISHED / "evidence.json")
    if found is None:
        raise FileNotFoundError(PUBLISHED / "evidence.json")
    return found


if __name__ == "__main__":
    command_line.run(main)
