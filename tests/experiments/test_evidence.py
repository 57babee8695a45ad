"""The evidence is resumed where it stopped, and the main job writes what it says."""

import json

import pytest

from experiments import evidence, label_noise
from experiments.harness import units


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of a smoke evidence of two methods."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = ["--smoke", "--methods", "sgd,vasso", "--runs", str(folder)]
    assert evidence.main(arguments) == 0
    return folder


def test_the_evidence_compares_methods_at_both_budgets(folder):
    found = json.loads((folder / "smoke/evidence.json").read_text())
    assert found["finished"]
    task = found["tasks"]["wine-50"]
    sgd, vasso = task["gradients"]["sgd"], task["gradients"]["vasso"]
    assert sgd["gradients"] == vasso["gradients"]
    assert task["epochs"]["vasso"]["gradients"] == 2 * vasso["gradients"]
    assert vasso["differences"]["sgd"]["mean"] == pytest.approx(
        vasso["last"]["mean"] - sgd["last"]["mean"], abs=1e-3
    )
    assert len(task["search"]["vasso"]["trials"]) >= units.SMOKE.search.trials
    assert (folder / "smoke/evidence.png").stat().st_size > 5000


def test_what_is_finished_is_not_done_again(folder, monkeypatch, capsys):
    def run(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(units, "run", run)
    arguments = ["--smoke", "--methods", "sgd,vasso", "--runs", str(folder)]
    assert evidence.main(arguments) == 0
    printed = capsys.readouterr()
    assert "2 of 2 units are finished" in printed.out
    assert "Saved all 2 units" in printed.err


def test_the_list_says_what_is_missing_and_trains_nothing(folder, capsys):
    arguments = ["--smoke", "--list", "--methods", "sgd,sam", "--runs", str(folder)]
    assert evidence.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 of 2 units are finished; the others take about")
    assert lines[1].split() == ["wine-50", "sgd", "finished"]


def test_the_main_job_writes_numbers_and_a_figure(tmp_path, capsys):
    arguments = ["--smoke", "--methods", "sgd,lagged_vasso", "--runs", str(tmp_path)]
    assert label_noise.main(arguments) == 0
    found = json.loads((tmp_path / "smoke/label_noise.json").read_text())
    assert list(found["methods"]) == ["sgd", "lagged_vasso"]
    assert found["finished"]
    assert len(found["methods"]["sgd"]["last"]["values"]) == found["seeds"] == 2
    assert (tmp_path / "smoke/label_noise.png").stat().st_size > 5000
    printed = capsys.readouterr()
    assert "lagged VaSSO" in printed.out
    assert "Saved all 2 methods" in printed.err
    assert not (tmp_path / "label_noise.json").exists()


@pytest.mark.parametrize("budget", ["gradients", "epochs"])
def test_the_main_job_has_all_that_is_searched_of_every_method(budget):
    from experiments.harness.methods import METHODS

    picked = label_noise.picked(budget)
    assert set(label_noise.DEFAULT) <= set(picked)
    for name, hyperparameters in picked.items():
        assert list(hyperparameters) == list(METHODS[name].space)
