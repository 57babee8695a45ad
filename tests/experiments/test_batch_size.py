"""Batch sizes get the epochs or the updates they are to get, and one program all."""

import json
import subprocess
import sys
from pathlib import Path

import batch_size
import digits
import jax
import numpy as np
import optax
import pytest

import optax_vasso as ov

BATCH_SIZE = Path(batch_size.__file__)


@pytest.mark.parametrize("batch", batch_size.BATCH_SIZES)
def test_matched_updates_are_those_of_the_reference(batch):
    per_epoch = digits.TRAINING_IMAGES // batch
    assert batch_size.epochs_of("epochs", batch, 60) == 60
    assert batch_size.epochs_of("updates", batch, 60) * per_epoch == 1200


def test_the_learning_rate_grows_with_the_root_of_the_batch_size():
    reference = batch_size.learning_rate(batch_size.REFERENCE)
    assert reference == digits.LEARNING_RATE
    assert batch_size.learning_rate(4 * batch_size.REFERENCE) == 2 * reference


@pytest.mark.parametrize(
    ("row", "method"),
    [
        ({"rho": 0.0, "theta": 1.0}, lambda base: base),
        ({"rho": 0.3, "theta": 1.0}, lambda base: ov.sam(base, 0.3)),
    ],
)
def test_vasso_without_a_radius_is_sgd_and_without_smoothing_sam(row, method):
    base = optax.sgd(0.1)
    split = digits.test_split()
    params = digits.init_mlp(jax.random.key(0), (64, 8, 10))

    def grad_fn(params):
        return jax.grad(digits.cross_entropy)(
            params, split.images[:20], split.labels[:20]
        )

    def update(optimizer):
        optimizer = optax.with_extra_args_support(optimizer)
        return optimizer.update(
            grad_fn(params), optimizer.init(params), params, grad_fn=grad_fn
        )[0]

    expected = update(method(base))
    found = update(batch_size.make_optimizer(base, row, 0))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # The same operations, but for one addition of zero.
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def test_the_smoke_run_writes_a_figure_and_the_numbers(tmp_path):
    assert batch_size.main(["--smoke", "--results", str(tmp_path)]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["batch_size_0.json", "batch_size_0.png"]
    results = json.loads((tmp_path / names[0]).read_text())
    epochs, updates = results["epochs"], results["updates"]
    assert [column["updates"] for column in epochs] == [40, 8]
    assert [column["updates"] for column in updates] == [40, 40]
    assert epochs[0]["methods"] == updates[0]["methods"]
    sgd, sam, _ = epochs[1]["methods"].values()
    assert len(sgd["keskar"]) == results["seeds"] == 2
    assert sgd["train_loss"] != sam["train_loss"]


def test_a_batch_larger_than_the_training_set_is_refused_in_one_line(tmp_path):
    finished = subprocess.run(
        [sys.executable, BATCH_SIZE, "--batch-sizes", "50,1001"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert "must be integers from 1 to 1000" in finished.stderr
    assert finished.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
