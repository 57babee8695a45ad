"""VaSSO's gain over SAM by the share of random labels, from files of label_noise.py.

Trains nothing. For each share it needs what these two have written:

    python examples/label_noise.py --noise 0.25 --tune
    python examples/label_noise.py --noise 0.25

Prints and draws the paired gains over SAM on the test images, and, on the validation
images of --tune, the best accuracy at each θ against that of SAM.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from command_line import (
    Parser,
    environment,
    results_folder,
    run,
    write_atomically,
    write_json,
)
from label_noise import TUNED
from methods import describe
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LEVELS = "0.25,0.5,0.75"
METHODS = ("friendly_sam", "vasso", "lagged_vasso")


def read(path: Path, parser: Parser) -> dict[str, Any]:
    """A results file, or an error that says which command writes it."""
    share = path.stem.split("_")[2]
    tune = " --tune" if path.stem.endswith("tuning") else ""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        parser.error(
            f"{path} cannot be read ({error.__class__.__name__}): write it with "
            f"examples/label_noise.py --noise {share}{tune}"
        )


def gains(trained: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each method its accuracy and what it is above SAM, seed by seed."""
    return [
        {
            "method": name,
            "hyperparameters": summary["hyperparameters"],
            "mean": summary["mean"],
            "standard_error": summary["standard_error"],
            "gain": summary.get("difference_to_sam"),
        }
        for name, summary in trained["methods"].items()
        if name in ("sam", *METHODS)
    ]


def by_theta(tuned: dict[str, Any]) -> list[dict[str, float]]:
    """VaSSO's best radius and accuracy for each θ, SAM being θ = 1; by rising θ."""
    points = [*tuned["methods"]["vasso"]]
    points += [row | {"theta": 1.0} for row in tuned["methods"]["sam"]]
    thetas = sorted({point["theta"] for point in points})
    return [
        max((p for p in points if p["theta"] == theta), key=lambda p: p["accuracy"])
        for theta in thetas
    ]


def print_tables(levels: list[dict[str, Any]]) -> None:
    """Gains by noise, then accuracy by θ."""
    table = Table(title="Test accuracy in percent, and paired difference to SAM")
    for column in ("random labels", "method", "hyperparameters"):
        table.add_column(column)
    for column in ("accuracy", "gain over SAM", "p"):
        table.add_column(column, justify="right")
    for level in levels:
        for row in level["gains"]:
            gain = row["gain"]
            table.add_row(
                f"{level['noise']:.0%}, {level['seeds']} seeds",
                TUNED[row["method"]].label,
                describe(row["hyperparameters"]),
                f"{row['mean']:.1f} ± {row['standard_error']:.1f}",
                f"{gain['mean']:+.1f} ± {gain['standard_error']:.1f}" if gain else "",
                f"{gain['p_two_sided']:.1g}" if gain else "",
            )
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table)
    table = Table(title="Best validation accuracy in percent at each θ (and its ρ)")
    table.add_column("random labels")
    thetas = [row["theta"] for row in levels[0]["by_theta"]]
    for theta in thetas:
        table.add_column("SAM" if theta == 1 else f"θ = {theta:g}", justify="right")
    for level in levels:
        table.add_row(
            f"{level['noise']:.0%}, {level['tuning_seeds']} seeds",
            *(
                f"{row['accuracy']:.1f} ± {row['standard_error']:.1f} ({row['rho']:g})"
                for row in level["by_theta"]
            ),
        )
    console.print(table)


def draw(path: Path, levels: list[dict[str, Any]]) -> None:
    """Gain over noise on the left, validation accuracy over θ on the right."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.5, 3.7), layout="constrained", width_ratios=(1, 1.15)
    )
    noise = [100 * level["noise"] for level in levels]
    for marker, name in zip("Ds^", METHODS, strict=True):
        rows = [
            next((r["gain"] for r in level["gains"] if r["method"] == name), None)
            for level in levels
        ]
        known = [i for i, row in enumerate(rows) if row]
        if known:
            left.errorbar(
                [noise[i] for i in known],
                [rows[i]["mean"] for i in known],
                yerr=[rows[i]["standard_error"] for i in known],
                color=TUNED[name].color,
                label=TUNED[name].label,
                marker=marker,
                markersize=5,
                capsize=3,
            )
    left.axhline(0, color=TUNED["sam"].color, lw=1)
    left.text(noise[-1], 0, "SAM", color=TUNED["sam"].color, va="bottom", ha="right")
    left.set_xticks(noise)
    left.set_xlabel("random training labels (%)")
    left.set_ylabel("test accuracy above SAM (points)")
    left.legend(frameon=False)
    shades = plt.colormaps["viridis"](np.linspace(0.15, 0.85, len(levels)))
    for level, shade, marker in zip(levels, shades, "osD^v*", strict=False):
        rows = level["by_theta"]
        sam = rows[-1]["accuracy"]
        right.errorbar(
            [row["theta"] for row in rows],
            [row["accuracy"] - sam for row in rows],
            yerr=[row["standard_error"] for row in rows],
            color=shade,
            marker=marker,
            markersize=5,
            capsize=3,
            label=f"{level['noise']:.0%} random",
        )
    thetas = [row["theta"] for row in levels[0]["by_theta"]]
    right.axhline(0, color="grey", lw=0.8)
    right.set_xscale("log")
    right.set_xticks(
        thetas, ["1 (SAM)" if theta == 1 else f"{theta:g}" for theta in thetas]
    )
    right.minorticks_off()
    right.set_xlabel("smoothing θ, each at its best ρ")
    right.set_ylabel("validation accuracy above SAM (points)")
    right.legend(frameon=False)
    for ax in (left, right):
        ax.grid(alpha=0.3, linewidth=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=160))
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Read, print, write."""
    parser = Parser(prog="noise_levels.py", description=__doc__.splitlines()[0])
    parser.add_argument("--noise", default=LEVELS, help="shares, commas between")
    parser.add_argument(
        "--results",
        type=results_folder,
        default="results",
        help="folder to read from and write to",
    )
    options = parser.parse_args(arguments)
    levels = []
    for share in options.noise.split(","):
        stem = f"label_noise_{share.strip()}"
        trained = read(options.results / f"{stem}.json", parser)
        tuned = read(options.results / f"{stem}_tuning.json", parser)
        levels.append(
            {
                "noise": trained["noise"],
                "seeds": trained["seeds"],
                "tuning_seeds": tuned["seeds"],
                "gains": gains(trained),
                "by_theta": by_theta(tuned),
            }
        )
    print_tables(levels)
    path = options.results / "noise_levels.json"
    write_json(path, {"environment": environment(), "levels": levels})
    draw(path.with_suffix(".png"), levels)
    print(f"Wrote {path.with_suffix('')}.json and .png")
    return 0


if __name__ == "__main__":
    run(main)
