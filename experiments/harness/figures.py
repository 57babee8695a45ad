"""The figures that several experiments share, without a display."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.harness.methods import METHODS, Method


def panels(rows: int, columns: int, width: float = 4.2, height: float = 3.6) -> Any:
    """A figure and its (rows, columns) axes, with a light grid."""
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat:
        ax.grid(alpha=0.3, linewidth=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Write a figure and forget it."""
    figure.savefig(path, dpi=150)
    plt.close(figure)


def style_of(name: str) -> Method:
    """How a method looks; a base optimizer by another name looks like SGD."""
    return METHODS.get(name, METHODS["sgd"])


def dodged(count: int, width: float = 0.6) -> np.ndarray:
    """Where several things stand side by side around one place."""
    return width * ((np.arange(count) + 0.5) / count - 0.5)


def points(
    ax: Any,
    name: str,
    xs: Sequence[float],
    means: Sequence[float],
    errors: Sequence[float],
    *,
    label: str | None = None,
    line: str = "none",
) -> None:
    """Means ± standard errors of one method, in its colour and with its marker."""
    method = style_of(name)
    ax.errorbar(
        xs,
        means,
        yerr=errors,
        color=method.color,
        marker=method.marker,
        markersize=5,
        linestyle=line,
        linewidth=1,
        capsize=2,
        label=label,
    )


def curves(ax: Any, rows: dict[str, Any], label: str = "test accuracy (%)") -> None:
    """A measure over the gradients taken, mean ± standard error."""
    for name, row in rows.items():
        curve, method = row["curve"], style_of(name)
        taken = np.array(curve["epochs"]) / row["epochs"] * row["gradients"]
        mean, error = np.array(curve["mean"]), np.array(curve["standard_error"])
        ax.plot(taken, mean, color=method.color, label=row["label"])
        ax.fill_between(
            taken, mean - error, mean + error, color=method.color, alpha=0.2, lw=0
        )
    ax.set_xlabel("gradients")
    ax.set_ylabel(label)
    ax.legend(frameon=False, fontsize=8)


def ranking(
    ax: Any,
    rows: dict[str, Any],
    hollow: dict[str, Any] | None = None,
    label: str = "test accuracy (%)",
) -> None:
    """One line per method: accuracy at the last epoch, and at the epoch picked.

    Args:
      ax: the axes.
      rows: of a comparison; filled markers, and a vertical tick at the epoch picked.
      hollow: the same methods at another budget.
      label: of what is measured.
    """
    names = list(rows)[::-1]
    for height, name in enumerate(names):
        method, row = style_of(name), rows[name]
        for found, filled in ((row, True), ((hollow or {}).get(name), False)):
            if found:
                ax.errorbar(
                    found["last"]["mean"],
                    height - 0.22 * (not filled),
                    xerr=found["last"]["standard_error"],
                    color=method.color,
                    marker=method.marker,
                    markerfacecolor=method.color if filled else "white",
                    markersize=6,
                    capsize=2,
                )
        picked = row["picked"]["mean"]
        ax.plot(picked, height, "|", color=method.color, markersize=13)
    ax.set_yticks(range(len(names)), [rows[name]["label"] for name in names])
    ax.set_xlabel(label)
