"""What a step may send and hold beside plain AdamW, on meshes of up to 64 devices.

Steps are compiled and never run, so that even a billion parameters need no memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest

from benchmarks import layouts

ROOT = Path(__file__).parents[2]
BILLION = "1 B on 16 × 4"
# Both kinds of division. What FSDP alone sends, test_budgets.py compares as well; the
# others are larger.
ALWAYS = "4 × 2"
SMALL = ("8", ALWAYS, "16 × 4")
TWO_GRADIENTS = ("SAM", "SAM apart", "VaSSO apart")
COMPILED = {
    ",".join(SMALL): ("AdamW", *TWO_GRADIENTS, "lagged VaSSO"),
    BILLION: ("AdamW", "SAM apart", "lagged VaSSO"),
}
CASES = [
    (layout, method)
    for names, methods in COMPILED.items()
    for layout in names.split(",")
    for method in methods
]


def of_methods(is_one):
    return pytest.mark.parametrize(
        ("layout", "method"),
        [
            case if case[0] == ALWAYS else cases.exhaustive(*case)
            for case in CASES
            if is_one(case[1])
        ],
    )


@pytest.fixture(scope="module")
def rows(once, pytestconfig):
    def run():
        found = {}
        compiled = COMPILED
        if not pytestconfig.getoption("all"):
            compiled = {ALWAYS: COMPILED[",".join(SMALL)]}
        for names, methods in compiled.items():
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "benchmarks.layouts", "--json"),
                    *("--layouts", names, "--methods", ",".join(methods)),
                ],
                capture_output=True,
                text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                timeout=600,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            found |= json.loads(done.stdout)
        return found

    return once("layouts", run)


@of_methods(lambda method: method in TWO_GRADIENTS)
def test_two_gradients_send_twice_and_three_scalars(rows, layout, method):
    plain, found = rows[f"{layout}: AdamW"], rows[f"{layout}: {method}"]
    assert found["collectives"] <= 2 * plain["collectives"]
    assert found["scalars"] <= plain["scalars"] + 3
    # Scalars are far below a thousandth of what a gradient sends.
    assert found["sent_MB"] <= 2.001 * plain["sent_MB"]


@of_methods(lambda method: method == "lagged VaSSO")
def test_a_lagged_step_sends_one_gradient_and_three_scalars(rows, layout, method):
    plain, found = rows[f"{layout}: AdamW"], rows[f"{layout}: {method}"]
    assert found["collectives"] <= plain["collectives"]
    assert found["scalars"] <= plain["scalars"] + 3
    assert found["sent_MB"] <= 1.001 * plain["sent_MB"]


@of_methods(lambda method: method.endswith(" apart"))
def test_gradients_apart_hold_two_and_a_half_shards_more(rows, layout, method):
    """The clean gradient and the perturbed parameters are two."""
    plain, found = rows[f"{layout}: AdamW"], rows[f"{layout}: {method}"]
    shards = (found["temporary_MB"] - plain["temporary_MB"]) / plain["shard_MB"]
    assert shards <= 2.5


@pytest.mark.exhaustive
def test_a_billion_parameters_are_divided_over_all_devices(rows):
    """AdamW holds three copies; SAM none besides, and lagged VaSSO one."""
    for method, copies in (("AdamW", 3), ("SAM apart", 3), ("lagged VaSSO", 4)):
        row = rows[f"{BILLION}: {method}"]
        # Scales and biases, which are not divided, and the batch are within 2 %.
        assert row["arguments_MB"] <= 1.02 * copies * row["shard_MB"]
    size = layouts.measuring.tree_size(layouts.parameters(layouts.BILLION))
    assert size > 1e9
