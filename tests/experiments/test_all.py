"""One command repeats everything that is published, and goes on where it stopped."""

import types

import pytest

from experiments import all as everything, evidence
from experiments.__main__ import runnable
from experiments.harness import command_line, progress

RUNS = (
    everything.Run("first", 10),
    everything.Run("second", 30),
    everything.Run("second_longer", 60, "second", ("--budget", "epochs")),
)


@pytest.fixture
def jobs(monkeypatch):
    """Three experiments that only save; ``done`` grows, and one may be interrupted."""
    state = types.SimpleNamespace(done=[], interrupt=None)

    def main_of(run):
        def main(arguments):
            if run.writes == state.interrupt:
                raise command_line.Interrupted(2)
            parser = command_line.experiment_parser("job", "A job.")
            parser.add_argument("--budget", default="gradients")
            options = command_line.parse(parser, arguments)
            with progress.over("job", 4) as part:
                part.advance(4)
            command_line.save(
                options, run.writes, {}, size=1, done=1, of=1, unit="jobs"
            )
            state.done.append((run.writes, options.budget))

        return main

    monkeypatch.setattr(everything, "RUNS", RUNS)
    monkeypatch.setattr(everything, "main_of", main_of)
    return state


def test_every_experiment_is_among_them():
    """All that can be run here; those of ``experiments.vision`` need downloads."""
    names = {run.name for run in everything.RUNS}
    assert names == runnable().keys() - {"all"}
    assert len({run.writes for run in everything.RUNS}) == len(everything.RUNS)


def test_it_says_how_long_it_takes_and_runs_what_is_missing(jobs, tmp_path, capsys):
    arguments = ["--runs", str(tmp_path)]
    jobs.interrupt = "second"
    with pytest.raises(command_line.Interrupted):
        everything.main(arguments)
    said = capsys.readouterr().out
    assert "0 of 3 experiments are finished; the others take about 1 min 40 s" in said
    assert "1 of 3 experiments are finished; the same command goes on" in said
    jobs.interrupt = None
    assert everything.main(arguments) == 0
    assert "the others take about 1 min 30 s" in capsys.readouterr().out
    once = [
        ("first", "gradients"),
        ("second", "gradients"),
        ("second_longer", "epochs"),
    ]
    assert jobs.done == once
    assert everything.main(arguments) == 0
    assert jobs.done == once


def test_publishing_and_smoke_are_passed_on(jobs, tmp_path):
    results, names = tmp_path / "results", sorted(run.writes for run in RUNS)
    assert everything.main(["--runs", str(tmp_path), "--publish", str(results)]) == 0
    assert sorted(path.stem for path in results.glob("*.json")) == names
    assert everything.main(["--runs", str(tmp_path), "--smoke"]) == 0
    smoke = tmp_path / "smoke"
    assert sorted(path.stem for path in smoke.glob("*.json")) == names


def test_the_list_runs_nothing(jobs, tmp_path, capsys):
    assert everything.main(["--runs", str(tmp_path), "--list"]) == 0
    assert not jobs.done
    assert "second_longer" in capsys.readouterr().out


def test_of_the_evidence_only_what_is_missing_is_counted(tmp_path):
    """Nothing is there yet: as long as the evidence itself says."""
    run = next(run for run in everything.RUNS if run.name == "evidence")
    shared = ["--runs", str(tmp_path), "--tasks", "digits-75,digits-50"]
    left = everything.seconds_left(run, shared)
    assert left == evidence.seconds_left(evidence.parsed(shared)) > 600
