"""Accuracy over the radius ρ and the smoothing θ: a heat map per weight decay.

Trains VaSSO at every point of a grid of ρ and θ, where θ = 1 is SAM, with several seeds
each. Cells are the accuracy on held-out validation examples with their true labels; the
test set is not touched. Cells with seeds that collapsed are hatched and say how many.
The robust radius of a θ is the largest ρ of the grid up to which no seed did.
"""

import functools
from pathlib import Path
from typing import Any

from experiments import harness, tasks
from experiments.harness import command_line

RADII = (0.1, 0.2, 0.35, 0.5, 0.8, 1.2, 1.8)
THETAS = (0.05, 0.1, 0.2, 0.4, 1.0)
WEIGHT_DECAYS = (5e-4, 5e-3)
LEARNING_RATE = 0.05


def main(arguments: list[str] | None = None) -> int:
    """Train, print, write."""
    parser = command_line.experiment_parser("radius", __doc__, seeds=6)
    parser.add_argument(
        "--task",
        choices=tasks.TITLES,
        default="digits-75",
        metavar="TASK",
        help=f"one of {', '.join(tasks.TITLES)}",
    )
    positive = command_line.numbers(command_line.positive_number)
    smoothing = command_line.numbers(
        command_line.number(float, 1e-6, 1.0, "numbers in (0, 1] with commas between")
    )
    for name, kind, default, meaning in (
        ("--rho", positive, RADII, "radii"),
        ("--theta", smoothing, THETAS, "weights of the newest gradient; 1 is SAM"),
        ("--weight-decay", positive, WEIGHT_DECAYS, "one heat map for each"),
    ):
        listed = ",".join(f"{value:g}" for value in default)
        parser.add_argument(name, type=kind, default=listed, help=meaning)
    parser.add_argument(
        "--learning-rate",
        type=command_line.positive_number,
        default=LEARNING_RATE,
        help="at the beginning; it falls to 0",
    )
    parser.add_argument(
        "--along",
        action="store_true",
        help="ρ is the length of ε along the gradient, as of projected_perturb",
    )
    options = command_line.parse(parser, arguments)
    harness.rows.use_all_cores()
    task = tasks.load(options.task)
    if options.smoke:
        task = task._replace(epochs=2 * task.epochs_per_call)
        options.rho, options.theta = options.rho[-2:], options.theta[-2:]
    name, method = f"radius_{options.task}", harness.methods.METHODS["vasso"]
    if options.along:
        name, method = f"radius_along_{options.task}", harness.ascents.projected_vasso()
    panels = {
        f"weight decay {decay:g}": harness.grids.Panel(
            task,
            method,
            [
                {
                    "learning_rate": options.learning_rate,
                    "weight_decay": decay,
                    "rho": rho,
                    "theta": theta,
                }
                for theta in options.theta
                for rho in options.rho
            ],
        )
        for decay in options.weight_decay
    }
    draws = functools.partial(draw, along=options.along)
    return harness.grids.run(parser, options, name, panels, show=show, draw=draws)


def by_theta(panel: dict[str, Any]) -> dict[float, list[dict[str, Any]]]:
    """The points of each θ, by rising ρ."""
    rows: dict[float, list[dict[str, Any]]] = {}
    for point in panel["points"]:
        rows.setdefault(point["hyperparameters"]["theta"], []).append(point)
    return rows


def robust_radius(points: list[dict[str, Any]]) -> str:
    """The largest radius up to which no seed collapsed, of points by rising ρ."""
    radii = [point["hyperparameters"]["rho"] for point in points]
    for number, point in enumerate(points):
        if point["accuracy"]["collapsed"]:
            return f"{radii[number - 1]:g}" if number else f"< {radii[0]:g}"
    return f"≥ {radii[-1]:g}"


def label(theta: float) -> str:
    """What a row of the heat map is called."""
    return "1 (SAM)" if theta == 1 else f"{theta:g}"


def cells(panel: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: mean accuracy, and in brackets how many collapsed."""
    rows = by_theta(panel)
    radii = [point["hyperparameters"]["rho"] for point in next(iter(rows.values()))]
    lines = [
        [
            f"θ = {label(theta)}",
            *(
                f"{point['accuracy']['mean']:.1f}"
                + (f" ({n})" if (n := point["accuracy"]["collapsed"]) else "")
                for point in points
            ),
            robust_radius(points),
        ]
        for theta, points in rows.items()
    ]
    return ["ρ", *(f"{rho:g}" for rho in radii), "robust radius"], lines


def gains(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The best point of each heat map against the best of SAM, paired by seed."""
    describe, best = harness.methods.describe, harness.grids.best
    lines = []
    for title, panel in content["panels"].items():
        chosen = best(panel["points"])
        sam = best(next(p for theta, p in by_theta(panel).items() if theta == 1))
        difference = harness.statistics.paired_difference(
            chosen["accuracy"]["values"], sam["accuracy"]["values"]
        )
        line = [title]
        for point in (chosen, sam):
            own = {k: point["hyperparameters"][k] for k in ("rho", "theta")}
            accuracy = harness.tables.mean_and_error(point["accuracy"])
            line.append(f"{accuracy} ({describe(own)})")
        lines.append([*line, harness.tables.plus_minus(difference)])
    return ["", "best (%)", "best of SAM (%)", "difference"], lines


def show(content: dict[str, Any]) -> None:
    """Print a table per weight decay."""
    for title, panel in content["panels"].items():
        harness.tables.show(
            f"{panel['task']}, {title}: accuracy (%) on {content['split']}, "
            f"{content['seeds']} seeds per point; in brackets, how many collapsed",
            *cells(panel),
        )
    if all(1 in by_theta(panel) for panel in content["panels"].values()):
        harness.tables.show("The best points of the grids", *gains(content))


def draw(path: Path, content: dict[str, Any], along: bool = False) -> None:
    """A heat map per weight decay."""
    figures, panels = harness.figures, content["panels"]
    rows = by_theta(next(iter(panels.values())))
    figure, axes = figures.panels(1, len(panels), height=0.8 + 0.36 * len(rows))
    for ax, (title, panel) in zip(axes[0], panels.items(), strict=True):
        rows = by_theta(panel)
        figures.heat_map(
            ax,
            [[point["accuracy"] for point in points] for points in rows.values()],
        )
        some = next(iter(rows.values()))
        ax.set_xticks(
            range(len(some)), [f"{p['hyperparameters']['rho']:g}" for p in some]
        )
        ax.set_yticks(range(len(rows)), map(label, rows))
        ax.tick_params(labelleft=ax is axes[0, 0])
        ax.set(xlabel="length along the gradient r" if along else "radius ρ")
        ax.set_title(title)
    axes[0, 0].set_ylabel("smoothing θ")
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
