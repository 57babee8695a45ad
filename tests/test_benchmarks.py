"""The benchmarks are listed, compared, and what they found stands on the page."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare, measuring, page
from benchmarks.__main__ import runnable
from experiments.harness import tables

ROOT = Path(__file__).parent.parent
PUBLISHED = sorted(
    path
    for path in (ROOT / "results").glob("*.json")
    if "benchmark" in json.loads(path.read_text())
)


def test_every_benchmark_is_listed():
    assert {"budgets", "limits", "peers", "scaling", "accelerator"} <= set(runnable())


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_result_file_names_device_versions_and_date(path):
    found = json.loads(path.read_text())["environment"]
    assert {"device", "cpu_count", "jax", "jaxlib", "optax", "date"} <= set(found)


@pytest.mark.parametrize("path", page.PAGES, ids=lambda path: path.stem)
def test_the_tables_of_a_page_are_those_that_the_files_make(path):
    text, made = path.read_text(), page.PAGES[path]
    assert tables.fill(text, made) == text, "run python -m benchmarks.page"
    places = [match[2] for match in tables.PLACE.finditer(text)]
    assert sorted(places) == sorted(made)


def test_the_accelerators_command_needs_nothing_but_jax_and_optax():
    """The optional dependencies cannot even be imported."""
    extras = ("flax", "sklearn", "rich", "matplotlib", "orbax", "torch", "haiku")
    lines = (
        "import sys",
        f"sys.modules |= dict.fromkeys({extras})",
        "import benchmarks.accelerator",
        "found = benchmarks.accelerator.network('resnet', smoke=True)",
        "found.loss_fn(found.params, found.batch)",
    )
    subprocess.run([sys.executable, "-c", "; ".join(lines)], check=True, cwd=ROOT)


ROWS = {
    "VaSSO": {
        "operations": 100.0,
        "time / SGD": [1.9, 2.0, 2.1],
        "share": [0.8, 0.85, 0.9],
        "compile_s": 2.0,
    }
}


@pytest.mark.parametrize(
    ("key", "value", "is_worse"),
    [
        ("operations", 102.0, True),
        ("operations", 50.0, False),
        ("time / SGD", [2.2, 2.3, 2.4], True),
        ("time / SGD", [2.0, 2.3, 2.4], False),  # the ranges meet
        ("time / SGD", [1.1, 1.2, 1.3], False),
        ("share", [0.5, 0.6, 0.7], True),
        ("share", [0.95, 0.96, 0.97], False),
        ("compile_s", 2.5, False),  # one time has no spread
        ("compile_s", 4.0, True),
        ("compile_s", None, True),  # measured no more
    ],
)
def test_what_got_worse_is_flagged(tmp_path, capsys, key, value, is_worse):
    new = copy.deepcopy(ROWS)
    new["VaSSO"][key] = value
    paths = []
    for name, rows in (("old", ROWS), ("new", new)):
        content = {"environment": measuring.environment(), "rows": rows}
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(content))
    assert compare.main([str(path) for path in paths]) == is_worse
    assert (f"worse: VaSSO: {key}" in capsys.readouterr().out) == is_worse


def test_the_order_of_the_rounds_turns():
    calls = []
    programs = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = measuring.interleaved(programs, rounds=2)
    assert calls == list("ab" + "ba" + "ab")
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}
    assert measuring.ratios([2.0, 4.0, 6.0], [1.0, 1.0, 1.0]) == [3.0, 4.0, 5.0]
