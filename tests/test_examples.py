"""The main job runs, writes whole files or none, and says what is wrong in a line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, EXAMPLES / "label_noise.py", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    return folder, run(
        "--smoke", "--methods", "sam,evasso_0.3,lagged_vasso", cwd=folder
    )


def test_the_smoke_run_writes_a_figure_and_the_numbers(smoke):
    folder, finished = smoke
    assert finished.returncode == 0, finished.stderr
    names = sorted(path.name for path in (folder / "results").iterdir())
    assert names == ["label_noise_0.75.json", "label_noise_0.75.png"]
    results = json.loads((folder / "results" / names[0]).read_text())
    assert list(results["methods"]) == ["sam", "evasso_0.3", "lagged_vasso"]
    sam, evasso, lagged = results["methods"].values()
    assert len(sam["accuracy"]) == results["seeds"] == 2
    assert sam["gradients_per_step"] == 2
    assert lagged["gradients_per_step"] == 1
    assert 1 < evasso["gradients_per_step"] < 2
    difference = lagged["difference_to_sam"]["mean"]
    assert difference == pytest.approx(lagged["mean"] - sam["mean"], abs=1e-3)
    assert results["environment"]["jax"]


def test_the_smoke_run_prints_a_table(smoke):
    assert "paired" in smoke[1].stdout
    assert "lagged VaSSO" in smoke[1].stdout


def test_tuning_writes_what_it_tried(tmp_path):
    finished = run("--smoke", "--tune", "--methods", "sam", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "results/label_noise_0.75_tuning.json").read_text())
    rows = found["methods"]["sam"]
    accuracies = [row["accuracy"] for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    assert {"rho", "accuracy", "standard_error"} == set(rows[0])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--noise", "1.5", "must be a number from 0 to 1, got '1.5'"),
        ("--seeds", "0", "must be an integer >= 1, got '0'"),
        ("--epochs", "many", "must be an integer >= 1, got 'many'"),
        ("--methods", "sam,adamw", "'adamw' is none of sgd, sam"),
        ("--radius", "1", "unrecognized arguments"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_two(option, value, message, tmp_path):
    finished = run(option, value, cwd=tmp_path)
    assert finished.returncode == 2
    assert message in finished.stderr
    assert finished.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_results_path_that_is_a_file_is_refused_before_training(tmp_path):
    (tmp_path / "taken").write_text("")
    finished = run("--results", "taken", cwd=tmp_path)
    assert finished.returncode == 2
    assert "taken is not a folder" in finished.stderr


INTERRUPTED = """
import sys, command_line, digits, label_noise

train = digits.train
finished = int(sys.argv[1])

def interrupted(*args, **kwargs):
    global finished
    finished -= 1
    if finished < 0:
        raise KeyboardInterrupt
    return train(*args, **kwargs)

digits.train = interrupted
command_line.run(lambda: label_noise.main(["--smoke", "--methods", "sgd,sam"]))
"""


@pytest.mark.parametrize("methods", [0, 1])
def test_an_interrupted_run_saves_the_methods_that_were_finished(methods, tmp_path):
    finished = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(methods)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 130
    assert "Interrupted: what was finished is saved" in finished.stderr
    assert "Traceback" not in finished.stderr
    files = sorted(path.name for path in tmp_path.glob("results/*"))
    if methods:
        assert files == ["label_noise_0.75.json", "label_noise_0.75.png"]
        results = json.loads((tmp_path / "results" / files[0]).read_text())
        assert list(results["methods"]) == ["sgd"]
        assert results["interrupted"]
    else:
        assert not files


WRITE_FAILS = """
import pathlib, command_line

def write(path):
    path.write_text("half")
    raise OSError("No space left on device")

try:
    command_line.write_atomically(pathlib.Path("results/numbers.json"), write)
except OSError as error:
    print(error)
"""


def test_a_write_that_fails_leaves_no_file(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-c", WRITE_FAILS],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stdout.strip() == "No space left on device"
    assert not list(tmp_path.glob("**/*.*"))


def test_help_names_every_option_and_its_default(tmp_path):
    finished = run("--help", cwd=tmp_path)
    assert finished.returncode == 0
    for option in ("--noise", "--seeds", "--methods", "--tune", "--results", "--smoke"):
        assert option in finished.stdout
    assert "default: 0.75" in finished.stdout
