"""The command line of every experiment: options, their checks, and interruptions.

Imports nothing that is slow, so that ``--help`` and mistakes are answered at once.
"""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from experiments.harness import files

# Name and label of every method; what they are stands in harness/methods.py.
METHOD_LABELS = {
    "sgd": "SGD",
    "sam": "SAM",
    "friendly_sam": "Friendly SAM",
    "vasso": "VaSSO",
    "evasso": "eVASSO, p = 0.5",
    "asam": "ASAM",
    "gsam": "GSAM",
    "lagged_vasso": "lagged VaSSO",
    "split_sam": "split SAM",
    "held_rise": "split SAM, held rise",
    "momentum_sam": "Momentum-SAM",
    "single_step_sam": "single-step SAM",
    "split_64": "split SAM, 1/64",
    "split_32": "split SAM, 1/32",
    "split_4": "split SAM, 1/4",
    "split_2": "split SAM, 1/2",
    "split_vasso": "split VaSSO",
    "split_friendly_sam": "split Friendly SAM",
    "split_asam": "split ASAM",
}


# Those of the evidence; a method that contains another comes after it.
COMPARED = (
    "sgd",
    "sam",
    "vasso",
    "friendly_sam",
    "lagged_vasso",
    "momentum_sam",
    "split_sam",
    "held_rise",
)
# Other shares of the batch for the ascent, and other ascents; on this task alone.
SPLITS = (
    "split_64",
    "split_32",
    "split_4",
    "split_2",
    "split_vasso",
    "split_friendly_sam",
    "split_asam",
)
SPLIT_TASKS = ("mnist1d-40",)
# Those of the larger convolutional networks, which take long.
CNN_METHODS = ("sgd", "sam", "momentum_sam", "split_sam")


class Interrupted(KeyboardInterrupt):
    """The process was asked to end, by Ctrl-C or by SIGTERM.

    Attributes:
      code: the exit code, 128 + the number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


class Parser(argparse.ArgumentParser):
    """A parser that shows every default and whose errors are one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def experiment_parser(
    name: str,
    description: str,
    *,
    seeds: int | None = None,
    methods: Iterable[str] | None = None,
    default_methods: Iterable[str] | None = None,
    tasks: Iterable[str] | None = None,
    default_tasks: Iterable[str] | None = None,
) -> Parser:
    """A parser with the options that all experiments have.

    Args:
      name: of the module, as in ``python -m experiments.NAME``.
      description: its docstring.
      seeds: the default of ``--seeds``; ``None`` leaves the option out.
      methods: the names that ``--methods`` allows; ``None`` leaves the option out.
      default_methods: its default; by default all.
      tasks: the names that ``--tasks`` allows; ``None`` leaves the option out.
      default_tasks: its default; by default all.
    """
    parser = Parser(prog=f"python -m experiments.{name}", description=description)
    if seeds is not None:
        parser.add_argument(
            "--seeds", type=positive_integer, default=seeds, help="how many seeds"
        )
    for option, allowed, default in (
        ("--methods", methods, default_methods),
        ("--tasks", tasks, default_tasks),
    ):
        if allowed is not None:
            names = list(allowed)
            parser.add_argument(
                option,
                type=some_of(names),
                default=",".join(default or names),
                help=f"'all', or some of {','.join(names)}",
            )
    parser.add_argument(
        "--runs",
        type=folder,
        default="runs",
        help="folder to write to; not under version control",
    )
    parser.add_argument(
        "--publish",
        type=folder,
        nargs="?",
        const="results",
        default=argparse.SUPPRESS,
        metavar="FOLDER",
        help="also write to this folder of published results (results, if none is "
        "named), unless what is there comes from a larger run (default: do not)",
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="a few seconds of everything, to see that it runs; written to RUNS/smoke",
    )
    return parser


def parse(parser: Parser, arguments: list[str] | None) -> argparse.Namespace:
    """The options of :func:`experiment_parser`, checked against each other."""
    options = parser.parse_args(arguments)
    options.publish = getattr(options, "publish", None)
    if options.smoke and options.publish:
        parser.error("argument --publish: a smoke run is never published")
    if options.smoke:
        options.runs = options.runs / "smoke"
        if hasattr(options, "seeds"):
            options.seeds = min(options.seeds, 2)
    for path in filter(None, (options.runs, options.publish)):
        try:
            files.check_writable(path)
        except OSError as error:
            parser.error(f"cannot write to {path}: {error.strerror}")
    return options


def check_publishing(
    parser: Parser, options: argparse.Namespace, name: str, size: int
) -> None:
    """Refuse, before anything is trained, to publish less than what is published."""
    if options.publish and files.is_larger(options.publish / f"{name}.json", size):
        parser.error(
            f"argument --publish: {options.publish / name}.json comes from a larger "
            "run than this one; run at least as much, or delete it"
        )


def save(
    options: argparse.Namespace,
    name: str,
    content: dict[str, Any],
    *,
    size: int,
    done: int,
    of: int,
    unit: str,
    draw: files.Drawing | Mapping[str, files.Drawing] | None = None,
) -> None:
    """Save what is finished, and say truly what was saved.

    Args:
      options: of :func:`parse`.
      name: of the files.
      content: for the results file.
      size: gradients of the whole run.
      done: how many units are finished.
      of: how many there are.
      unit: what is counted, in the plural.
      draw: (path, content) -> None writes the figure; or several, by what is added to
        their names.
    """
    if not done:
        print(f"None of {of} {unit} was finished: nothing was saved.", file=sys.stderr)
        return
    finished = done == of
    written = files.save(
        options.runs, name, content, size=size, finished=finished, draw=draw
    )
    if options.publish and finished:
        written += files.save(
            options.publish, name, content, size=size, finished=finished, draw=draw
        )
    amount = f"{done} of {of} {unit}"
    if finished:
        amount = f"the {unit.removesuffix('s')}" if of == 1 else f"all {of} {unit}"
    print(
        f"Saved {amount}: {', '.join(map(str, written))}",
        file=sys.stderr,
    )


def number(
    convert: Callable[[str], Any], low: float, high: float, allowed: str
) -> Callable[[str], Any]:
    """An argparse type: a number in [low, high], or an error that says so."""

    def parse_number(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
        return value

    return parse_number


positive_integer = number(int, 1, math.inf, "an integer >= 1")
share = number(float, 0.0, 1.0, "a number from 0 to 1")
positive_number = number(float, 5e-324, sys.float_info.max, "a finite number > 0")


def numbers(
    one: Callable[[str], Any],
) -> Callable[[str], list[Any]]:
    """An argparse type: numbers with commas between, in rising order."""
    return lambda text: sorted({one(part) for part in text.split(",")})


def some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """An argparse type: 'all', or some names with commas between."""
    known = list(names)

    def parse_names(text: str) -> list[str]:
        chosen = known if text == "all" else text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is none of {', '.join(known)}"
                )
        return list(dict.fromkeys(chosen))

    return parse_names


def folder(text: str) -> Path:
    """An argparse type: a folder that exists or may be made."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is not a folder")
    return path


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run an experiment's main; Ctrl-C and SIGTERM end it after it has saved.

    Both are an :class:`Interrupted` inside ``main``, which saves what is finished and
    says so in its ``finally``; a second signal does not disturb the saving.
    """

    def interrupt(number: int, frame: Any) -> None:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        raise Interrupted(number)

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, interrupt)
    try:
        code = main()
    except KeyboardInterrupt as interrupted:
        code = getattr(interrupted, "code", 128 + signal.SIGINT)
    except BrokenPipeError:
        # What reads our output has gone; that is no error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)
