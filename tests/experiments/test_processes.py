"""The launcher of several processes passes a signal on and lets each of them save."""

import os
import signal
import subprocess
import sys

import pytest

LAUNCHER = """
import argparse
from experiments.harness import command_line
from experiments.vision import processes
options = argparse.Namespace(local_processes=2, restarts=3)
command_line.run(lambda: processes.launch("worker", [], options))
"""
WORKER = r"""
import os, signal, sys, time
def save(number, frame):
    time.sleep(0.5)
    open(f"saved {sys.argv[-1]}", "x").close()  # once
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
os.write(1, b"ready\n")
time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_saves_every_process(tmp_path, number):
    (tmp_path / "worker.py").write_text(WORKER)
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        launcher.send_signal(number)
        launcher.communicate(timeout=300)
    finally:
        launcher.kill()
        launcher.communicate()
    assert launcher.returncode == 128 + number
    assert {path.name for path in tmp_path.glob("saved*")} == {"saved 0", "saved 1"}
