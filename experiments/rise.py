"""A radius from the rise of the loss on other examples, beside searched radii.

Every method is trained at every point of one small grid of learning rates and weight
decays, SAM and split SAM at every one of a few radii as well, at equal gradients. A
search is one seed: its noisy validation labels pick a point, which is scored by the
test accuracy of the other seeds. Differences are between searches, seed by seed.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from experiments import harness, tasks
from experiments.harness import command_line, files

GRID = {"learning_rate": (0.02, 0.06, 0.15), "weight_decay": (5e-4, 5e-3)}
RADII = {
    "sgd": (),
    "sam": (0.05, 0.15, 0.4),
    "split_sam": (0.5, 2.0, 8.0),
    "held_rise": (),
    "auto_vasso": (),
    "auto_lagged_vasso": (),
}
# The constants of the rule were chosen on tasks like the last two.
TASKS = ("cancer-40", "teacher-60", "wine-50", "digits-75")


def points(method: str) -> list[dict[str, float]]:
    """The hyperparameters of all trainings of a method."""
    grid = GRID | ({"rho": RADII[method]} if RADII[method] else {})
    return [
        dict(zip(grid, values, strict=True))
        for values in itertools.product(*grid.values())
    ]


def search(validation: np.ndarray, test: np.ndarray) -> list[float]:
    """What the search of each seed picks, scored on the others.

    Args:
      validation: (points, seeds) accuracy on noisy labels.
      test: (points, seeds) accuracy.
    """
    seeds = range(validation.shape[1])
    return [
        float(np.delete(test[validation[:, seed].argmax()], seed).mean())
        for seed in seeds
    ]


def measure(task: Any, name: str, seeds: int, progress: Any) -> dict[str, Any]:
    """All trainings of one method on one task; what the searches pick of them."""
    method, grid = harness.methods.METHODS[name], points(name)
    trained = harness.training.train(
        task,
        method,
        [point for point in grid for _ in range(seeds)],
        list(range(seeds)) * len(grid),
        epochs=harness.training.budget_epochs(task, method, "gradients"),
        test=True,
        progress=progress,
    )
    assert trained.test is not None
    validation, test = (
        found[:, -1].reshape(len(grid), seeds)
        for found in (trained.noisy_validation, trained.test)
    )
    best = validation.mean(axis=1).argmax()
    limit = tasks.collapsed_below(task)
    return harness.statistics.summary(search(validation, test), limit) | {
        "of_trainings": {"collapsed": int((test < limit).sum()), "all": test.size},
        "hyperparameters": grid[best],
    }


def main(arguments: list[str] | None = None) -> int:
    """Do what is missing; print, write."""
    parser = command_line.experiment_parser(
        "rise", __doc__, seeds=5, tasks=tasks.TITLES, default_tasks=TASKS
    )
    options = command_line.parse(parser, arguments)
    if options.smoke:
        options.tasks = ["wine-50"]
    harness.rows.use_all_cores(options.runs / "compiled")
    loaded = {name: tasks.load(name) for name in options.tasks}
    if options.smoke:
        loaded = {
            name: task._replace(epochs=4 * task.epochs_per_call)
            for name, task in loaded.items()
        }
    folder, units = options.runs / "rise", {}
    for (task, method), seeds in itertools.product(
        itertools.product(options.tasks, RADII), [options.seeds]
    ):
        each = harness.training.gradients_of(
            loaded[task], harness.methods.METHODS[method], "gradients"
        )
        work = round(each * len(points(method)) * seeds)
        units[task, method] = folder / f"{task}, {method}, {seeds} seeds.json", work
    size = sum(work for _, work in units.values())
    command_line.check_publishing(parser, options, "rise", size)
    found: dict[str, dict[str, Any]] = {}
    try:
        with harness.progress.over("rise", size) as progress:
            for (task, method), (path, work) in units.items():
                row = files.read_json(path)
                if row is None:
                    row = measure(loaded[task], method, options.seeds, progress)
                    files.write_json(path, row)
                else:
                    progress.advance(work)
                found.setdefault(task, {})[method] = row
    finally:
        content = {"searches": options.seeds, "tasks": found}
        complete = [name for name, row in found.items() if row.keys() == RADII.keys()]
        if complete:
            harness.tables.show("Held rise", *cells(content, complete))
        command_line.save(
            options,
            "rise",
            content,
            size=size,
            done=sum(map(len, found.values())),
            of=len(units),
            unit="parts",
            draw=draw,
        )
    return 0


def cells(
    content: dict[str, Any], names: list[str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Accuracies of all methods, what a held rise gains, and what collapsed."""
    labels = {name: harness.methods.METHODS[name].label for name in RADII}
    header = ["task", *(f"{label} (%)" for label in labels.values())]
    header += ["held rise − SGD", "held rise − SAM", "collapsed"]
    lines = []
    for task in names or content["tasks"]:
        row = content["tasks"][task]
        own, trainings = row["held_rise"], row["held_rise"]["of_trainings"]
        lines.append(
            [
                tasks.TITLES[task],
                *(harness.tables.mean_and_error(row[name]) for name in labels),
                *(
                    harness.tables.plus_minus(difference(own, row[other]))
                    for other in ("sgd", "sam")
                ),
                f"{trainings['collapsed']} of {trainings['all']}",
            ]
        )
    return header, lines


def difference(own: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Between two methods, search by search."""
    return harness.statistics.paired_difference(own["values"], other["values"])


def draw(path: Path, content: dict[str, Any]) -> None:
    """Every method less SGD, by task."""
    figures = harness.figures
    figure, axes = figures.panels(1, 1, width=7, height=4.4)
    found = content["tasks"]
    shown = [task for task, row in found.items() if row.keys() == RADII.keys()]
    for shift, name in zip(np.linspace(0.3, -0.3, 5), list(RADII)[1:], strict=True):
        method = harness.methods.METHODS[name]
        gains = [difference(found[task][name], found[task]["sgd"]) for task in shown]
        axes[0, 0].errorbar(
            [gain["mean"] for gain in gains],
            [shift - number for number in range(len(shown))],
            xerr=[gain["standard_error"] for gain in gains],
            capsize=2,
            linestyle="",
            color=method.color,
            marker=method.marker,
            label=method.label,
        )
    figures.task_axis(axes[0, 0], [tasks.TITLES[task] for task in shown])
    axes[0, 0].axvline(0, color="black", linewidth=0.8)
    axes[0, 0].set_xlabel("gain over SGD: test accuracy (points)")
    axes[0, 0].legend(
        frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
