"""Every number of the pages of results, and every one quoted, is that of a file."""

import importlib
import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.text import Text

from experiments import evidence, label_noise
from experiments.harness import figures, verdicts
from experiments.harness.tables import PLACE, fill

ROOT = Path(__file__).parent.parent
SHOWING = [ROOT / "docs" / "cost.md", *sorted((ROOT / "docs").glob("results/*.md"))]
QUOTING = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("index", "choosing", "lagged")),
    *sorted((ROOT / "docs").glob("results/*.md")),
    *sorted((ROOT / "docs").glob("tutorials/*.md")),
]


def of_docs(name):
    """A script of docs/, which is no package."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "docs"))


@pytest.fixture(scope="module")
def tables():
    return of_docs("results_tables")


def published(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def test_the_tables_are_those_that_the_files_make(tables):
    for page in tables.PAGES:
        text = page.read_text()
        assert fill(text, tables.TABLES) == text, "run python docs/results_tables.py"


def test_every_table_has_one_place_on_the_pages(tables):
    places = [
        match[2] for page in tables.PAGES for match in PLACE.finditer(page.read_text())
    ]
    assert sorted(places) == sorted(tables.TABLES)


@pytest.mark.parametrize("page", QUOTING, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_quotes_stands_in_a_table(tables, page):
    """Accuracies and differences, with their sign where one is quoted."""
    known = "".join(
        match[3]
        for results in tables.PAGES
        for match in PLACE.finditer(results.read_text())
    )
    text = PLACE.sub("", page.read_text())
    for quoted in re.findall(r"[+−]?\d+\.\d+ ± \d+\.\d+", text):
        assert quoted in known, quoted


@pytest.mark.parametrize("page", SHOWING, ids=lambda page: page.name)
def test_a_figure_links_to_itself_and_can_be_drawn_again(page):
    drawn = {
        f"{name}{added}.png"
        for name, draw in of_docs("redraw").DRAWINGS.items()
        for added in (draw if isinstance(draw, dict) else [""])
    }
    text = page.read_text()
    shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert re.findall(r"\[!\[[^]]*\]\(([^)]*)\)\]\(\1\)", text) == shown
    assert {Path(path).name for path in shown} <= drawn


@pytest.mark.parametrize("name", of_docs("redraw").DRAWINGS)
def test_a_figure_is_as_wide_as_a_page_with_text_that_can_be_read(name, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    draw = of_docs("redraw").DRAWINGS[name]
    for one in draw.values() if isinstance(draw, dict) else [draw]:
        one(ROOT / f"{name}.png", published(name))
    for figure in drawn:
        assert figure.get_figwidth() == pytest.approx(figures.WIDTH)
        sizes = [
            text.get_fontsize()
            for text in figure.findobj(Text)
            if text.get_visible() and text.get_text().strip()
        ]
        assert min(sizes) >= 7.5
        plt.close(figure)


def test_readme_main_job_and_evidence_give_one_comparison_one_verdict():
    """Accuracy and gain of every method of the main job are the same in all three."""
    of_evidence = published("evidence")["tasks"][label_noise.TASK]["methods"]
    of_job = published("label_noise")["methods"]
    rows = [
        [cell.strip(" *") for cell in line.split("|")[1:-1]]
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("|")
    ]
    _, lines = verdicts.cells({name: of_evidence[name] for name in label_noise.DEFAULT})
    for name, (label, accuracy, over_sgd, _) in zip(
        label_noise.DEFAULT, lines, strict=True
    ):
        (row,) = (row for row in rows if row[0] == label and accuracy in row)
        assert over_sgd in row
        assert of_job[name]["picked"] == of_evidence[name]["picked"]
        # The same trainings, up to rounding, which memorizing amplifies.
        assert of_job[name]["accuracy"]["mean"] == pytest.approx(
            of_evidence[name]["accuracy"]["mean"], abs=0.3
        )


def test_the_published_evidence_is_what_the_command_makes():
    units = [
        (name, method)
        for name, task in published("evidence")["tasks"].items()
        for method in task["methods"]
    ]
    assert sorted(units) == sorted(evidence.units_of(evidence.parsed([])))


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name
)
def test_the_tests_that_a_page_names_exist(page):
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", page.read_text()):
        assert f"def {name}(" in sources, name
