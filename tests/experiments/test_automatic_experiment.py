"""The automatic methods: beside the searched ones, their guard, their candidates."""

import json

import pytest

from experiments import automatic, automatic_candidates as candidates
from experiments.harness import training

# .ci/run makes the same runs, to see that they end; here their files are read.
ALREADY_RUN = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of both smoke tests."""
    folder = tmp_path_factory.mktemp("runs")
    for experiment in (automatic, candidates):
        assert experiment.main(["--smoke", "--runs", str(folder)]) == 0
    return folder


@ALREADY_RUN
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


@ALREADY_RUN
def test_the_guard_is_measured_without_and_with(folder):
    guard = json.loads((folder / "smoke/automatic.json").read_text())["guard"]
    assert list(guard) == list(automatic.EDGES)
    for found in guard.values():
        assert found["seeds"] == 2
        assert all(0 <= lost <= 2 for lost in found["collapsed"])
        assert all(0 < mean < 100 for mean in found["means"])


@ALREADY_RUN
def test_candidates_are_compared_with_the_searched_methods(folder):
    found = json.loads((folder / "smoke/automatic_candidates.json").read_text())
    assert found["finished"]
    for name, method in found["methods"].items():
        scores = method["wine-50"]
        searched = automatic.SEARCHED[name]
        assert list(scores) == [
            "sgd",
            "sam",
            searched,
            *list(candidates.CANDIDATES)[:3],
        ]
        gained = candidates.gains(name, method)["wine-50"]
        assert gained[searched] == 0
        assert gained["ρ = 0.3"] == (
            scores["ρ = 0.3"]["mean"] - scores[searched]["mean"]
        )
    assert (folder / "smoke/automatic_candidates.png").stat().st_size > 5000


@ALREADY_RUN
@pytest.mark.parametrize("experiment", [automatic, candidates])
def test_what_is_finished_is_not_done_again(experiment, folder, monkeypatch):
    def train(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "train", train)
    assert experiment.main(["--smoke", "--runs", str(folder)]) == 0


def test_a_task_is_left_out_of_the_choice_of_its_defaults():
    best, other, *rest = candidates.CANDIDATES

    def scores(**mean):
        means = dict.fromkeys(rest, 50.0) | mean | {"vasso": 70.0}
        return {name: {"mean": value} for name, value in means.items()}

    found = {
        "a": scores(**{best: 90.0, other: 60.0}),
        "b": scores(**{best: 60.0, other: 80.0}),
        "c": scores(**{best: 60.0, other: 70.0}),
    }
    chosen = {"a": other, "b": best, "c": best}
    assert candidates.left_out("auto_vasso", found) == chosen


def test_every_length_of_a_candidate_is_what_it_says():
    import jax.numpy as jnp
    import numpy as np

    from experiments.harness import ascents

    lengths = {
        "c": 0.1,
        "c/cos(d, g)": 0.1,
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
