"""Pictures of what :mod:`optax_vasso.sharpness` measures.

Each function draws into ``ax`` or makes a figure as wide as a column of text, and
returns the Axes. Call one again with the same ``ax`` and another ``label`` to compare:
colours, which stay apart for the colour-blind, and line styles follow by themselves.
Matplotlib's settings are left as they are.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Axes = Any
ArrayLike = Any

# Okabe and Ito, "Color Universal Design", 2008, the dark ones first.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
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
) -> Axes:
    """The spectral density on a logarithmic scale, with outliers below it.

    Args:
      density: a :class:`~optax_vasso.sharpness.SpectralDensity`.
      eigenvalues: an array of single eigenvalues to mark by ticks at the lower edge, as
        of :func:`~optax_vasso.sharpness.largest_eigenpairs`.
      ax: the Axes to draw into; None for a new figure.
      label: the name in the legend.

    Returns:
      The Axes.
    """
    ax = _axes(ax)
    values = np.asarray(density.density)
    # Between eigenvalues there is what is left of a Gaussian's tail: leave it out.
    shown = np.where(values > values.max() * 1e-7, values, np.nan)
    (line,) = ax.plot(density.grid, shown, label=label, **_next(ax))
    if eigenvalues is not None:
        ax.plot(
            np.asarray(eigenvalues),
            np.full(np.size(eigenvalues), 0.02),
            "|",
            color=line.get_color(),
            markersize=8,
            transform=ax.get_xaxis_transform(),
        )
    ax.set_yscale("log")
    ax.set_xlabel("eigenvalue λ (loss per squared unit of parameters)")
    ax.set_ylabel("density (per unit of λ)")
    return _finish(ax)


def interpolation(
    line: Any,
    *,
    ends: tuple[str, str] = ("start", "end"),
    ax: Axes | None = None,
    label: str | None = None,
    ylabel: str = "loss",
) -> Axes:
    """The loss on the line between two solutions, which are at α = 0 and 1.

    Args:
      line: a :class:`~optax_vasso.sharpness.Line`, as of
        :func:`~optax_vasso.sharpness.between`.
      ends: names of the two solutions, written at the upper edge.
      ax: the Axes to draw into; None for a new figure.
      label: the name in the legend.
      ylabel: what is drawn, with its unit.

    Returns:
      The Axes.
    """
    ax = _axes(ax)
    if not ax.lines:
        for alpha, name in zip((0, 1), ends, strict=True):
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
    ax.plot(line.steps, line.losses, label=label, **_next(ax))
    ax.set_xlabel("α, position on the line from one to the other")
    ax.set_ylabel(ylabel)
    return _finish(ax)


def landscape_1d(
    line: Any,
    *,
    ax: Axes | None = None,
    label: str | None = None,
    xlabel: str = "distance from the solution (units of the parameters)",
    ylabel: str = "loss",
) -> Axes:
    """The loss along a direction.

    Args:
      line: a :class:`~optax_vasso.sharpness.Line`, as of
        :func:`~optax_vasso.sharpness.along`.
      ax: the Axes to draw into; None for a new figure.
      label: the name in the legend, as of the direction.
      xlabel: what the steps are, with their unit.
      ylabel: what is drawn, with its unit.

    Returns:
      The Axes.
    """
    ax = _axes(ax)
    ax.plot(line.steps, line.losses, label=label, **_next(ax))
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    return _finish(ax)


def landscape_2d(
    plane: Any,
    *,
    ax: Axes | None = None,
    label: str = "loss",
    levels: Sequence[float] | int = 12,
) -> Axes:
    """The loss on a plane as filled contours, the solution as a cross.

    Args:
      plane: a :class:`~optax_vasso.sharpness.Plane`.
      ax: the Axes to draw into; None for a new figure.
      label: what the colour bar shows, with its unit.
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
    contours = ax.contourf(xs, ys, losses, cmap="cividis", **shown)
    ax.contour(xs, ys, losses, levels=heights, colors="white", linewidths=0.3)
    ax.plot(0, 0, "+", color="white", markersize=8)
    bar = ax.figure.colorbar(contours, cax=ax.inset_axes((1.05, 0, 0.06, 1)))
    bar.set_label(label, fontsize=ax.yaxis.label.get_size())
    # Not the size of the first tick label: axes that share theirs may have none.
    bar.ax.tick_params(labelsize=ax.yaxis.get_tick_params().get("labelsize"))
    bar.set_ticks(heights[::2], labels=[f"{height:.2g}" for height in heights[::2]])
    ax.set_aspect("equal")
    ax.set_xlabel("first direction (1 = its length)")
    ax.set_ylabel("second direction (1 = its length)")
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
    for i, (label, values) in enumerate(kinds.items()):
        style = _next(ax)
        ax.plot(
            steps, np.asarray(values), label=label, marker=_MARKERS[i], ms=3, **style
        )
        if label == "average" and average_error is not None:
            _band(ax, steps, values, average_error, style["color"])
    ax.set_yscale("log", nonpositive="mask")
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
    xlabel: str = "epoch",
) -> Axes:
    """How far the perturbation moves from step to step, in units of its length.

    Args:
      steps: when it was measured, shape ``(n,)``.
      stability: ‖ε_t − ε_{t−1}‖/ρ, between 0 and 2, shape ``(n,)``, as
        :func:`optax_vasso.track_stability` has it.
      error: its standard errors, drawn as a band.
      ax: the Axes to draw into; None for a new figure.
      label: the name in the legend.
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
    style = _next(ax)
    ax.plot(steps, stability, label=label, **style)
    if error is not None:
        _band(ax, steps, stability, error, style["color"])
    ax.set_ylim(0, 2.2)  # Room for the legend above two unrelated directions.
    ax.set_xlabel(xlabel)
    ax.set_ylabel("‖ε$_t$ − ε$_{t−1}$‖ / ρ")
    return _finish(ax)


def sharpness_against_gap(
    sharpness: ArrayLike,
    gap: ArrayLike,
    *,
    ax: Axes | None = None,
    label: str | None = None,
    xlabel: str = "sharpness",
    ylabel: str = "generalization gap",
) -> Axes:
    """Sharpness against what it is to predict, one point a solution.

    Args:
      sharpness: any measure, positive, shape ``(n,)``; the axis is logarithmic.
      gap: training minus test accuracy, or test minus training loss, shape ``(n,)``.
      ax: the Axes to draw into; None for a new figure.
      label: the name in the legend, as of the method of training.
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
        **(_next(ax) | {"linestyle": "none"}),
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
            "Pictures need matplotlib: pip install 'optax-vasso[plot]'"
        ) from None
    with plt.rc_context(_STYLE):
        _, ax = plt.subplots(
            figsize=(_COLUMN_WIDTH, 0.75 * _COLUMN_WIDTH), layout="constrained"
        )
    return ax


def _drawn(ax: Axes) -> int:
    """How many curves there are; ticks and lines of reference are none."""
    return sum(line.get_gid() == "curve" for line in ax.lines)


def _next(ax: Axes) -> dict[str, Any]:
    number = _drawn(ax)
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "linewidth": 1.3,
        "gid": "curve",
    }


def _band(
    ax: Axes, steps: ArrayLike, values: ArrayLike, error: ArrayLike, color: str
) -> None:
    values, error = np.asarray(values), np.asarray(error)
    ax.fill_between(
        steps, values - error, values + error, color=color, alpha=0.25, linewidth=0
    )


def _finish(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.3, linewidth=0.5)
    _, labels = ax.get_legend_handles_labels()
    if labels:
        size = ax.xaxis.get_ticklabels()[0].get_fontsize()
        ax.legend(frameon=False, fontsize=size)
    return ax
