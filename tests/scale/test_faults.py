"""The script of faults runs.

Each kind of fault has tests of its own in ``test_checkpoint.py``, ``test_pod.py`` and
``test_stop_signals.py``; the script repeats them at random moments and places.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("orbax.checkpoint")


@pytest.mark.exhaustive
def test_every_fault_is_survived_once():
    # In a process of its own, in which JAX has not started: it forks.
    running = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--repeat", "1"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert running.returncode == 0, running.stdout + running.stderr[-3000:]
    rows = [line.split()[-2:] for line in running.stdout.splitlines()[1:]]
    assert len(rows) == 7
    assert all(tried == survived for tried, survived in rows)
