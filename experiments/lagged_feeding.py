"""What the average of lagged VaSSO should be fed with.

It is fed with the gradient at the perturbed point. The alternative needs no second
gradient either: leave out every k-th perturbation (ρ = 0 on that step), so that the
next gradient is a clean one. Each at the best of a grid of radii and θ; accuracy is
that on held-out validation examples with their true labels, never on the test set.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from experiments import harness
from experiments.harness import command_line

TASKS = {"75 % random labels": "digits-75", "50 % random labels": "digits-50"}
SETTING = {"learning_rate": 0.05, "weight_decay": 0.005}
RADII = (0.09, 0.16, 0.28, 0.5, 0.9)
THETAS = (0.2, 0.5)
# Steps from one clean gradient to the next; "never" is longer than any training.
PERIODS = {"never": 1e6, "every 5th step": 5.0, "every 2nd step": 2.0}


def main(arguments: list[str] | None = None) -> int:
    """Train, print, write."""
    parser = command_line.experiment_parser("lagged_feeding", __doc__, seeds=6)
    options = command_line.parse(parser, arguments)
    harness.rows.use_all_cores()
    from experiments import tasks

    panels = {}
    for title, name in TASKS.items():
        task = tasks.load(name)
        if options.smoke:
            task = task._replace(epochs=task.epochs_per_call)
        points = [
            SETTING | {"rho": rho, "theta": theta, "period": period}
            for period in PERIODS.values()
            for theta in THETAS[-1 if options.smoke else 0 :]
            for rho in RADII[-2 if options.smoke else 0 :]
        ]
        panels[title] = harness.grids.Panel(task, resting_lagged_vasso(), points)
    return harness.grids.run(
        parser, options, "lagged_feeding", panels, show=show, draw=draw
    )


@functools.cache
def resting_lagged_vasso() -> Any:
    """Lagged VaSSO whose perturbation is left out on every ``period``-th step."""
    import jax.numpy as jnp
    import optax

    import optax_vasso as ov

    def make(base: Any, chosen: dict[str, Any], seed: Any) -> Any:
        def radius(step: Any) -> Any:
            rests = step % chosen["period"] == chosen["period"] - 1
            return jnp.where(rests, 0.0, chosen["rho"])

        # The average is kept apart: it must outlive a step without a perturbation.
        ascent = optax.chain(ov.vasso_ema(chosen["theta"]), ov.sam_perturb(radius))
        return ov.lagged(base, ascent)

    lagged = harness.methods.METHODS["lagged_vasso"]
    period = harness.methods.Range(2, 1e6)
    return dataclasses.replace(lagged, own=lagged.own | {"period": period}, make=make)


def cells(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: the best of the grid."""
    panels = {
        title: harness.grids.parted(panel["points"], PERIODS)
        for title, panel in content["panels"].items()
    }
    lines = []
    for name in PERIODS:
        line = [name]
        for of_periods in panels.values():
            best = harness.grids.best(of_periods[name])
            accuracy, chosen = best["accuracy"], best["hyperparameters"]
            line.append(
                f"{harness.tables.mean_and_error(accuracy)} "
                f"(ρ = {chosen['rho']:g}, θ = {chosen['theta']:g})"
            )
        lines.append(line)
    return ["clean gradient", *panels], lines


def show(content: dict[str, Any]) -> None:
    """Print the table."""
    harness.tables.show(
        f"Lagged VaSSO, accuracy (%) on {content['split']}, {content['seeds']} seeds, "
        "at the best ρ and θ of the grid",
        *cells(content),
    )


def draw(path: Path, content: dict[str, Any]) -> None:
    """A panel per task: accuracy over the radius, a curve per period and θ."""
    figures, panels = harness.figures, content["panels"]
    figure, axes = figures.panels(1, len(panels), height=2.8)
    looks = list(zip(figures.shades(len(PERIODS)), figures.MARKERS, strict=False))
    for ax, (title, panel) in zip(axes[0], panels.items(), strict=True):
        parts = harness.grids.parted(panel["points"], PERIODS)
        for (name, points), (color, marker) in zip(parts.items(), looks, strict=True):
            thetas = dict.fromkeys(p["hyperparameters"]["theta"] for p in points)
            for theta in thetas:
                figures.over_radius(
                    ax,
                    [p for p in points if p["hyperparameters"]["theta"] == theta],
                    label=f"{name}, θ = {theta:g}",
                    color=color,
                    marker=marker,
                    dashed=theta != next(iter(thetas)),
                )
        ax.set_title(title)
        ax.tick_params(labelleft=ax is axes[0, 0])
    axes[0, 0].set_ylabel("validation accuracy (%)")
    figures.shared_legend(figure, axes[0, 0], columns=3, title="clean gradient")
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
