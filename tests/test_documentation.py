"""Every Python block of the README and the docs runs, in order, as a reader would."""

import re

import cases
import pages
import pytest
from pages import BLOCK, ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
# What a reader meets first; the others run with --all, which .ci/run asks of this file.
FIRST = ("README.md",)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)")


@pytest.mark.parametrize(
    "page", cases.every([p for p, t in TEXTS.items() if BLOCK.search(t)], FIRST)
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages.names_of(page)


@pytest.mark.parametrize("page", [p for p, t in TEXTS.items() if LINK.search(t)])
def test_the_links_of_a_page_lead_somewhere(page):
    for target in LINK.findall(TEXTS[page]):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_the_readme_has_code_and_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert len(BLOCK.findall(text)) >= 2
    assert "-m experiments.label_noise" in text
    assert "-m pytest" in text
