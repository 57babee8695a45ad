"""One method on one task by the protocol: search, then test at both budgets.

The search is at equal gradients and never sees the test set. For equal epochs, which is
another length of training for methods of several gradients per step, its finalists are
measured again at that length.
"""

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.harness import files, tables, training, tuning
from experiments.harness.methods import Method
from experiments.harness.progress import Progress, over
from experiments.tasks import Task

# Seeds of the search; those of the test are 0, 1, …
FIRST_SEARCH_SEED = 10_000


class Plan(NamedTuple):
    """How much is trained.

    Attributes:
      search: trials and seeds of the search.
      seeds: of the test.
      again: seeds on which the finalists are measured again for equal epochs.
    """

    search: tuning.Budget = tuning.Budget()
    seeds: int = 24
    again: int = 6


SMOKE = Plan(tuning.Budget(4, 1, ((2, 2),), widenings=1), seeds=2, again=1)


def work_of(task: Task, method: Method, plan: Plan) -> float:
    """Gradients of a unit that widens nothing."""
    gradients = training.gradients_of(task, method, "gradients")
    work = gradients * (plan.search.trainings + plan.seeds)
    if method.gradients > 1:
        again = plan.search.rungs[-1][0] * plan.again + plan.seeds
        work += again * training.gradients_of(task, method, "epochs")
    return work


def saved(folder: Path, name: str, plan: Plan) -> dict[str, Any] | None:
    """The unit that is saved under a name, if it has as many test seeds."""
    found = files.read_json(folder / f"{name}.json")
    if found and len(found["gradients"]["last"]["values"]) >= plan.seeds:
        return found
    return None


def run_and_save(
    folder: Path, name: str, task: Task, method: Method, plan: Plan, progress: Progress
) -> dict[str, Any]:
    """Run a unit and save it under a name."""
    result = run(task, method, plan, progress)
    size = round(work_of(task, method, plan))
    files.save(folder, name, result, size=size, finished=True)
    return result


def run_missing(
    title: str,
    folder: Path,
    units: dict[tuple[str, str], tuple[Task, Method]],
    plan: Plan,
) -> dict[tuple[str, str], dict[str, Any]]:
    """All units; those that are saved are not run again.

    Args:
      title: of the progress.
      folder: where the units are saved, each under (its folder, its name).
      units: what to train with what, by (its folder, its name).
      plan: how much.
    """
    found, missing = {}, []
    for group, name in units:
        if unit := saved(folder / group, name, plan):
            found[group, name] = unit
        else:
            missing.append((group, name))
    try:
        work = sum(work_of(*units[key], plan) for key in missing)
        with over(title, work) as progress:
            for group, name in missing:
                found[group, name] = run_and_save(
                    folder / group, name, *units[group, name], plan, progress
                )
    finally:
        if len(found) < len(units):
            print(
                f"{len(found)} of {len(units)} units are saved in {folder}; the same "
                "command goes on from there.",
                file=sys.stderr,
            )
    return found


def run(task: Task, method: Method, plan: Plan, progress: Progress) -> dict[str, Any]:
    """Search and test; what a results file says of it.

    Args:
      task: what is learned.
      method: with what.
      plan: how much.
      progress: advanced by :func:`work_of` in all.

    Returns:
      ``search`` (:func:`tuning.as_json`), and rows of :func:`tables.row`:
      ``gradients``, and ``epochs`` (the same, for methods of one gradient).
    """
    began, before = time.perf_counter(), progress.done
    planned = work_of(task, method, plan)

    def measure(
        points: list[dict[str, float]], seeds: list[int], budget: str = "gradients"
    ) -> np.ndarray:
        trained = training.train(
            task,
            method,
            points,
            seeds,
            epochs=training.budget_epochs(task, method, budget),
            progress=progress,
        )
        return trained.noisy_validation[:, -1]

    def test(point: dict[str, float], budget: str) -> dict[str, Any]:
        trained = training.train(
            task,
            method,
            [point] * plan.seeds,
            range(plan.seeds),
            epochs=training.budget_epochs(task, method, budget),
            test=True,
            progress=progress,
        )
        return tables.row(task, method, point, trained)

    found = tuning.search(
        method.space, measure, plan.search, first_seed=FIRST_SEARCH_SEED
    )
    result = {
        "task": task.title,
        "method": method.label,
        "search": tuning.as_json(found),
        "gradients": test(found.picked, "gradients"),
    }
    if method.gradients == 1:
        result["epochs"] = result["gradients"]
    else:
        points = [found.trials[i].hyperparameters for i in found.finalists]
        seeds = list(range(FIRST_SEARCH_SEED, FIRST_SEARCH_SEED + plan.again))
        scores = measure(
            [point for point in points for _ in seeds], seeds * len(points), "epochs"
        )
        best = int(scores.reshape(len(points), -1).mean(1).argmax())
        result["epochs"] = test(points[best], "epochs")
    # Whatever was widened or left out, the unit is done.
    progress.advance(before + planned - progress.done)
    return result | {"unit_seconds": round(time.perf_counter() - began, 1)}
