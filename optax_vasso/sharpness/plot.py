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
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
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
    # Between eigenvalues there is what is left of a Gaussian's tail: leave it out.
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

    losses = np.asarray(plane.losses)
    low, high = np.nanmin(losses), np.nanmax(losses)
    if isinstance(levels, Sequence):
        heights = np.asarray(levels)
    elif low > 0 and high > 3 * low:
        heights = np.geomspace(low, high, levels)
    else:
        heights = np.linspace(low, high, levels)
    # Colours by the number of the contour, whatever the distance to the next.
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


def sharpness_over_training(
    steps: ArrayLike,
    ascent: ArrayLike,
    worst: ArrayLike,
    average: ArrayLike,
    *,
    average_error: ArrayLike | None = None,
    ax: Axes | None = None,
    xlabel: str = "epoch",
    ylabel: str = "rise of the loss in the ball",
) -> Axes:
    """The three kinds of sharpness while training, on a logarithmic scale.

    A rise that is not positive, as of an average lost in its error, has no place on it
    and is left out with its band.

    Args:
      steps: when they were measured, shape ``(n,)``.
      ascent: rises along the gradient, shape ``(n,)``.
      worst: rises in the worst direction, shape ``(n,)``.
      average: mean rises over directions, shape ``(n,)``.
      average_error: their standard errors, drawn as a band.
      ax: the Axes to draw into; None for a new figure.
      xlabel: the unit of ``steps``.
      ylabel: what is drawn, as with its radius.

    Returns:
      The Axes.
    """
    ax = _axes(ax)
    kinds = {"worst direction": worst, "ascent direction": ascent, "average": average}
    # Not the colours of the methods: these are kinds of sharpness of one.
    for i, (label, values) in enumerate(kinds.items()):
        style = _next(ax, COLORS[4 + i])
        positive = _positive(values)
        ax.plot(steps, positive, label=label, marker=_MARKERS[i], ms=3, **style)
        if values is average and average_error is not None:
            # The band is about positive averages; down to where it leaves the scale.
            lowest = np.nanmin(positive) / 10 if np.isfinite(positive).any() else 1
            _band(ax, steps, positive, average_error, style["color"], lowest)
    ax.set_yscale("log")
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    return _finish(ax)


def adversary_stability(
    steps: ArrayLike,
    stability: ArrayLike,
    *,
    error: ArrayLike | None = None,
    ax: Axes | None = None,
    label: str | None = None,
    color: str | None = None,
    xlabel: str = "epoch",
) -> Axes:
    """How far the perturbation moves from step to step, in units of its length.

    Args:
      steps: when it was measured, shape ``(n,)``.
      stability: ‖ε_t − ε_{t−1}‖/ρ, between 0 and 2, shape ``(n,)``, as it is tracked in
        training.
      error: its standard errors, drawn as a band.
      ax: the Axes to draw into; None for a new figure.
      label: the name in the legend.
      color: of the curve; None for the next of ``COLORS``.
      xlabel: the unit of ``steps``.

    Returns:
      The Axes.
    """
    ax = _axes(ax)
    if not ax.lines:
        ax.axhline(2**0.5, color="0.6", linewidth=0.8, zorder=0, label="_unrelated")
        ax.annotate(
            "unrelated directions, √2",
            (1, 2**0.5),
            xycoords=("axes fraction", "data"),
            xytext=(0, 9),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=7,
            color="0.35",
        )
    style = _next(ax, color)
    ax.plot(steps, stability, label=label, **style)
    if error is not None:
        _band(ax, steps, stability, error, style["color"])
    ax.set_ylim(0, 2.4)  # Room for the legend above two unrelated directions.
    ax.set_xlabel(xlabel)
    ax.set_ylabel("move of the perturbation, ‖ε$_t$ − ε$_{t−1}$‖/ρ")
    return _finish(ax)


def sharpness_against_gap(
    sharpness: ArrayLike,
    gap: ArrayLike,
    *,
    ax: Axes | None = None,
    label: str | None = None,
    color: str | None = None,
    xlabel: str = "sharpness",
    ylabel: str = "generalization gap",
) -> Axes:
    """Sharpness against what it is to predict, one point per solution.

    Args:
      sharpness: any measure, positive, shape ``(n,)``; the axis is logarithmic.
      gap: training minus test accuracy, or test minus training loss, shape ``(n,)``.
      ax: the Axes to draw into; None for a new figure.
      label: the name in the legend, as of the method of training.
      color: of the points; None for the next of ``COLORS``.
      xlabel: the measure, with its unit.
      ylabel: the gap, with its unit.

    Returns:
      The Axes.
    """
    ax = _axes(ax)
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    ax.plot(
        sharpness,
        gap,
        marker=_MARKERS[_drawn(ax) % len(_MARKERS)],
        markersize=4,
        markerfacecolor="none",
        label=label,
        **(_next(ax, color) | {"linestyle": "none"}),
    )
    ax.set_xscale("log")
    # Matplotlib writes every decade's 2 to 9 where there is no more than one decade.
    low, high = ax.get_xlim()
    subs = (1, 2, 5) if high < 200 * low else (1,)
    ax.xaxis.set_major_locator(LogLocator(subs=subs))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    return _finish(ax)


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
    # Outside of the context: a notebook's backend changes settings when it is loaded.
    figure = plt.figure(
        figsize=(_COLUMN_WIDTH, 0.75 * _COLUMN_WIDTH), layout="constrained"
    )
    with plt.rc_context(_STYLE):
        return figure.add_subplot()


def _drawn(ax: Axes) -> int:
    """How many curves there are; ticks and lines of reference are none."""
    return sum(line.get_gid() == "curve" for line in ax.lines)


def _distinct(numbers: np.ndarray) -> list[str]:
    """Two digits of each number, or as many as tell them apart."""
    for digits in range(2, 8):
        labels = [f"{number:.{digits}g}" for number in numbers]
        if len(set(labels)) == len(labels):
            break
    return labels


def _next(ax: Axes, color: str | None) -> dict[str, Any]:
    number = _drawn(ax)
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


def _positive(values: ArrayLike) -> np.ndarray:
    """The values, and NaN for those that a logarithmic scale cannot show."""
    array = np.asarray(values, float)
    return np.where(array > 0, array, np.nan)


def _band(
    ax: Axes,
    steps: ArrayLike,
    values: ArrayLike,
    error: ArrayLike,
    color: str,
    lowest: float = -np.inf,
) -> None:
    values, error = np.asarray(values), np.asarray(error)
    low = np.maximum(values - error, lowest)
    ax.fill_between(steps, low, values + error, color=color, alpha=0.25, linewidth=0)


def _finish(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.3, linewidth=0.5)
    # What explains the ticks comes after the curves.
    handles = sorted(
        ax.get_legend_handles_labels()[0], key=lambda h: h.get_gid() == "ticks"
    )
    if handles:
        size = ax.xaxis.get_ticklabels()[0].get_fontsize()
        ax.legend(handles=handles, frameon=False, fontsize=size)
    return ax
