"""Grids of trainings: how accuracy depends on a radius, on a weight, on a schedule.

Scored on held-out validation examples with their true labels, at the last epoch of a
training at equal gradients. The test set is not touched, so that nothing can be picked
on it.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from experiments import tasks
from experiments.harness import command_line, progress
from experiments.harness.methods import Method
from experiments.harness.progress import Progress
from experiments.harness.statistics import summary
from experiments.harness.training import budget_epochs, gradients_of, train
from experiments.tasks import Task

# Neither those of the test nor those of the search.
FIRST_SEED = 20_000

Point = dict[str, float]
Content = dict[str, Any]


class Panel(NamedTuple):
    """What is trained in one go.

    Attributes:
      task: what is learned.
      method: with what.
      points: the hyperparameters, each with every seed.
    """

    task: Task
    method: Method
    points: list[Point]


def work_of(panel: Panel, seeds: int) -> float:
    """Gradients that a panel takes."""
    each = gradients_of(panel.task, panel.method, "gradients")
    return len(panel.points) * seeds * each


def measure(panel: Panel, seeds: int, progress: Progress | None = None) -> Content:
    """Train every point of a panel; what a results file says of it.

    Returns:
      ``task`` and ``method``, their titles, and ``points``: a list of
      ``hyperparameters``, ``accuracy`` (:func:`statistics.summary`, true labels) and
      ``noisy``, the mean on the labels that a user has.
    """
    points, limit = panel.points, tasks.collapsed_below(panel.task)
    trained = train(
        panel.task,
        panel.method,
        [point for point in points for _ in range(seeds)],
        list(range(FIRST_SEED, FIRST_SEED + seeds)) * len(points),
        epochs=budget_epochs(panel.task, panel.method, "gradients"),
        progress=progress,
    )
    true = trained.clean_validation[:, -1].reshape(len(points), seeds)
    noisy = trained.noisy_validation[:, -1].reshape(len(points), seeds)
    return {
        "task": panel.task.title,
        "method": panel.method.label,
        "points": [
            {
                "hyperparameters": point,
                "accuracy": summary(of_seeds, limit),
                "noisy": round(float(given.mean()), 3),
            }
            for point, of_seeds, given in zip(points, true, noisy, strict=True)
        ],
    }


def best(points: list[Content]) -> Content:
    """The point with the best mean accuracy."""
    return max(points, key=lambda point: point["accuracy"]["mean"])


def parted(points: list[Content], names: Iterable[str]) -> dict[str, list[Content]]:
    """The points of each name, of which all have as many, one name after another."""
    keys = list(names)
    each = len(points) // len(keys)
    return {
        name: points[number * each : (number + 1) * each]
        for number, name in enumerate(keys)
    }


def run(
    parser: command_line.Parser,
    options: Any,
    name: str,
    panels: dict[str, Panel],
    *,
    show: Callable[[Content], None],
    draw: Callable[[Path, Content], None],
) -> int:
    """Measure the panels one after another, print, write; the exit code.

    Args:
      parser: to refuse publishing with, before anything is trained.
      options: of :func:`command_line.parse`, with ``seeds``.
      name: of the files.
      panels: by their titles.
      show: prints what was found.
      draw: (path, content) -> None writes the figure.
    """
    work = {title: work_of(panel, options.seeds) for title, panel in panels.items()}
    size = round(sum(work.values()))
    command_line.check_publishing(parser, options, name, size)
    found: dict[str, Content] = {}
    try:
        with progress.over(name, size) as bar:
            for title, panel in panels.items():
                found[title] = measure(panel, options.seeds, bar)
    finally:
        content = {
            "seeds": options.seeds,
            "split": "validation, true labels",
            "panels": found,
        }
        if found:
            show(content)
        command_line.save(
            options,
            name,
            content,
            size=size,
            done=len(found),
            of=len(panels),
            unit="panels",
            draw=draw,
        )
    return 0
