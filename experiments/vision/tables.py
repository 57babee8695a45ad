"""One command per table of a paper: search, seeds, report; it goes on where it stopped.

    python -m experiments.vision.tables vasso_cifar10 --data-dir DIR
    python -m experiments.vision.tables friendly_cifar100 --data-dir DIR --epochs 100
    python -m experiments.vision.tables vasso_noise --data-dir DIR --grid theta=0.2,0.4

For every preset of the table, each point of the grid is trained once, with a seed of
its own, on nine tenths of the training images and validated on the rest, with the
labels that training sees; the point with the best last epoch is trained with all seeds
and tested. Options of cifar.py may follow and change every run.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.harness import command_line, files, progress
from experiments.vision import cifar, programs, report
from experiments.vision.archives import DataError
from experiments.vision.methods import hyperparameters
from experiments.vision.options import SETTINGS, parse_arguments
from experiments.vision.presets import NOISES, PRESETS

Point = dict[str, float]
Grid = dict[str, list[float]]
VALIDATION = 0.1
# The radii and θ of a summary of arXiv 2509.02433, which proposes this sweep; that of
# arXiv 2309.15639 has θ = 0.4 and 0.9. ASAM's radii: github.com/davda54/sam, issue 37.
GRID: Grid = {"rho": [0.05, 0.1, 0.2, 0.5], "theta": [0.2, 0.4, 0.6, 0.9]}
ASAM_RHO = [0.5, 1.0, 2.0, 5.0]


class Table(NamedTuple):
    """A table of a paper.

    Attributes:
      title: whose it is.
      presets: its rows.
      grid: what is searched by default.
    """

    title: str
    presets: list[str]
    grid: Grid


def _rows(methods: str, models: str, data: str) -> list[str]:
    """All presets of these methods and models on these data, models first."""
    return [f"{m}_{n}_{data}" for n in models.split() for m in methods.split()]


TABLES = {
    "vasso_cifar10": Table(
        "VaSSO 2023, CIFAR-10 (its networks, after its text and its figure)",
        _rows(
            "sgd sam asam vasso", "vgg11_bn resnet18 wrn28_10 pyramidnet110", "cifar10"
        ),
        GRID,
    ),
    "vasso_cifar100": Table(
        "VaSSO 2023, CIFAR-100 (its networks, after its figure)",
        _rows("sgd sam asam vasso", "resnet18 wrn28_10 pyramidnet110", "cifar100"),
        GRID,
    ),
    "vasso_noise": Table(
        "VaSSO 2023, label noise on CIFAR-10",
        [
            name
            for noise in NOISES
            for name in _rows(
                "sgd sam vasso", "resnet18", f"cifar10_noise{100 * noise:.0f}"
            )
        ],
        GRID,
    ),
    "evasso_cifar10": Table(
        "VaSSO 2025, the saving of eVASSO on CIFAR-10",
        _rows("sam vasso evasso", "resnet18 wrn28_10", "cifar10"),
        GRID,
    ),
    "friendly_cifar10": Table(
        "Friendly SAM 2024, CIFAR-10 (the networks of its code)",
        _rows(
            "sam friendly_sam",
            "resnet18 vgg16_bn_512 wrn34_10 pyramidnet110_bottleneck",
            "cifar10",
        ),
        GRID,
    ),
    "friendly_cifar100": Table(
        "Friendly SAM 2024, CIFAR-100 (the networks of its code)",
        _rows(
            "sam friendly_sam",
            "resnet18 vgg16_bn_512 wrn34_10 pyramidnet110_bottleneck",
            "cifar100",
        ),
        GRID,
    ),
    "lagged_cifar10": Table(
        "One gradient a step against two, CIFAR-10 (not of a paper)",
        _rows("sgd lagged_vasso sam vasso", "resnet18 wrn28_10", "cifar10"),
        GRID,
    ),
    "gsam_imagenet": Table(
        "GSAM 2022, table 1, at the radii that the paper states",
        [name for name in PRESETS if name.endswith("_imagenet")],
        {},
    ),
}


def points(preset: str, grid: Grid, given: list[str]) -> list[Point]:
    """What is searched for a preset: all points of what its method takes.

    Raises:
      SystemExit: an option of ``given`` is refused; the message is printed.
    """
    options = parse_arguments(["--preset", preset, *given])
    taken = hyperparameters(options.method).keys() | SETTINGS.keys()
    if options.method == "asam" and grid.get("rho") == GRID["rho"]:
        grid = grid | {"rho": ASAM_RHO}
    own = {name: values for name, values in grid.items() if name in taken}
    found = [
        dict(zip(own, values, strict=True))
        for values in itertools.product(*own.values())
    ]
    for point in found:
        parse_arguments(command(preset, point, given))
    return found


def command(preset: str, point: Point, given: list[str]) -> list[str]:
    """The command line of cifar.py for a preset at a point of the grid."""
    changed = [
        f"--{name.replace('_', '-')}={value:.12g}" for name, value in point.items()
    ]
    return ["--preset", preset, *changed, *given]


def train(given: list[str], folder: Path, on_epoch: Callable[..., Any]) -> list[Any]:
    """The results of all seeds of a command line; a finished run is not trained again.

    A run that was interrupted goes on from its checkpoint.
    """
    options = parse_arguments([*given, "--results", str(folder)])
    options.directory = folder / "checkpoints" / cifar.run_name(options)
    cifar.check_devices(options)
    images_of, run, results = None, None, []
    for seed in options.seeds:
        path = cifar.results_file(options, seed)
        if report.finished(path):
            found = json.loads(path.read_text())
            if found["settings"] != cifar.settings(options):
                raise OSError(
                    f"{path} is of other settings: choose another --results folder"
                )
            for epoch in found["epochs"]:
                on_epoch(epoch)
            results.append(found)
            continue
        images_of = images_of or cifar.load(options)
        images = images_of(seed)
        run = run or programs.prepare(options, images, programs.data_mesh())
        result = cifar.train_seed(options, run, images, seed, on_epoch=on_epoch)
        results.append(report.with_summary(result))
    return results


def search(
    preset: str,
    tried: list[Point],
    arguments: argparse.Namespace,
    given: list[str],
    on_epoch: Callable[..., Any],
) -> dict[str, Any]:
    """Train every point and write down how they did, best first.

    Returns:
      "picked", the best point, and "edge", the names of what was picked at the smallest
      or largest value tried, where a wider grid might do better.
    """
    if len(tried) < 2:
        return {"preset": preset, "picked": tried[0], "edge": [], "rows": []}
    rows = []
    held_out = [f"--validation={VALIDATION}", f"--seed={arguments.search_seed}"]
    for point in tried:
        (result,) = train(
            command(preset, point, given) + held_out,
            arguments.results / "search",
            on_epoch,
        )
        rows.append(point | {"validation_accuracy": result["last"]})
    # A diverged run has a loss that is not a number, and an accuracy nevertheless.
    order = sorted(range(len(rows)), key=lambda i: -rows[i]["validation_accuracy"])
    picked = tried[order[0]]
    values = {name: sorted({point[name] for point in tried}) for name in picked}
    edge = [
        name
        for name, value in picked.items()
        if len(values[name]) > 1 and value in (values[name][0], values[name][-1])
    ]
    found = {
        "preset": preset,
        "picked": picked,
        "edge": edge,
        "rows": [rows[i] for i in order],
    }
    files.write_json(arguments.results / "search" / f"{preset}.json", found)
    return found


def grid_values(text: str) -> tuple[str, list[float]]:
    """An argparse type: ``name=1,2,3``."""
    name, _, values = text.partition("=")
    try:
        return name.replace("-", "_"), [float(value) for value in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a name and numbers such as theta=0.4,0.9, got {text!r}"
        ) from None


def make_parser() -> command_line.Parser:
    """The options of a table; all others are those of cifar.py."""
    parser = command_line.Parser(
        prog="tables.py",
        description="A table of a paper: search, seeds, report.",
        epilog="All other options are those of cifar.py and change every run.",
    )
    described = "; ".join(f"{name}: {table.title}" for name, table in TABLES.items())
    parser.add_argument("table", choices=list(TABLES), help=described)
    parser.add_argument("--seeds", default="0,1,2", help="of the runs that are tested")
    parser.add_argument("--search-seed", type=int, default=1000, help="of the search")
    parser.add_argument(
        "--grid",
        type=grid_values,
        action="append",
        default=[],
        help="name=values to search, for all that take it; one value to fix it",
    )
    parser.add_argument(
        "--results",
        type=command_line.folder,
        help="folder of results and checkpoints; runs/TABLE if left out",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Repeat a table, and say before how much there is to train."""
    parser = make_parser()
    parsed, given = parser.parse_known_args(arguments)
    parsed.results = parsed.results or Path("runs") / parsed.table
    table = TABLES[parsed.table]
    grid = table.grid | dict(parsed.grid)
    seeds = [f"--seeds={parsed.seeds}"]
    # Everything is parsed before anything is trained.
    plan = {name: points(name, grid, [*given, *seeds]) for name in table.presets}
    unknown = grid.keys() - {name for tried in plan.values() for name in tried[0]}
    if unknown - GRID.keys():
        parser.error(f"argument --grid: no run takes {', '.join(sorted(unknown))}")
    options = {
        name: parse_arguments(["--preset", name, *given, *seeds]) for name in plan
    }
    some = options[table.presets[0]]
    if some.pod or some.coordinator or some.local_processes:
        parser.error("a table is trained by one process, with all devices of its host")
    tested = some.seeds
    if parsed.search_seed in tested:
        parser.error(
            f"argument --search-seed: {parsed.search_seed} is among --seeds: choose "
            "another, so that nothing is picked on a seed that is reported"
        )
    trials = {name: len(tried) * (len(tried) > 1) for name, tried in plan.items()}
    epochs = sum((trials[name] + len(tested)) * options[name].epochs for name in plan)
    print(
        f"{table.title}: {sum(trials.values())} trainings to search and "
        f"{len(plan) * len(tested)} to test, {epochs:,} epochs in all."
    )
    results, found = [], []
    try:
        with progress.over(parsed.table, epochs) as bar:

            def on_epoch(epoch: dict[str, Any]) -> None:
                bar.advance(1)

            for name, tried in plan.items():
                bar.describe(name)
                found.append(search(name, tried, parsed, given, on_epoch))
                chosen = command(name, found[-1]["picked"], [*given, *seeds])
                results += train(chosen, parsed.results, on_epoch)
    except (DataError, OSError) as error:
        print(f"tables.py: {error}", file=sys.stderr)
        return 2
    finally:
        if results:
            report.print_table(results)
    for row in found:
        if row["edge"]:
            print(
                f"{row['preset']}: {', '.join(row['edge'])} was picked at the edge of "
                "its grid: widen it and run again."
            )
    return report.report(parsed.results)


if __name__ == "__main__":
    command_line.run(main)
