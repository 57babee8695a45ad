"""Several processes train as one does, and a job that was killed goes on as it was."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pod_process
import pytest

pytest.importorskip("orbax.checkpoint")
SAVED = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: -signal.SIGINT}


def start(environment, *runs):
    """Run them one after another in two processes, until one of these ends.

    Returns what process 0 printed, and the exit codes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    workers = [
        subprocess.Popen(
            [
                *(sys.executable, pod_process.__file__),
                json.dumps({"address": address, "id": i, "runs": runs}),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | environment
            | {
                "PYTHONPATH": os.pathsep.join(sys.path),
                "JAX_NUM_CPU_DEVICES": "4",
            },
        )
        for i in range(pod_process.PROCESSES)
    ]
    try:
        deadline = time.monotonic() + 300
        # Those that have saved end by themselves.
        while not any(w.poll() not in (None, 0, *SAVED.values()) for w in workers):
            if all(w.poll() is not None for w in workers):
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.kill()  # The others wait for the one that died.
        outputs = [worker.communicate() for worker in workers]
    codes = [worker.returncode for worker in workers]
    assert codes[1] in (0, -signal.SIGKILL, *SAVED.values()), outputs[1][1][-3000:]
    printed = outputs[0][0].splitlines()  # Gloo prints there as well.
    return [json.loads(line) for line in printed if line.startswith("{")], codes


def stopped(environment, folder, number, *before):
    """After other runs, one that process 1 is told to stop, and how it goes on.

    Returns what the others and the restart printed, the exit codes, and the step.
    """
    directory = {"directory": str(folder / "stopped")}
    signalled = {"steps": 10**6, "signal": number, "signal_at": 7}
    printed, codes = start(environment, *before, directory | signalled)
    names = (path.name for path in (folder / "stopped").iterdir())
    step = max(int(name) for name in names if name.isdigit())
    undisturbed = {"steps": step + 2, "directory": str(folder / "not stopped")}
    restart = directory | {"steps": step + 2}
    (whole, resumed), after = start(environment, undisturbed, restart)
    assert after == [0, 0]
    return printed, {"whole": whole, "resumed": resumed, "codes": codes, "step": step}


@pytest.fixture(scope="module")
def job(once, compiled_once, shared_folder):
    """Three pairs of processes after each other, whose imports take most of the time.

    10 steps; 4 of parameters divided over data and model; 10 that are killed at step 7,
    and restarted; a run that is stopped by SIGTERM, and restarted.
    """
    folder = shared_folder / "pod"
    folder.mkdir(exist_ok=True)

    def run():
        undisturbed = {"steps": 10, "directory": str(folder / "undisturbed")}
        divided = {"steps": 4, "directory": str(folder / "divided"), "model": 2}
        restart = {"steps": 10, "directory": str(folder / "killed")}
        killed = restart | {"signal": signal.SIGKILL, "signal_at": 7}
        (whole, parts), codes = start(compiled_once, undisturbed, divided, killed)
        assert codes[1] == -signal.SIGKILL
        assert (folder / "killed" / "4").is_dir()
        (restarted,), signalled = stopped(
            compiled_once, folder, signal.SIGTERM, restart
        )
        return {
            "folder": str(folder),
            "whole": whole,
            "divided": parts,
            "restarted": restarted,
            "stopped": signalled,
        }

    return once("pod_job", run)


def test_processes_train_as_one_does(job, x64, tmp_path):
    whole = job["whole"]
    assert (whole["step"], whole["devices"]) == (10, 8)
    alone = pod_process.train(pod_process.load(), 10, tmp_path)
    assert alone["devices"] == 1
    # float64 sums in another order.
    assert whole["sums"] == pytest.approx(alone["sums"], abs=1e-12)


def test_a_job_killed_and_restarted_is_bit_identical(job):
    whole, restarted = job["whole"], job["restarted"]
    assert (whole["done"], restarted["done"]) == (10, 6)
    assert restarted["digest"] == whole["digest"]


def test_another_mesh_goes_on_from_the_same_checkpoint(job, x64, tmp_path):
    directory = Path(job["folder"], "killed")
    pod = pod_process.load()
    moved = pod_process.train(pod, 12, directory)
    alone = pod_process.train(pod, 12, tmp_path)
    assert moved["sums"] == pytest.approx(alone["sums"], abs=1e-12)
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        pod_process.train(pod, 12, directory, seed=1)


def test_parameters_divided_over_data_and_model(job, x64, tmp_path):
    """Eight devices of two processes as 4 × 2, and one that goes on from there."""
    divided = job["divided"]
    assert divided["devices"] == 8
    assert divided["shards"] == {"hidden": [64 // 4, 128 // 2], "out": [128 // 8, 10]}
    pod = pod_process.load()
    moved = pod_process.train(pod, 6, Path(job["folder"], "divided"))
    alone = pod_process.train(pod, 6, tmp_path / "alone")
    # float64 sums in another order.
    assert moved["sums"] == pytest.approx(alone["sums"], abs=1e-12)


def check_signal(number, found):
    assert found["codes"] == [SAVED[signal.SIGTERM], SAVED[number]]
    assert found["step"] >= 7
    assert found["resumed"]["done"] == 2
    assert found["resumed"]["digest"] == found["whole"]["digest"]


def test_a_signal_to_one_process_saves_them_all_at_the_same_step(job):
    check_signal(signal.SIGTERM, job["stopped"])


# What each signal does to one process, test_stop_signals.py tests.
@pytest.mark.exhaustive
def test_ctrl_c_in_one_process_saves_them_all_at_the_same_step(compiled_once, tmp_path):
    _, found = stopped(compiled_once, tmp_path, signal.SIGINT)
    check_signal(signal.SIGINT, found)
