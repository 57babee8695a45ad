"""The search spends what it says, finds what is there, and watches its edges."""

import numpy as np
import pytest

from experiments.harness import tuning
from experiments.harness.methods import METHODS, Range

SPACE = {"rho": Range(0.1, 1.0, least=0.01), "theta": Range(0.05, 1.0, most=1.0)}


def peak(calls, **best):
    """A score that falls with the distance, in decades, from the best values."""

    def measure(points, seeds):
        calls.extend(zip((tuple(p.values()) for p in points), seeds, strict=True))
        return np.array(
            [-sum(np.log10(p[n] / b) ** 2 for n, b in best.items()) for p in points]
        )

    return measure


def test_a_search_finds_a_peak_inside_its_ranges_and_spends_its_budget():
    calls, budget = [], tuning.Budget()
    found = tuning.search(
        SPACE, peak(calls, rho=0.3, theta=0.2), budget, first_seed=500
    )
    assert found.picked["rho"] == pytest.approx(0.3, rel=0.35)
    assert found.picked["theta"] == pytest.approx(0.2, rel=0.35)
    assert found.widened == found.on_edge == []
    assert len(calls) == budget.trainings == len(set(calls))
    assert len(found.trials) == budget.trials
    assert {seed for _, seed in calls} == set(range(500, 512))


def test_every_method_is_given_as_many_trainings():
    spent = set()
    for method in METHODS.values():
        calls = []
        centre = {n: (r.low * r.high) ** 0.5 for n, r in method.space.items()}
        tuning.search(
            method.space, peak(calls, **centre), tuning.Budget(), first_seed=0
        )
        spent.add(len(calls))
    assert spent == {tuning.Budget().trainings}


def test_a_peak_beyond_the_range_widens_it_and_is_reached():
    found = tuning.search(
        SPACE, peak([], rho=3.0, theta=0.2), tuning.Budget(), first_seed=0
    )
    assert found.widened
    assert "rho = " in found.widened[0]
    assert found.picked["rho"] > 1.2
    assert found.ranges["rho"][1] > 1.5


@pytest.mark.parametrize("rho", [0.015, 8.0])
def test_ranges_may_be_widened_at_both_ends_and_more_than_once(rho):
    found = [
        tuning.search(
            SPACE,
            peak([], rho=rho, theta=0.2),
            tuning.Budget(),
            first_seed=0,
            seed=seed,
        )
        for seed in range(8)
    ]
    assert max(len(search.widened) for search in found) > 1
    for search in found:
        low, high = search.ranges["rho"]
        assert low <= search.picked["rho"] <= high


def test_a_value_that_may_not_be_larger_is_no_edge():
    found = tuning.search(
        SPACE, peak([], rho=0.3, theta=50.0), tuning.Budget(), first_seed=0
    )
    assert found.picked["theta"] > 0.7
    assert not any("theta" in sentence for sentence in found.widened)
    assert "theta" not in found.on_edge
    assert all(trial.hyperparameters["theta"] <= 1 for trial in found.trials)


def test_a_pick_that_stays_on_an_edge_is_reported():
    budget = tuning.Budget(widenings=0)
    found = tuning.search(SPACE, peak([], rho=30.0, theta=0.2), budget, first_seed=0)
    assert found.on_edge == ["rho"]


def test_the_best_trials_are_measured_on_all_seeds_and_only_they():
    found = tuning.search(
        SPACE, peak([], rho=0.3, theta=0.2), tuning.Budget(), first_seed=0
    )
    counts = sorted(len(trial.scores) for trial in found.trials)
    assert counts == [2] * 16 + [4] * 5 + [12] * 3
    assert all(len(found.trials[i].scores) == 12 for i in found.finalists)
    assert found.picked == found.trials[found.finalists[0]].hyperparameters


def test_starts_are_tried_with_what_they_leave_out_from_the_best_so_far():
    found = tuning.search(
        SPACE,
        peak([], rho=0.3, theta=0.2),
        tuning.Budget(widenings=0),
        first_seed=0,
        starts=[{"rho": 0.31}, {"rho": 0.77, "theta": 0.11}],
    )
    tried = [trial.hyperparameters for trial in found.trials]
    first = tried[:12]
    near = {point["theta"] for point in first}
    assert tried[12]["rho"] == 0.31
    assert tried[12]["theta"] in near
    assert tried[13] == {"rho": 0.77, "theta": 0.11}


def test_a_search_is_repeatable():
    found = [
        tuning.search(
            SPACE, peak([], rho=0.3, theta=0.2), tuning.Budget(), first_seed=0
        )
        for _ in range(2)
    ]
    assert tuning.as_json(found[0]) == tuning.as_json(found[1])
