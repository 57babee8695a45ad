"""Whether SAM collapses because of its radius, or of its radius at the start.

SAM and VaSSO on digits with random labels, with the whole radius from the first step,
and with a radius that grows linearly over the first third or over all of the training.
Accuracy is that on held-out validation examples with their true labels; the test set is
not touched.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from experiments import harness
from experiments.harness import command_line

TASK = "digits-75"
SETTING = {"learning_rate": 0.05, "weight_decay": 0.005}
RADII = (0.16, 0.28, 0.5, 0.9, 1.6, 2.8)
THETAS = (1.0, 0.2, 0.05)
# Share of the training in which the radius grows.
WARMUPS = {"nothing": 0.0, "the first third": 1 / 3, "all of the training": 1.0}


def main(arguments: list[str] | None = None) -> int:
    """Train, print, write."""
    parser = command_line.experiment_parser("radius_warmup", __doc__, seeds=8)
    options = command_line.parse(parser, arguments)
    harness.rows.use_all_cores()
    from experiments import tasks

    task = tasks.load(TASK)
    if options.smoke:
        task = task._replace(epochs=2 * task.epochs_per_call)
    budget = harness.training.gradients_of(task, warmed_vasso(), "gradients")
    steps = budget / warmed_vasso().gradients
    panels = {
        label(theta): harness.grids.Panel(
            task,
            warmed_vasso(),
            [
                SETTING
                | {"rho": rho, "theta": theta, "growing": max(1.0, share * steps)}
                for share in WARMUPS.values()
                for rho in RADII[-2 if options.smoke else 0 :]
            ],
        )
        for theta in THETAS[: 1 if options.smoke else None]
    }
    return harness.grids.run(
        parser, options, "radius_warmup", panels, show=show, draw=draw
    )


@functools.cache
def warmed_vasso() -> Any:
    """VaSSO whose radius has grown to ρ after ``growing`` steps."""
    import jax.numpy as jnp

    import optax_vasso as ov

    def make(base: Any, chosen: dict[str, Any], seed: Any) -> Any:
        def radius(step: Any) -> Any:
            return chosen["rho"] * jnp.minimum(1.0, (step + 1) / chosen["growing"])

        return ov.vasso(base, radius, theta=chosen["theta"])

    vasso = harness.methods.METHODS["vasso"]
    growing = harness.methods.Range(1, 1e4)
    return dataclasses.replace(vasso, own=vasso.own | {"growing": growing}, make=make)


def label(theta: float) -> str:
    """What a θ is called."""
    return "SAM" if theta == 1 else f"VaSSO, θ = {theta:g}"


def cells(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table."""
    lines = []
    for title, panel in content["panels"].items():
        for name, points in harness.grids.parted(panel["points"], WARMUPS).items():
            accuracies = [point["accuracy"] for point in points]
            lines.append(
                [
                    title,
                    name,
                    *(
                        harness.tables.mean_and_error(a)
                        + (f" ({a['collapsed']})" if a["collapsed"] else "")
                        for a in accuracies
                    ),
                ]
            )
    radii = [f"ρ = {point['hyperparameters']['rho']:g}" for point in points]
    return ["method", "ρ grows over", *radii], lines


def show(content: dict[str, Any]) -> None:
    """Print the table."""
    harness.tables.show(
        f"Accuracy (%) on {content['split']}, {content['seeds']} seeds; in brackets, "
        "how many collapsed",
        *cells(content),
    )


def draw(path: Path, content: dict[str, Any]) -> None:
    """A panel per θ: accuracy over the radius, a curve per warm-up."""
    figures, panels = harness.figures, content["panels"]
    figure, axes = figures.panels(1, len(panels), height=2.6)
    looks = list(zip(figures.shades(len(WARMUPS)), figures.MARKERS, strict=False))
    for ax, (title, panel) in zip(axes[0], panels.items(), strict=True):
        parts = harness.grids.parted(panel["points"], WARMUPS)
        for (name, points), (color, marker) in zip(parts.items(), looks, strict=True):
            figures.over_radius(ax, points, label=name, color=color, marker=marker)
        ax.set_title(title)
        ax.tick_params(labelleft=ax is axes[0, 0])
    axes[0, 0].set_ylabel("validation accuracy (%)")
    figures.shared_legend(figure, axes[0, 0], title="ρ grows over")
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
