"""Running tests on a copy of the repository, each time in a fork that has JAX imported.

A fork costs milliseconds where a new interpreter costs seconds, and XLA's programs come
from a cache on the disk wherever the error does not change them.
"""

import contextlib
import gc
import importlib.metadata
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.mutation.mutants import PACKAGE, root, source_of

# What tests import, but for the library; nothing here may start a backend of JAX.
IMPORTED = (
    "numpy scipy.stats sklearn.datasets hypothesis jax jax.numpy optax optax.contrib "
    "flax.linen flax.nnx chex orbax.checkpoint haiku equinox matplotlib.pyplot jmp"
)
# They test the repository and not the library, or take minutes to reach it.
LEFT_OUT = (
    "tests/experiments/",
    "tests/trainers/",
    "tests/test_api_reference.py",
    "tests/test_benchmarks.py",
    "tests/test_documentation.py",
    "tests/test_example_programs.py",
    "tests/test_layout.py",
    "tests/test_release.py",
    "tests/test_results_page.py",
    "tests/test_workflows.py",
)
BROKEN = 98  # exit status: the library cannot be imported
# Seconds and files of the parts in which tests are run: most errors end in the first.
PARTS = (1.0, 4), (8.0, 10), (float("inf"), 1000)
# Of processor time, not of the clock: a loaded machine is no endless loop.
PATIENCE = 60.0  # seconds to import, collect and compile, whatever the tests take


class Folder(NamedTuple):
    """Where a run keeps what it knows: a copy of the repository, tests, results."""

    path: Path

    @property
    def tree(self):
        return self.path / "tree"

    @property
    def tests(self):
        return self.path / "tests"


def test_files():
    """The files of tests that have to notice."""
    files = sorted((root() / "tests").rglob("test_*.py"))
    names = [file.relative_to(root()).as_posix() for file in files]
    return [name for name in names if not name.startswith(LEFT_OUT)]


def copy_repository(folder):
    """Bring the copy up to date with the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=root(),
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    wanted = {name for name in listed.split("\0") if name and (root() / name).is_file()}
    for name in wanted:
        here, there = root() / name, folder.tree / name
        same = there.exists() and (
            here.stat().st_mtime == there.stat().st_mtime
            and here.stat().st_size == there.stat().st_size
        )
        if not same:
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(here, there)
    for path in folder.tree.rglob("*.py"):
        if path.relative_to(folder.tree).as_posix() not in wanted:
            path.unlink()
    # Programs that tests start: they say which lines they run (see `record`).
    (folder.tree / "sitecustomize.py").write_text(
        "import os\n"
        "if 'COVERAGE_PROCESS_START' in os.environ:\n"
        "    import sys\n"
        "    sys.path.append(os.environ['COVERAGE_IS_IN'])\n"
        "    import coverage\n"
        "    coverage.process_startup()\n"
    )


@contextlib.contextmanager
def changed(folder, mutant):
    """The copy, with the error in it."""
    path = folder.tree / PACKAGE / mutant.file
    source, times = path.read_bytes(), path.stat()
    if source != source_of(mutant.file):
        raise SystemExit(f"{mutant.file} has changed since this run began")
    path.write_bytes(mutant.text(source))
    # Not the time that is noted in what was compiled of the right text.
    os.utime(path, (time.time(), times.st_mtime + 1000))
    try:
        yield
    finally:
        path.write_bytes(source)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def prepare(folder):
    """Import what tests need, once, and set what all forks inherit."""
    folder.path.mkdir(parents=True, exist_ok=True)
    copy_repository(folder)
    tree = str(folder.tree)
    more = [p for p in os.environ.get("PYTHONPATH", "").split(":") if p != str(root())]
    os.environ.update(
        PYTHONPATH=":".join([tree, *filter(None, more)]),
        JAX_PLATFORMS="cpu",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        JAX_COMPILATION_CACHE_DIR=str(folder.path / "compiled"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
        MPLBACKEND="agg",
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))
    for name in IMPORTED.split():
        importlib.import_module(name)
    for plugin in importlib.metadata.entry_points(group="pytest11"):
        plugin.load()
    assert not any(name.startswith(PACKAGE) for name in sys.modules)
    # Every fork, and pytest at its end, would otherwise search these modules for
    # garbage, which takes longer than most tests.
    gc.collect()
    gc.freeze()


def in_fork(action, log, seconds):
    """Call in a fork; returns what it exits with, None if it took too long.

    Args:
        action: What to call, without arguments; it returns the exit status.
        log: The file of what it prints.
        seconds: Of processor time that the fork may take, and a program that it starts.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setsid()
            # To Linux it has as much to say as any other session, however nice it is.
            with contextlib.suppress(OSError):
                Path("/proc/self/autogroup").write_text(str(os.nice(0)))
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            seconds = int(seconds)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
            with open(log, "wb") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            code = action()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    handle, ended = os.pidfd_open(child), []
    try:
        ended, _, _ = select.select([handle], [], [], 20 * seconds)
    finally:  # this process may have been told to stop
        with contextlib.suppress(ProcessLookupError):  # and whatever it has started
            os.killpg(child, signal.SIGKILL)
        os.close(handle)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if ended and code != -signal.SIGXCPU else None


