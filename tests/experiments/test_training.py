"""Rows do not touch each other, budgets are in gradients, and a search sees no test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_vasso as ov
from experiments import tasks
from experiments.harness import networks, rows, tables, training, units
from experiments.harness.methods import METHODS, base, describe
from experiments.harness.progress import Progress

CHOSEN = {
    "learning_rate": 0.1,
    "weight_decay": 1e-3,
    "rho": 0.1,
    "theta": 0.5,
    "lmbda": 0.6,
    "alpha": 0.3,
}


@pytest.fixture(scope="module")
def wine():
    return tasks.load("wine-50")._replace(epochs=6)


@pytest.fixture(scope="module")
def vasso(wine):
    """Three trainings that differ in radius and seed."""
    points = [CHOSEN | {"rho": rho} for rho in (0.1, 0.2, 0.1)]
    progress = Progress("", 0)
    trained = training.train(
        wine,
        METHODS["vasso"],
        points,
        [0, 1, 2],
        epochs=6,
        test=True,
        progress=progress,
    )
    return trained, progress


def test_rows_that_are_added_for_the_devices_repeat_the_last():
    size = rows.rows_at_once()
    placed = np.asarray(rows.place(np.arange(3)))
    assert placed.tolist() == [0, 1, 2] + [2] * (size - 3)
    doubled = rows.over_rows(lambda factor, row: factor * row, shared=1)
    assert (
        np.asarray(doubled(2, rows.place(np.arange(3)))).tolist()
        == (2 * placed).tolist()
    )


def test_a_row_does_not_depend_on_the_rows_beside_it_and_compiles_nothing(wine, vasso):
    together, _ = vasso
    program = training._program(METHODS["vasso"], wine.network, tilted=False)
    before = program.run._cache_size()
    alone = training.train(
        wine, METHODS["vasso"], [CHOSEN | {"rho": 0.2}], [1], epochs=6, test=True
    )
    assert program.run._cache_size() == before
    assert alone.test.tolist() == together.test[1:2].tolist()


def test_gradients_are_counted_and_reported_as_progress(wine, vasso):
    trained, progress = vasso
    steps = 6 * wine.steps_per_epoch
    assert trained.gradients.tolist() == [2 * steps] * 3
    assert progress.done == 3 * 2 * steps
    assert trained.epochs.tolist() == [3, 6]
    assert trained.test.shape == trained.noisy_validation.shape == (3, 2)


def test_a_search_is_not_shown_the_test_set(wine, monkeypatch):
    evaluated = []
    place = training.place
    monkeypatch.setattr(
        training, "place", lambda row: (evaluated.append(row), place(row))[1]
    )
    found = training.train(wine, METHODS["sgd"], [CHOSEN], [0], epochs=3)
    assert found.test is None
    shown = np.concatenate([r["evaluated"].ravel() for r in evaluated if "seed" in r])
    assert not set(shown) & set(wine.test)


@pytest.mark.parametrize("name", METHODS)
def test_equal_gradients_are_equal_within_one_evaluation(name):
    task, method = tasks.load("digits-75"), METHODS[name]
    taken = training.gradients_of(task, method, "gradients")
    one_call = task.epochs_per_call * task.steps_per_epoch * method.gradients
    assert abs(taken - task.epochs * task.steps_per_epoch) <= one_call / 2
    assert training.budget_epochs(task, method, "epochs") == task.epochs


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_one_step_with_all_that_is_searched(name):
    method = METHODS[name]
    point = {n: CHOSEN[n] for n in method.space}
    assert describe(point).count("=") == len(point)
    # The harness adds the loss of guessing to what is searched.
    optimizer = method.make(base(point, 4), point | {"guessing": 100.0}, 0)
    step = ov.make_train_step(
        lambda p, batch: jnp.mean(batch) * jnp.sum(p["w"] ** 2) / 2,
        optimizer,
        **method.makers(),
    )
    state = ov.init_train_state({"w": jnp.array([3.0, 4.0])}, optimizer)
    taken = []
    for _ in range(2):
        state, metrics = step(state, jnp.ones(8))
        second = not method.makers() and metrics.get("ascended", False)
        taken.append(1 + int(second))
    assert jnp.all(jnp.isfinite(state.params["w"]))
    assert jnp.linalg.norm(state.params["w"]) < 5
    if method.gradients != 1.5:
        assert taken == [method.gradients] * 2


def test_a_convolution_is_that_of_jax():
    images = jax.random.normal(jax.random.key(0), (2, 16, 3))
    kernel = jax.random.normal(jax.random.key(1), (9, 3, 5))
    found = networks._convolved(images, kernel, 4).reshape(2, 4, 4, 5)
    wanted = jax.lax.conv_general_dilated(
        images.reshape(2, 4, 4, 3),
        kernel.reshape(3, 3, 3, 5),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "size"), [((9,), 5), ((8, 7), 3)])
def test_a_convolution_of_stride_2_is_that_of_jax(shape, size):
    images = jax.random.normal(jax.random.key(0), (2, *shape, 3))
    kernel = jax.random.normal(jax.random.key(1), (size ** len(shape) * 3, 5))
    wanted = jax.lax.conv_general_dilated(
        images,
        kernel.reshape(*[size] * len(shape), 3, 5),
        [2] * len(shape),
        [(1, 1)] * len(shape),
        dimension_numbers=("NHWC", "HWIO", "NHWC")
        if shape[1:]
        else ("NHC", "HIO", "NHC"),
    )
    found = networks._patches(images, size) @ kernel
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_without_batch_normalization_a_reference_changes_nothing():
    network = networks.strided_convnet((9,), ((5, 2), (3, 3)), 5, normalized=False)
    params = network.init(np.random.default_rng(0))
    inputs = jax.random.normal(jax.random.key(0), (6, 9))
    np.testing.assert_array_equal(
        network.logits(params, inputs), network.logits(params, inputs, 2 * inputs)
    )


@pytest.mark.parametrize(
    "network",
    [
        networks.small_convnet(4, (2, 3), 5),
        networks.strided_convnet((4, 4), ((3, 2), (3, 3)), 5, normalized=True),
    ],
)
def test_batch_normalization_is_evaluated_with_the_statistics_of_the_reference(network):
    params = network.init(np.random.default_rng(0))
    inputs = jax.random.normal(jax.random.key(0), (6, 16))
    logits = jax.jit(network.logits)
    with_itself = logits(params, inputs, inputs)
    np.testing.assert_allclose(logits(params, inputs), with_itself, rtol=1e-4)
    one = logits(params, inputs[:1], inputs)
    np.testing.assert_allclose(one, with_itself[:1], rtol=1e-4, atol=1e-5)


def test_noise_in_the_gradients_has_the_norm_that_is_asked_for():
    params = {"w": jnp.zeros((100, 50)), "b": jnp.zeros(50)}
    noise = training._noise(jax.random.key(0), params, 3.0)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(noise)))
    assert float(norm) == pytest.approx(3.0, rel=0.05)


def test_a_row_of_a_table_says_what_was_measured(wine, vasso):
    trained, _ = vasso
    row = tables.row(wine, METHODS["vasso"], CHOSEN, trained)
    assert row["last"]["values"] == pytest.approx(
        trained.test[:, -1].tolist(), abs=1e-4
    )
    assert row["gradients"] == trained.gradients[0]
    compared = tables.compare({"sgd": row, "vasso": row})
    header, lines = tables.cells(compared)
    assert header[-1] in ("− SGD", "− VaSSO")
    assert lines[1][-1] == "+0.0 ± 0.0"
    assert tables.markdown(header, lines).count("\n") == 3


def test_a_unit_searches_and_tests_on_other_seeds(wine, monkeypatch):
    seen = {True: set(), False: set()}
    train = training.train

    def spy(*arguments, test=False, **options):
        seen[test] |= set(arguments[3])
        return train(*arguments, test=test, **options)

    monkeypatch.setattr(training, "train", spy)
    method = METHODS["vasso"]
    progress = Progress("", units.work_of(wine, method, units.SMOKE))
    found = units.run(wine, method, units.SMOKE, progress)
    assert seen[True] == {0, 1}
    assert not seen[True] & seen[False]
    assert progress.done == pytest.approx(progress.total)
    assert found["gradients"]["epochs"] == 3
    assert found["epochs"]["epochs"] == 6
    assert found["search"]["picked"] == found["gradients"]["hyperparameters"]


def test_units_that_are_saved_are_not_run_again(wine, tmp_path, monkeypatch, capsys):
    ran = []

    def run(task, method, plan, progress):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append((task.name, method.label))
        return {"gradients": {"last": {"values": [1.0] * plan.seeds}}}

    monkeypatch.setattr(units, "run", run)
    wanted = {
        ("a", "sgd"): (wine, METHODS["sgd"]),
        ("a", "sam"): (wine, METHODS["sam"]),
        ("b", "sgd"): (wine, METHODS["sgd"]),
    }
    with pytest.raises(KeyboardInterrupt):
        units.run_missing("all", tmp_path, wanted, units.SMOKE)
    assert "2 of 3 units are saved" in capsys.readouterr().err
    ran.clear()
    found = units.run_missing("all", tmp_path, wanted, units.SMOKE)
    assert len(ran) == 1
    assert found.keys() == wanted.keys()
    # What has fewer seeds than are asked for is run again.
    ran.clear()
    more = units.SMOKE._replace(seeds=3)
    units.run_missing("all", tmp_path, dict([*wanted.items()][:1]), more)
    assert len(ran) == 1
