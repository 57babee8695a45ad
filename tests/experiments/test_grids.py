"""Grids hold what they say, are scored on held-out examples, and save what is done."""

import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_vasso as ov
from experiments import (
    best_radius,
    lagged_feeding,
    radius,
    radius_warmup,
    tasks,
)
from experiments.harness import command_line, grids, statistics
from experiments.harness.methods import METHODS
from experiments.harness.training import Trained

WINE = tasks.load("wine-50")


def trained(task, method, points, seeds, **options):
    """Accuracies that say of which ρ, θ and seed they are; nothing is trained."""
    found = [
        100 * point["rho"] + point["theta"] + (seed - grids.FIRST_SEED) / 100
        for point, seed in zip(points, seeds, strict=True)
    ]
    assert not options.get("test")
    return Trained(
        epochs=np.array([1]),
        noisy_validation=np.array(found)[:, None] - 1,
        clean_validation=np.array(found)[:, None],
        test=None,
        gradients=np.ones(len(seeds)),
        params=None,
    )


def points_of(radii, thetas=(0.5, 1.0)):
    return [{"rho": rho, "theta": theta} for theta in thetas for rho in radii]


def test_every_point_is_measured_with_every_seed(monkeypatch):
    monkeypatch.setattr(grids, "train", trained)
    panel = grids.Panel(WINE, METHODS["vasso"], points_of((0.1, 0.3)))
    found = grids.measure(panel, seeds=3)
    assert [point["hyperparameters"] for point in found["points"]] == panel.points
    assert found["points"][1]["accuracy"]["values"] == [30.5, 30.51, 30.52]
    assert found["points"][1]["noisy"] == pytest.approx(29.51)
    assert grids.best(found["points"])["hyperparameters"] == {"rho": 0.3, "theta": 1.0}


def test_the_seeds_of_a_grid_are_none_of_the_search_or_the_test():
    from experiments.harness.units import FIRST_SEARCH_SEED, Plan

    assert FIRST_SEARCH_SEED + Plan().search.rungs[-1][1] <= grids.FIRST_SEED
    assert Plan().seeds <= grids.FIRST_SEED


def test_what_is_interrupted_keeps_the_panels_that_were_finished(
    tmp_path, monkeypatch, capsys
):
    calls = []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise command_line.Interrupted(2)
        return trained(*args, **options)

    monkeypatch.setattr(grids, "train", interrupted)
    with pytest.raises(command_line.Interrupted):
        radius.main(["--task", "wine-50", "--runs", str(tmp_path)])
    found = json.loads((tmp_path / "radius_wine-50.partial.json").read_text())
    assert list(found["panels"]) == ["weight decay 0.0005"]
    assert not found["finished"]
    assert (tmp_path / "radius_wine-50.partial.png").stat().st_size > 5000
    assert "Saved 1 of 2 panels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("collapsed", "said"),
    [
        ([0, 0, 0], "≥ 0.5"),
        ([0, 0, 1], "0.2"),
        ([0, 2, 0], "0.1"),  # stable again beyond a collapse does not count
        ([1, 0, 0], "< 0.1"),
    ],
)
def test_the_robust_radius_is_the_largest_up_to_which_nothing_collapsed(
    collapsed, said
):
    points = [
        {"hyperparameters": {"rho": rho}, "accuracy": {"collapsed": count}}
        for rho, count in zip((0.1, 0.2, 0.5), collapsed, strict=True)
    ]
    assert radius.robust_radius(points) == said


