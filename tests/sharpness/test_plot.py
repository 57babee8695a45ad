"""Pictures: finished by default, into a given Axes or a new one, settings untouched."""

import sys

import matplotlib as mpl
import numpy as np
import pytest

from optax_vasso import plot, sharpness

mpl.use("Agg")
import matplotlib.pyplot as plt

GRID = np.linspace(-1, 5, 50)
DENSITY = sharpness.SpectralDensity(GRID, np.exp(-(GRID**2)), GRID, GRID)
LINE = sharpness.Line(np.linspace(-1, 2, 31), np.linspace(-1, 2, 31) ** 2 + 0.1)
PLANE = sharpness.Plane(
    np.linspace(-1, 1, 9),
    np.linspace(-2, 2, 11),
    0.1 + np.linspace(-2, 2, 11)[:, None] ** 2 + np.linspace(-1, 1, 9) ** 2,
)
STEPS = np.arange(5)
ONES = np.ones(5)

PICTURES = {
    "spectrum": lambda **kw: plot.spectrum(DENSITY, eigenvalues=[3.0, 4.0], **kw),
    "interpolation": lambda **kw: plot.interpolation(LINE, ends=("SB", "LB"), **kw),
    "landscape_1d": lambda **kw: plot.landscape_1d(LINE, **kw),
    "landscape_2d": lambda **kw: plot.landscape_2d(PLANE, **kw),
    "sharpness_over_training": lambda **kw: plot.sharpness_over_training(
        STEPS, ONES, 3 * ONES, 0.1 * ONES, average_error=0.01 * ONES, **kw
    ),
    "adversary_stability": lambda **kw: plot.adversary_stability(
        STEPS, ONES, error=0.1 * ONES, **kw
    ),
    "sharpness_against_gap": lambda **kw: plot.sharpness_against_gap(ONES, STEPS, **kw),
}
CURVES = [name for name in PICTURES if name != "landscape_2d"]
LABELLED = [name for name in CURVES if name != "sharpness_over_training"]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_an_axes_with_labels_that_draws(name):
    before = dict(mpl.rcParams)
    ax = PICTURES[name]()
    ax.figure.canvas.draw()
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert ax.figure.get_size_inches()[0] == pytest.approx(3.5)
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_into_the_axes_that_is_given(name):
    figure, ax = plt.subplots()
    assert PICTURES[name](ax=ax) is ax
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("name", LABELLED)
def test_a_second_call_adds_a_curve_of_another_colour_to_the_legend(name):
    ax = PICTURES[name](label="first")
    PICTURES[name](ax=ax, label="second")
    lines, labels = ax.get_legend_handles_labels()
    assert labels == ["first", "second"]
    assert [line.get_color() for line in lines] == list(plot.COLORS[:2])


@pytest.mark.parametrize("name", LABELLED)
def test_curves_without_labels_differ_in_colour_and_have_no_legend(name):
    ax = PICTURES[name]()
    PICTURES[name](ax=ax)
    curves = [line for line in ax.lines if line.get_gid() == "curve"]
    assert [line.get_color() for line in curves] == list(plot.COLORS[:2])
    assert ax.get_legend() is None


def test_landscapes_side_by_side_may_share_an_axis():
    figure, axes = plt.subplots(1, 2, sharey=True)
    for ax in axes:
        plot.landscape_2d(PLANE, ax=ax)
        ax.label_outer()
    figure.canvas.draw()
    plt.close(figure)


def test_the_three_kinds_of_sharpness_have_names():
    ax = PICTURES["sharpness_over_training"]()
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["worst direction", "ascent direction", "average"]
    heights = [line.get_ydata()[0] for line in ax.lines]
    assert heights == pytest.approx([3, 1, 0.1])


def test_the_interpolation_marks_its_ends_once():
    ax = PICTURES["interpolation"]()
    PICTURES["interpolation"](ax=ax)
    assert [text.get_text() for text in ax.texts] == ["SB", "LB"]


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'optax-vasso\[plot\]'$"):
        plot.landscape_1d(LINE)
