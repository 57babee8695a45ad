"""Errors put into the library on purpose, one at a time: do the tests notice?

    python -m tests.mutation --random 300        # an hour or two on one core
    python -m tests.mutation --by-hand           # those of by_hand.py
    python -m tests.mutation --random 300 --again    # those that survived, once more
    python -m tests.mutation --table             # what is known, nothing else

The first run records which test runs which line, with coverage (about twenty
minutes); `--record FILES` does so again for files that have changed. Results are
appended to a file as they come, and what is in it is not tried again, so that a run can
be stopped at any time. Tests that caught something are run without an error, once; what
one of them caught that fails then is tried again. At the end there is a table, and
every survivor as a change of lines; what no test can notice belongs into
`equivalent.py`, with the reason.
"""

import argparse
import collections
import json
import time
from pathlib import Path

from tests.mutation import mutants, record, trials


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--random", type=int, default=0, metavar="N", help="N mutants at random")
    add("--seed", type=int, default=0, help="of the random ones")
    add("--by-hand", action="store_true", help="those of by_hand.py")
    add("--modules", nargs="+", metavar="FILE", help="only these, as in gate.py")
    add("--again", action="store_true", help="try survivors once more")
    add("--record", nargs="*", metavar="TEST_FILE", help="first, these or all files")
    add("--table", action="store_true", help="print the results and end")
    add("--minutes", type=float, default=1e9, help="stop after so many")
    add("--least", type=float, default=0, help="per cent to be caught, or exit with 1")
    add("--budget", type=float, default=150, help="seconds of tests per mutant")
    add("--recorded", action="store_true", help="record nothing, use what there is")
    add("--folder", type=Path, default=Path("runs/mutation"), help="of the results")
    add("--results", help="name of the file of results in the folder")
    arguments = parser.parse_args()
    ends = time.time() + 60 * arguments.minutes

    name = arguments.results or f"random-{arguments.seed}"
    results = arguments.folder / f"{name}.jsonl"
    chosen, gone = [], []
    if arguments.by_hand:
        chosen, gone = mutants.by_hand()
    chosen += mutants.sample(arguments.random, arguments.seed, arguments.modules)
    if arguments.modules:
        chosen = [m for m in chosen if m.file in arguments.modules]
    if not arguments.table:
        try_all(arguments, chosen, results, ends)
    if show(latest(results), gone) < arguments.least:
        raise SystemExit(1)


def latest(results):
    """The last answer on each mutant."""
    if not results.exists():
        return {}
    rows = map(json.loads, results.read_text().splitlines())
    return {tuple(row["key"]): row for row in rows}


def try_all(arguments, chosen, results, ends):
    """Record if need be, then try what has no answer yet."""
    folder = trials.Folder(arguments.folder.resolve())
    trials.prepare(folder)
    recorded = record.Known(folder).recorded()
    files = arguments.record or trials.test_files()
    if arguments.record is None:
        files = [] if arguments.recorded else [f for f in files if f not in recorded]
    for file in files:
        number, failed, seconds = record.record(folder, file)
        print(f"{file}: {number} tests, {seconds:.0f} s", *failed, flush=True)
    known = record.Known(folder)
    kept = {"caught", "timeout", "equivalent"}
    kept |= set() if arguments.again else {"survived", "error"}
    while True:
        answers = latest(results)
        distrusted = doubtful(folder, answers)
        left = [
            mutant
            for mutant in chosen
            if answers.get(mutant.key, {}).get("status") not in kept
            or answers[mutant.key]["by"] in distrusted
        ]
        if not left:
            return
        for i, mutant in enumerate(left):
            if time.time() > ends:
                print("out of time")
                return
            tests = known.tests_of(mutant, arguments.budget)
            tests = [pair for pair in tests if pair[0] not in distrusted]
            if mutants.equivalent(mutant.key):
                answer = trials.Answer("equivalent", "", 0, 0.0)
            else:
                answer = trials.try_mutant(folder, mutant, tests)
            row = {"key": mutant.key, "line": mutant.line, "kind": mutant.kind}
            with open(results, "a") as out:
                out.write(json.dumps(row | answer._asdict()) + "\n")
            print(
                f"{i + 1}/{len(left)} {mutant.file}:{mutant.line} {mutant.kind}: "
                f"{answer.status} {answer.by} ({answer.seconds:.0f} s)",
                flush=True,
            )
        kept |= {"survived", "error"}  # what is left now was caught by mistake


def doubtful(folder, answers):
    """Tests that caught a mutant and fail without one, too; each is asked once."""
    path = folder.path / "passes.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    caught = {row["by"] for row in answers.values() if "::" in row["by"]} - known.keys()
    if caught:
        failed = trials.failing(folder, sorted(caught))
        known |= {test: test not in failed for test in caught}
        path.write_text(json.dumps(known, indent=0))
    return {test for test, passes in known.items() if not passes}


def show(answers, gone):
    """Print a table of modules and the survivors; the share that was noticed."""
    counts = collections.defaultdict(collections.Counter)
    survivors = []
    for key, row in sorted(answers.items()):
        status = row["status"]
        if mutants.equivalent(key):
            status = "equivalent"
        elif status in {"survived", "error"}:
            survivors.append(row)
        for where in (key[0], "all"):
            counts[where][status] += 1
    columns = ("caught", "survived", "timeout", "equivalent", "error")
    print(f"\n{'module':32}", "mutants", *(f"{c:>10}" for c in columns))
    total = counts.pop("all", collections.Counter())
    for where, count in [*sorted(counts.items()), ("all", total)]:
        print(f"{where:32}", f"{count.total():7}", *(f"{count[c]:10}" for c in columns))
    fair = total.total() - total["equivalent"] - total["error"]
    noticed = total["caught"] + total["timeout"]
    share = 100 * noticed / max(fair, 1)
    print(f"\nnoticed: {noticed} of {fair}, {share:.1f} %")
    for row in survivors:
        file, function, old, new = row["key"]
        print(f"\n{file}:{row['line']} {function}, {row['kind']}: {row['status']}")
        print(*(f"  - {line}" for line in old.split("\n")), sep="\n")
        print(*(f"  + {line}" for line in new.split("\n")), sep="\n")
    for file, old, _ in gone:
        print(f"\nnot applicable any more: {file}: {old.strip()!r}")
    return share


if __name__ == "__main__":
    main()
