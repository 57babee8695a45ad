"""The figures that several experiments share, without a display."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker

from experiments.harness.methods import METHODS, Method
from optax_vasso import sharpness
from optax_vasso.sharpness import plot

# Inches that a page has room for; text of a figure of this width is then a little
# smaller than that of the page.
WIDTH = 7.0
plt.rcParams.update(
    {
        "font.size": 8,
        "axes.titlesize": 8.5,
        "axes.labelsize": 8,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "legend.title_fontsize": 8,
        "legend.frameon": False,
        "lines.linewidth": 1.2,
        "axes.linewidth": 0.7,
        "hatch.linewidth": 0.4,
        "figure.constrained_layout.wspace": 0.04,
    }
)
# What is no method has shades of a hue that no method has, from light to dark.
_SHADES = matplotlib.colormaps["BuPu"]
MARKERS = ("o", "s", "^", "D")


def shades(count: int) -> list[Any]:
    """Colours for as many settings or libraries, from light to dark."""
    return [_SHADES(level) for level in np.linspace(0.4, 1.0, count)]


def panels(
    rows: int, columns: int, width: float | None = None, height: float = 2.4
) -> Any:
    """A figure as wide as a page and its (rows, columns) axes, with a light grid.

    Args:
      rows: how many axes below each other.
      columns: how many side by side.
      width: inches of one of them; None for an equal share of ``WIDTH``.
      height: inches of one of them.
    """
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width * columns if width else WIDTH, height * rows),
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat:
        ax.grid(alpha=0.3, linewidth=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Write a figure and forget it."""
    figure.savefig(path, dpi=200)
    plt.close(figure)


def style_of(name: str) -> Method:
    """How a method looks; a base optimizer by another name looks like SGD."""
    return METHODS.get(name, METHODS["sgd"])


def marker_size(marker: str) -> float:
    """The size at which a marker looks as large as the others."""
    return 6.5 if marker == "*" else 4.5


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
        markersize=marker_size(method.marker),
        linestyle=line,
        linewidth=1,
        capsize=2,
        label=label,
    )


def logarithmic(axis: Any) -> None:
    """A logarithmic axis that names 1, 2 and 5 of every decade."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(ticker.NullFormatter())


def curves(
    ax: Any,
    rows: dict[str, Any],
    label: str = "test accuracy (%)",
    legend: bool = True,
) -> None:
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
    if legend:
        ax.legend()


def ranking(
    ax: Any,
    rows: dict[str, Any],
    hollow: dict[str, Any] | None = None,
    label: str = "test accuracy (%)",
) -> None:
    """One line per method: mean ± standard error at the last epoch.

    Args:
      ax: the axes.
      rows: of a comparison, drawn with filled markers.
      hollow: the same methods at another budget, drawn below with hollow ones.
      label: of what is measured.
    """
    names = list(rows)[::-1]
    for height, name in enumerate(names):
        method = style_of(name)
        for found, filled in ((rows[name], True), ((hollow or {}).get(name), False)):
            if found:
                ax.errorbar(
                    found["last"]["mean"],
                    height - 0.25 * (not filled),
                    xerr=found["last"]["standard_error"],
                    color=method.color,
                    marker=method.marker,
                    markerfacecolor=method.color if filled else "white",
                    markersize=marker_size(method.marker),
                    capsize=2,
                )
    ax.set_yticks(range(len(names)), [rows[name]["label"] for name in names])
    ax.set_xlabel(label)


def round_ticks(ax: Any) -> None:
    """Ticks at round numbers of a symmetric logarithmic axis."""
    ticks = [-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50]
    low, high = ax.get_xlim()
    shown = [tick for tick in ticks if low <= tick <= high]
    ax.set_xticks(shown, [f"{tick:g}".replace("-", "−") for tick in shown])
    ax.minorticks_off()


def shared_legend(
    figure: Any, ax: Any, columns: int = 4, title: str | None = None
) -> None:
    """The legend of one of the axes under all of them."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles, labels, title=title, ncols=columns, loc="outside lower center"
    )


def task_axis(ax: Any, tasks: Sequence[str]) -> None:
    """Tasks from top to bottom, at the heights 0, −1 and so on."""
    names = [textwrap.fill(task, 40) for task in tasks]
    ax.set_yticks(range(0, -len(tasks), -1), names)
    ax.set_ylim(0.5 - len(tasks), 0.5)


def heat_map(ax: Any, cells: list[list[dict[str, Any]]]) -> None:
    """Mean accuracies, in rows from the bottom; hatched where seeds collapsed.

    All heat maps have the same colours.

    Args:
      ax: the axes.
      cells: of :func:`statistics.summary`.
    """
    mean = np.array([[cell["mean"] for cell in row] for row in cells])
    image = ax.imshow(
        mean, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=100
    )
    for i, j in np.ndindex(mean.shape):
        background, cell = image.cmap(image.norm(mean[i, j])), cells[i][j]
        color = "white" if mean[i, j] < 60 else "black"
        text = f"{mean[i, j]:.1f}"
        if cell["collapsed"]:
            text += f"\n{cell['collapsed']} of {len(cell['values'])}"
            square = plt.Rectangle((j - 0.5, i - 0.5), 1, 1)
            square.set(fill=False, hatch="///", edgecolor=color, linewidth=0)
            ax.add_patch(square)
        box = {"facecolor": background, "linewidth": 0, "pad": 1.0}
        ax.text(j, i, text, ha="center", va="center", color=color, size=7.5, bbox=box)
    ax.grid(visible=False)
    ax.tick_params(length=0)


def over_radius(
    ax: Any,
    points: list[dict[str, Any]],
    *,
    label: str,
    color: Any,
    marker: str = "o",
    dashed: bool = False,
) -> None:
    """Accuracy of a grid over the radius, mean ± standard error.

    Args:
      ax: the axes.
      points: of :func:`grids.measure`, by rising ρ.
      label: in the legend.
      color: of the curve.
      marker: of Matplotlib.
      dashed: draw it dashed.
    """
    radii = [point["hyperparameters"]["rho"] for point in points]
    ax.errorbar(
        radii,
        [point["accuracy"]["mean"] for point in points],
        yerr=[point["accuracy"]["standard_error"] for point in points],
        linestyle="--" if dashed else "-",
        color=color,
        marker=marker,
        markersize=3.5,
        capsize=1.5,
        elinewidth=0.8,
        label=label,
    )
    ax.set_xscale("log")
    ax.set_xticks(radii, [f"{rho:g}" for rho in radii])
    ax.minorticks_off()
    ax.set_xlabel("radius ρ")
    ax.set_ylim(0, 100)


def planes(
    axes: Any, rises: dict[str, np.ndarray], label: str, levels: list[float]
) -> None:
    """Squares from −1 to 1 around solutions, by their titles, with one colour bar."""
    for ax in axes[len(rises) :]:
        ax.set_visible(False)
    for ax, (title, losses) in zip(axes, rises.items(), strict=False):
        steps = np.linspace(-1, 1, len(losses))
        last = title == list(rises)[-1]
        plot.plane(
            sharpness.Plane(steps, steps, losses),
            ax=ax,
            levels=levels,
            label=label if last else None,
        )
        ax.set_title(title)
        ax.set_xlabel("first direction")
        ax.set_ylabel("second direction" if ax is axes[0] else "")
        ax.set_xticks([-1, 0, 1])
        ax.set_yticks([-1, 0, 1])
        ax.tick_params(labelleft=ax is axes[0])
        ax.grid(visible=False)
