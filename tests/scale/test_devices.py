"""Eight devices train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RECIPES = ("vasso", "friendly", "evasso", "lagged", "adam")
SYNCHRONIZED = (
    *(f"{recipe} {layout}" for recipe in RECIPES for layout in ("data", "fsdp")),
    "vasso tensor",
    "vasso explicit data",
    "vasso explicit fsdp",
    "vasso data microbatched",
    "vasso data split",
    "vasso explicit split",
    "vasso pmap",
)
LOCAL = (
    "local mesh Auto",
    "local mesh Explicit",
    "local groups on one device",
    "local microbatched on a grid",
    "local apart on a grid",
)


@pytest.fixture(scope="module")
def results(once):
    def run():
        environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
        done = subprocess.run(
            [sys.executable, str(HERE / "eight_devices.py")],
            capture_output=True,
            text=True,
            env=environment,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return once("eight_devices", run)


@pytest.mark.parametrize("name", SYNCHRONIZED)
def test_steps_on_eight_devices_are_those_on_one(results, name):
    # float64 sums in another order.
    assert results[name] < 1e-12


@pytest.mark.parametrize("name", SYNCHRONIZED[:11])
def test_shardings_do_not_change_from_step_to_step(results, name):
    assert results[f"{name} shardings lost"] == 0


@pytest.mark.parametrize("name", LOCAL)
def test_local_ascent_is_the_loop_over_shards(results, name):
    assert results[name] < 1e-12


def test_local_ascent_is_another_method_than_synchronized(results):
    assert results["local differs from synchronized"] > 1e-3


def test_local_averages_live_on_their_own_device(results):
    assert results["local averages per device"] == 1


def test_each_microbatch_is_perturbed_by_itself_with_divided_parameters(results):
    assert results["a perturbation per microbatch, fsdp"] < 1e-12
    # An eighth, and the few arrays that are small and whole on each.
    assert results["fsdp arguments per device"] < 0.15


def test_the_digest_of_an_array_is_the_same_on_every_mesh(results):
    assert results["layouts with a digest of their own"] == 1
