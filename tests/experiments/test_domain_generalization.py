"""The unseen domain is not seen: neither in training nor in a search."""

import numpy as np
import pytest

from experiments import domain_generalization as dg, tasks
from experiments.harness import statistics


@pytest.fixture(scope="module")
def unseen():
    return {angle: dg.load(angle) for angle in (0, 45)}


def test_each_digit_is_in_one_domain_and_the_first_is_not_rotated(unseen):
    task = unseen[0]
    assert len(task.test) + len(task.pool) == len(task.inputs) == 1797
    assert len(task.test) in (299, 300)
    upright = task.inputs[task.test] * 16
    np.testing.assert_array_equal(upright, np.round(upright))
    rotated = unseen[45].inputs[unseen[45].test] * 16
    assert np.abs(rotated - np.round(rotated)).max() > 0.1


@pytest.mark.parametrize("angle", [0, 45])
def test_the_unseen_domain_is_in_no_split(unseen, angle):
    task = unseen[angle]
    for seed in range(3):
        split = tasks.split(task, seed)
        assert len(split.training) == 1200
        seen = np.concatenate([split.training, split.validation])
        assert not np.isin(seen, task.test).any()
        assert len(np.unique(seen)) == len(task.pool)


def row(values):
    return {
        "label": "a method",
        "hyperparameters": {},
        "gradients": 720,
        "last": statistics.summary(values, 20),
        "picked": statistics.summary(values, 20),
    }


def test_the_average_over_domains_is_compared_seed_by_seed(tmp_path):
    found = {
        ("0", "sgd"): {"gradients": row([60.0, 62.0, 10.0])},
        ("15", "sgd"): {"gradients": row([80.0, 82.0, 80.0])},
        ("0", "sam"): {"gradients": row([62.0, 64.0, 14.0])},
        ("15", "sam"): {"gradients": row([80.0, 82.0, 80.0])},
    }
    rows = dg.compare(found, [0, 15], ["sgd", "sam"], "gradients")
    assert rows["sgd"]["average"]["values"] == [70, 72, 45]
    assert rows["sgd"]["average"]["collapsed"] == 1
    difference = rows["sam"]["differences"]["sgd"]
    assert difference["mean"] == pytest.approx(4 / 3)
    header, lines = dg.cells(rows)
    assert {len(line) for line in lines} == {len(header)}
    path = tmp_path / "figure.png"
    content = {"seeds": 3, "angles": [0, 15], "gradients": rows, "epochs": rows}
    dg.draw(path, content)
    assert path.stat().st_size > 5000
