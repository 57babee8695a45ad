"""The figures of docs/cost.md, from the result files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stored import Rows, load
from experiments.harness import figures as shared, methods

# Of methods the colour that they have everywhere, of other things shades.
OTHERS = ("optax.adam", "the same, plainly", "optax.contrib.sam, opaque")
COLORS = dict(zip(OTHERS, shared.shades(len(OTHERS)), strict=True)) | {
    method.label: method.color for method in methods.METHODS.values()
}
COLORS["VaSSO's chain"] = COLORS["VaSSO"]


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
    figure, axes = shared.panels(1, 3, height=2.8)
    chosen = (
        ("parameters", "milliseconds", "parameters", "milliseconds per step"),
        ("leaves", "compile_s", "leaves of a chain", "seconds to compile"),
        ("blocks", "compile_s", "blocks of a transformer", "seconds to compile"),
    )
    lines: dict[str, dict[str, Any]] = {}
    for ax, (axis, key, x_label, y_label) in zip(axes.flat, chosen, strict=True):
        for label, (sizes, values) in series(rows, axis, key).items():
            dashed = "--" if label in OTHERS else "-"
            (line,) = ax.plot(
                sizes, values, marker="o", ls=dashed, color=COLORS[label], ms=3
            )
            lines.setdefault(axis, {})[label] = line
        ax.set(xscale="log", xlabel=x_label, ylabel=y_label)
        shared.logarithmic(ax.yaxis)
    blocks = [1, 4, 12, 24]
    axes[0, 2].set_xticks(blocks, [str(number) for number in blocks])
    axes[0, 2].xaxis.minorticks_off()
    axes[0, 1].legend(lines["leaves"].values(), lines["leaves"], loc="upper left")
    steps = lines["parameters"]
    figure.legend(steps.values(), steps, ncols=5, loc="outside lower center")
    shared.save(figure, path)


def limits(path: Path) -> None:
    """Shares of the bandwidth over leaves."""
    rows = load("limits")["rows"]
    figure, axes = shared.panels(1, 1, height=2.8)
    ax = axes[0, 0]
    for name, chain in (("vasso", "VaSSO"), ("sam", "SAM")):
        method = shared.style_of(name)
        points = [
            (int(key.split(", ")[1].split()[0]), row["share"])
            for key, row in rows.items()
            if key.startswith(f"{chain}, ")
        ]
        leaves, shares = zip(*points, strict=True)
        low, median, high = 100 * np.array(shares).T
        ax.plot(leaves, median, marker=method.marker, color=method.color, label=chain)
        ax.fill_between(leaves, low, high, color=method.color, alpha=0.15, lw=0)
    label = "6/7: VaSSO's average is read twice"
    ax.axhline(600 / 7, color="0.4", lw=0.8, ls="--", zorder=0, label=label)
    ax.set_xscale("log")
    ax.set_xticks(leaves, [f"{number:,}" for number in leaves])
    ax.xaxis.minorticks_off()
    ax.set_ylim(0, None)
    ax.set_xlabel("leaves of 4 M parameters")
    ax.set_ylabel("share of the bandwidth limit (%)")
    ax.legend(loc="lower left")
    shared.save(figure, path)


def peers(path: Path) -> None:
    """Time per step of each library, over ours, by network."""
    rows = {
        name: row["time / ours"]
        for name, row in load("peers")["rows"].items()
        if row.get("time / ours", [1, 1, 1]) != [1, 1, 1]
    }
    networks = list(dict.fromkeys(name.split(": ")[0] for name in rows))
    libraries = list(dict.fromkeys(name.split(": ", 1)[1] for name in rows))
    figure, axes = shared.panels(1, 1, height=3.2)
    ax = axes[0, 0]
    looks = zip(shared.shades(len(networks)), shared.MARKERS, strict=True)
    shifts = -shared.dodged(len(networks), 0.7)
    for network, shift, look in zip(networks, shifts, looks, strict=True):
        there = [i for i, name in enumerate(libraries) if f"{network}: {name}" in rows]
        shares = [rows[f"{network}: {libraries[i]}"] for i in there]
        low, median, high = np.array(shares).T
        ax.errorbar(
            median,
            [shift - i for i in there],
            xerr=[median - low, high - median],
            color=look[0],
            marker=look[1],
            markersize=4,
            linestyle="",
            linewidth=0.8,
            capsize=1.5,
            label=network,
        )
    ax.axvline(1, color="0.4", lw=0.8, zorder=0)
    ax.set_yticks(range(0, -len(libraries), -1), libraries)
    ax.set_xlabel("time of a step, that of optax_vasso = 1")
    shared.shared_legend(figure, ax, columns=2)
    shared.save(figure, path)


FIGURES = (limits, peers, scaling)


def draw(folder: Path) -> Iterator[Path]:
    """Every figure whose result file is there."""
    for make in FIGURES:
        path = folder / f"{make.__name__}.png"
        try:
            make(path)
        except FileNotFoundError:
            continue
        yield path
