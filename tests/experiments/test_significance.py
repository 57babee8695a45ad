"""Means over seeds and paired differences are those of the textbook."""

import methods
import numpy as np
import optax
import pytest
from scipy import stats
from significance import paired_difference, standard_error


def test_the_standard_error_is_the_deviation_over_the_root_of_the_number():
    values = [1.0, 2.0, 4.0, 7.0]
    assert standard_error(values) == pytest.approx(stats.sem(values))
    assert standard_error([3.0]) == 0


def test_a_paired_difference_is_the_paired_t_test():
    values, reference = np.array([3.0, 5.0, 4.0]), np.array([2.5, 4.0, 4.5])
    found = paired_difference(values, reference)
    test = stats.ttest_rel(values, reference)
    assert found["mean"] == pytest.approx(1 / 3)
    assert found["p_two_sided"] == pytest.approx(test.pvalue)
    assert found["p_no_worse"] == pytest.approx(1 - test.pvalue / 2)


@pytest.mark.parametrize(
    ("shift", "p_two_sided", "p_no_worse"), [(0, 1, 1), (1, 0, 1), (-1, 0, 0)]
)
def test_a_difference_that_never_varies_is_certain(shift, p_two_sided, p_no_worse):
    found = paired_difference(np.arange(3.0) + shift, np.arange(3.0))
    assert found["p_two_sided"] == p_two_sided
    assert found["p_no_worse"] == p_no_worse


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_takes_its_hyperparameters_by_name(name):
    defaults = methods.hyperparameters(name)
    optimizer = methods.make_optimizer(name, optax.sgd(0.1), defaults, seed=1)
    assert optimizer.init({"w": np.ones(2, np.float32)}) is not None
    assert methods.describe(defaults).count("=") == len(defaults)
