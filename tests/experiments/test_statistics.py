"""Means over seeds and paired differences are the textbook's."""

import numpy as np
import pytest
from scipy import stats

from experiments.harness import statistics


def test_the_standard_error_is_the_deviation_over_the_root_of_the_number():
    values = [1.0, 2.0, 4.0, 7.0]
    assert statistics.standard_error(values) == pytest.approx(stats.sem(values))
    assert statistics.standard_error([3.0]) == 0


def test_the_error_of_a_paired_difference_is_that_of_the_differences():
    values, reference = np.array([3.0, 5.0, 4.0]), np.array([2.5, 4.0, 4.5])
    found = statistics.paired_difference(values, reference)
    assert found["mean"] == pytest.approx(1 / 3)
    assert found["standard_error"] == pytest.approx(stats.sem(values - reference))


def test_a_table_compares_each_pair_once():
    random = np.random.default_rng(0)
    values = {name: random.normal(80, 3, 8) for name in ("sgd", "sam", "vasso")}
    found = statistics.comparisons(values, ("sgd", "sam", "absent"))
    pairs = [(row, reference) for row, cells in found.items() for reference in cells]
    assert pairs == [("sam", "sgd"), ("vasso", "sgd"), ("vasso", "sam")]


def test_one_seed_is_compared_with_nothing():
    found = statistics.comparisons({"sgd": [1.0], "sam": [2.0]}, ("sgd",))
    assert found == {"sgd": {}, "sam": {}}


def test_a_summary_counts_the_seeds_that_collapsed():
    found = statistics.summary([10.0, 80.0, 84.0, 88.0], collapsed_below=20.0)
    assert found["collapsed"] == 1
    assert (found["minimum"], found["median"]) == (10.0, 82.0)
    assert (found["lower_quartile"], found["upper_quartile"]) == (62.5, 85.0)


def test_early_stopping_scores_the_epoch_that_validation_picks():
    validation = np.array([[0.2, 0.5, 0.4], [0.7, 0.7, 0.1]])
    test = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert statistics.early_stopped(validation, test).tolist() == [2.0, 4.0]
