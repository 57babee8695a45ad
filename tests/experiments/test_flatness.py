"""What flatness measures is what it says, and its SAM is SAM."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bouncing, flatness, tasks
from experiments.harness import solutions, training
from experiments.harness.methods import METHODS
from experiments.harness.networks import mlp


@pytest.fixture(scope="module")
def wine():
    return tasks.load("wine-50")._replace(epochs=6, network=mlp(13, 8, 3))


@pytest.fixture(scope="module")
def params(wine):
    return wine.network.init(np.random.default_rng(0))


def test_vasso_with_theta_one_is_sam(wine):
    """To rounding: the average of one gradient adds zero times the last."""
    method, chosen = flatness.watched("sam")
    watched = training.train(wine, method, [chosen], [0], epochs=6, test=True)
    sam = training.train(
        wine, METHODS["sam"], [flatness.PICKED["sam"]], [0], epochs=6, test=True
    )
    for one, other in zip(
        jax.tree.leaves(watched.params), jax.tree.leaves(sam.params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_states_are_shown_after_every_evaluation(wine):
    seen = []
    trained = training.train(
        wine,
        METHODS["sgd"],
        [flatness.PICKED["sgd"]] * 3,
        range(3),
        epochs=6,
        test=True,
        watch=lambda epoch, state: seen.append((epoch, state.params)),
    )
    assert [epoch for epoch, _ in seen] == [3, 6]
    for shown, final in zip(
        jax.tree.leaves(seen[-1][1]), jax.tree.leaves(trained.params), strict=True
    ):
        np.testing.assert_array_equal(shown, final)
        assert len(shown) == 3


def test_the_losses_are_those_of_the_given_labels(wine, params):
    measured = solutions.measure(wine, params, seed=0)
    (inputs, labels), (test_inputs, test_labels) = solutions.data_of(wine, 0)
    assert len(inputs) == wine.training
    assert len(test_inputs) == len(wine.test)
    given = tasks.split(wine, 0).given_labels
    np.testing.assert_array_equal(test_labels, given[wine.test])

    @jax.jit
    def loss(inputs, labels):
        logits = wine.network.logits(params, inputs)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
        return -chosen.mean()

    train_loss = float(loss(inputs, labels))
    assert measured["train_loss"] == pytest.approx(train_loss, rel=1e-5)
    gap = float(loss(test_inputs, test_labels)) - train_loss
    assert measured["loss_gap"] == pytest.approx(gap, abs=1e-5)
    assert measured["lambda_max"] > 0
    assert measured["keskar"] > 0


def test_the_adversary_of_all_examples_is_aligned_and_without_error(wine, params):
    training_set, _ = solutions.data_of(wine, 0)
    slope = jax.jit(jax.grad(solutions.loss_of(wine.network)))
    gradient = slope(params, training_set)
    found = solutions.adversary(wine, params, gradient, gradient, 0)
    assert found["cosine_to_full_gradient"] == pytest.approx(1, abs=1e-5)
    assert found["squared_error"] == pytest.approx(0, abs=1e-6)
    downhill = jax.tree.map(lambda leaf: -0.01 * leaf, gradient)
    found = solutions.adversary(wine, params, downhill, None, 0)
    assert found["lowered"] > 0.5
    assert found["cosine_to_full_gradient"] == pytest.approx(-1, abs=1e-5)
    assert "squared_error" not in found


def test_the_loss_rises_by_nothing_at_the_centre_of_the_plane(wine, params):
    found = solutions.landscape(wine, params, 0)
    plane = np.array(found["plane"])
    centre = solutions.PLANE // 2
    assert plane.shape == (solutions.PLANE, solutions.PLANE)
    assert plane[centre, centre] == 0
    assert np.ptp(plane) > 0
    assert len(found["spectrum"][0]) == len(found["spectrum"][1])


def test_tables_and_figure_are_made_of_the_file(tmp_path):
    results = Path(__file__).parents[2] / "results"
    content = json.loads((results / "flatness.json").read_text())
    for measures in (flatness.MEASURES, flatness.ADVERSARY):
        header, lines = flatness.cells(content["methods"], measures)
        assert len(lines) == len(measures)
        assert {len(line) for line in lines} == {len(header)}
    for name, draw in flatness.FIGURES.items():
        draw(tmp_path / f"flatness{name}.png", content)
        assert (tmp_path / f"flatness{name}.png").stat().st_size > 50_000


def test_sam_bounces_with_its_closed_form_and_the_file_says_so(tmp_path):
    assert bouncing.main(["--runs", str(tmp_path)]) == 0
    found = [bouncing.bounce(*setting) for setting in bouncing.SETTINGS[:1]]
    for row in found:
        # Float64, after thousands of steps.
        assert row["relative_error"] < 1e-12
        assert row["alternates"]
        assert row["across"] < 1e-12
    assert (tmp_path / "bouncing.png").stat().st_size > 5000
