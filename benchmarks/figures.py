"""The figures of docs/cost.md, from the result files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stored import Rows, load
from experiments.harness import figures as shared, methods

# Of what is no method of the experiments; those have their own colour everywhere.
COLORS = ("#009E73", "#E69F00", "#999999")
OWN = {method.label: method.color for method in methods.METHODS.values()} | {
    "VaSSO's chain": methods.METHODS["vasso"].color
}
OURS, THEIRS = "#0072B2", "#CC79A7"  # JAX and PyTorch


def series(rows: Rows, axis: str, key: str) -> dict[str, tuple[Any, Any]]:
    """Name -> sizes and values of a measure over an axis of ``scaling``."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, row in rows.items():
        if name.startswith(axis + " ") and key in row:
            size, label = name.removeprefix(axis + " ").split(": ")
            value = row[key][1] if isinstance(row[key], list) else row[key]
            found.setdefault(label, []).append((float(size.replace(",", "")), value))
    return {label: tuple(zip(*points, strict=True)) for label, points in found.items()}


def scaling(path: Path) -> None:
    """Time and compilation over parameters, leaves and blocks."""
    rows = load("scaling")["rows"]
    figure, axes = shared.panels(1, 3, width=4.0)
    chosen = (
        ("parameters", "milliseconds", "parameters", "milliseconds per step"),
        ("leaves", "compile_s", "leaves of a chain", "seconds to compile"),
        ("blocks", "compile_s", "blocks of a transformer", "seconds to compile"),
    )
    for ax, (axis, key, x_label, y_label) in zip(axes.flat, chosen, strict=True):
        lines = series(rows, axis, key)
        others = iter(COLORS)
        for label, (sizes, values) in lines.items():
            color = OWN.get(label) or next(others)
            ax.loglog(sizes, values, "o-", color=color, label=label, markersize=4)
        ax.set_xlabel(x_label)
        ax.set_ylabel(y_label)
        ax.legend(frameon=False, fontsize=7)
    shared.save(figure, path)


def limits(path: Path) -> None:
    """Shares of the bandwidth over leaves."""
    rows = load("limits")["rows"]
    figure, axes = shared.panels(1, 1, width=5.0)
    ax = axes[0, 0]
    for name, chain in (("vasso", "VaSSO"), ("sam", "SAM")):
        color = shared.style_of(name).color
        points = [
            (int(key.split(", ")[1].split()[0]), row["share"])
            for key, row in rows.items()
            if key.startswith(f"{chain}, ")
        ]
        leaves, shares = zip(*points, strict=True)
        low, median, high = 100 * np.array(shares).T
        ax.plot(leaves, median, "o-", color=color, label=chain)
        ax.fill_between(leaves, low, high, color=color, alpha=0.2, lw=0)
    ax.axhline(85, color="black", lw=0.8, ls=":")
    ax.set_xscale("log")
    ax.set_ylim(0, None)
    ax.set_xlabel("leaves of 4 M parameters")
    ax.set_ylabel("share of the bandwidth limit (%)")
    ax.legend(frameon=False)
    shared.save(figure, path)


def peers(path: Path) -> None:
    """Time per step of each library, over ours."""
    rows = load("peers")["rows"]
    kinds = {
        name.split(": ")[0]: None for name, row in rows.items() if "time / ours" in row
    }
    figure, axes = shared.panels(-(-len(kinds) // 2), 2, width=5.4, height=2.7)
    for ax in axes.flat[len(kinds) :]:
        ax.set_visible(False)
    for ax, kind in zip(axes.flat, kinds, strict=False):
        bars = {
            name.removeprefix(f"{kind}: "): row["time / ours"]
            for name, row in rows.items()
            if name.startswith(f"{kind}: ") and row["time / ours"] != [1, 1, 1]
        }
        low, median, high = np.array(list(bars.values())).T
        heights = np.arange(len(bars))[::-1]
        colors = [THEIRS if "orch" in name else OURS for name in bars]
        ax.barh(heights, median, color=colors, height=0.6)
        ax.errorbar(
            *(median, heights),
            xerr=[median - low, high - median],
            fmt="none",
            color="black",
            lw=0.8,
        )
        ax.set_yticks(heights, list(bars), fontsize=7)
        ax.axvline(1, color="black", lw=0.8, ls=":")
        ax.set_xlabel("time of a step / ours")
        ax.set_title(kind, fontsize=9)
    shared.save(figure, path)


def draw(folder: Path) -> Iterator[Path]:
    """Every figure whose result file is there."""
    for make in (limits, peers, scaling):
        path = folder / f"{make.__name__}.png"
        try:
            make(path)
        except FileNotFoundError:
            continue
        yield path
