"""One command repeats everything that is published, and goes on where it stopped."""

import json
import types

import pytest

from experiments import all as everything
from experiments.__main__ import runnable
from experiments.harness import command_line, progress

RUNS = (
    everything.Run("first", 10),
    everything.Run("second", 30),
    everything.Run("second_longer", 60, "second", ("--budget", "epochs")),
)


@pytest.fixture
def calls(monkeypatch):
    """Three experiments that only save; what they were called with, and the shares."""
    called = []

    def imported(name):
        def main(arguments):
            parser = command_line.experiment_parser("job", "A job.")
            parser.add_argument("--budget", default="gradients")
            options = command_line.parse(parser, arguments)
            called.append((name, options.budget))
            if len(called) == imported.interrupted_at:
                raise command_line.Interrupted(2)
            with progress.over("job", 4) as part:
                part.advance(4)
            run = next(
                r
                for r in RUNS
                if r.arguments == tuple(arguments[-2:])
                or (
                    not r.arguments
                    and name.endswith(r.name)
                    and "--budget" not in arguments
                )
            )
            command_line.save(
                options, run.writes, {}, size=1, done=1, of=1, unit="jobs"
            )

        return types.SimpleNamespace(main=main)

    imported.interrupted_at = None
    monkeypatch.setattr(everything, "RUNS", RUNS)
    monkeypatch.setattr(everything.importlib, "import_module", imported)
    return called, imported


def test_every_experiment_is_among_them():
    """All that can be run here; those of ``experiments.vision`` need downloads."""
    names = {run.name for run in everything.RUNS}
    assert names == runnable().keys() - {"all"}
    assert len({run.writes for run in everything.RUNS}) == len(everything.RUNS)


def test_what_reads_the_evidence_comes_after_it():
    order = [run.name for run in everything.RUNS]
    assert order.index("evidence") < order.index("answers")
    assert order.index("evidence") < order.index("choosing_rho")


def test_it_says_how_long_it_takes_and_runs_what_is_missing(calls, tmp_path, capsys):
    called, imported = calls
    imported.interrupted_at = 2
    with pytest.raises(command_line.Interrupted):
        everything.main(["--runs", str(tmp_path)])
    said = capsys.readouterr().out
    assert "0 of 3 experiments are finished; the others take about 1 min 40 s" in said
    assert "1 of 3 experiments are finished; the same command goes on" in said
    imported.interrupted_at = None
    called.clear()
    assert everything.main(["--runs", str(tmp_path)]) == 0
    assert "the others take about 1 min 30 s" in capsys.readouterr().out
    assert [budget for _, budget in called] == ["gradients", "epochs"]
    called.clear()
    assert everything.main(["--runs", str(tmp_path)]) == 0
    assert not called


def test_publishing_and_smoke_are_passed_on(calls, tmp_path):
    results = tmp_path / "results"
    assert everything.main(["--runs", str(tmp_path), "--publish", str(results)]) == 0
    assert len(list(results.glob("*.json"))) == 3
    assert everything.main(["--runs", str(tmp_path), "--smoke"]) == 0
    smoke = sorted(path.stem for path in (tmp_path / "smoke").glob("*.json"))
    assert smoke == sorted(run.writes for run in RUNS)
    assert json.loads((tmp_path / "smoke/first.json").read_text())["finished"]


def test_the_list_runs_nothing(calls, tmp_path, capsys):
    assert everything.main(["--runs", str(tmp_path), "--list"]) == 0
    assert not calls[0]
    assert "second_longer" in capsys.readouterr().out
