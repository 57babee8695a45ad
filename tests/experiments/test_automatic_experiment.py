"""The automatic methods: candidates, the guard, and the searched methods beside."""

import json

import pytest

from experiments import automatic


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of a smoke test, with units of an evidence that is made up."""
    folder = tmp_path_factory.mktemp("runs")
    units = folder / "smoke" / "evidence" / "wine-50"
    units.mkdir(parents=True)
    for name, values in (("auto_vasso", [80.0, 84.0]), ("vasso", [81.0, 81.0])):
        last = {"mean": sum(values) / 2, "standard_error": 2.0, "values": values}
        last |= {"minimum": min(values), "collapsed": 0}
        unit = {"gradients": {"last": last}}
        (units / f"{name}.json").write_text(json.dumps(unit))
    assert automatic.main(["--smoke", "--runs", str(folder)]) == 0
    return folder


def test_candidates_guard_and_comparison_are_saved(folder):
    found = json.loads((folder / "smoke/automatic.json").read_text())
    assert found["finished"]
    method = found["methods"]["auto_vasso"]
    tried = method["tried"]["wine-50"]["candidates"]
    assert list(tried) == list(automatic.CANDIDATES)
    assert all(0 <= row["accuracy"] <= 100 for row in tried.values())
    assert method["compared"]["wine-50"]["difference"]["mean"] == 1.0
    assert found["methods"]["auto_lagged_vasso"]["compared"] == {}
    assert found["guard"]["seeds"] == 2
    assert (folder / "smoke/automatic.png").stat().st_size > 5000


def test_what_is_finished_is_not_done_again(folder, monkeypatch):
    def train(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(automatic.harness.training, "train", train)
    assert automatic.main(["--smoke", "--runs", str(folder)]) == 0


def test_a_task_is_left_out_of_the_choice_of_its_defaults():
    best, other, *rest = automatic.CANDIDATES

    def part(**accuracy):
        names = dict.fromkeys(rest, 50.0) | accuracy
        return {"candidates": {k: {"accuracy": names[k]} for k in automatic.CANDIDATES}}

    tried = {
        "a": part(**{best: 90.0, other: 60.0}),
        "b": part(**{best: 60.0, other: 80.0}),
        "c": part(**{best: 60.0, other: 70.0}),
    }
    assert automatic.left_out(tried) == {"a": other, "b": best, "c": best}


def test_a_relative_radius_is_a_share_of_the_first_parameters():
    task = automatic.tasks.load("wine-50")
    chosen = automatic.BASIC | {"r": 0.0, "relative": 0.01}
    # He initialization of 13-64-64-3: 2 n_out per layer, so ‖x_0‖² is about 262.
    assert automatic.settings(task, chosen)["r"] == pytest.approx(0.162, rel=0.1)
