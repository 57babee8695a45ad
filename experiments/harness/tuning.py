"""The search for hyperparameters, the same for every method.

Half of the trials are a quasi-random sequence over the ranges, half are drawn around
the best of the first half and may leave the ranges. All are measured on a few seeds;
the best go on to more (successive halving over seeds). If what is picked lies at an end
of its range, the range is widened there, and more trials are drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import qmc

from experiments.harness.methods import Range

# (hyperparameters of each training, its seed) -> a score for each; higher is better
Measure = Callable[[list[dict[str, float]], list[int]], np.ndarray]

# A value closer than this to an end of its range, in units of the range, is at the end.
EDGE = 0.05
# Standard deviation of trials around a good one, and how far a range is widened.
STEP, WIDENING = 0.12, 0.5


class Budget(NamedTuple):
    """How much a search may train.

    Attributes:
      trials: how many hyperparameters are tried; the same number for every method.
      seeds: of every trial.
      rungs: (trials that go on, seeds that they then have) of each later stage.
      widenings: how often ranges may be widened, by a quarter of the trials each.
    """

    trials: int = 24
    seeds: int = 2
    rungs: tuple[tuple[int, int], ...] = ((8, 4), (3, 12))
    widenings: int = 2

    @property
    def trainings(self) -> int:
        """How many trainings a search takes that widens nothing."""
        count, before = self.trials * self.seeds, self.seeds
        for survivors, seeds in self.rungs:
            count += survivors * (seeds - before)
            before = seeds
        return count


class Trial(NamedTuple):
    """Hyperparameters, and one score for each seed that they were measured on."""

    hyperparameters: dict[str, float]
    scores: list[float]


class Search(NamedTuple):
    """What a search has found.

    Attributes:
      picked: the best hyperparameters.
      trials: all, in the order in which they were drawn.
      finalists: the indices of those that were measured on all seeds, best first.
      ranges: (low, high) of each hyperparameter at the end.
      widened: one sentence for each time that a range was widened.
      on_edge: hyperparameters that still lie at an end of their range.
    """

    picked: dict[str, float]
    trials: list[Trial]
    finalists: list[int]
    ranges: dict[str, tuple[float, float]]
    widened: list[str]
    on_edge: list[str]


def search(
    space: Mapping[str, Range],
    measure: Measure,
    budget: Budget,
    *,
    first_seed: int,
    seed: int | Sequence[int] = 0,
    starts: Sequence[Mapping[str, float]] = (),
) -> Search:
    """Search all hyperparameters of a method jointly.

    Args:
      space: the range of each hyperparameter.
      measure: trains and scores on validation examples.
      budget: how much.
      first_seed: the seeds of the trainings are this one and those that follow; they
        are none of the test's.
      seed: of the trials that are drawn.
      starts: hyperparameters, or some of them, that are tried first in the second half,
        such as the best of a method that this one contains; what one leaves out is that
        of the best trials of the first half.
    """
    random = np.random.default_rng(seed)
    box = Box(space)
    sequence = qmc.Halton(len(space), seed=np.random.default_rng(seed))
    begun = (budget.trials + 1) // 2
    drawn = list(sequence.random(begun))
    scores: list[list[float]] = []

    def top_up(indices: Sequence[int], seeds: int) -> None:
        """Measure the trials on the seeds that they lack, in one go."""
        scores.extend([] for _ in range(len(drawn) - len(scores)))
        lacking = [(i, s) for i in indices for s in range(len(scores[i]), seeds)]
        if lacking:
            found = measure(
                [box.values(drawn[i]) for i, _ in lacking],
                [first_seed + s for _, s in lacking],
            )
            for (i, _), score in zip(lacking, found, strict=True):
                scores[i].append(float(score))

    def best(indices: Sequence[int], count: int) -> list[int]:
        return sorted(indices, key=lambda i: -float(np.mean(scores[i])))[:count]

    def halve(indices: Sequence[int]) -> list[int]:
        top_up(indices, budget.seeds)
        for survivors, seeds in budget.rungs:
            indices = best(indices, survivors)
            top_up(indices, seeds)
        return best(indices, len(indices))

    top_up(range(begun), budget.seeds)
    centres = best(range(begun), max(1, begun // 4))
    for i in range(budget.trials - begun):
        near = drawn[centres[i % len(centres)]]
        point = near + STEP * random.standard_normal(len(space))
        if i < len(starts):
            moved = box.moved(near, starts[i])
            # What was tried already would tell nothing new.
            if all(box.values(moved) != box.values(other) for other in drawn):
                point = moved
        drawn.append(box.within(point))
    box.take_in(drawn)
    finalists = halve(range(len(drawn)))
    widened: list[str] = []
    for _ in range(budget.widenings):
        ends = box.ends(drawn[finalists[0]])
        if not ends:
            break
        picked = drawn[finalists[0]]
        widened += box.widen(ends, picked)
        fresh = range(len(drawn), len(drawn) + max(2, budget.trials // 4))
        for _ in fresh:
            point = picked + STEP * random.standard_normal(len(space))
            for axis, upwards in ends.items():
                far = box.high[axis] if upwards else box.low[axis]
                point[axis] = random.uniform(*sorted((picked[axis], far)))
            drawn.append(box.within(point))
        box.take_in(drawn)
        # The new ones that are best so far meet the finalists on all seeds.
        top_up(fresh, budget.seeds)
        finalists = halve([*finalists, *best(fresh, max(1, len(fresh) // 3))])
    return Search(
        picked=box.values(drawn[finalists[0]]),
        trials=[Trial(box.values(d), s) for d, s in zip(drawn, scores, strict=True)],
        finalists=finalists,
        ranges=box.ranges(),
        widened=widened,
        on_edge=[box.names[axis] for axis in box.ends(drawn[finalists[0]])],
    )


class Box:
    """Points of a search space; the unit cube is where the search begins."""

    def __init__(self, space: Mapping[str, Range]) -> None:
        self.names = list(space)
        self.space = list(space.values())
        self.low, self.high = np.zeros(len(space)), np.ones(len(space))
        self.least = np.array([self._unit(r, r.least) for r in self.space])
        self.most = np.array([self._unit(r, r.most) for r in self.space])

    @staticmethod
    def _unit(r: Range, value: float) -> float:
        if r.linear:
            return (value - r.low) / (r.high - r.low)
        return float(np.log(value / r.low) / np.log(r.high / r.low))

    @staticmethod
    def _value(r: Range, unit: float) -> float:
        if r.linear:
            return float(r.low + unit * (r.high - r.low))
        return float(r.low * (r.high / r.low) ** unit)

    def values(self, point: np.ndarray) -> dict[str, float]:
        """Hyperparameters at a point, to three digits."""
        return {
            name: float(f"{self._value(r, unit):.3g}")
            for name, r, unit in zip(self.names, self.space, point, strict=True)
        }

    def moved(self, point: np.ndarray, values: Mapping[str, float]) -> np.ndarray:
        """A point with some of its hyperparameters replaced."""
        return np.array(
            [
                self._unit(r, values[name]) if name in values else unit
                for name, r, unit in zip(self.names, self.space, point, strict=True)
            ]
        )

    def within(self, point: np.ndarray) -> np.ndarray:
        """The closest point that is allowed at all."""
        return np.clip(point, self.least, self.most)

    def take_in(self, points: list[np.ndarray]) -> None:
        """Let the ranges reach as far as the points."""
        self.low = np.minimum(self.low, np.min(points, axis=0))
        self.high = np.maximum(self.high, np.max(points, axis=0))

    def ends(self, point: np.ndarray) -> dict[int, bool]:
        """Axes on which a point is at an end that could be widened: is it the upper?"""
        margin = EDGE * (self.high - self.low)
        upper = (point > self.high - margin) & (self.high < self.most - 1e-9)
        lower = (point < self.low + margin) & (self.low > self.least + 1e-9)
        return {int(axis): bool(upper[axis]) for axis in np.flatnonzero(upper | lower)}

    def widen(self, ends: Mapping[int, bool], point: np.ndarray) -> list[str]:
        """Widen at the ends where a point is; a sentence for each."""
        said = []
        before, value = self.ranges(), self.values(point)
        for axis, upwards in ends.items():
            if upwards:
                self.high[axis] = min(self.high[axis] + WIDENING, self.most[axis])
            else:
                self.low[axis] = max(self.low[axis] - WIDENING, self.least[axis])
        for axis in ends:
            name = self.names[axis]
            was, now = before[name], self.ranges()[name]
            said.append(
                f"{name} = {value[name]:g} lies at an end of {was[0]:g} to {was[1]:g}: "
                f"widened to {now[0]:g} to {now[1]:g}."
            )
        return said

    def ranges(self) -> dict[str, tuple[float, float]]:
        """(low, high) of each hyperparameter."""
        low, high = self.values(self.low), self.values(self.high)
        return {name: (low[name], high[name]) for name in self.names}


def as_json(found: Search) -> dict[str, Any]:
    """A search as a results file has it."""
    return {
        "picked": found.picked,
        "ranges": {name: list(r) for name, r in found.ranges.items()},
        "widened": found.widened,
        "on_edge": found.on_edge,
        "trials": [
            trial.hyperparameters | {"scores": [round(s, 3) for s in trial.scores]}
            for trial in found.trials
        ],
    }
