"""A run that was saved on one mesh goes on on any other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest

pytest.importorskip("orbax.checkpoint")
HERE = Path(__file__).parent
# Saved on 8 devices with FSDP; data × model.
ALWAYS = ("4 × 2", "4 × 2, in the background", "1 × 1")
AT_NIGHT = ("2 × 4", "2 × 2")
RECIPES = ("vasso", "lagged")
CASES = [f"{recipe}, {mesh}" for recipe in RECIPES for mesh in ALWAYS] + [
    cases.exhaustive(f"{recipe}, {mesh}") for recipe in RECIPES for mesh in AT_NIGHT
]


@pytest.fixture(scope="module")
def results(once, shared_folder, pytestconfig):
    meshes = ALWAYS + AT_NIGHT if pytestconfig.getoption("all") else ALWAYS

    def run():
        done = subprocess.run(
            [
                *(sys.executable, str(HERE / "other_meshes.py")),
                str(shared_folder / "other_meshes"),
                *(mesh.replace(" × ", "x") for mesh in meshes if "," not in mesh),
            ],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return once("other_meshes_results", run)


@pytest.mark.parametrize("case", CASES)
def test_the_state_comes_back_to_the_bit_and_lies_as_the_new_mesh_says(results, case):
    assert results[case]["same bits"]
    assert results[case]["placed"]


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_as_on_the_first_mesh(results, case):
    # float64 sums in another order.
    assert results[case]["difference"] < 1e-12


@pytest.mark.parametrize("recipe", ["vasso", "lagged"])
def test_orbax_writes_the_state_of_the_call_while_training_goes_on(results, recipe):
    """The steps that donated its buffers were over before the first file was opened."""
    found = results[f"{recipe}, 4 × 2, in the background"]
    assert found["unwritten"]
    assert found["same bits"]
