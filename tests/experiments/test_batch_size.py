"""Batch sizes get the epochs or the updates they are to get, and are compared."""

import argparse

import numpy as np
import pytest

from experiments import batch_size
from experiments.harness import statistics, tables


def options(matched="epochs"):
    return argparse.Namespace(noise="50", matched=matched, smoke=False)


@pytest.mark.parametrize("size", batch_size.SIZES)
def test_updates_or_epochs_are_those_of_the_reference(size):
    by_epochs, _ = batch_size.at_batch(options(), size, "sgd")
    by_updates, _ = batch_size.at_batch(options("updates"), size, "sgd")
    assert by_epochs.epochs == 60
    assert by_updates.epochs * by_updates.steps_per_epoch == 60 * 20
    for task in (by_epochs, by_updates):
        assert task.batch == size
        assert task.epochs % task.epochs_per_call == 0


def test_the_search_begins_where_the_batch_size_says():
    spaces = {
        size: batch_size.at_batch(options(), size, "vasso")[1].space
        for size in (50, 200)
    }
    assert spaces[200]["learning_rate"].high == 2 * spaces[50]["learning_rate"].high
    assert spaces[200]["weight_decay"] == spaces[50]["weight_decay"]
    assert list(spaces[50]) == ["learning_rate", "weight_decay", "rho", "theta"]


@pytest.fixture
def content():
    """Two methods at two batch sizes; SAM is worse by 1 and 3 points."""
    random = np.random.default_rng(0)

    def row(name, values):
        sharpness = {key: list(random.uniform(1, 2, 3)) for key in batch_size.MEASURES}
        return {
            "label": name.upper(),
            "hyperparameters": {"learning_rate": 0.1},
            "gradients": 1200,
            "last": statistics.summary(values, 20),
            "picked": statistics.summary(values, 20),
            "sharpness": sharpness,
        }

    sizes = {}
    for size, worse in (("10", 1.0), ("1000", 3.0)):
        values = np.array([90.0, 92.0, 91.0])
        noise = np.array([0.0, 0.1, -0.1])
        rows = {"sgd": row("sgd", values), "sam": row("sam", values - worse + noise)}
        sizes[size] = dict.fromkeys(("gradients", "epochs"), tables.compare(rows))
    return {
        "noise": 50,
        "seeds": 3,
        "matched": "epochs",
        "sizes": sizes,
        "largest_minus_smallest": batch_size.across(sizes),
    }


def test_the_largest_batch_is_compared_with_the_smallest(content):
    found = content["largest_minus_smallest"]
    assert found["SGD"]["mean"] == 0
    assert found["SAM"]["mean"] == pytest.approx(-2)


def test_tables_and_figure_are_made_of_the_file(content, tmp_path):
    header, lines = batch_size.cells(content)
    assert len(lines) == 4
    assert {len(line) for line in lines} == {len(header)}
    header, lines = batch_size.sharpness_cells(content)
    assert {len(line) for line in lines} == {len(header)}
    path = tmp_path / "figure.png"
    batch_size.draw(path, content)
    assert path.stat().st_size > 5000
