"""What is published declares what it imports, and says only what an index can show."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from release import check

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OURS = {"optax_vasso", "benchmarks", "examples", "experiments", "release", "tests"}
# The distribution of a module, where it has another name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "haiku": "dm-haiku",
    "haliax": "levanter",  # which is built on it
    "jaxlib": "jax",  # which pins it
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "tensorstore": "orbax-checkpoint",  # which is built on it
    "yaml": "pyyaml",
}


def name_of(requirement):
    return re.split(r"[\[=<>~! ]", requirement, maxsplit=1)[0].lower()


def declared(extras):
    """The distributions that the library and these extras of it ask for."""
    optional = PROJECT["project"]["optional-dependencies"]
    requirements = [*PROJECT["project"]["dependencies"]]
    for extra in extras:
        for requirement in optional[extra]:
            if match := re.fullmatch(r"optax-vasso\[(.*)\]", requirement):
                requirements += declared(match[1].split(","))
            else:
                requirements.append(requirement)
    return {name_of(requirement) for requirement in requirements}


def imported(folder):
    """The third parties' modules that the programs of a folder import, by file."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    beside = {path.stem for path in paths}  # pytest puts their folders on the path
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            for module in {name.split(".")[0] for name in names}:
                if module not in {*sys.stdlib_module_names, *OURS, *beside}:
                    yield path, module


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("optax_vasso", ["plot", "checkpoint"]),
        ("examples", ["examples"]),
        ("experiments", ["vision"]),
        ("benchmarks", ["test", "peers"]),
        ("tests", ["test", "trainers"]),
        ("release", []),
    ],
)
def test_what_is_imported_is_declared(folder, extras):
    known = declared(extras)
    for path, module in imported(folder):
        assert DISTRIBUTIONS.get(module, module).lower() in known, (path, module)


def test_the_core_needs_no_extra():
    """Modules of the extras are imported where they are used."""
    extras = declared(["plot", "checkpoint"]) - declared([])
    for path, module in imported("optax_vasso"):
        if DISTRIBUTIONS.get(module, module) in extras:
            assert path.stem in ("plot", "checkpoint", "description"), path


def description():
    """README.md as an index shows it."""
    text = (ROOT / "README.md").read_text()
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for rule in hook["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    return text


def test_the_description_of_an_index_has_no_relative_links_and_pictures():
    text = description()
    assert check.RELATIVE.search(text) is None
    assert "<!--" not in text
    assert len(check.BLOCK.findall(text)) == len(
        check.BLOCK.findall((ROOT / "README.md").read_text())
    )


@pytest.mark.parametrize(
    "text", ["[a](docs/a.md)", "![a](a.png)", "[a](#a)", '<img src="a.png">']
)
def test_a_relative_link_is_found(text):
    assert check.RELATIVE.search(text)
    assert not check.RELATIVE.search("[a](https://b.org/a.md)")


def test_the_page_on_reliability_names_the_lower_bounds():
    page = (ROOT / "docs/reliability.md").read_text()
    optional = PROJECT["project"]["optional-dependencies"]
    requirements = [
        *PROJECT["project"]["dependencies"],
        *optional["vision"],
        *optional["checkpoint"],
    ]
    oldest = {name_of(r): r.partition(">=")[2] for r in requirements}
    oldest["python"] = PROJECT["project"]["requires-python"].removeprefix(">=")
    titles = {"orbax": "orbax-checkpoint"}
    rows = re.findall(r"^\| (Python|JAX|Optax|Flax|NumPy|Orbax) \| (\S+) ", page, re.M)
    assert len(rows) == 6
    for title, version in rows:
        name = title.lower()
        assert version == oldest[titles.get(name, name)], title


def test_the_version_is_the_same_everywhere():
    version = re.search(
        r'__version__ = "(.*)"', (ROOT / "optax_vasso/__init__.py").read_text()
    )[1]
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    assert f"Version {version}}}" in (ROOT / "docs/index.md").read_text()
