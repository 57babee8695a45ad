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
def alone():
    return outcome(pod("--steps", "20"))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_as_one_does(alone, processes):
    total, loss, (step, _) = outcome(
        pod("--steps", "20", "--local-processes", str(processes))
    )
    assert step == "20"
    # float64 sums in another order.
    assert total == pytest.approx(alone[0], abs=1e-12)
    assert loss == alone[1]


def test_a_job_killed_and_restarted_is_bit_identical(tmp_path):
    whole = outcome(pod("--steps", "20", "--local-processes", "2"))
    killed = pod(
        *("--steps", "20", "--local-processes", "2", "--restarts", "1"),
        *("--directory", str(tmp_path), "--save-every", "8", "--die-at", "13"),
    )
    assert "A process died" in killed.stderr
    assert outcome(killed) == whole
    # Another mesh goes on from the same checkpoint.
    moved = outcome(pod("--steps", "20", "--directory", str(tmp_path), devices=4))
    assert moved[2][0] == "20"
    assert moved[0] == pytest.approx(whole[0], abs=1e-12)
    refused = pod("--rho", "0.2", "--directory", str(tmp_path), code=1)
    assert "rho: 0.1 there, 0.2 here" in refused.stderr
