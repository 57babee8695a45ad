"""Every number of the page of results and of the README's tables is that of a file."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return importlib.import_module("results_tables")
    finally:
        sys.path.remove(str(ROOT / "docs"))


def test_the_tables_are_those_that_the_files_make(tables):
    page = tables.PAGE.read_text()
    assert tables.fill(page) == page, "run python docs/results_tables.py"


def test_every_table_has_a_place_on_the_page(tables):
    places = [match[2] for match in tables.PLACE.finditer(tables.PAGE.read_text())]
    assert sorted(places) == sorted(tables.TABLES)


@pytest.mark.parametrize("noise", ["0.75", "0.5"])
def test_the_readme_quotes_the_results(noise):
    results = json.loads((ROOT / "results" / f"label_noise_{noise}.json").read_text())
    rows = [
        [cell.strip(" *") for cell in line.split("|")[1:-1]]
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("|")
    ]
    for method in results["methods"].values():
        label = method["label"].replace(" p =", ", p =").replace(" k =", ", k =")
        accuracy = f"{method['mean']:.1f} ± {method['standard_error']:.1f}"
        assert any(row[0] == label and accuracy in row for row in rows), label


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_what_a_page_quotes_is_on_the_page_of_results(tables, page):
    results = tables.PAGE.read_text()
    for quoted in re.findall(r"\d+\.\d+ ± \d+\.\d+", (ROOT / page).read_text()):
        assert quoted in results, quoted


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name
)
def test_the_tests_that_a_page_names_exist(page):
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", page.read_text()):
        assert f"def {name}(" in sources, name
