"""Which test runs which line of the library, and how long it takes."""

import ast
import collections
import functools
import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from tests.mutation.mutants import PACKAGE, modules, source_of
from tests.mutation.trials import in_fork, run_tests

LONGEST = 1200.0  # seconds for one file
SETTINGS = """[run]
parallel = true
data_file = {data}
source = {source}
context = ${{MUTATION_TEST-}}
disable_warnings = no-data-collected, module-not-measured, module-not-imported
"""


class Contexts:
    """A plugin of pytest: tells coverage which test runs.

    What a fixture of a whole file does counts for all tests of the file.
    """

    def __init__(self, measured):
        self.measured = measured

    def switch(self, name):
        os.environ["MUTATION_TEST"] = name  # for the programs that the test starts
        self.measured.switch_context(name)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.test = item.nodeid
        self.switch(self.test)
        result = yield
        self.switch("")
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope == "function":
            return (yield)
        self.switch(self.test.split("::")[0])
        result = yield
        self.switch(self.test)
        return result


class Times:
    """A plugin of pytest: how long each test takes, and whether it passes.

    In processor time, with that of the programs it starts: what else the machine does
    has no part in it.
    """

    def __init__(self):
        self.seconds, self.failed = {}, set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        before = sum(os.times()[:4])
        result = yield
        self.seconds[item.nodeid] = round(sum(os.times()[:4]) - before, 3)
        return result

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)


def record(folder, file):
    """Run a file of tests, and keep as JSON which lines each runs, and its seconds."""
    began = time.time()
    work = folder.path / "coverage"
    work.mkdir(exist_ok=True)
    for old in work.iterdir():
        old.unlink()
    settings = work / "settings"
    settings.write_text(
        SETTINGS.format(data=work / "data", source=folder.tree / PACKAGE)
    )
    log = folder.path / "record.log"

    def watched(arguments):
        import coverage

        os.environ["COVERAGE_PROCESS_START"] = str(settings)
        os.environ["COVERAGE_IS_IN"] = str(Path(coverage.__file__).parents[1])
        measured = coverage.Coverage(config_file=str(settings))
        measured.start()
        times = Times()
        code = pytest.main([*arguments, file], plugins=[Contexts(measured), times])
        measured.stop()
        measured.save()
        result = {"seconds": times.seconds, "failed": sorted(times.failed)}
        (work / "times.json").write_text(json.dumps(result))
        return 0 if code in (0, 1) else int(code)

    if in_fork(run_tests(folder, [], coverage=watched), log, LONGEST) != 0:
        raise SystemExit(f"{file} does not run by itself, see {log}")
    times = json.loads((work / "times.json").read_text())
    failed = set(times["failed"])
    seconds = {t: s for t, s in times["seconds"].items() if t not in failed}
    folder.tests.mkdir(exist_ok=True)
    target = folder.tests / (file.replace("/", ".") + ".json")
    known = {
        "file": file,
        "library": {name: digest(name) for name in modules()},
        "seconds": seconds,
        "failed": sorted(failed),
        "lines": _merged(_lines(work, folder)),
    }
    target.write_text(json.dumps(known))
    return len(seconds), sorted(failed), time.time() - began


def _lines(work, folder):
    """Pairs of a module and, by line, the tests that run it."""
    import coverage
    from coverage import CoverageData

    for path in work.glob("data*"):
        data = CoverageData(basename=str(path))
        try:
            data.read()
        except coverage.exceptions.DataError:  # of a program that the test has killed
            continue
        for measured in data.measured_files():
            inside = Path(measured).relative_to(folder.tree / PACKAGE)
            by_line = data.contexts_by_lineno(measured)
            lines = {
                line: [context.strip("|").split("|")[0] for context in contexts]
                for line, contexts in by_line.items()
            }
            yield inside.as_posix(), lines


