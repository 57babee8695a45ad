"""Mistakes are one line, help is quick, and a run that is ended says what it saved."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import batch_size, evidence, flatness, label_noise
from experiments.__main__ import main as experiments_main, runnable
from experiments.harness import command_line, progress

ROOT = Path(__file__).parents[2]
HELP = """
import sys
from experiments import {name}
try:
    {name}.main(["--help"])
finally:
    slow = {{"jax", "matplotlib", "scipy", "sklearn", "rich"}} & set(sys.modules)
    assert not slow, slow
"""
JOB = """
import sys, time
from experiments.harness import command_line

def main():
    options = command_line.parse(
        command_line.experiment_parser("job", "A job."), ["--runs", sys.argv[1]]
    )
    done = 0
    try:
        for _ in range(3):
            done += 1
            print("working", flush=True)
            time.sleep(0 if done < 2 else 60)
    finally:
        command_line.save(
            options, "job", {}, size=1, done=done - 1, of=3, unit="parts"
        )

command_line.run(main)
"""


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "name",
    [
        "label_noise",
        "evidence",
        "flatness",
        "batch_size",
        "domain_generalization",
        "char_lm",
        "quantization",
        "forgetting",
    ],
)
def test_help_imports_nothing_slow_and_explains_every_option(name):
    finished = start(HELP.format(name=name))
    out, error = finished.communicate()
    assert finished.returncode == 0, error
    assert "(default: runs)" in " ".join(out.split())
    assert "--seeds" in out or "--searches" in out


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (label_noise, ["--searches", "0"], "must be an integer >= 1, got '0'"),
        (label_noise, ["--searches", "nan"], "must be an integer >= 1, got 'nan'"),
        (label_noise, ["--methods", "sam,adamw"], "'adamw' is none of sgd, sam"),
        (label_noise, ["--radius", "1"], "unrecognized arguments"),
        (label_noise, ["--smoke", "--publish"], "a smoke run is never published"),
        (label_noise, ["--runs", "{file}"], "is not a folder"),
        (label_noise, ["--runs", "{file}/deeper"], "cannot write to"),
        (batch_size, ["--sizes", "50,1001"], "must be an integer from 1 to 1000"),
        (batch_size, ["--noise", "60"], "invalid choice: '60'"),
        (flatness, ["--methods", "asam"], "'asam' is none of sgd, sam, vasso"),
        (evidence, ["--minutes", "nan"], "must be a finite number > 0, got 'nan'"),
        (evidence, ["--tasks", "mnist"], "'mnist' is none of digits-0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(
    module, arguments, message, tmp_path, capsys
):
    file = tmp_path / "file"
    file.touch()
    arguments = [argument.format(file=file) for argument in arguments]
    with pytest.raises(SystemExit) as exit_of:
        module.main(arguments)
    assert exit_of.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_publishing_less_than_is_published_is_refused_before_training(
    tmp_path, capsys, monkeypatch
):
    published = {"finished": True, "size": 1e12}
    (tmp_path / "label_noise.json").write_text(json.dumps(published))
    with pytest.raises(SystemExit):
        label_noise.main(["--runs", str(tmp_path / "runs"), "--publish", str(tmp_path)])
    assert "comes from a larger run than this one" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_what_is_finished_and_says_so(number, tmp_path):
    job = start(JOB, tmp_path)
    assert [job.stdout.readline() for _ in range(2)] == ["working\n"] * 2
    job.send_signal(number)
    _, error = job.communicate()
    assert job.returncode == 128 + number
    path = tmp_path / "job.partial.json"
    assert error.splitlines() == [f"Saved 1 of 3 parts: {path}"]
    assert json.loads(path.read_text())["finished"] is False


def test_nothing_finished_is_nothing_saved(tmp_path, capsys):
    parser = command_line.experiment_parser("job", "A job.")
    options = command_line.parse(parser, ["--runs", str(tmp_path)])
    command_line.save(options, "job", {}, size=1, done=0, of=3, unit="parts")
    assert (
        capsys.readouterr().err == "None of 3 parts was finished: nothing was saved.\n"
    )
    assert not os.listdir(tmp_path)


def test_a_reader_that_has_gone_is_no_error(tmp_path):
    job = start(
        "from experiments.harness import command_line as c\n"
        "c.run(lambda: print('\\n' * 200_000))"
    )
    with job:
        job.stdout.close()
        assert job.stderr.read() == ""
    assert job.returncode == 141


def test_experiments_are_listed_with_what_they_are_for():
    found = runnable()
    assert {"label_noise", "evidence"} <= set(found)
    assert all(line.endswith((".", "?")) for line in found.values())


def test_an_experiment_runs_by_its_name(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="No experiment 'labels': choose from"):
        experiments_main(["labels"])
    ran = []
    monkeypatch.setattr(runpy, "run_module", lambda *args, **kw: ran.append((args, kw)))
    experiments_main(["label_noise", "--seeds", "2"])
    assert ran == [(("experiments.label_noise",), {"run_name": "__main__"})]
    assert sys.argv == ["label_noise", "--seeds", "2"]


def test_lines_say_how_much_is_done_and_how_long_it_will_take(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 11.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    lines = progress.Lines("job", 100, sys.stderr)
    lines.advance(25)
    lines.advance(1)  # too soon for another line
    lines.advance(24)
    assert capsys.readouterr().err.splitlines() == [
        "job: 25% after 10 s, about 30 s left",
        "job: 50% after 20 s, about 20 s left",
    ]


def test_a_part_does_its_share_of_the_whole():
    whole = progress.Progress("whole", 100)
    with progress.part_of(whole, 40), progress.over("part", 8) as part:
        part.advance(2)
        assert whole.done == pytest.approx(10)
        part.advance(3)
    assert whole.done == pytest.approx(40)


def test_an_interrupted_part_is_not_counted_as_done():
    whole = progress.Progress("whole", 100)
    with pytest.raises(KeyboardInterrupt), progress.part_of(whole, 40):
        raise KeyboardInterrupt
    assert whole.done == 0
    assert not progress._outer


@pytest.mark.parametrize(
    ("seconds", "said"), [(8.2, "8 s"), (125, "2 min 05 s"), (4200, "1 h 10 min")]
)
def test_durations_are_said_as_people_say_them(seconds, said):
    assert progress.duration(seconds) == said
