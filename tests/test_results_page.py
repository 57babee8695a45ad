"""Every number of the pages of results, and every one quoted, is that of a file."""

import importlib
import json
import re
import sys
from pathlib import Path

import jax
import pytest

from experiments import answers, evidence, label_noise
from experiments.harness.tables import PLACE, fill

ROOT = Path(__file__).parent.parent
QUOTING = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("index", "choosing", "lagged")),
    *sorted((ROOT / "docs").glob("results/*.md")),
    *sorted((ROOT / "docs").glob("tutorials/*.md")),
]


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return importlib.import_module("results_tables")
    finally:
        sys.path.remove(str(ROOT / "docs"))


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


def test_the_readme_shows_the_evidence_on_the_task_of_the_main_job():
    """Every method of the main job, at equal gradients."""
    rows = [
        [cell.strip(" *") for cell in line.split("|")[1:-1]]
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("|")
    ]
    found = published("evidence")["tasks"][label_noise.TASK]["gradients"]
    for name in label_noise.DEFAULT:
        last = found[name]["last"]
        accuracy = f"{last['mean']:.1f} ± {last['standard_error']:.1f}"
        assert any(row[0] == found[name]["label"] and accuracy in row for row in rows)


@pytest.mark.parametrize("budget", ["gradients", "epochs"])
def test_the_main_job_repeats_the_evidence(budget):
    """The same seeds and hyperparameters: the same trainings, up to rounding."""
    name = "label_noise" if budget == "gradients" else "label_noise_epochs"
    searched = published("evidence")["tasks"][label_noise.TASK][budget]
    for method, row in published(name)["methods"].items():
        assert row["last"]["mean"] == pytest.approx(
            searched[method]["last"]["mean"], abs=row["last"]["standard_error"]
        )


def test_the_published_evidence_is_what_the_command_makes():
    units = [
        (name, method)
        for name, task in published("evidence")["tasks"].items()
        for method in task["search"]
    ]
    assert sorted(units) == sorted(evidence.units_of(evidence.parsed([])))


def test_the_answers_are_those_of_the_evidence():
    found = published("evidence")["tasks"]
    for question, rows in published("answers")["questions"].items():
        expected = answers.answer(found, answers.QUESTIONS[question])
        expected = json.loads(json.dumps(expected))
        assert jax.tree.structure(rows) == jax.tree.structure(expected)
        # The last digits depend on the version of SciPy.
        for one, other in zip(
            jax.tree.leaves(rows), jax.tree.leaves(expected), strict=True
        ):
            assert one == other or one == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name
)
def test_the_tests_that_a_page_names_exist(page):
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", page.read_text()):
        assert f"def {name}(" in sources, name