def test_the_table_of_a_heat_map_has_its_collapsed_seeds_in_brackets():
    panel = {
        "points": [
            {
                "hyperparameters": {"rho": rho, "theta": theta},
                "accuracy": statistics.summary(values, 20),
            }
            for rho, theta, values in (
                (0.1, 0.4, [80, 82]),
                (0.5, 0.4, [85, 15]),
                (0.1, 1.0, [70, 70]),
                (0.5, 1.0, [72, 74]),
            )
        ]
    }
    gains = radius.gains({"panels": {"weight decay 0": panel}})[1]
    assert gains[0][1:4] == [
        "81.0 ± 1.0 (ρ = 0.1, θ = 0.4)",
        "73.0 ± 1.0 (ρ = 0.5, θ = 1)",
        "+8.0 ± 0.0",
    ]
    header, rows = radius.cells(panel)
    assert header == ["ρ", "0.1", "0.5", "robust radius"]
    assert rows == [
        ["θ = 0.4", "81.0", "50.0 (1)", "0.1"],
        ["θ = 1 (SAM)", "70.0", "73.0", "≥ 0.5"],
    ]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rho", "0.1,-1", "must be a finite number > 0, got '-1'"),
        ("--theta", "0.5,1.5", "must be numbers in (0, 1] with commas between"),
        ("--task", "mnist", "invalid choice: 'mnist'"),
        ("--seeds", "0", "must be an integer >= 1"),
    ],
)
def test_a_bad_option_is_one_line(option, value, message, capsys):
    with pytest.raises(SystemExit) as exit_of:
        radius.main([option, value])
    assert exit_of.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_one_dial_is_turned_at_a_time(tmp_path, monkeypatch):
    """The reference is a value of every dial, and is trained once."""
    seen = []

    def counted(task, method, points, seeds, **options):
        seen.append((task, points[0]))
        return trained(task, method, points, seeds)

    monkeypatch.setattr(grids, "train", counted)
    assert best_radius.main(["--seeds", "2", "--runs", str(tmp_path)]) == 0
    assert len(seen) == 1 + sum(
        len(values) - 1 for values in best_radius.DIALS.values()
    )
    (reference, fixed), *others = seen
    for task, point in others:
        changed = [
            task.name != reference.name,
            task.network is not reference.network,
            point["weight_decay"] != fixed["weight_decay"],
            point["theta"] != fixed["theta"],
        ]
        assert sum(changed) == 1
    content = json.loads((tmp_path / "best_radius.json").read_text())
    for of_values in best_radius.curves(content).values():
        assert len(of_values) == 4
        for points in of_values.values():
            radii = [point["hyperparameters"]["rho"] for point in points]
            assert radii == list(best_radius.RADII)


def test_the_radius_grows_for_as_many_steps_as_asked():
    chosen = {"rho": 2.0, "theta": 1.0, "growing": 4.0}
    optimizer = radius_warmup.warmed_vasso().make(optax.sgd(0.0), chosen, 0)
    params, lengths = jnp.zeros(3), []

    def grad_fn(point):
        lengths.append(float(jnp.linalg.norm(point - params)))
        return jnp.ones(3)

    state = optimizer.init(params)
    for _ in range(6):
        _, state = optimizer.update(jnp.ones(3), state, params, grad_fn=grad_fn)
    assert lengths == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


@pytest.mark.parametrize(
    ("period", "lengths"), [(2.0, [2, 0, 2, 0, 2]), (1e6, [2, 2, 2, 2, 2])]
)
def test_lagged_vasso_rests_on_every_kth_step(period, lengths):
    chosen = {"rho": 2.0, "theta": 0.5, "period": period}
    optimizer = lagged_feeding.resting_lagged_vasso().make(optax.sgd(0.1), chosen, 0)
    params = jnp.zeros(3)
    state, found = optimizer.init(params), []
    for _ in lengths:
        updates, state = optimizer.update(jnp.ones(3), state, params)
        params = optax.apply_updates(params, updates)
        centre = ov.eval_params(state, params)
        found.append(float(jnp.linalg.norm(params - centre)))
    assert found == pytest.approx(lengths, abs=1e-5)


@pytest.mark.parametrize("experiment", [radius_warmup, lagged_feeding])
def test_a_table_and_a_figure_come_of_every_grid(
    experiment, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(grids, "train", trained)
    assert experiment.main(["--seeds", "2", "--runs", str(tmp_path)]) == 0
    name = experiment.__name__.rpartition(".")[2]
    assert (tmp_path / f"{name}.png").stat().st_size > 5000
    content = json.loads((tmp_path / f"{name}.json").read_text())
    header, rows = experiment.cells(content)
    assert all(len(row) == len(header) for row in rows)
    assert "true labels" in capsys.readouterr().out
