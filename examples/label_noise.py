"""What variance suppression is worth when labels are wrong: digits, an MLP, a minute.

Trains SGD, SAM, Friendly SAM and VaSSO on digits of which a share of the training
labels is random, each at the hyperparameters that a validation split has picked, over
many seeds in one compiled program. Prints a table with paired differences to SAM and
writes the numbers as JSON and a figure as PNG.
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import digits
import matplotlib
import numpy as np
import optax
from command_line import (
    Parser,
    environment,
    number,
    positive_integer,
    progress_bar,
    results_folder,
    run,
    some_of,
    write_atomically,
    write_json,
)
from methods import METHODS, describe, make_optimizer
from rich.console import Console
from rich.table import Table
from rows import one_device_per_core
from significance import paired_difference, standard_error

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Tuned(NamedTuple):
    """A method to compare, with what --tune tries and has picked.

    Attributes:
      label: its name in tables and figures.
      method: its name in methods.METHODS.
      grid: the values that --tune tries for each hyperparameter.
      best: for each share of noise, what --tune has picked.
    """

    label: str
    method: str
    grid: dict[str, list[float]]
    best: dict[float, dict[str, float]]

    @property
    def color(self) -> str:
        """Its colour in figures."""
        return METHODS[self.method].color

    def at(self, noise: float) -> dict[str, float]:
        """The hyperparameters picked at the share of noise closest to this one."""
        return self.best[min(self.best, key=lambda q: abs(q - noise))]

    def make(
        self, base: optax.GradientTransformation, row: dict[str, Any], seed: Any
    ) -> optax.GradientTransformation:
        """The optimizer of one run."""
        return make_optimizer(self.method, base, row, seed)


TUNED = {
    "sgd": Tuned("SGD", "base", {}, {0.5: {}}),
    "sam": Tuned(
        "SAM",
        "sam",
        {"rho": [0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.8, 1.0]},
        {0.25: {"rho": 0.8}, 0.5: {"rho": 0.5}, 0.75: {"rho": 0.35}},
    ),
    "friendly_sam": Tuned(
        "Friendly SAM",
        "friendly_sam",
        {"rho": [0.4, 0.5, 0.6, 0.7, 0.8, 1.0], "lmbda": [0.6]},
        {
            0.25: {"rho": 0.8, "lmbda": 0.6},
            0.5: {"rho": 0.7, "lmbda": 0.6},
            0.75: {"rho": 0.5, "lmbda": 0.6},
        },
    ),
    "vasso": Tuned(
        "VaSSO",
        "vasso",
        {"rho": [0.4, 0.5, 0.6, 0.8, 1.0, 1.2, 1.6], "theta": [0.05, 0.1, 0.2, 0.4]},
        {
            0.25: {"rho": 0.8, "theta": 0.1},
            0.5: {"rho": 0.6, "theta": 0.4},
            0.75: {"rho": 1.2, "theta": 0.05},
        },
    ),
    "asam": Tuned("ASAM", "asam", {"rho": [1.5, 2.0, 3.0, 4.0]}, {0.75: {"rho": 3.0}}),
    "gsam": Tuned(
        "GSAM",
        "gsam",
        {"rho": [0.25, 0.35], "alpha": [0.1, 0.3]},
        {0.75: {"rho": 0.25, "alpha": 0.3}},
    ),
    "evasso_0.5": Tuned(
        "eVASSO p = 0.5",
        "evasso",
        {"rho": [1.0, 1.4, 2.0], "theta": [0.1, 0.2], "probability": [0.5]},
        {0.75: {"rho": 1.4, "theta": 0.2, "probability": 0.5}},
    ),
    "evasso_0.3": Tuned(
        "eVASSO p = 0.3",
        "evasso",
        {"rho": [1.4, 2.0, 2.8], "theta": [0.1, 0.2], "probability": [0.3]},
        {0.75: {"rho": 2.0, "theta": 0.2, "probability": 0.3}},
    ),
    "looksam": Tuned(
        "LookSAM k = 5",
        "looksam",
        {"rho": [0.2, 0.35, 0.6], "alpha": [0.5, 1.0]},
        {0.75: {"rho": 0.6, "alpha": 0.5}},
    ),
    "lagged_vasso": Tuned(
        "lagged VaSSO",
        "lagged_vasso",
        {"rho": [0.4, 0.5, 0.6], "theta": [0.3, 0.5, 0.7]},
        {
            0.25: {"rho": 0.4, "theta": 0.5},
            0.5: {"rho": 0.4, "theta": 0.3},
            0.75: {"rho": 0.5, "theta": 0.7},
        },
    ),
}
DEFAULT_METHODS = ("sgd", "sam", "friendly_sam", "vasso")
SWEEP_METHODS = ("sam", "friendly_sam", "vasso")
SWEEP_RADII = (0.1, 0.2, 0.35, 0.5, 0.8, 1.2)


def train_tuned(
    method: Tuned, noise: float, seeds: int, epochs: int, on_epoch: Callable[[], Any]
) -> tuple[digits.Runs, float]:
    """Train one method on the training images; the runs and seconds, all included."""
    start = time.perf_counter()
    chosen = method.at(noise)
    runs = digits.train(
        method.make,
        {name: np.full(seeds, value) for name, value in chosen.items()},
        np.arange(seeds),
        digits.test_split(),
        noise,
        epochs=epochs,
        on_epoch=on_epoch,
    )
    return runs, time.perf_counter() - start


def train_over_radius(
    method: Tuned, noise: float, seeds: int, epochs: int, on_epoch: Callable[[], Any]
) -> np.ndarray:
    """Final test accuracy at each radius of the sweep, (radii, seeds)."""
    chosen = method.at(noise)
    rows = len(SWEEP_RADII) * seeds
    hyperparameters = {name: np.full(rows, value) for name, value in chosen.items()}
    hyperparameters["rho"] = np.repeat(SWEEP_RADII, seeds)
    runs = digits.train(
        method.make,
        hyperparameters,
        np.tile(np.arange(seeds), len(SWEEP_RADII)),
        digits.test_split(),
        noise,
        epochs=epochs,
        evaluate_every=epochs,
        on_epoch=on_epoch,
    )
    return runs.accuracy[:, -1].reshape(len(SWEEP_RADII), seeds)


def tune(
    method: Tuned, noise: float, seeds: int, epochs: int, on_epoch: Callable[[], Any]
) -> list[dict[str, float]]:
    """Validation accuracy of every point of a method's grid, best first.

    Each seed holds out its own 200 of the 1,000 training images, with their true
    labels; the test images are never seen.
    """
    points = [
        dict(zip(method.grid, values, strict=True))
        for values in itertools.product(*method.grid.values())
    ]
    splits = digits.stack([digits.validation_split(seed) for seed in range(seeds)])
    tiled = digits.tile(splits, len(points))
    hyperparameters = {
        name: np.repeat([point[name] for point in points], seeds)
        for name in method.grid
    }
    runs = digits.train(
        method.make,
        hyperparameters,
        np.tile(np.arange(seeds), len(points)),
        tiled,
        noise,
        epochs=epochs,
        evaluate_every=epochs,
        on_epoch=on_epoch,
    )
    table = runs.accuracy[:, -1].reshape(len(points), seeds)
    rows = [
        point | {"accuracy": float(row.mean()), "standard_error": standard_error(row)}
        for point, row in zip(points, table, strict=True)
    ]
    return sorted(rows, key=lambda row: -row["accuracy"])


def summarize(name: str, runs: digits.Runs, seconds: float, noise: float) -> dict:
    """What the results file says of one method."""
    final = runs.accuracy[:, -1]
    return {
        "label": TUNED[name].label,
        "hyperparameters": TUNED[name].at(noise),
        "mean": float(final.mean()),
        "standard_error": standard_error(final),
        "gradients_per_step": float(runs.gradients.mean()),
        "seconds": round(seconds, 2),
        "accuracy": final.tolist(),
        "curve": runs.accuracy.mean(axis=0).tolist(),
        "curve_standard_error": [standard_error(c) for c in runs.accuracy.T],
        "epochs": runs.epochs.tolist(),
    }


def compare_to_sam(summaries: dict[str, dict]) -> None:
    """Add the paired difference to SAM, and its p-values, to each other method."""
    if "sam" not in summaries:
        return
    reference = summaries["sam"]["accuracy"]
    for name, summary in summaries.items():
        if name == "sam" or len(reference) < 2:
            continue
        summary["difference_to_sam"] = paired_difference(summary["accuracy"], reference)


def print_table(summaries: dict[str, dict], noise: float, seeds: int) -> None:
    """One row a method."""
    table = Table(
        title=f"Digits, {noise:.0%} of the training labels random, {seeds} seeds: "
        "test accuracy in percent"
    )
    for column in ("method", "hyperparameters"):
        table.add_column(column)
    columns = ("accuracy", "paired difference to SAM", "p", "gradients/step", "seconds")
    for column in columns:
        table.add_column(column, justify="right")
    for summary in summaries.values():
        difference = summary.get("difference_to_sam")
        table.add_row(
            summary["label"],
            describe(summary["hyperparameters"]),
            f"{summary['mean']:.1f} ± {summary['standard_error']:.1f}",
            f"{difference['mean']:+.1f} ± {difference['standard_error']:.1f}"
            if difference
            else "",
            f"{difference['p_two_sided']:.1g}" if difference else "",
            f"{summary['gradients_per_step']:.2f}",
            f"{summary['seconds']:.1f}",
        )
    Console(width=None if Console().is_terminal else 110).print(table)


def draw(path: Path, results: dict) -> None:
    """Accuracy over epochs, over the radius, and over gradients per step."""
    summaries, sweep = results["methods"], results.get("radius_sweep")
    with_cost = len(summaries) > len(DEFAULT_METHODS)
    panels = 1 + bool(sweep) + with_cost
    figure, axes = plt.subplots(
        1, panels, figsize=(4.4 * panels, 3.7), squeeze=False, layout="constrained"
    )
    axes = list(axes[0])
    draw_epochs(axes[0], {k: v for k, v in summaries.items() if k in DEFAULT_METHODS})
    if sweep:
        draw_radii(axes[1], sweep)
    if with_cost:
        draw_cost(axes[-1], summaries)
    for ax in axes:
        ax.set_ylabel("test accuracy (%)")
        ax.grid(alpha=0.3, linewidth=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    noise, seeds = results["noise"], results["seeds"]
    figure.suptitle(
        f"Digits with {noise:.0%} random training labels "
        f"(mean ± standard error, {seeds} seeds)",
        fontsize=11,
    )
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=160))
    plt.close(figure)


def draw_epochs(ax: plt.Axes, summaries: dict[str, dict]) -> None:
    """Accuracy while training."""
    for name, summary in summaries.items():
        curve = np.array(summary["curve"])
        error = np.array(summary["curve_standard_error"])
        color = TUNED[name].color
        ax.plot(summary["epochs"], curve, color=color, label=summary["label"])
        ax.fill_between(
            summary["epochs"],
            curve - error,
            curve + error,
            color=color,
            alpha=0.2,
            lw=0,
        )
    ax.set_xlabel("epoch")
    ax.legend(frameon=False, loc="best")


def draw_radii(ax: plt.Axes, sweep: dict[str, Any]) -> None:
    """Final accuracy at each radius, the other hyperparameters as tuned."""
    markers = iter("os^Dv")
    for name, rows in sweep["accuracy"].items():
        values = np.array(rows)
        other = {k: v for k, v in sweep["fixed"][name].items() if k != "rho"}
        ax.errorbar(
            sweep["radii"],
            values.mean(axis=1),
            yerr=[standard_error(row) for row in values],
            color=TUNED[name].color,
            marker=next(markers),
            markersize=4,
            capsize=2,
            label=", ".join(filter(None, [TUNED[name].label, describe(other)])),
        )
    ax.set_xscale("log")
    ax.set_xticks(sweep["radii"], [f"{rho:g}" for rho in sweep["radii"]])
    ax.minorticks_off()
    ax.set_xlabel(f"radius ρ ({values.shape[1]} seeds each)")
    ax.legend(frameon=False, loc="lower left", fontsize=8)


def draw_cost(ax: plt.Axes, summaries: dict[str, dict]) -> None:
    """Final accuracy against what a step costs."""
    best = max(summary["mean"] for summary in summaries.values())
    far = [s for s in summaries.values() if s["mean"] < best - 15]
    near = {n: s for n, s in summaries.items() if s not in far}
    line = 0.06 * (best - min(summary["mean"] for summary in near.values()) + 2)
    column_top = -np.inf
    for name, summary in sorted(
        near.items(),
        key=lambda item: (round(item[1]["gradients_per_step"], 1), item[1]["mean"]),
    ):
        cost, mean = summary["gradients_per_step"], summary["mean"]
        error = summary["standard_error"]
        ax.errorbar(
            cost, mean, yerr=error, color=TUNED[name].color, marker="o", capsize=2
        )
        if cost > 1.9:
            # One column of labels to the right of the two-gradient methods.
            column_top = max(mean, column_top + line)
            place, aligned = (cost + 0.06, column_top), ("left", "center")
        else:
            # LookSAM and eVASSO p = 0.3 are neighbours: below, to either side.
            side = {"looksam": "right", "evasso_0.3": "left"}.get(name, "center")
            up = 1 if side == "center" else -1
            place = (cost, mean + up * (error + 0.3 * line))
            aligned = (side, "bottom" if up == 1 else "top")
        ax.annotate(
            summary["label"],
            (cost, mean),
            xytext=place,
            ha=aligned[0],
            va=aligned[1],
            fontsize=8,
        )
    if far:
        note = ", ".join(
            f"{s['label']} ({s['gradients_per_step']:.0f}): {s['mean']:.1f} %"
            for s in far
        )
        ax.text(
            0.02,
            0.98,
            f"not shown: {note}",
            transform=ax.transAxes,
            va="top",
            fontsize=8,
        )
    # The labels of the column may reach above the highest point.
    ax.set_ylim(top=max(ax.get_ylim()[1], column_top + line))
    ax.set_xlim(0.75, 2.55)
    ax.set_xticks([1, 1.25, 1.5, 1.75, 2])
    ax.set_xlabel("gradients per step")


def parse_arguments(arguments: list[str] | None = None) -> Any:
    """The command line."""
    parser = Parser(prog="label_noise.py", description=__doc__)
    share = number(float, 0.0, 1.0, "a number from 0 to 1")
    parser.add_argument(
        "--noise", type=share, default=0.75, help="share of random training labels"
    )
    parser.add_argument(
        "--seeds", type=positive_integer, default=16, help="seeds for each method"
    )
    parser.add_argument(
        "--sweep-seeds",
        type=number(int, 0, float("inf"), "an integer >= 0"),
        default=2,
        help="seeds for each radius of the sweep; 0 leaves the sweep out",
    )
    parser.add_argument(
        "--epochs", type=positive_integer, default=digits.EPOCHS, help="training epochs"
    )
    parser.add_argument(
        "--methods",
        type=some_of(TUNED),
        default=",".join(DEFAULT_METHODS),
        help=f"'all', or some of {','.join(TUNED)}",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="try each method's grid on validation splits instead, and print the best",
    )
    parser.add_argument(
        "--results", type=results_folder, default="results", help="folder to write to"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="2 seeds and 2 epochs, to see that it runs"
    )
    options = parser.parse_args(arguments)
    if options.smoke:
        options.seeds, options.epochs = 2, 2
        options.sweep_seeds = min(options.sweep_seeds, 1)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Train, print, write."""
    options = parse_arguments(arguments)
    results = {
        "noise": options.noise,
        "seeds": options.seeds,
        "epochs": options.epochs,
        "environment": environment(),
        "methods": {},
    }
    stem = f"label_noise_{options.noise:g}"
    if options.tune:
        fill, report, stem = tune_all, report_tuning, f"{stem}_tuning"
    else:
        fill, report = train_all, report_training
    try:
        fill(options, results)
    except KeyboardInterrupt:
        results["interrupted"] = True
        raise
    finally:
        if results["methods"]:
            report(options.results / f"{stem}.json", results)
    return 0