def _merged(found):
    modules = {}
    for module, lines in found:
        for line, tests in lines.items():
            known = modules.setdefault(module, {}).setdefault(str(line), [])
            known.extend(t for t in tests if t and t not in known)
    return modules


def digest(module):
    """Of a module's text: lines are only comparable within the same."""
    return hashlib.sha256(source_of(module)).hexdigest()[:16]


class Known:
    """All records of a folder, asked for the tests of a mutant."""

    def __init__(self, folder):
        self.files = [
            json.loads(path.read_text()) for path in sorted(folder.tests.glob("*.json"))
        ]
        # Of each test, how many lines of the library it runs.
        self.reach = collections.Counter(
            name
            for known in self.files
            for lines in known["lines"].values()
            for names in lines.values()
            for name in names
        )

    def recorded(self):
        """The files of tests that have a record."""
        return {known["file"] for known in self.files}

    def tests_of(self, mutant, budget):
        """Pairs of a test and its seconds, for one mutant.

        First the tests that run its line, those on that are quick and that run, as the
        other tests of their file do, little beside its module; then the others of these
        files.

        Args:
            mutant: The error.
            budget: Seconds that the tests may take together.
        """
        seconds_of, rank, late = {}, {}, set()
        for known in self.files:
            lines = known["lines"].get(mutant.file, {})
            if not lines:
                continue
            if known["library"].get(mutant.file) == digest(mutant.file):
                names = self._of_line(mutant, lines)
            else:  # the module has changed since: whoever runs any of it
                names = {name for names in lines.values() for name in names}
            seconds = known["seconds"]
            if known["file"] in names:  # a fixture of all tests of the file
                names = set(seconds)
                # The test that was slowest made it.
                late.update(sorted(names, key=seconds.get)[:-1])
            inside = collections.Counter(n for names in lines.values() for n in names)
            in_all = sum(self.reach[name] for name in seconds)
            about = sum(inside[name] for name in seconds) / max(in_all, 1)

            def cost(name, seconds=seconds, inside=inside):
                # With another program it takes longer than it took.
                return (0.2 + seconds[name]) * self.reach[name] / (1 + inside[name])

            # Those of one file are much alike, so that the next is worth less.
            on = sorted(names & seconds.keys(), key=cost)
            place = {name: i + 1 for i, name in enumerate(on)}
            for name in seconds if on else ():
                is_late = name in late or seconds[name] > 1.0
                order = cost(name) * place.get(name, 1) / max(about, 1e-3)
                rank[name] = name not in place, is_late, order, name
                seconds_of[name] = seconds[name]
        chosen, spent = [], 0.0
        for name in sorted(rank, key=rank.get):
            took = 0.1 + seconds_of[name]  # most of a quick test is what is around it
            if spent + took <= budget or not chosen:
                chosen.append((name, seconds_of[name]))
                spent += took
        return chosen

    def _of_line(self, mutant, lines):
        """The tests that run a line; those behind it if it runs at import only."""
        at_import = lines_at_import(mutant.file)
        if mutant.line not in at_import and lines.get(str(mutant.line)):
            return set(lines[str(mutant.line)])
        # A default, or a line in the middle of a statement.
        after = sorted(int(line) for line in lines if int(line) > mutant.line)
        for line in after if mutant.function else ():
            if line not in at_import and lines[str(line)]:
                return set(lines[str(line)])
        return {
            name
            for line, names in lines.items()
            if int(line) not in at_import
            for name in names
        }


@functools.cache
def lines_at_import(file):
    """The lines of a module that run when it is imported, in every test."""
    found = set()

    def walk(statements):
        for node in statements:
            first, last = node.lineno, node.end_lineno
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first = min([first, *(d.lineno for d in node.decorator_list)])
                last = node.body[0].lineno - 1
                if isinstance(node, ast.ClassDef):
                    walk(node.body)
            found.update(range(first, max(first, last) + 1))

    walk(ast.parse(source_of(file)).body)
    return found
