"""A grid of trainings is the trainings of the grid, whatever it is split into."""

import json
import subprocess
import sys
from pathlib import Path

import digits
import jax
import numpy as np
import pytest
import sweep
from rows import over_rows, split_rows

SWEEP = Path(sweep.__file__)


@pytest.mark.parametrize(
    ("collapsed", "radius"),
    [
        ([False, False, False], 0.5),
        ([False, False, True], 0.2),
        ([False, True, False], 0.1),  # stable again beyond a collapse does not count
        ([True, False, False], None),
    ],
)
def test_the_robust_radius_is_the_largest_up_to_which_nothing_collapsed(
    collapsed, radius
):
    assert sweep.robust_radius([0.1, 0.2, 0.5], np.array(collapsed)) == radius


def test_the_grid_holds_each_point_with_each_seed_once():
    rows = sweep.grid([0.1, 0.2], [0.4, 1.0], 3)
    points = set(zip(*(rows[name].tolist() for name in rows), strict=True))
    assert len(points) == len(rows["seed"]) == 12
    assert rows["theta"].reshape(2, 2, 3)[1].tolist() == [[1.0] * 3] * 2
    assert rows["rho"].reshape(2, 2, 3)[:, 1].tolist() == [[0.2] * 3] * 2


def test_a_sweep_is_summarized_by_what_collapsed():
    accuracy = np.array([[[80.0, 82.0], [85.0, 15.0]], [[70.0, 70.0], [72.0, 74.0]]])
    results = {"radii": [0.1, 0.5], "thetas": [0.4, 1.0], "accuracy": accuracy.tolist()}
    first, second = sweep.summarize(results)
    assert (first["robust_radius"], first["largest_radius_is_stable"]) == (0.1, False)
    assert (first["best_radius"], first["best_accuracy"]) == (0.1, 81.0)
    assert first["collapsed"] == [0, 1]
    assert (second["robust_radius"], second["largest_radius_is_stable"]) == (0.5, True)


@pytest.mark.parametrize("count", [1, 3, 8, 9])
def test_rows_that_are_added_for_the_devices_repeat_the_last(count):
    rows = np.arange(count)
    split = np.asarray(split_rows(rows))
    assert (split[:count] == rows).all()
    assert (split[count:] == count - 1).all()
    doubled = over_rows(lambda row: 2 * row)(split_rows(rows))[:count]
    assert (np.asarray(doubled) == 2 * rows).all()


def test_a_row_does_not_depend_on_the_rows_beside_it():
    """Up to the rounding of matrix products of another shape."""
    split = jax.tree.map(lambda leaf: leaf[:200], digits.test_split())
    train = digits.trainer(sweep.make_optimizer, 0.5, epochs=1)
    rows = {"rho": np.array([0.1, 0.3, 0.2]), "theta": np.array([1.0, 0.4, 0.2])}
    together = train(rows, np.array([0, 1, 2]), split)
    alone = train({k: v[1:2] for k, v in rows.items()}, np.array([1]), split)
    for of_all, of_one in zip(
        jax.tree.leaves(together.params), jax.tree.leaves(alone.params), strict=True
    ):
        np.testing.assert_allclose(of_all[1], of_one[0], atol=1e-5)
    assert together.gradients.tolist() == [2, 2, 2]


def test_memory_that_is_short_allows_fewer_rows(monkeypatch):
    row = 12 * sum(
        leaf.nbytes for leaf in jax.tree.leaves(digits.init_mlp(jax.random.key(0)))
    )
    for free, rows in ((20 * row, 10), (row, 1), (0, 1)):
        monkeypatch.setattr(
            sweep.os, "sysconf", lambda name, free=free: free if "AV" in name else 1
        )
        assert sweep.rows_that_fit() == rows


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory):
    """A sweep of four trainings in parts of three, in a process of two devices."""
    folder = tmp_path_factory.mktemp("sweep")
    arguments = ["--smoke", "--rho", "0.5,0.1", "--theta", "1", "--rows-at-once", "3"]
    finished = subprocess.run(
        [sys.executable, SWEEP, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return folder / "results", finished.stdout


def test_a_sweep_in_parts_fills_the_whole_grid(in_parts):
    folder, printed = in_parts
    results = json.loads((folder / "sweep.json").read_text())
    assert np.shape(results["accuracy"]) == (1, 2, 2)
    assert len(results["seconds"]) == 2
    assert results["radii"] == [0.1, 0.5]
    assert (folder / "sweep.png").stat().st_size > 5000
    assert "robust radius" in printed


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rho", "0.1,-1", "must be numbers > 0 with commas between, got '-1'"),
        ("--theta", "0.5,1.5", "must be numbers in (0, 1] with commas between"),
        ("--name", "a/b", "'a/b' is not the name of a file"),
        ("--rows-at-once", "0", "must be an integer >= 1"),
    ],
)
def test_a_bad_option_is_one_line(option, value, message, capsys):
    with pytest.raises(SystemExit) as exit_of:
        sweep.main([option, value])
    assert exit_of.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_is_interrupted_keeps_the_parts_that_were_finished(tmp_path, monkeypatch):
    calls = []

    def trainer(*args, **kwargs):
        def train(hyperparameters, seeds, splits, *, on_epoch):
            calls.append(len(seeds))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return digits.Runs(np.full((len(seeds), 1), 50.0), None, None, None)

        return train

    monkeypatch.setattr(digits, "trainer", trainer)
    arguments = ["--rho", "0.1", "--theta", "0.4,1", "--seeds", "2"]
    arguments += ["--rows-at-once", "2", "--results", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        sweep.main(arguments)
    results = json.loads((tmp_path / "sweep.json").read_text())
    assert results["interrupted"]
    assert results["accuracy"] == [[[50.0, 50.0]], [[None, None]]]
    assert [row["theta"] for row in results["by_theta"]] == [0.4]
