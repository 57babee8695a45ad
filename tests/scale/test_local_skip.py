"""One bad group among several: all skip the step, and their parameters stay the same.

The bad batch has a finite loss and a gradient that is not: the root of zero.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_vasso as ov

HERE = Path(__file__).parent
METHODS = ("sam", "vasso", "lagged_vasso", "asam")


def loss_fn(params, batch):
    return jnp.mean(jnp.sqrt(batch @ params))


# Only the bad group can know: the gate is closed on the second step, so that no loss
# shows it, and the base optimizer forgives what is not finite.
OPTIMIZER = ov.wrappers.skip_nonfinite(
    ov.sharpness_aware(
        ov.train.average_over(optax.chain(optax.zero_nans(), optax.adam(0.01)), "data"),
        optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(0.01)),
        gate=ov.gate.every(2),
    )
)
GOOD = jnp.arange(1.0, 17.0).reshape(8, 2)
BAD = GOOD.at[2:4].set(0.0)


def test_groups_on_one_device_skip_together():
    params = jnp.asarray([1.0, 2.0])
    state = ov.train.init_local_state(params, OPTIMIZER, groups=4)
    step = ov.train.make_local_train_step(loss_fn, OPTIMIZER)
    finite = []
    for batch in (GOOD, BAD, GOOD):
        before = jax.tree.map(np.asarray, (state.params, state.opt_state))
        state, metrics = step(state, batch)
        finite.append(bool(metrics["finite"]))
        if not finite[-1]:
            np.testing.assert_array_equal(state.params, before[0])
            old, new = (
                s.optimizer_state.ascent_state for s in (before[1], state.opt_state)
            )
            jax.tree.map(np.testing.assert_array_equal, old, new)
    assert finite == [True, False, True]
    assert np.isfinite(state.params).all()
    assert int(metrics["skipped"]) == 1


@pytest.fixture(scope="module")
def on_devices():
    done = subprocess.run(
        [sys.executable, str(HERE / "skip_and_reduce.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_devices_skip_together_and_stay_equal(on_devices):
    assert on_devices["finite"] == [True, False, True]
    assert on_devices["difference between devices"] == 0
    assert on_devices["moved by the bad batch"] == 0
    assert on_devices["moved by the good batches"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_no_leaf_adds_a_collective_of_scalars(on_devices, method):
    """FSDP on eight devices: a norm is one reduction, however many leaves it is of."""
    counts = on_devices["scalar all-reduces"]
    few, many = counts[f"{method} 6"], counts[f"{method} 12"]
    # One for the loss of each pass, one or two for each norm.
    assert 1 <= few == many <= 6
