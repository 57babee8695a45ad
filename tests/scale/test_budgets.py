"""What every recipe may cost, by XLA's analysis: `benchmarks/budgets.json` holds it.

Of the XLA that wrote the file, all figures are compared; of another one, which fuses
and schedules in its own way, those that the mathematics and the sharding decide.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import quick

from benchmarks import budgets, peaks

ROOT = Path(__file__).parents[2]
KEPT = json.loads(budgets.PATH.read_text())
# More than half of the time; perceptrons with large batches and with small ones, whose
# memory is that of activations and of parameters, are measured every time.
LARGE = "transformer"
# Fused in another way there are fewer; all else is the same. --all counts them.
COUNTS_NO_INSTRUCTIONS = quick.FLAGS[-1] in os.environ.get("XLA_FLAGS", "")


def is_small(name):
    return not name.startswith(LARGE)


@pytest.fixture(scope="module")
def measured(once, pytestconfig):
    without = () if pytestconfig.getoption("all") else ("--without", LARGE)
    if COUNTS_NO_INSTRUCTIONS:
        without += ("--two-layers",)

    def run():
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.budgets", "--json", *without],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return once("budgets", run)


@pytest.fixture(scope="module")
def rows(measured):
    return measured["rows"]


@pytest.mark.parametrize(
    "name", cases.every(KEPT["rows"], filter(is_small, KEPT["rows"]))
)
def test_a_step_keeps_its_budget(measured, name):
    found = [row for row in budgets.differences(KEPT, measured) if row[0] == name]
    if COUNTS_NO_INSTRUCTIONS:
        found = [row for row in found if "instructions" not in row[1]]
    assert not found, (
        "python -m benchmarks.budgets --update rewrites budgets.json, where the diff "
        "shows what changed"
    )


def test_every_recipe_has_a_budget(rows):
    assert rows.keys() <= KEPT["rows"].keys()
    assert rows.keys() >= {*filter(is_small, KEPT["rows"])}
    assert budgets.METHODS.keys() < KEPT["rows"].keys()


def test_a_figure_that_moves_is_found():
    name, key = "VaSSO", "instructions"
    row = KEPT["rows"][name]
    moved = KEPT["rows"] | {name: row | {key: 1.05 * row[key]}}
    ((where, what, *_),) = budgets.differences(KEPT, KEPT | {"rows": moved})
    assert (where, what) == (name, key)
    other = KEPT["environment"] | {"jaxlib": "0"}
    new = {"environment": other, "rows": moved}
    assert not list(budgets.differences(KEPT, new))


@pytest.mark.parametrize(
    ("name", "gradients"),
    [("SGD", 1), ("SAM", 2), ("VaSSO", 2), ("lagged VaSSO", 1), ("split SAM", 2)],
)
def test_bytes_all_reduced_in_gradients(rows, name, gradients):
    # Beside gradients there are scalars: losses and metrics.
    row = rows[name]
    assert row["data all-reduce: gradients"] == pytest.approx(gradients, abs=1e-3)
    for kind in budgets.KINDS[1:]:
        assert row[f"data {kind}: number"] == 0


def test_local_ascent_reduces_one_gradient(rows):
    row = rows["VaSSO, local ascent"]
    assert row["local all-reduce: gradients"] == pytest.approx(1, abs=1e-3)


def test_gradients_apart_hold_the_activations_of_scanned_layers_once(rows):
    """Beside them SAM has one more copy of the parameters, an eighth of the stack."""
    plain, sam = (
        rows[f"{name}, scanned layers"]["activations"] for name in ("SGD", "SAM")
    )
    assert sam < plain + 1.1 / 8
    together = budgets.scanned(budgets.RECIPES["SAM"](budgets.BASE))["activations"]
    assert together > 1.5 * sam, "XLA no longer needs train.apart"


@pytest.mark.parametrize(("name", "gradients"), [("VaSSO", 2), ("lagged VaSSO", 1)])
@pytest.mark.parametrize("kind", budgets.KINDS)
def test_fsdp_sends_only_scalars_beyond_plain_gradients(rows, name, gradients, kind):
    plain = rows["SGD"][f"fsdp {kind}: gradients"]
    assert rows[name][f"fsdp {kind}: gradients"] <= gradients * plain + 1e-3
    if kind == "all-gather":
        assert plain > 0


@pytest.mark.parametrize(
    "network", cases.every(peaks.LAGGED, filter(is_small, peaks.LAGGED))
)
def test_what_a_lagged_step_holds_beside_its_base(rows, network):
    """In copies of the parameters, of which the state is one.

    Through Optax no less than max(1, 2 − A) is possible, A the temporary memory of the
    base optimizer: y and two of ε, d and the gradient outlast the norm.
    """
    base = rows[f"{network}: SGD"]["peak"]
    lagged = f"{network}: lagged VaSSO"
    through_optax, in_train_step = peaks.LAGGED[network]
    assert rows[lagged]["peak"] - base <= through_optax
    assert rows[f"{lagged}, make_train_step"]["peak"] - base <= in_train_step


@pytest.mark.parametrize(
    ("method", "copies"), [("GSAM", 0.01), ("LookSAM, k = 5", 1.01)]
)
def test_what_a_method_holds_beside_the_same_in_plain_lines(rows, method, copies):
    """LookSAM's stored direction is not renewed in the branch of the ascent."""
    ours, plain = (rows[f"{method}, 512 × 8{how}"]["peak"] for how in ("", ", plainly"))
    assert ours - plain <= copies


@pytest.mark.parametrize("name", ["split SAM", "split SAM, held rise"])
def test_two_parts_of_a_batch_are_one_gradient_of_it(rows, name):
    # Beside it, ε is formed and added: some nine operations per parameter, which is
    # much beside four examples per device and little beside hundreds.
    parameters = 2 * budgets.WIDTH**2
    beyond = rows[name]["operations"] - rows["SGD"]["operations"]
    assert beyond < 10 * parameters
    for kind in budgets.KINDS[1:]:
        assert rows[name][f"data {kind}: number"] == 0


@pytest.mark.parametrize(
    ("method", "gradients", "copies"),
    [("SAM", 2, 0), ("lagged VaSSO", 1, 1), ("balanced SGD", 1, 0)],
)
def test_frozen_weights_cost_nothing(rows, method, gradients, copies):
    """No state, no gradient, no memory: a copy of them is 32 copies of the adapters."""
    plain, found = rows["adapters: SGD"], rows[f"adapters: {method}"]
    assert plain["state in adapters"] == 1
    # Beside the copies of the adapters there are a few scalars.
    assert found["state in adapters"] == pytest.approx(1 + copies, abs=2e-3)
    # An evaluation forwards and one backwards, less that of the first layer's inputs,
    # and the adapters' own products; a gradient of the frozen weights is one more.
    assert plain["evaluations"] < 1.65
    assert found["evaluations"] <= 1.001 * gradients * plain["evaluations"]
    if gradients == 1:
        beyond = found["temporary in adapters"] - plain["temporary in adapters"]
        assert beyond <= 3


@pytest.mark.parametrize(("how", "most"), [("", 2.0), (", 4 microbatches", 2.35)])
def test_functional_sam_takes_two_gradients_and_a_third_more_in_microbatches(
    rows, how, most
):
    assert rows[f"Functional SAM{how}"]["operations in gradients"] <= most
