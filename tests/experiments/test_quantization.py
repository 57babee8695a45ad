"""Annealing for few bits: equal starts and gradients; one text chooses, one tests."""

import json

import cases
import jax
import numpy as np
import pytest

from experiments import quantization
from experiments.harness import annealing
from experiments.harness.language_methods import METHODS
from experiments.harness.progress import Progress
from experiments.harness.transformer import Transformer
from experiments.tasks.corpus import VOCABULARY, evenly_spaced_windows, read

SMALLEST = Transformer(8, 1, VOCABULARY, annealing.CONTEXT)
SETTING = quantization.DEFAULTS | {"learning_rate": 0.01}
STEPS = annealing.STEPS_PER_CALL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of the smoke test."""
    folder = tmp_path_factory.mktemp("runs")
    assert quantization.main(["--smoke", "--runs", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def text():
    return read().text["training"].astype(np.int32)


@pytest.fixture(scope="module")
def starts(text):
    return annealing.pretrain(
        SMALLEST, text, SETTING, [0, 1], steps=STEPS, progress=Progress("", 0)
    )


def annealed(text, starts, method, setting, *, gradients=2 * STEPS, seeds=(0, 1)):
    progress = Progress("", 0)
    windows = {"training": evenly_spaced_windows(text, 64, annealing.CONTEXT + 1)}
    losses = annealing.anneal(
        *(SMALLEST, METHODS[method], text, windows, SETTING | setting, starts, seeds),
        bits=(8, 3),
        gradients=gradients,
        progress=progress,
    )
    assert progress.done == len(seeds) * gradients
    return losses["training"]


def test_training_learns_and_fewer_bits_lose_more(text, starts):
    clean, eight, three, _, three_per_tensor = annealed(text, starts, "adamw", {}).T
    assert (clean < np.log(VOCABULARY)).all()
    # At initialization's scale eight bits change a loss of 3 by less than 1e-2.
    np.testing.assert_allclose(eight, clean, atol=1e-2)
    assert three.mean() > clean.mean()
    assert three_per_tensor.mean() > clean.mean()


@pytest.mark.parametrize(
    "method", cases.every(["momentum_sam", "lagged_vasso", "sam", "random"], ["sam"])
)
def test_a_method_without_a_radius_is_adamw(text, starts, method):
    """With a method of two gradients it is AdamW on the first half of the batches."""
    gradients = METHODS[method].gradients
    found = annealed(text, starts, method, {"rho": 0.0}, gradients=gradients * STEPS)
    expected = annealed(text, starts, "adamw", {}, gradients=STEPS)
    # Programs that differ round differently, which training makes larger.
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_every_method_goes_on_from_the_same_weights_and_moments(text, starts):
    """At the learning rate 0 nothing moves, and an average of equals is the same."""
    still = {"learning_rate": 0.0}
    expected = annealed(text, starts, "adamw", still, gradients=STEPS)
    for method, own in (("nadamw", {}), ("momentum_sam", {"rho": 0.5})):
        found = annealed(text, starts, method, still | own, gradients=STEPS)
        # x_t is y_t less the perturbation, in float32.
        np.testing.assert_allclose(found, expected, atol=1e-5)
    found = annealed(text, starts, "adamw", still | {"newest": 0.1}, gradients=STEPS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_seed_trains_alike_whatever_trains_beside_it(text, starts):
    alone = annealed(text, [leaf[1:2] for leaf in starts], "adamw", {}, seeds=(1,))
    together = annealed(text, starts, "adamw", {})
    np.testing.assert_allclose(alone[0], together[1], rtol=1e-6)


def test_steps_that_the_program_cannot_make_are_refused(text, starts):
    with pytest.raises(ValueError, match="75 steps are no multiple of 50"):
        annealed(text, starts, "sam", {}, gradients=3 * STEPS)


@pytest.mark.exhaustive  # .ci/run makes the same smoke run
def test_all_settings_are_compared_and_one_of_each_method_is_chosen(folder):
    found = json.loads((folder / "smoke/quantization.json").read_text())
    assert found["finished"]
    for name, settings in found["families"].items():
        assert len(settings) == len(quantization.FAMILIES[name].settings)
        assert sum(one["chosen"] for one in settings) == 1
        for one in settings:
            for split in quantization.SPLITS:
                rows = one[split]
                assert list(rows) == list(quantization.FORMATS)
                assert {len(row["values"]) for row in rows.values()} == {2}
    header, lines = quantization.cells(found)
    assert {len(line) for line in lines} == {len(header)}
    assert (folder / "smoke/quantization.png").stat().st_size > 5000


@pytest.mark.exhaustive
def test_what_is_finished_is_not_done_again(folder, monkeypatch):
    def train(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(annealing, "pretrain", train)
    monkeypatch.setattr(annealing, "anneal", train)
    assert quantization.main(["--smoke", "--runs", str(folder)]) == 0


def test_the_validation_text_chooses():
    formats = len(quantization.FORMATS)

    def losses(validation, test):
        values = {"validation": validation, "test": test}
        return {name: np.full((2, formats), v).tolist() for name, v in values.items()}

    found = quantization.summaries(
        {
            "adamw": [{"setting": {}, "losses": losses(2.0, 2.0)}],
            "decay": [
                {"setting": {"weight_decay": 0.3}, "losses": losses(1.0, 4.0)},
                {"setting": {"weight_decay": 1.0}, "losses": losses(3.0, 1.0)},
            ],
        }
    )
    assert [one["chosen"] for one in found["decay"]] == [True, False]
    assert found["decay"][1]["test"]["clean"]["difference"]["mean"] == -1.0
    assert found["decay"][1]["label"] == "AdamW, weight decay 1"
    assert "difference" not in found["adamw"][0]["test"]["clean"]


def test_the_learning_rate_has_the_lowest_mean_loss():
    assert quantization.best_rate({"0.01": [1.0, 3.0], "0.02": [1.5, 1.5]}) == 0.02


def test_noise_has_the_length_of_the_radius_and_is_new_in_each_step():
    from experiments.harness.language_methods import random_perturb

    ascent = random_perturb(0.5, 7)
    grads = {"a": np.ones(3, np.float32), "b": np.zeros(2, np.float32)}
    first, state = ascent.update(grads, ascent.init(grads))
    second, _ = ascent.update(grads, state)
    for noise in (first, second):
        norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(noise)))
        assert norm == pytest.approx(0.5, rel=1e-6)
    assert not np.allclose(first["a"], second["a"])
