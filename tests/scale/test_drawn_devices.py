"""Eight devices and microbatches, with any radius, rate and parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hypothesis import settings
from test_common import EVERY

# A few by default; with --hypothesis-profile=thorough 30 of every method.
IS_THOROUGH = settings().max_examples > 25
COUNT = 30 if IS_THOROUGH else 10
# The radius of held_rise follows the loss of examples that the ascent does not see.
NAMES = sorted(EVERY.keys() - {"held_rise"}) if IS_THOROUGH else ["lagged_vasso"]


def test_eight_devices_and_microbatches_train_as_one_device_does():
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("drawn_devices.py")),
            str(COUNT),
            *NAMES,
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    apart = json.loads(done.stdout)
    # float64 sums in another order.
    assert {route: d for route, d in apart.items() if d > 1e-12} == {}
