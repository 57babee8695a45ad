"""On mapped axes, under JAX's default checks: right, or refused while tracing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import optax_vasso as ov
from optax_vasso._internal.mapped import vary

HERE = Path(__file__).parent
# One of each kind: test_common traces all of them, which takes no compilation.
RECIPES = ("sam", "ae_sam", "looksam", "held_rise", "lagged_vasso", "sampa")
RECIPES += ("skip_nonfinite",)
CASES = (
    *(f"{kind} {recipe}" for kind in ("invariant", "varying") for recipe in RECIPES),
    "synchronized",
    "synchronized, microbatches",
    "synchronized, apart",
    "synchronized, two axes",
    "pmap, line search",
    "local gsam",
    "local weighted",
    "local looksam",
    "local, line search",
    "local, adaptive gate",
    "local, tracked",
    "local, skipping",
    "own loop",
    "mesh with another axis",
)
# Training on each device for itself needs what a shared training needs and one gate or
# carried state; gradients apart are tested on other meshes, the descent of GSAM here.
AT_NIGHT = {
    *(
        "varying skip_nonfinite",
        "local, skipping",
    ),  # test_local_skip.py has a bad batch
    *("varying looksam", "varying held_rise", "varying sampa"),
    *("synchronized, apart", "local weighted"),
}
ALWAYS = [case for case in CASES if case not in AT_NIGHT]
SGD = optax.sgd(0.1)
PARAMS = jnp.asarray([1.0, 2.0])
BATCH = jnp.asarray([[1.0, 2.0], [3.0, -1.0]])


@pytest.fixture(scope="module")
def results(once, pytestconfig):
    chosen = CASES if pytestconfig.getoption("all") else ALWAYS

    def run():
        done = subprocess.run(
            [sys.executable, str(HERE / "mapped_axes.py"), *chosen],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return once("mapped_axes", run)


@pytest.mark.parametrize("name", cases.every(CASES, ALWAYS))
def test_four_devices_train_as_one_does(results, name):
    # float64 sums in another order.
    assert results[name] < 1e-12


def one_device():
    """Enough to trace on: JAX tracks what varies by the specs."""
    return jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))


def loss_fn(params, batch):
    return jnp.mean(jnp.cosh(batch @ params))


def trace(on_device, *args):
    """Trace a function of shared parameters, and of a batch that devices divide."""
    mapped = jax.shard_map(
        on_device, mesh=one_device(), in_specs=(P(), P("data")), out_specs=P()
    )
    return jax.eval_shape(mapped, *args)


def update(optimizer, own=True, value=None):
    """A step of a user's loop; with ``own``, of gradients that JAX has not summed."""

    def on_device(params, batch):
        grad_fn = jax.grad(lambda p: loss_fn(p, batch))
        point = vary(params, frozenset({"data"})) if own else params
        loss = loss_fn(params, batch)
        return optimizer.update(
            grad_fn(point), optimizer.init(params), params, grad_fn=grad_fn, value=loss
        )[0]

    return trace(on_device, PARAMS, BATCH)


def test_gradients_that_jax_has_summed_are_not_averaged():
    optimizer = ov.sam(ov.train.average_over(SGD, "data"), 0.1)
    update(optimizer)
    with pytest.raises(ValueError, match=r"^updates is the same.*'data'.*jax.lax.pcas"):
        update(optimizer, own=False)


def test_a_train_step_does_not_take_a_sum_for_a_mean():
    optimizer = ov.sam(SGD, 0.1)

    def moved(**kwargs):
        step = ov.make_train_step(loss_fn, optimizer, **kwargs)
        state = ov.init_train_state(PARAMS, optimizer)
        return trace(lambda state, batch: step(state, batch)[0].params, state, BATCH)

    moved(gradient=ov.train.synchronized("data"))
    with pytest.raises(ValueError, match=r"^loss_fn differs.*sum.*synchronized\('data"):
        moved()


def test_a_gate_that_devices_would_answer_differently_is_refused():
    def by_loss(state, *, value, **extra_args):
        return value > 1.0, state

    def optimizer(gate):
        averaged = ov.train.average_over(SGD, "data")
        return ov.sharpness_aware(averaged, ov.sam_perturb(0.1), gate=gate)

    update(optimizer(ov.gate.adaptive()))
    with pytest.raises(ValueError, match="gate decides for each device of axis 'data'"):
        update(optimizer(ov.gate.Gate(lambda: (), by_loss)))


def test_devices_that_share_their_parameters_skip_together():
    """Each sees the loss of its own part, and the update is that of all."""
    update(ov.wrappers.skip_nonfinite(ov.sam(SGD, 0.1)), own=False)


def local_step(base, mesh):
    optimizer = ov.sharpness_aware(base, ov.sam_perturb(0.1), gate=ov.gate.every(2))
    state = ov.train.init_local_state(PARAMS, optimizer, 1 if mesh else 2, mesh=mesh)
    step = ov.train.make_local_train_step(loss_fn, optimizer, mesh=mesh)
    return step(state, BATCH)


@pytest.mark.parametrize("on_mesh", [True, False], ids=["mesh", "groups"])
@pytest.mark.parametrize(
    "before", [optax.trace(0.9), ov.descent.looksam_descent(0.3)], ids=["trace", "look"]
)
def test_an_average_of_one_device_is_not_shared(before, on_mesh):
    mesh = one_device() if on_mesh else None
    averaged = ov.train.average_over(SGD, "data")
    with pytest.raises(ValueError, match="would differ between.*inside average_over"):
        local_step(optax.chain(before, averaged), mesh)
    local_step(ov.train.average_over(optax.chain(before, SGD), "data"), mesh)


def test_a_model_state_that_cannot_be_averaged_is_not_shared():
    def counting(params, batch, model_state):
        large = jnp.sum(batch > 1, dtype=jnp.int32)
        return loss_fn(params, batch), model_state + large

    mesh = one_device()
    optimizer = ov.sam(ov.train.average_over(SGD, "data"), 0.1)
    state = ov.train.init_local_state(
        PARAMS, optimizer, 1, mesh=mesh, model_state=jnp.zeros((), jnp.int32)
    )
    step = ov.train.make_local_train_step(counting, optimizer, mesh=mesh)
    with pytest.raises(ValueError, match=r"^state\.model_state would differ between"):
        step(state, BATCH)
