"""One method on one task, searched several times: the unit of the evidence is a search.

Every search draws its own trials and its own seeds of training, and validates on noisy
labels alone. What it picks is trained again on test seeds of its own, which all methods
of that search share, so that methods are compared search by search.
"""

import time
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import tasks
from experiments.harness import training, tuning
from experiments.harness.methods import Method
from experiments.harness.progress import Progress
from experiments.harness.statistics import summary
from experiments.tasks import Task

# Seeds of the searches begin here; those of the tests are 0, 1, …
FIRST_SEED, SEEDS_APART = 10_000, 1_000
# After how many trials one may ask what validation picks.
TRIALS = (1, 2, 4, 8, 16)


class Plan(NamedTuple):
    """How much is trained.

    Attributes:
      searches: how many.
      budget: of each.
      tests: trainings of what a search picks, on seeds of their own.
    """

    searches: int = 5
    budget: tuning.Budget = tuning.Budget(16, 1, ((4, 3),), widenings=1)
    tests: int = 8


SMOKE = Plan(2, tuning.Budget(4, 1, ((2, 2),), widenings=1), tests=2)


def work_of(task: Task, method: Method, plan: Plan) -> float:
    """Gradients of all searches, if no range is widened."""
    each = plan.budget.trainings * task.folds + plan.tests
    return plan.searches * each * training.gradients_of(task, method, "gradients")


def run(
    task: Task,
    method: Method,
    plan: Plan,
    starts: Sequence[Sequence[dict[str, float]]],
    progress: Progress,
    begun: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Search and test; what a results file says of it.

    Args:
      task: what is learned.
      method: with what.
      plan: how much.
      starts: for each search, hyperparameters to try among the others.
      progress: advanced by :func:`work_of` in all.
      begun: what this returned for fewer searches, to go on from.

    Returns:
      ``searches``, what each of them did: ``picked``; ``tests``, the accuracies of what
      it picked; ``validation``, its own score, on noisy labels; ``on_edge``; ``best``,
      its two best trials; ``trials``: their hyperparameters, and for each training the
      accuracies on ``noisy`` and ``clean`` validation labels and on ``test`` examples.
    """
    began, before = time.perf_counter(), progress.done
    planned = work_of(task, method, plan)
    known = begun["searches"] if begun else []
    found = known + [
        search(task, method, plan, number, starts[number] if starts else (), progress)
        for number in range(len(known), plan.searches)
    ]
    # Whatever was widened, the method is done.
    progress.advance(before + planned - progress.done)
    return {
        "task": task.title,
        "method": method.label,
        "searches": found,
        "unit_seconds": round(
            time.perf_counter() - began + (begun["unit_seconds"] if begun else 0.0), 1
        ),
    }


def search(
    task: Task,
    method: Method,
    plan: Plan,
    number: int,
    starts: Sequence[dict[str, float]],
    progress: Progress,
) -> dict[str, Any]:
    """One search and its tests."""
    seen: dict[tuple, list[list[float]]] = {}

    def train(points: list[dict[str, float]], seeds: list[int]) -> training.Trained:
        return training.train(
            task,
            method,
            points,
            seeds,
            epochs=training.budget_epochs(task, method, "gradients"),
            test=True,
            curve=False,
            progress=progress,
        )

    def measure(points: list[dict[str, float]], seeds: list[int]) -> np.ndarray:
        """Score by noisy validation, over all folds; the rest is for the record."""
        folds = range(task.folds)
        trained = train(
            [point for point in points for _ in folds],
            [task.folds * seed + fold for seed in seeds for fold in folds],
        )
        assert trained.test is not None
        noisy, clean, test = (
            accuracy[:, -1].reshape(len(points), task.folds).mean(axis=1)
            for accuracy in (
                trained.noisy_validation,
                trained.clean_validation,
                trained.test,
            )
        )
        for point, *scores in zip(points, noisy, clean, test, strict=True):
            seen.setdefault(tuple(point.values()), []).append(
                [float(s) for s in scores]
            )
        return noisy

    found = tuning.search(
        method.space,
        measure,
        plan.budget,
        first_seed=FIRST_SEED + SEEDS_APART * number,
        seed=(zlib.crc32(task.name.encode()), number),
        starts=starts,
    )
    tests = train([found.picked] * plan.tests, test_seeds(task, plan, number))
    assert tests.test is not None
    trials = [
        trial.hyperparameters
        | dict(
            zip(
                ("noisy", "clean", "test"),
                np.round(
                    np.transpose(seen[tuple(trial.hyperparameters.values())]), 3
                ).tolist(),
                strict=True,
            )
        )
        for trial in found.trials
    ]
    return {
        "picked": found.picked,
        "tests": [round(float(accuracy), 4) for accuracy in tests.test[:, -1]],
        "validation": round(float(np.mean(found.trials[found.finalists[0]].scores)), 3),
        "on_edge": found.on_edge,
        "best": [found.trials[i].hyperparameters for i in found.finalists[:2]],
        "trials": trials,
    }


def test_seeds(task: Task, plan: Plan, number: int) -> list[int]:
    """The seeds of the tests of a search: one fold of each, no two searches' alike."""
    first = plan.tests * number
    return [task.folds * seed for seed in range(first, first + plan.tests)]


def row(task: Task, method: Method, unit: dict[str, Any]) -> dict[str, Any]:
    """What a results file says of one method on one task; a value per search."""
    found = unit["searches"]
    limit = tasks.collapsed_below(task)
    tests = np.array([one["tests"] for one in found])
    return {
        "label": method.label,
        "accuracy": summary(tests.mean(axis=1), limit),
        "between_seeds": round(float(tests.std(axis=1, ddof=1).mean()), 3),
        "collapsed": int((tests < limit).sum()),
        "tests": tests.tolist(),
        "validation": [one["validation"] for one in found],
        "picked": [one["picked"] for one in found],
        "on_edge": [one["on_edge"] for one in found],
        "after_trials": {str(k): picked_of(found, k) for k in TRIALS},
        "picked_by_true_labels": summary(by_true_labels(found), limit)["mean"],
        "picked_by_noisy_labels": summary(picked_of(found, None), limit)["mean"],
    }


def picked_of(found: list[dict[str, Any]], count: int | None) -> list[float]:
    """For each search, the test accuracy of what validation picks of ``count`` trials.

    A trial counts by its first seed alone, as somebody would who trains once per trial.
    Where the first half of the trials, which were drawn alike, has several groups of
    that many, their mean; ``None`` takes all trials.
    """
    values = []
    for one in found:
        trials = one["trials"]
        half = len(trials[: max(TRIALS)]) // 2
        groups = (
            [trials[i : i + count] for i in range(0, half, count)]
            if count and count <= half
            else [trials[:count]]
        )
        best = [max(group, key=lambda t: t["noisy"][0]) for group in groups]
        values.append(float(np.mean([trial["test"][0] for trial in best])))
    return values


def by_true_labels(found: list[dict[str, Any]]) -> list[float]:
    """What validation examples with true labels would have picked of all trials."""
    return [
        max(one["trials"], key=lambda trial: trial["clean"][0])["test"][0]
        for one in found
    ]