class Chosen:
    """A plugin of pytest: these tests in this order, and which of them failed."""

    def __init__(self, tests, notes):
        self.order = {test: i for i, test in enumerate(tests)}
        self.notes = notes

    def note(self, **what):
        with open(self.notes, "a") as out:
            out.write(json.dumps(what) + "\n")

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.nodeid in self.order]
        items.sort(key=lambda item: self.order[item.nodeid])
        self.note(collected=len(items))

    def pytest_collectreport(self, report):
        if report.failed:
            self.note(failed=f"import of {report.nodeid}")

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.note(failed=report.nodeid)


def run_tests(folder, tests, until_one_fails=True, *, coverage=None):
    """What ``in_fork`` calls: pytest on the copy, in the order of the list."""

    def action():
        os.chdir(folder.tree)
        sys.path[:] = [str(folder.tree), *(p for p in sys.path if p != str(root()))]
        # `tests` is a package of the copy from here on.
        for name in [n for n in sys.modules if n == "tests" or n.startswith("tests.")]:
            del sys.modules[name]
        arguments = ["-q", "--tb=line", "-p", "no:cacheprovider"]
        # Of packages that are imported before pytest starts.
        arguments += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        if coverage is not None:
            return coverage(arguments)
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        try:
            importlib.import_module(PACKAGE)
        except Exception:
            traceback.print_exc()
            return BROKEN
        files = list(dict.fromkeys(test.split("::")[0] for test in tests))
        plugin = Chosen(tests, folder.path / "notes.jsonl")
        arguments += ["-x"] if until_one_fails else []
        return int(pytest.main([*arguments, *files], plugins=[plugin]))

    return action


class Answer(NamedTuple):
    """What became of a mutant."""

    status: str  # caught, survived, timeout, error
    by: str
    tests: int
    seconds: float


def try_mutant(folder, mutant, tests):
    """Run the tests of a mutant until one fails.

    Args:
        folder: Of the run.
        mutant: The error.
        tests: Pairs of a test and its seconds, those first that are likely to fail.
    """
    began = time.time()
    tried = 0
    left, sizes = list(tests), list(PARTS)
    while left:
        part = first_part(left, *sizes[0])
        with changed(folder, mutant):
            code, collected, failed = trial(folder, part)
        tried += collected
        if code in (0, 5):  # 5: nothing collected, for the record is older
            left = [pair for pair in left if pair not in set(part)]
            sizes = sizes[1:] or sizes
            continue
        status, by = "error", f"exit status {code}"
        if code is None:
            status, by = "timeout", ""
        elif code == BROKEN:
            status, by = "caught", "import of the library"
        elif failed:
            status, by = "caught", failed
        elif code < 0:
            status, by = "caught", f"signal {-code}"
        return Answer(status, by, tried, time.time() - began)
    return Answer("survived", "", tried, time.time() - began)


def trial(folder, part, *, until_one_fails=True):
    """Run some tests: the exit status, how many there were, and which failed first."""
    notes = folder.path / "notes.jsonl"
    notes.write_text("")
    code = in_fork(
        run_tests(folder, [test for test, _ in part], until_one_fails),
        folder.path / "log",
        PATIENCE + 6 * sum(seconds for _, seconds in part),
    )
    seen = [json.loads(line) for line in notes.read_text().splitlines()]
    failed = [line["failed"] for line in seen if "failed" in line]
    collected = sum(line.get("collected", 0) for line in seen)
    return code, collected, failed if not until_one_fails else next(iter(failed), None)


def failing(folder, tests):
    """Those of some tests that fail without any error in the library.

    They say nothing about a mutant: they depend on what ran before, or on a cache.
    """
    code, _, failed = trial(folder, [(t, 10.0) for t in tests], until_one_fails=False)
    return set(tests) & set(failed) if code in (0, 1) else set()


def first_part(tests, most_seconds, most_files):
    """The first tests, from so many files and for so long, and one at least."""
    first, files, spent = [], set(), 0.0
    for test, seconds in tests:
        file = test.split("::")[0]
        if first and (
            spent + seconds > most_seconds or len(files | {file}) > most_files
        ):
            continue
        first.append((test, seconds))
        files.add(file)
        spent += seconds
    return first
