"""Several processes train as one does, and a job that was killed goes on as it was."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")


def pod(*arguments, code=0, devices=1):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "pod.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "JAX_ENABLE_X64": "1",
            "JAX_NUM_CPU_DEVICES": str(devices),
        },
        timeout=600,
    )
    assert done.returncode == code, done.stdout + done.stderr[-3000:]
    return done


def outcome(done):
    total = float(re.search(r"sum (\S+)", done.stdout)[1])
    loss = float(re.search(r"loss (\S+)", done.stdout)[1])
    return total, loss, re.search(r"step (\d+) digest (\w+)", done.stdout).groups()


@pytest.fixture(scope="module")
def finished():
    """What 20 steps give on a number of processes; each is run once."""
    known = {}

    def train(processes):
        if processes not in known:
            option = ["--local-processes", str(processes)] if processes > 1 else []
            known[processes] = outcome(pod("--steps", "20", *option))
        return known[processes]

    return train


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_as_one_does(finished, processes):
    alone, together = finished(1), finished(processes)
    assert together[2][0] == "20"
    # float64 sums in another order.
    assert together[0] == pytest.approx(alone[0], abs=1e-12)
    assert together[1] == alone[1]


def test_a_job_killed_and_restarted_is_bit_identical(finished, tmp_path):
    killed = pod(
        *("--steps", "20", "--local-processes", "2", "--restarts", "1"),
        *("--directory", str(tmp_path), "--save-every", "8", "--die-at", "13"),
    )
    assert "A process died" in killed.stderr
    assert outcome(killed) == finished(2)
    # Another mesh goes on from the same checkpoint.
    moved = outcome(pod("--steps", "20", "--directory", str(tmp_path), devices=4))
    assert moved[2][0] == "20"
    assert moved[0] == pytest.approx(finished(1)[0], abs=1e-12)
    refused = pod("--rho", "0.2", "--directory", str(tmp_path), code=1)
    assert "rho: 0.1 there, 0.2 here" in refused.stderr


def test_bad_arguments_are_one_line():
    done = pod("--process-id", "1", code=2)
    assert "go together" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    done = pod("--batch", "30", code=1, devices=4)
    assert "--batch 30 is not divided by 4 devices" in done.stderr
