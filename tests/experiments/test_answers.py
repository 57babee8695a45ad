"""The reports from the evidence say what its numbers say."""

import json

import numpy as np
import pytest

from experiments import answers, choosing_rho, evidence, tasks
from experiments.harness import command_line, networks, statistics, tables

NAMES = ("digits-0", "digits-75", "wine-50", "cancer-40", "text-50", "convnet-50")
SEEDS = 6
GAIN = {"sgd": 0, "sam": 2, "friendly_sam": 2, "vasso": 2, "lagged_vasso": -1}


def row(name, task):
    """Accuracies of a method: GAIN above SGD, and seeds that vary alike."""
    base = 80 + np.arange(SEEDS) + tasks.load(task).classes
    wobble = 0.1 * (np.arange(SEEDS) % 2) if name != "sgd" else 0
    accuracy = statistics.summary(base + GAIN[name] + wobble, 20)
    return {
        "label": command_line.METHOD_LABELS[name],
        "last": accuracy,
        "picked": accuracy,
    }


def search(name, rho):
    """Three finalists, of which the first is the best, and two trials that ended."""
    trials = [
        {
            "learning_rate": 0.1,
            "weight_decay": 1e-3,
            "rho": rho * factor,
            "theta": 1.0 if name == "sam" else 0.5,
            "scores": [score] * seeds,
        }
        for factor, score, seeds in (
            (1, 90, 12),
            (1.2, 89.5, 12),
            (0.8, 89, 12),
            (3, 60, 2),
            (0.3, 60, 2),
        )
    ]
    if name == "sam":
        for trial in trials:
            del trial["theta"]
    picked = {k: v for k, v in trials[0].items() if k != "scores"}
    return {"picked": picked, "trials": trials}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Evidence in which the radius is a tenth of the parameters' norm at the start."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for name in NAMES:
        task = tasks.load(name)
        norm = networks.norm(task.network.init(np.random.default_rng(0)))
        rows = {method: row(method, name) for method in GAIN}
        found[name] = {
            "task": task.title,
            "gradients": tables.compare(rows),
            "epochs": tables.compare(rows),
            "search": {m: search(m, 0.1 * norm) for m in choosing_rho.METHODS},
        }
    content = {"finished": True, "size": 1, "seeds": SEEDS, "tasks": found}
    (folder / "evidence.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def answered(runs):
    assert answers.main(["--runs", str(runs)]) == 0
    return json.loads((runs / "answers.json").read_text())


def test_differences_are_paired_and_corrected_over_the_table(answered):
    rows = next(iter(answered["questions"].values()))
    assert len(rows) == 4 * len(NAMES)
    sam = next(row for row in rows if row["compared"] == "SAM − SGD")
    assert sam["mean"] == pytest.approx(2.05)
    assert sam["interval"][0] < sam["mean"] < sam["interval"][1]
    assert sam["p_holm"] > sam["p"]
    assert sam["certain"]


def test_a_verdict_needs_a_corrected_p_value():
    rows = [
        {
            "task": "a task",
            "compared": "one − two",
            "mean": mean,
            "standard_error": 1.0,
            "interval": [mean - 2, mean + 2],
            "p_holm": p,
            "certain": p < answers.LEVEL,
        }
        for mean, p in ((5.0, 0.001), (-5.0, 0.001), (2.5, 0.051))
    ]
    said = [line[-1] for line in answers.cells(rows)[1]]
    assert said == ["above", "below", "no difference found"]


def test_a_table_with_two_budgets_says_which_is_which(answered):
    rows = answered["questions"][
        "Does VaSSO gain over SAM, when both are searched alike?"
    ]
    assert {row["compared"] for row in rows} == {
        "VaSSO − SAM, equal gradients",
        "VaSSO − SAM, equal epochs",
    }


def test_the_gain_over_sgd_is_there_at_each_level_of_noise(answered, runs):
    gains = answered["gain_over_noise"]["vasso"]
    assert [gain["random_labels"] for gain in gains] == [0, 75]
    assert gains[0]["mean"] == pytest.approx(2.05)
    assert (runs / "answers.png").stat().st_size > 5000


@pytest.fixture(scope="module")
def chosen(runs):
    assert choosing_rho.main(["--runs", str(runs)]) == 0
    return json.loads((runs / "choosing_rho.json").read_text())


def test_the_rule_that_the_evidence_follows_errs_nowhere(chosen):
    for rule in chosen["rules"]:
        factors = [error["factor"] for error in rule["errors"]]
        if rule["rule"] == "ρ = c ‖x₀‖^a":
            assert max(factors) == pytest.approx(1)
            assert np.exp(rule["coefficients"][0]) == pytest.approx(0.1)
            assert rule["coefficients"][1] == pytest.approx(1)
            assert all(error["good"] for error in rule["errors"])
        elif rule["rule"] == "ρ = c":
            assert max(factors) > 1.5


def test_a_rule_is_made_without_the_task_that_it_is_tried_on(chosen):
    """One constant: the geometric mean of the radii of all other tasks."""
    radii = {
        u["task"]: u["picked"]["rho"] for u in chosen["units"] if u["method"] == "sam"
    }
    rule = next(
        r for r in chosen["rules"] if (r["method"], r["rule"]) == ("sam", "ρ = c")
    )
    for error in rule["errors"]:
        others = [rho for task, rho in radii.items() if task != error["task"]]
        assert error["rho"] == pytest.approx(np.exp(np.mean(np.log(others))))


def test_trials_of_the_first_stage_are_not_called_good(chosen):
    for u in chosen["units"]:
        rho = u["picked"]["rho"]
        assert u["good_radii"] == pytest.approx([0.8 * rho, 1.2 * rho])


def test_a_rule_needs_enough_tasks(tmp_path, runs, capsys):
    content = json.loads((runs / "evidence.json").read_text())
    content["tasks"] = dict(list(content["tasks"].items())[:2])
    (tmp_path / "evidence.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as exit_of:
        choosing_rho.main(["--runs", str(tmp_path)])
    assert exit_of.value.code == 2
    assert "the evidence has 2 tasks, too few" in capsys.readouterr().err


def test_without_evidence_the_command_that_makes_it_is_named(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evidence, "PUBLISHED", tmp_path)
    with pytest.raises(SystemExit):
        answers.main(["--runs", str(tmp_path / "runs")])
    assert "run python -m experiments.evidence first" in capsys.readouterr().err
