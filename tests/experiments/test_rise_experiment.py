"""A held rise beside SGD, SAM and split SAM on one small grid."""

import json

import numpy as np
import pytest

from experiments import rise
from experiments.harness import training

# .ci/run makes the same runs, to see that they end; here their files are read.
ALREADY_RUN = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of the smoke test."""
    folder = tmp_path_factory.mktemp("runs")
    assert rise.main(["--smoke", "--runs", str(folder)]) == 0
    return folder


@ALREADY_RUN
def test_every_method_is_searched_and_scored(folder):
    found = json.loads((folder / "smoke/rise.json").read_text())
    assert found["finished"]
    rows = found["tasks"]["wine-50"]
    assert list(rows) == list(rise.RADII)
    for name, row in rows.items():
        assert len(row["values"]) == found["searches"] == 2
        assert row["of_trainings"]["all"] == 2 * len(rise.points(name))
    assert (folder / "smoke/rise.png").stat().st_size > 5000


@ALREADY_RUN
def test_what_is_finished_is_not_done_again(folder, monkeypatch):
    def train(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "train", train)
    assert rise.main(["--smoke", "--runs", str(folder)]) == 0


def test_a_search_is_scored_on_the_seeds_that_did_not_pick():
    validation = np.array([[1.0, 3.0], [2.0, 2.0]])
    test = np.array([[10.0, 20.0], [30.0, 40.0]])
    # The first seed picks the second point, the second seed the first.
    assert rise.search(validation, test) == [40.0, 10.0]


def test_only_methods_with_a_radius_have_one_to_search():
    assert [len(rise.points(name)) for name in rise.RADII] == [
        6,
        18,
        18,
        6,
        6,
        6,
    ]
