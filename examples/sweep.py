"""Radius ρ by smoothing θ by seeds: a grid of trainings as one compiled program.

Trains VaSSO on digits with random labels at every point of the grid, many seeds each;
θ = 1 is SAM. All trainings are rows of one vmapped program, split over the devices, and
in parts if their parameters do not fit into memory. Draws accuracy over the grid with
the region where no seed collapses, and prints, for each θ, the robust radius: the
largest ρ of the grid up to which none did.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digits
import jax
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
    write_atomically,
    write_json,
)
from rich.console import Console
from rich.table import Table
from rows import one_device_per_core
from significance import standard_error

import optax_vasso as ov

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The grid of the VaSSO papers, and SAM.
RADII = (0.05, 0.1, 0.2, 0.5)
THETAS = (0.2, 0.4, 0.6, 0.9, 1.0)
# Test accuracy in percent below which a training has collapsed: twice that of chance.
COLLAPSED = 20.0


def make_optimizer(
    base: optax.GradientTransformation, row: dict[str, jax.Array], seed: jax.Array
) -> optax.GradientTransformation:
    """VaSSO; SAM where θ = 1."""
    del seed
    return ov.vasso(base, row["rho"], row["theta"])


def grid(radii: list[float], thetas: list[float], seeds: int) -> dict[str, np.ndarray]:
    """The rows: θ outermost, then ρ, then seeds, so that parts are whole θ first."""
    theta, rho, seed = np.meshgrid(thetas, radii, np.arange(seeds), indexing="ij")
    return {"theta": theta.ravel(), "rho": rho.ravel(), "seed": seed.ravel()}


def rows_that_fit() -> int:
    """How many trainings the memory of the devices holds at once."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        free = len(devices) * (stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    else:  # a CPU: its devices share what is free
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    params = jax.eval_shape(digits.init_mlp, jax.random.PRNGKey(0))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    # Parameters, momentum, average, perturbed point and two gradients; and as much
    # again for temporaries and the images.
    return max(1, int(free / 2 // (12 * size)))


def train_all(options: Any, results: dict[str, Any], accuracy: np.ndarray) -> None:
    """Fill ``accuracy``, (θ, ρ, seeds), part by part."""
    rows = grid(results["radii"], results["thetas"], options.seeds)
    count = accuracy.size
    at_once = min(options.rows_at_once or rows_that_fit(), count)
    train = digits.trainer(
        make_optimizer,
        options.noise,
        epochs=options.epochs,
        evaluate_every=options.epochs,
    )
    starts = range(0, count, at_once)
    with progress_bar() as bar:
        task = bar.add_task(f"{count} trainings", total=len(starts) * options.epochs)
        for start in starts:
            began = time.perf_counter()
            # As many rows in the last part, so that nothing is compiled for it.
            part = np.minimum(np.arange(start, start + at_once), count - 1)
            runs = train(
                {name: rows[name][part] for name in ("rho", "theta")},
                rows["seed"][part],
                digits.test_split(),
                on_epoch=lambda: bar.advance(task),
            )
            accuracy.flat[part] = runs.accuracy[:, -1]
            results["seconds"].append(round(time.perf_counter() - began, 2))


def robust_radius(radii: list[float], collapsed: np.ndarray) -> float | None:
    """The largest radius up to which nothing collapsed; None if not even the first.

    ``collapsed``: of each radius, in rising order, whether any seed did.
    """
    stable = int(np.argmax(np.append(collapsed, True)))
    return radii[stable - 1] if stable else None


def summarize(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each θ whose trainings are finished."""
    radii, summary = results["radii"], []
    for theta, of_theta in zip(results["thetas"], results["accuracy"], strict=True):
        table = np.array(of_theta)
        if np.isnan(table).any():
            continue
        best = int(np.argmax(table.mean(axis=1)))
        collapsed = (table < COLLAPSED).any(axis=1)
        summary.append(
            {
                "theta": theta,
                "robust_radius": robust_radius(radii, collapsed),
                "largest_radius_is_stable": not collapsed.any(),
                "best_radius": radii[best],
                "best_accuracy": float(table[best].mean()),
                "best_standard_error": standard_error(table[best]),
                "collapsed": (table < COLLAPSED).sum(axis=1).tolist(),
            }
        )
    return summary


def print_table(results: dict[str, Any]) -> None:
    """Robust radius and best accuracy by θ."""
    table = Table(
        title=f"Digits, {results['noise']:.0%} of the training labels random, "
        f"{results['seeds']} seeds a point: test accuracy in percent"
    )
    for column in ("θ", "robust radius", "best ρ", "accuracy there"):
        table.add_column(column, justify="right")
    for row in results["by_theta"]:
        sign = "≥ " if row["largest_radius_is_stable"] else ""
        radius = row["robust_radius"]
        robust = f"{sign}{radius:g}" if radius else f"< {results['radii'][0]:g}"
        table.add_row(
            "1 (SAM)" if row["theta"] == 1 else f"{row['theta']:g}",
            robust,
            f"{row['best_radius']:g}",
            f"{row['best_accuracy']:.1f} ± {row['best_standard_error']:.1f}",
        )
    Console(width=None if Console().is_terminal else 110).print(table)


def draw(path: Path, results: dict[str, Any]) -> None:
    """Mean accuracy over the grid; cells with collapsed seeds are hatched."""
    radii, thetas = results["radii"], results["thetas"]
    accuracy = np.array(results["accuracy"], float)
    mean, collapsed = accuracy.mean(axis=2), (accuracy < COLLAPSED).sum(axis=2)
    figure, ax = plt.subplots(
        figsize=(1.6 + 0.85 * len(radii), 1.6 + 0.55 * len(thetas)),
        layout="constrained",
    )
    image = ax.imshow(mean, origin="lower", aspect="auto", cmap="viridis", vmin=10)
    middle = (np.nanmax(mean) + 10) / 2
    for i, j in np.ndindex(mean.shape):
        if np.isnan(mean[i, j]):
            continue
        color = "white" if mean[i, j] < middle else "black"
        lines = f"{mean[i, j]:.1f}"
        if collapsed[i, j]:
            lines += f"\n{collapsed[i, j]}/{accuracy.shape[2]}"
            ax.add_patch(
                plt.Rectangle(
                    (j - 0.5, i - 0.5), 1, 1, fill=False, hatch="///", ec=color, lw=0
                )
            )
        box = {"facecolor": image.cmap(image.norm(mean[i, j])), "lw": 0, "pad": 1.5}
        ax.text(
            j, i, lines, ha="center", va="center", color=color, fontsize=8, bbox=box
        )
    # The border between cells without and with collapsed seeds.
    for i, j in np.argwhere(collapsed > 0):
        for di, dj in ((0, -1), (0, 1), (-1, 0), (1, 0)):
            k, m = i + di, j + dj
            inside = 0 <= k < len(thetas) and 0 <= m < len(radii)
            if inside and not collapsed[k, m]:
                x, y = j + dj / 2, i + di / 2
                half_x, half_y = abs(di) / 2, abs(dj) / 2
                ax.plot(
                    [x - half_x, x + half_x],
                    [y - half_y, y + half_y],
                    color="#D55E00",
                    lw=2.5,
                    solid_capstyle="round",
                )
    ax.set_xticks(range(len(radii)), [f"{rho:g}" for rho in radii])
    ax.set_yticks(
        range(len(thetas)), ["1 (SAM)" if t == 1 else f"{t:g}" for t in thetas]
    )
    ax.tick_params(length=0)
    ax.set_xlabel("radius ρ")
    ax.set_ylabel("smoothing θ")
    note = "\nhatched: so many of them collapsed" if collapsed.any() else ""
    ax.set_title(
        f"{results['noise']:.0%} random labels, {results['seeds']} seeds a point{note}",
        fontsize=10,
    )
    figure.colorbar(image, label="test accuracy (%)")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=160))
    plt.close(figure)


def numbers(low: float, high: float, allowed: str) -> Callable[[str], list[float]]:
    """An argparse type: numbers in [low, high] with commas between, in rising order."""
    one = number(float, low, high, allowed)
    return lambda text: sorted({one(part) for part in text.split(",")})


def parse_arguments(arguments: list[str] | None = None) -> Any:
    """The command line."""
    parser = Parser(prog="sweep.py", description=__doc__.splitlines()[0])

    def listed(values: tuple[float, ...]) -> str:
        return ",".join(f"{value:g}" for value in values)

    parser.add_argument(
        "--rho",
        type=numbers(1e-6, 1e6, "numbers > 0 with commas between"),
        default=listed(RADII),
        help="radii",
    )
    parser.add_argument(
        "--theta",
        type=numbers(1e-6, 1, "numbers in (0, 1] with commas between"),
        default=listed(THETAS),
        help="weights of the newest gradient; 1 is SAM",
    )
    parser.add_argument(
        "--noise",
        type=number(float, 0.0, 1.0, "a number from 0 to 1"),
        default=0.75,
        help="share of random training labels",
    )
    parser.add_argument(
        "--seeds", type=positive_integer, default=8, help="seeds for each point"
    )
    parser.add_argument(
        "--epochs", type=positive_integer, default=digits.EPOCHS, help="training epochs"
    )
    parser.add_argument(
        "--rows-at-once",
        type=positive_integer,
        help="trainings in memory at the same time; by default as many as fit",
    )
    parser.add_argument(
        "--results", type=results_folder, default="results", help="folder to write to"
    )
    parser.add_argument("--name", default="sweep", help="name of the files")
    parser.add_argument(
        "--smoke", action="store_true", help="2 seeds and 2 epochs, to see that it runs"
    )
    options = parser.parse_args(arguments)
    if os.path.basename(options.name) != options.name or not options.name:
        parser.error(f"argument --name: {options.name!r} is not the name of a file")
    if options.smoke:
        options.seeds, options.epochs = 2, 2
    return options


def main(arguments: list[str] | None = None) -> int:
    """Train, print, write."""
    options = parse_arguments(arguments)
    results: dict[str, Any] = {
        "radii": options.rho,
        "thetas": options.theta,
        "noise": options.noise,
        "seeds": options.seeds,
        "epochs": options.epochs,
        "collapsed_below": COLLAPSED,
        "environment": environment(),
        "devices": jax.local_device_count(),
        "seconds": [],
    }
    accuracy = np.full((len(options.theta), len(options.rho), options.seeds), np.nan)
    path = options.results / f"{options.name}.json"
    try:
        train_all(options, results, accuracy)
    except KeyboardInterrupt:
        results["interrupted"] = True
        raise
    finally:
        if results["seconds"]:
            results["accuracy"] = accuracy.tolist()
            results["by_theta"] = summarize(results)
            print_table(results)
            # JSON has no NaN: what was not trained is null.
            results["accuracy"] = np.where(
                np.isnan(accuracy), None, accuracy.astype(object)
            ).tolist()
            write_json(path, results)
            draw(path.with_suffix(".png"), results)
            print(f"Wrote {path.with_suffix('')}.json and .png")
    return 0


if __name__ == "__main__":
    one_device_per_core()
    run(main)
