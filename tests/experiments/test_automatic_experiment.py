"""The automatic methods: beside the searched ones, their guard, their candidates."""

import json

import pytest

from experiments import automatic, automatic_candidates as candidates
from experiments.harness import training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of both smoke tests."""
    folder = tmp_path_factory.mktemp("runs")
    for experiment in (automatic, candidates):
        assert experiment.main(["--smoke", "--runs", str(folder)]) == 0
    return folder


def test_automatic_methods_are_compared_with_the_published_searches(folder):
    found = json.loads((folder / "smoke/automatic.json").read_text())
    assert found["finished"]
    published = automatic.evidence.PUBLISHED / "evidence.json"
    tasks = json.loads(published.read_text())["tasks"]
    for name, searched in automatic.SEARCHED.items():
        row = found["methods"][name]["wine-50"]
        last = tasks["wine-50"]["gradients"][searched]["last"]
        assert row["searched"]["mean"] == last["mean"]
        # Two seeds are compared with the same two.
        expected = row["automatic"]["mean"] - sum(last["values"][:2]) / 2
        assert row["difference"]["mean"] == pytest.approx(expected, abs=0.01)
    assert (folder / "smoke/automatic.png").stat().st_size > 5000


def test_the_guard_is_measured_without_and_with(folder):
    guard = json.loads((folder / "smoke/automatic.json").read_text())["guard"]
    assert list(guard) == list(automatic.EDGES)
    for found in guard.values():
        assert found["seeds"] == 2
        assert all(0 <= lost <= 2 for lost in found["collapsed"])
        assert all(0 < mean < 100 for mean in found["means"])


def test_candidates_are_all_compared(folder):
    found = json.loads((folder / "smoke/automatic_candidates.json").read_text())
    assert found["finished"]
    for method in found["methods"].values():
        tried = method["tried"]["wine-50"]["candidates"]
        assert list(tried) == list(candidates.CANDIDATES)
        assert all(0 <= row["accuracy"] <= 100 for row in tried.values())
    assert (folder / "smoke/automatic_candidates.png").stat().st_size > 5000


@pytest.mark.parametrize("experiment", [automatic, candidates])
def test_what_is_finished_is_not_done_again(experiment, folder, monkeypatch):
    def train(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "train", train)
    assert experiment.main(["--smoke", "--runs", str(folder)]) == 0


def test_a_task_and_the_digits_are_left_out_of_the_choice_of_the_defaults():
    best, other, third, *rest = candidates.CANDIDATES

    def part(**accuracy):
        names = dict.fromkeys((third, *rest), 50.0) | accuracy
        return {"candidates": {k: {"accuracy": a} for k, a in names.items()}}

    tried = {
        "a": part(**{best: 90.0, other: 60.0}),
        "b": part(**{best: 60.0, other: 80.0}),
        "c": part(**{best: 60.0, other: 70.0}),
        "digits-75": part(**{best: 10.0, other: 10.0, third: 99.0}),
    }
    chosen = {"a": other, "b": best, "c": best, "digits-75": best}
    assert candidates.left_out(tried) == chosen


def test_every_length_of_a_candidate_is_what_it_says():
    import jax.numpy as jnp
    import numpy as np

    from experiments.harness import ascents

    lengths = {
        "c": 0.1,
        "c/cos(d, g)": 0.1,
        "c √n": 0.1,
        "c σ/‖g‖": 0.0,
        "c η‖m‖": 0.1 * 0.3 * 5.0,
        "c η/η₀": 0.1,
        "c t/T": 0.0,
        "c ‖x‖ per leaf": 0.1 * 2.0,
    }
    assert tuple(lengths) == ascents.RADII
    params, grads = jnp.array([0.0, 2.0]), jnp.array([3.0, 4.0])
    for radius, expected in lengths.items():
        settings = ascents.as_numbers(candidates.candidate(radius, 0.1))
        settings |= {"learning_rate": 0.3, "steps": 10.0}
        settings = {name: jnp.asarray(value) for name, value in settings.items()}
        ascent = ascents.traced_ascent(settings)
        perturbation, _ = ascent.update(grads, ascent.init(params), params)
        np.testing.assert_allclose(
            jnp.linalg.norm(perturbation), expected, rtol=1e-5, err_msg=radius
        )
