"""Several processes train as one does, and a job that was killed goes on as it was."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cases
import pod_process
import pytest

pytest.importorskip("orbax.checkpoint")
SAVED = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: -signal.SIGINT}


def start(environment, *runs, devices=2):
    """Run them one after another in processes of some devices, until one of these ends.

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
                "JAX_NUM_CPU_DEVICES": str(devices),
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


@pytest.fixture(scope="module")
def job(once, compiled_once, shared_folder):
    """20 steps; the same, but killed at step 13; the same, restarted."""
    directory = str(shared_folder / "pod")

    def run():
        undisturbed = {"steps": 20, "directory": str(shared_folder / "undisturbed")}
        killed = {"signal": signal.SIGKILL}
        killed |= {"steps": 20, "directory": directory, "signal_at": 13}
        (whole,), codes = start(compiled_once, undisturbed, killed)
        assert codes[1] == -signal.SIGKILL
        assert Path(directory, "8").is_dir()
        restart = {"steps": 20, "directory": directory}
        (restarted,), codes = start(compiled_once, restart)
        assert codes == [0, 0]
        return directory, whole, restarted

    return once("pod_job", run)


def test_processes_train_as_one_does(job, x64, tmp_path):
    _, whole, _ = job
    assert (whole["step"], whole["devices"]) == (20, 4)
    alone = pod_process.train(pod_process.load(), 20, tmp_path)
    assert alone["devices"] == 1
    # float64 sums in another order.
    assert whole["sums"] == pytest.approx(alone["sums"], abs=1e-12)


def test_a_job_killed_and_restarted_is_bit_identical(job):
    _, whole, restarted = job
    assert (whole["done"], restarted["done"]) == (20, 12)
    assert restarted["digest"] == whole["digest"]


def test_another_mesh_goes_on_from_the_same_checkpoint(job, x64, tmp_path):
    directory, _, _ = job
    pod = pod_process.load()
    moved = pod_process.train(pod, 24, directory)
    alone = pod_process.train(pod, 24, tmp_path)
    assert moved["sums"] == pytest.approx(alone["sums"], abs=1e-12)
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        pod_process.train(pod, 24, directory, seed=1)


def test_parameters_divided_over_data_and_model(compiled_once, x64, tmp_path):
    """Eight devices of two processes as 4 × 2, and one that goes on from there."""
    directory = str(tmp_path / "pod")
    run = {"steps": 4, "directory": directory, "model": 2}
    (divided,), codes = start(compiled_once, run, devices=4)
    assert codes == [0, 0]
    assert divided["devices"] == 8
    assert divided["shards"] == {"hidden": [64 // 4, 128 // 2], "out": [128 // 8, 10]}
    pod = pod_process.load()
    moved = pod_process.train(pod, 6, directory)
    alone = pod_process.train(pod, 6, tmp_path / "alone")
    # float64 sums in another order.
    assert moved["sums"] == pytest.approx(alone["sums"], abs=1e-12)


# What each signal does to one process, test_stop_signals.py tests.
@pytest.mark.parametrize("number", [signal.SIGTERM, cases.exhaustive(signal.SIGINT)])
def test_a_signal_to_one_process_saves_them_all_at_the_same_step(
    compiled_once, tmp_path, number
):
    stopped = {"steps": 10**6, "directory": str(tmp_path / "pod")}
    _, codes = start(compiled_once, stopped | {"signal": number, "signal_at": 13})
    assert codes == [SAVED[signal.SIGTERM], SAVED[number]]
    step = max(int(f.name) for f in (tmp_path / "pod").iterdir() if f.name.isdigit())
    assert step >= 13
    undisturbed = {"steps": step + 2, "directory": str(tmp_path / "undisturbed")}
    restarted = stopped | {"steps": step + 2}
    (whole, after), codes = start(compiled_once, undisturbed, restarted)
    assert codes == [0, 0]
    assert after["done"] == 2
    assert after["digest"] == whole["digest"]
