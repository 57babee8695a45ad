"""How the best radius moves with label noise, weight decay, width and θ, one at a time.

SAM on digits with 75 % random labels over a grid of radii, and the same with one thing
changed. Accuracy is that on held-out validation examples with their true labels; the
test set is not touched.
"""

from pathlib import Path
from typing import Any

from experiments import harness
from experiments.harness import command_line

RADII = (0.05, 0.09, 0.16, 0.28, 0.5, 0.9, 1.6)
SETTING = {"learning_rate": 0.05, "weight_decay": 0.005, "theta": 1.0}
NOISE, WIDTH = 75, 256
# What is changed, and to what; the value of the reference is among them.
DIALS: dict[str, tuple[float, ...]] = {
    "random labels (%)": (0, 25, 50, 75),
    "weight decay": (5e-4, 2e-3, 5e-3, 0.0125),
    "width": (64, 128, 256, 512),
    "θ": (1.0, 0.3, 0.1, 0.03),
}
REFERENCE = {
    "random labels (%)": NOISE,
    "weight decay": SETTING["weight_decay"],
    "width": WIDTH,
    "θ": SETTING["theta"],
}
# Radii at which the accuracy is at most so far from the best, in points.
TOLERANCE = 1.0


def main(arguments: list[str] | None = None) -> int:
    """Train, print, write."""
    parser = command_line.experiment_parser("best_radius", __doc__, seeds=4)
    options = command_line.parse(parser, arguments)
    harness.rows.use_all_cores()
    panels = {"reference": panel(options)}
    for dial, values in DIALS.items():
        for value in values:
            if value != REFERENCE[dial]:
                panels[f"{dial} = {value:g}"] = panel(options, dial, value)
    if options.smoke:
        panels = dict(list(panels.items())[:3])
    return harness.grids.run(
        parser, options, "best_radius", panels, show=show, draw=draw
    )


def panel(options: Any, dial: str = "", value: float = 0.0) -> Any:
    """The reference, or what it is with one dial turned."""
    from experiments import tasks
    from experiments.harness.networks import mlp

    setting = REFERENCE | ({dial: value} if dial else {})
    width = int(setting["width"])
    task = tasks.load(f"digits-{setting['random labels (%)']:.0f}")
    task = task._replace(network=mlp(64, width, width, task.classes))
    if options.smoke:
        task = task._replace(epochs=2 * task.epochs_per_call)
    fixed = SETTING | {
        "weight_decay": setting["weight decay"],
        "theta": setting["θ"],
    }
    return harness.grids.Panel(
        task,
        harness.methods.METHODS["vasso"],
        [fixed | {"rho": rho} for rho in RADII[-2 if options.smoke else 0 :]],
    )


def curves(content: dict[str, Any]) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """The points by rising ρ, of each dial and value."""
    found = content["panels"]
    return {
        dial: {
            value: found[name]["points"]
            for value in values
            if (
                name := "reference"
                if value == REFERENCE[dial]
                else f"{dial} = {value:g}"
            )
            in found
        }
        for dial, values in DIALS.items()
    }


def good_radii(points: list[dict[str, Any]]) -> list[float]:
    """The radii whose accuracy is within TOLERANCE of the best."""
    least = harness.grids.best(points)["accuracy"]["mean"] - TOLERANCE
    return [
        point["hyperparameters"]["rho"]
        for point in points
        if point["accuracy"]["mean"] >= least
    ]


def cells(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table."""
    lines = []
    for dial, of_values in curves(content).items():
        for value, points in of_values.items():
            best, good = harness.grids.best(points), good_radii(points)
            accuracy = best["accuracy"]
            lines.append(
                [
                    dial,
                    f"{value:g}" + (" (reference)" if value == REFERENCE[dial] else ""),
                    f"{best['hyperparameters']['rho']:g}",
                    f"{good[0]:g}"
                    if len(good) == 1
                    else f"{good[0]:g} to {good[-1]:g}",
                    harness.tables.mean_and_error(accuracy),
                ]
            )
    within = f"ρ within {TOLERANCE:g} point of it"
    return ["changed", "to", "best ρ", within, "accuracy (%)"], lines


def show(content: dict[str, Any]) -> None:
    """Print the table."""
    harness.tables.show(
        f"Best radius on {content['split']}, {content['seeds']} seeds per point",
        *cells(content),
    )


def draw(path: Path, content: dict[str, Any]) -> None:
    """A panel per dial: accuracy over the radius, a curve per value."""
    figures = harness.figures
    figure, axes = figures.panels(2, 2)
    for ax, (dial, of_values) in zip(axes.flat, curves(content).items(), strict=True):
        looks = zip(figures.shades(len(of_values)), figures.MARKERS, strict=False)
        for (value, points), look in zip(of_values.items(), looks, strict=True):
            figures.over_radius(
                ax,
                points,
                label=f"{value:g}",
                color=look[0],
                marker=look[1],
                dashed=value == REFERENCE[dial],
            )
        if of_values:
            ax.legend(loc="lower left")
        ax.set_title(dial)
        ax.set_ylabel("validation accuracy (%)" if ax in axes[:, 0] else "")
        ax.set_xlabel("radius ρ" if ax in axes[-1] else "")
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
