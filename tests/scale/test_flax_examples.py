"""The Flax examples run, and learn."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("flax")


@pytest.mark.parametrize("name", ["flax_linen", "flax_nnx"])
def test_a_network_with_batch_normalization_learns_the_digits(name):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--smoke"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr
    accuracies = [float(a) for a in re.findall(r"accuracy (\S+)", done.stdout)]
    assert len(accuracies) == 2
    # Two epochs give 0.89 and 0.91; chance is 0.1.
    assert accuracies[-1] > 0.8
