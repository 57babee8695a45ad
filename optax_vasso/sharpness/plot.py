"""Plots of the results of :mod:`optax_vasso.sharpness`.

Each function draws into ``ax`` or makes a figure as wide as a column of text, and
returns the Axes. Call one again with the same ``ax`` and another ``label`` to compare:
colours, which colour-blind readers can tell apart, and line styles then advance in the
order SGD, SAM, VaSSO, lagged VaSSO; ``color`` names another. Matplotlib's settings are
left as they are, and it is imported when the first picture is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Axes = Any
ArrayLike = Any

# Four for the methods: SGD, SAM, VaSSO, lagged VaSSO. The rest is of Okabe and Ito,
# "Color Universal Design", 2008, as the second and the third are.
COLORS = ("#000000", "#0072B2", "#D55E00", "#8B0000", "#009E73", "#CC79A7", "#56B4E9")
_DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1)), (0, (3, 1, 1, 1)), ":")
_COLUMN_WIDTH = 3.5  # inches
_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.7,
    "savefig.dpi": 200,
}


def spectrum(
    density: Any,
    *,
    eigenvalues: ArrayLike | None = None,
    ax: Axes | None = None,
    label: str | None = None,
    color: str | None = None,
) -> Axes:
    """The spectral density on a logarithmic scale, single eigenvalues as ticks below.

    Args:
      density: a :class:`~optax_vasso.sharpness.SpectralDensity`.
      eigenvalues: an array of single eigenvalues to mark by ticks at the lower edge, as
        of :func:`~optax_vasso.sharpness.eigenpairs`.
      ax: the Axes to draw into; None for a new figure.
      label: the name in the legend.
      color: of the curve and the ticks; None for the next of ``COLORS``.

    Returns:
      The Axes.
    """
    ax = _axes(ax)
    values = np.asarray(density.density)
    # Leave out the tails of Gaussians between eigenvalues.
    shown = np.where(values > values.max() * 1e-7, values, np.nan)
    style = _next(ax, color)
    ax.plot(density.grid, shown, label=label, **style)
    if eigenvalues is not None:
        explained = any(line.get_gid() == "ticks" for line in ax.lines)
        ax.plot(
            np.asarray(eigenvalues),
            np.full(np.size(eigenvalues), 0.02),
            "|",
            color=style["color"],
            markersize=8,
            transform=ax.get_xaxis_transform(),
            label="_" if explained or label is None else "single eigenvalues",
            gid="ticks",
        )
    ax.set_yscale("log")
    ax.set_xlabel("eigenvalue λ (loss per squared unit of x)")
    ax.set_ylabel("density of eigenvalues (per unit of λ)")
    return _finish(ax)


def line(
    line: Any,
    *,
    ends: tuple[str, str] | None = None,
    ax: Axes | None = None,
    label: str | None = None,
    color: str | None = None,
    xlabel: str = "step s along the direction (1 = its length)",
    ylabel: str = "loss",
) -> Axes:
    """The loss along a direction, or on the line between two solutions.

    Args:
      line: a :class:`~optax_vasso.sharpness.Line`, as of
        :func:`~optax_vasso.sharpness.along`.
      ends: names of two solutions, marked at the steps 0 and 1; None for a line through
        one solution.
      ax: the Axes to draw into; None for a new figure.
      label: the name in the legend, as of the direction.
      color: of the curve; None for the next of ``COLORS``.
      xlabel: what the steps are, with their unit; with ``ends`` it says which step
        is which of them.
      ylabel: what is drawn, with its unit.

    Returns:
      The Axes.
    """
    ax = _axes(ax)
    if ends is not None:
        xlabel = f"position α on the line from {ends[0]} (0) to {ends[1]} (1)"
        if not ax.lines:
            for alpha, name in zip((0, 1), ends, strict=True):
                _mark_end(ax, alpha, name)
    ax.plot(line.steps, line.losses, label=label, **_next(ax, color))
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    return _finish(ax)


def plane(
    plane: Any,
    *,
    ax: Axes | None = None,
    label: str | None = "loss",
    levels: Sequence[float] | int = 12,
) -> Axes:
    """The loss on a plane as filled contours, the solution as a cross.

    Args:
      plane: a :class:`~optax_vasso.sharpness.Plane`.
      ax: the Axes to draw into; None for a new figure.
      label: what the colour bar shows, with its unit; None for no colour bar, as where
        several planes of the same ``levels`` share one.
      levels: the heights of the contours, or how many: these are spaced evenly in the
        logarithm where the loss is positive and spans more than a factor of three.

    Returns:
      The Axes.
    """
    ax = _axes(ax)
    from matplotlib.colors import BoundaryNorm

    losses = plane.losses
    low, high = np.nanmin(losses), np.nanmax(losses)
    if not isinstance(levels, int):
        heights = np.asarray(levels)
    elif low > 0 and high > 3 * low:
        heights = np.geomspace(low, high, levels)
    else:
        heights = np.linspace(low, high if high > low else low + 1, levels)
    # Colours follow the numbers of the contours, not their distances.
    shown = {
        "levels": heights,
        "norm": BoundaryNorm(heights, 256, extend="both"),
        "extend": "both",
    }
    xs, ys = plane.x_steps, plane.y_steps
    contours = ax.contourf(xs, ys, losses, cmap="viridis", **shown)
    ax.contour(xs, ys, losses, levels=heights, colors="black", linewidths=0.3)
    ax.plot(0, 0, "+", color="white", markersize=8, markeredgewidth=1.5)
    if label is not None:
        bar = ax.figure.colorbar(contours, cax=ax.inset_axes((1.05, 0, 0.06, 1)))
        bar.set_label(label, fontsize=ax.yaxis.label.get_size())
        bar.ax.tick_params(labelsize=ax.yaxis.get_major_ticks(1)[0].label1.get_size())
        bar.set_ticks(heights[::2], labels=_distinct(heights[::2]))
        bar.ax.minorticks_off()
    ax.set_aspect("equal")
    ax.set_xlabel("first direction, s")
    ax.set_ylabel("second direction, t")
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError(
            "Plots need Matplotlib: run pip install '.[plot]' in a clone of "
            "optax_vasso."
        ) from None
    # Outside the context, since a notebook's backend changes settings when it loads.
    figure = plt.figure(
        figsize=(_COLUMN_WIDTH, 0.75 * _COLUMN_WIDTH), layout="constrained"
    )
    with plt.rc_context(_STYLE):
        return figure.add_subplot()


def _distinct(numbers: np.ndarray) -> list[str]:
    """Labels of two digits, or as many as distinguish the numbers."""
    for digits in range(2, 8):
        labels = [f"{number:.{digits}g}" for number in numbers]
        if len(set(labels)) == len(labels):
            break
    return labels


def _next(ax: Axes, color: str | None) -> dict[str, Any]:
    """The style of the next curve; ticks and reference lines do not count."""
    number = sum(line.get_gid() == "curve" for line in ax.lines)
    return {
        "color": color or COLORS[number % len(COLORS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "linewidth": 1.3,
        "gid": "curve",
    }


def _mark_end(ax: Axes, alpha: float, name: str) -> None:
    ax.axvline(alpha, color="0.6", linewidth=0.8, zorder=0, label="_end")
    ax.annotate(
        name,
        (alpha, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4 if alpha else -4, 2),
        textcoords="offset points",
        ha="left" if alpha else "right",
        va="bottom",
        fontsize=7,
    )


def _finish(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.3, linewidth=0.5)
    # The entry for ticks comes after the curves.
    handles = sorted(
        ax.get_legend_handles_labels()[0], key=lambda h: h.get_gid() == "ticks"
    )
    if handles:
        size = ax.xaxis.get_ticklabels()[0].get_fontsize()
        ax.legend(handles=handles, frameon=False, fontsize=size)
    return ax
