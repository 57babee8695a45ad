"""The table of trainers, and the versions that it names."""

import re
import tomllib

from pages import FOREIGN, ROOT

FOLDER = ROOT / "docs" / "trainers"
TEXTS = {page.stem: page.read_text() for page in FOLDER.glob("*.md")}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]


def test_the_versions_that_are_tested_are_those_that_the_pages_name():
    pinned = dict(entry.split("==") for entry in EXTRAS["trainers"] if "==" in entry)
    assert pinned.keys() | {"haliax"} == FOREIGN
    for package, version in pinned.items():
        assert version in TEXTS["index"], package
        pages = [name for name, text in TEXTS.items() if version in text]
        assert len(pages) == 2, (package, pages)


def test_the_table_links_to_every_page():
    linked = set(re.findall(r"\]\(([a-z-]+)\.md", TEXTS["index"]))
    assert linked == TEXTS.keys() - {"index"}
