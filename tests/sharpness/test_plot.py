"""Pictures: finished by default, into a given Axes or a new one, settings untouched."""

import importlib
import sys

import matplotlib as mpl
import numpy as np
import pytest

from optax_vasso import sharpness
from optax_vasso.sharpness import plot

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

PICTURES = {
    "spectrum": lambda **kw: plot.spectrum(DENSITY, eigenvalues=[3.0, 4.0], **kw),
    "line": lambda **kw: plot.line(LINE, **kw),
    "line between": lambda **kw: plot.line(LINE, ends=("SB", "LB"), **kw),
    "plane": lambda **kw: plot.plane(PLANE, **kw),
}
CURVES = [name for name in PICTURES if name != "plane"]


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


@pytest.mark.parametrize("name", CURVES)
def test_a_second_call_adds_a_curve_of_another_colour_to_the_legend(name):
    ax = PICTURES[name](label="first")
    PICTURES[name](ax=ax, label="second")
    lines, _ = ax.get_legend_handles_labels()
    curves = [line for line in lines if line.get_gid() == "curve"]
    assert [line.get_label() for line in curves] == ["first", "second"]
    assert [line.get_color() for line in curves] == list(plot.COLORS[:2])
    shown = [text.get_text() for text in ax.get_legend().get_texts()]
    assert shown[:2] == ["first", "second"]


@pytest.mark.parametrize("name", CURVES)
def test_curves_without_labels_differ_in_colour_and_have_no_legend(name):
    ax = PICTURES[name]()
    PICTURES[name](ax=ax)
    curves = [line for line in ax.lines if line.get_gid() == "curve"]
    assert [line.get_color() for line in curves] == list(plot.COLORS[:2])
    assert ax.get_legend() is None


def test_planes_side_by_side_share_an_axis_and_a_colour_bar():
    """Numbers of a bar are as large as those of its plane, which has none inside."""
    figure, axes = plt.subplots(1, 2, sharey=True)
    plot.plane(PLANE, ax=axes[0], label=None)
    plot.plane(PLANE, ax=axes[1])
    for ax in axes:
        ax.label_outer()
    figure.canvas.draw()
    assert [len(ax.child_axes) for ax in axes] == [0, 1]
    (bar,) = axes[1].child_axes
    assert bar.get_ylabel() == "loss"
    assert not any(text.get_visible() for text in axes[1].get_yticklabels())
    sizes = {text.get_size() for text in bar.get_yticklabels()}
    assert sizes == {axes[0].get_yticklabels()[0].get_size()}


def test_the_numbers_of_a_colour_bar_are_as_large_as_those_of_a_new_figure():
    ax = plot.plane(PLANE)
    ax.figure.canvas.draw()
    (bar,) = ax.child_axes
    labels = [*bar.get_yticklabels(), *ax.get_yticklabels()]
    assert {label.get_size() for label in labels} == {7}


def test_the_numbers_of_a_colour_bar_differ_however_little_the_loss_changes():
    losses = np.linspace(1.58, 1.73, 12).reshape(3, 4)
    ax = plot.plane(sharpness.Plane(np.arange(4), np.arange(3), losses))
    ax.figure.canvas.draw()
    (bar,) = ax.child_axes
    labels = [label.get_text() for label in bar.get_yticklabels()]
    assert len(set(labels)) == len(labels)


def test_the_contours_of_a_plane_are_spaced_by_what_it_spans():
    """Evenly in the logarithm over a factor of 50, evenly from below zero."""

    def heights(plane, **kw):
        (bar,) = plot.plane(plane, **kw).child_axes
        return np.array(bar.get_yticks())

    spaced = heights(PLANE)
    np.testing.assert_allclose(spaced[1:] / spaced[:-1], spaced[1] / spaced[0])
    spaced = heights(PLANE._replace(losses=PLANE.losses - 1))
    np.testing.assert_allclose(np.diff(spaced), spaced[1] - spaced[0])
    for levels in ([1, 2, 4], np.array([1, 2, 4])):
        np.testing.assert_allclose(heights(PLANE, levels=levels), [1, 4])


def test_a_flat_plane_is_drawn_too():
    ax = plot.plane(PLANE._replace(losses=np.full_like(PLANE.losses, 0.5)))
    ax.figure.canvas.draw()


def test_a_colour_may_be_chosen():
    for name in CURVES:
        ax = PICTURES[name](color="#8B0000")
        curves = [line for line in ax.lines if line.get_gid() == "curve"]
        assert [line.get_color() for line in curves] == ["#8B0000"]


def test_ticks_of_eigenvalues_have_the_colour_of_their_curve_and_one_explanation():
    ax = PICTURES["spectrum"](label="first")
    PICTURES["spectrum"](ax=ax, label="second")
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["first", "second", "single eigenvalues"]
    ticks = [line for line in ax.lines if line.get_gid() == "ticks"]
    assert [line.get_color() for line in ticks] == list(plot.COLORS[:2])


def test_a_line_between_two_solutions_marks_its_ends_once():
    ax = PICTURES["line between"]()
    PICTURES["line between"](ax=ax)
    assert [text.get_text() for text in ax.texts] == ["SB", "LB"]
    assert [text.get_ha() for text in ax.texts] == ["right", "left"]  # outside
    ends = [line for line in ax.lines if line.get_label() == "_end"]
    assert [line.get_xdata()[0] for line in ends] == [0, 1]
    assert ax.get_xlabel() == "position α on the line from SB (0) to LB (1)"


def test_the_module_is_imported_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    importlib.reload(plot)


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[plot\]' in a clone"):
        plot.line(LINE)