def train_all(options: Any, results: dict[str, Any]) -> None:
    """Fill ``results`` method by method."""
    summaries = results["methods"]
    swept = [name for name in SWEEP_METHODS if name in options.methods]
    with progress_bar() as bar:
        tasks = {
            name: bar.add_task(TUNED[name].label, total=options.epochs)
            for name in options.methods
        }
        for name, task in tasks.items():
            runs, seconds = train_tuned(
                TUNED[name],
                options.noise,
                options.seeds,
                options.epochs,
                lambda task=task: bar.advance(task),
            )
            summaries[name] = summarize(name, runs, seconds, options.noise)
        if options.sweep_seeds and swept:
            task = bar.add_task("radius sweep", total=options.epochs * len(swept))
            sweep = {"radii": list(SWEEP_RADII), "fixed": {}, "accuracy": {}}
            results["radius_sweep"] = sweep
            for name in swept:
                accuracy = train_over_radius(
                    TUNED[name],
                    options.noise,
                    options.sweep_seeds,
                    options.epochs,
                    lambda: bar.advance(task),
                )
                sweep["fixed"][name] = summaries[name]["hyperparameters"]
                sweep["accuracy"][name] = accuracy.tolist()


def report_training(path: Path, results: dict[str, Any]) -> None:
    """Print the table, write the numbers and the figure."""
    compare_to_sam(results["methods"])
    print_table(results["methods"], results["noise"], results["seeds"])
    write_json(path, results)
    draw(path.with_suffix(".png"), results)
    print(f"Wrote {path.with_suffix('')}.json and .png")


def tune_all(options: Any, results: dict[str, Any]) -> None:
    """Fill ``results`` with the grid of each method, best first."""
    with progress_bar() as bar:
        for name in options.methods:
            task = bar.add_task(TUNED[name].label, total=options.epochs)
            results["methods"][name] = tune(
                TUNED[name],
                options.noise,
                options.seeds,
                options.epochs,
                lambda task=task: bar.advance(task),
            )


def report_tuning(path: Path, results: dict[str, Any]) -> None:
    """Print the best three points of each grid and write all."""
    for name, rows in results["methods"].items():
        print(TUNED[name].label, *rows[:3], sep="\n  ")
    write_json(path, results)
    print(f"Wrote {path}")


if __name__ == "__main__":
    one_device_per_core()
    run(main)
