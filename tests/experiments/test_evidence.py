"""The unit of the evidence is a search; the main job repeats what it says."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import evidence, label_noise, tasks
from experiments.harness import (
    command_line,
    files,
    methods,
    progress,
    searches,
    tables,
    training,
    verdicts,
)

RESULTS = Path(__file__).parents[2] / "results"
ARGUMENTS = ["--smoke", "--methods", "sgd,sam", "--runs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of a smoke evidence of two methods."""
    folder = tmp_path_factory.mktemp("runs")
    assert evidence.main([*ARGUMENTS, str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def units(folder):
    """What was saved of both."""
    path = folder / "smoke/evidence/wine-50"
    return {
        name: json.loads((path / f"{name}.json").read_text()) for name in ("sgd", "sam")
    }


def test_every_search_has_trials_and_seeds_of_its_own(units):
    for unit in units.values():
        first, second = (one["trials"] for one in unit["searches"])
        rates = [{trial["learning_rate"] for trial in one} for one in (first, second)]
        assert not rates[0] & rates[1]
    task, plan = tasks.load("wine-50"), searches.SMOKE
    seeds = [searches.test_seeds(task, plan, number) for number in range(2)]
    assert not set(seeds[0]) & set(seeds[1])
    assert max(seeds[1]) < searches.FIRST_SEED


def test_a_search_tries_the_best_points_of_the_method_that_it_contains(units):
    for sgd, sam in zip(
        units["sgd"]["searches"], units["sam"]["searches"], strict=True
    ):
        tried = [(t["learning_rate"], t["weight_decay"]) for t in sam["trials"]]
        best = sgd["best"][0]
        assert (best["learning_rate"], best["weight_decay"]) in tried


def test_what_is_picked_validates_best_and_is_tested_on_other_seeds(monkeypatch):
    task, seen = tasks.load("wine-50")._replace(epochs=6), []
    train = training.train

    def spy(*arguments, **options):
        seen.append(set(arguments[3]))
        return train(*arguments, **options)

    monkeypatch.setattr(training, "train", spy)
    method, plan = methods.METHODS["sgd"], searches.SMOKE
    work = progress.Progress("", searches.work_of(task, method, plan))
    unit = searches.run(task, method, plan, [], work)
    assert work.done == pytest.approx(work.total)
    validated = [seeds for seeds in seen if min(seeds) >= searches.FIRST_SEED]
    tested = [seeds for seeds in seen if max(seeds) < searches.FIRST_SEED]
    assert len(validated) + len(tested) == len(seen)
    assert tested == [set(searches.test_seeds(task, plan, i)) for i in range(2)]
    for one in unit["searches"]:
        finalists = [t for t in one["trials"] if len(t["noisy"]) > 1]
        best = max(finalists, key=lambda trial: np.mean(trial["noisy"]))
        assert {name: best[name] for name in one["picked"]} == one["picked"]
        assert one["validation"] == pytest.approx(np.mean(best["noisy"]), abs=1e-3)
        assert len(one["tests"]) == plan.tests


def test_more_searches_go_on_from_those_that_are_done():
    """The first searches stay what they are, and the rest are as if done at once."""

    def unseen():
        return progress.Progress("", 0)

    task = tasks.load("wine-50")._replace(epochs=6)
    method, plan = methods.METHODS["sgd"], searches.SMOKE
    whole, first = (
        searches.run(task, method, plan._replace(searches=count), [], unseen())
        for count in (2, 1)
    )
    more = searches.run(task, method, plan, [], unseen(), first)
    assert more["searches"] == whole["searches"]
    assert more["searches"][0] == first["searches"][0]
    assert more["unit_seconds"] > first["unit_seconds"]


def test_convolutional_networks_stand_in_a_table_of_their_own():
    """With fewer methods, and not in the averages over the tasks."""
    units = evidence.units_of(evidence.parsed([]))
    convolutions = {name for name, _ in units if tasks.is_cnn(name)}
    for task in convolutions:
        found = [method for name, method in units if name == task]
        assert found == list(command_line.CNN_METHODS)
    content = json.loads((RESULTS / "evidence.json").read_text())
    assert convolutions < content["tasks"].keys()
    assert not convolutions & verdicts.main_tasks(content).keys()
    assert len(verdicts.main_tasks(content)) == 9
    _, lines = verdicts.of_convolutions(content)
    assert len(lines) == len(convolutions) * len(command_line.CNN_METHODS)
    for make in (verdicts.of_all_tasks, lambda c: verdicts.of_all_gains(c, "sgd")):
        shown = {line[0] for line in make(content)[1]}
        assert not shown & {tasks.title(name) for name in convolutions}


def test_after_k_trials_a_search_deploys_the_best_validated_of_them():
    """Of eight trials, four were drawn alike: two groups of two, one of four."""
    trials = [
        {"noisy": [noisy], "test": [test]}
        for noisy, test in zip([3, 1, 2, 4, 0, 9, 5, 6], range(8), strict=True)
    ]
    found = [{"trials": trials}]
    assert searches.picked_of(found, 1) == [np.mean([0, 1, 2, 3])]
    assert searches.picked_of(found, 2) == [np.mean([0, 3])]
    assert searches.picked_of(found, 4) == [3]
    assert searches.picked_of(found, 8) == searches.picked_of(found, None) == [5]


def test_what_is_finished_is_not_done_again(folder, monkeypatch, capsys):
    def run(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(searches, "run", run)
    assert evidence.main([*ARGUMENTS, str(folder)]) == 0
    printed = capsys.readouterr()
    assert "2 of 2 units are finished" in printed.out
    assert "Saved all 2 units" in printed.err
    for name in ("evidence", "evidence_length", "evidence_trials"):
        assert (folder / f"smoke/{name}.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("names", "drawn"),
    [
        (["digits-75-short", "wine-50"], True),
        (["digits-75-short"], False),
        (["mnist1d_cnn-40"], False),
    ],
)
def test_any_tasks_can_be_run_alone(folder, units, names, drawn):
    """Figures show tasks at their own length, and are left out where there are none."""
    options = evidence.parsed(["--smoke", "--methods", "sgd,sam"])
    options.tasks, options.runs = names, folder / f"{names}"
    for name in names:
        for method, unit in units.items():
            files.write_json(evidence.unit_path(options, name, method), unit)
    evidence.report(options, evidence.units_of(options), show=set(names))
    found = json.loads((options.runs / "evidence.json").read_text())
    assert list(found["tasks"]) == names
    assert (options.runs / "evidence_trials.png").exists() == drawn
    assert (options.runs / "evidence_length.png").exists() == drawn


def test_the_list_says_what_is_missing_and_trains_nothing(folder, capsys):
    arguments = ["--smoke", "--list", "--methods", "sgd,vasso", "--runs", str(folder)]
    assert evidence.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 of 2 units are finished; the others take about")
    assert lines[1].split() == ["wine-50", "sgd", "finished"]


def test_differences_are_between_searches_and_a_verdict_needs_their_interval():
    rows = {
        name: {"accuracy": {"values": values}}
        for name, values in (("sgd", [1.0, 2, 3]), ("sam", [2.0, 4, 6]))
    }
    assert verdicts.gain(rows, "sam")["mean"] == 2
    assert verdicts.gain(rows, "sam")["standard_error"] == pytest.approx(1 / 3**0.5)
    difference = {"mean": 2.0, "standard_error": 0.7}
    # The half width of 95 % is 4.30 standard errors of three values, 2.78 of five.
    assert verdicts.sign(difference, 3) == 0
    assert verdicts.sign(difference, 5) == 1
    assert verdicts.sign({"mean": -2.0, "standard_error": 0.7}, 5) == -1


@pytest.mark.exhaustive  # .ci/run makes the same smoke run
def test_the_main_job_writes_numbers_and_a_figure(tmp_path, capsys):
    arguments = ["--smoke", "--methods", "sgd,lagged_vasso", "--runs", str(tmp_path)]
    assert label_noise.main(arguments) == 0
    found = json.loads((tmp_path / "smoke/label_noise.json").read_text())
    assert list(found["methods"]) == ["sgd", "lagged_vasso"]
    assert found["finished"]
    values = found["methods"]["sgd"]["accuracy"]["values"]
    assert len(values) == found["searches"] == 2
    assert (tmp_path / "smoke/label_noise.png").stat().st_size > 5000
    printed = capsys.readouterr()
    assert "lagged VaSSO" in printed.out
    assert "Saved all 2 methods" in printed.err
    assert not (tmp_path / "label_noise.json").exists()


def test_the_table_of_the_main_job_fits_into_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    content = json.loads((RESULTS / "label_noise.json").read_text())
    header, lines = verdicts.cells(content["methods"])
    assert header == ["method", "accuracy (%)", "over SGD", "over SAM"]
    tables.show("digits", header, lines)
    printed = capsys.readouterr().out
    assert "…" not in printed
    for row in content["methods"].values():
        (line,) = (
            x for x in printed.splitlines() if x.startswith(f"│ {row['label']} ")
        )
        assert tables.mean_and_error(row["accuracy"]) in line
        assert len(line) <= 80
