"""The command line of an image experiment: settings, presets, what fits together."""

import argparse
import functools
from pathlib import Path
from typing import Any

import optax

from experiments.harness import command_line
from experiments.vision import methods, models, processes, programs
from experiments.vision.presets import PRESETS, RECOLLECTED

# What makes a run what it is, with defaults: a checkpoint knows it, a preset sets it.
SETTINGS: dict[str, Any] = {
    "dataset": "cifar10",
    "model": "resnet18",
    "method": "vasso",
    "final_rho": None,
    "optimizer": "sgd",
    "learning_rate": 0.05,
    "weight_decay": 1e-3,
    "momentum": 0.9,
    "clip": 0.0,
    "batch": 128,
    "epochs": 200,
    "warmup_epochs": 0,
    "label_smoothing": 0.0,
    "label_noise": 0.0,
    "validation": 0.0,
    "cutout": 16,
    "cutout_probability": 0.5,
    "image_size": 224,
    "dtype": "float32",
    "microbatches": 1,
    "local_ascent": 0,
    "recollect": None,
}
SMOKE = {"dataset": "synthetic", "model": "resnet_tiny", "batch": 32, "epochs": 2}
SMOKE |= {"evaluation_batch": 40, "cutout": 8}
NOT_GIVEN = object()
ABSENT = argparse.SUPPRESS  # no default that --help could show
DESCRIPTION = "The papers' image experiments, on CIFAR or on a folder of images."


def hyperparameters() -> dict[str, list[str]]:
    """The hyperparameters of all methods -> the methods that take them."""
    taken: dict[str, list[str]] = {}
    for method in methods.METHODS:
        for name in methods.hyperparameters(method):
            taken.setdefault(name, []).append(method)
    return taken


@functools.cache
def make_parser() -> command_line.Parser:
    """All options; defaults are filled in later, after those of a preset."""
    parser = command_line.Parser(prog="cifar.py", description=DESCRIPTION)
    whole = command_line.positive_integer
    number = command_line.number
    infinity = float("inf")
    share = number(float, 0.0, 1.0, "a number from 0 to 1")
    positive = number(float, 0.0, infinity, "a number >= 0")
    count = number(int, 0, infinity, "an integer >= 0")

    def setting(group: Any, name: str, **kwargs: Any) -> None:
        default = ABSENT if SETTINGS[name] is None else SETTINGS[name]
        group.add_argument(f"--{name.replace('_', '-')}", default=default, **kwargs)

    group = parser.add_argument_group("experiment")
    group.add_argument(
        "--preset",
        default=ABSENT,
        metavar="NAME",
        help="a paper's settings; options change them",
    )
    group.add_argument(
        "--list-presets", action="store_true", help="print them with their sources"
    )
    datasets = ["cifar10", "cifar100", "folder", "synthetic"]
    setting(group, "dataset", choices=datasets, help="folder: DIR/train and DIR/val")
    group.add_argument(
        "--data-dir",
        type=Path,
        default=ABSENT,
        metavar="DIR",
        help="archives, or train/ and val/",
    )
    setting(group, "model", choices=models.MODELS, help="see models/")
    setting(
        group,
        "label_noise",
        type=share,
        help="share of training labels drawn anew, by seed, from all classes: a label "
        "may be replaced by itself, as in the Friendly SAM authors' code",
    )
    setting(
        group,
        "validation",
        type=number(float, 0.0, 0.9, "a number from 0 to 0.9"),
        help="share of the training images, with the labels that training sees, to "
        "evaluate on in place of the test images, for a choice of settings",
    )
    group.add_argument("--seed", type=count, default=0, help="of everything random")
    group.add_argument(
        "--seeds", default=ABSENT, help="several, such as 0,1,2, one after another"
    )

    group = parser.add_argument_group("method")
    setting(group, "method", choices=list(methods.METHODS), help="base: none of them")
    for name, takers in hyperparameters().items():
        defaults = [f"{methods.hyperparameters(m)[name]:g} for {m}" for m in takers]
        integer = isinstance(methods.hyperparameters(takers[0])[name], int)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=int if integer else float,
            default=ABSENT,
            help=f"default: {', '.join(defaults)}",
        )
    setting(
        group,
        "final_rho",
        type=positive,
        help="rho falls with the learning rate, from --rho to this at 0",
    )
    group.add_argument(
        "--local-ascent",
        type=whole,
        nargs="?",
        const=-1,
        default=0,
        metavar="GROUPS",
        help="m-sharpness: each device, or each of so many parts of the batch of one "
        "device, ascends by itself",
    )
    setting(
        group,
        "recollect",
        type=count,
        help="training batches on which batch statistics are renewed, at the evaluated "
        f"parameters, before each evaluation; default: {RECOLLECTED} for lagged_vasso, "
        "which collects them at the perturbed ones, and 0 for the others",
    )

    group = parser.add_argument_group("training")
    setting(group, "optimizer", choices=["sgd", "adamw"], help="sgd has an L2 penalty")
    setting(group, "learning_rate", type=positive, help="at the start of the cosine")
    setting(group, "weight_decay", type=positive, help="of all parameters")
    setting(group, "momentum", type=share, help="of sgd")
    setting(group, "clip", type=positive, help="norm of the gradient; 0: as it is")
    setting(group, "batch", type=whole, help="of all processes; a remainder is dropped")
    setting(group, "epochs", type=whole, help="to the end of the cosine")
    setting(group, "warmup_epochs", type=count, help="in a line from 0")
    setting(group, "label_smoothing", type=share, help="of the training loss")
    setting(group, "cutout", type=count, help="side of the square in pixels; 0: none")
    setting(group, "cutout_probability", type=share, help="of an image to be cut")
    setting(group, "image_size", type=whole, help="of a folder's images, in pixels")
    setting(group, "dtype", choices=["float32", "bfloat16"], help="what is computed in")
    setting(group, "microbatches", type=whole, help="parts of a batch, in turn")
    group.add_argument("--evaluation-batch", type=whole, default=1000, help="of all")

    group = parser.add_argument_group("files")
    group.add_argument(
        "--results",
        type=command_line.folder,
        default=Path("runs/cifar"),
        help="folder of the JSON file of each seed",
    )
    group.add_argument(
        "--directory",
        type=command_line.folder,
        default=ABSENT,
        help="checkpoints; a run goes on from its last one, to the bit. With several "
        "processes Ctrl-C writes none",
    )
    group.add_argument("--save-every", type=whole, default=2000, help="steps")
    group.add_argument(
        "--metrics-directory",
        type=command_line.folder,
        default=ABSENT,
        help="TensorBoard and JSON lines, a line an epoch",
    )
    group.add_argument(
        "--report",
        type=command_line.folder,
        default=ABSENT,
        metavar="DIR",
        help="one table of the runs in a folder",
    )
    group.add_argument(
        "--smoke", action="store_true", help="tiny model and made-up images, 2 epochs"
    )
    processes.add_options(parser)
    return parser


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line: defaults, changed by a preset, changed by what is given."""
    parser = make_parser()
    defaults = {
        action.dest: None if action.default is ABSENT else action.default
        for action in parser._actions
        if action.dest != "help"
    }
    empty = argparse.Namespace(**dict.fromkeys(defaults, NOT_GIVEN))
    explicit = {
        name: value
        for name, value in vars(parser.parse_args(given, empty)).items()
        if value is not NOT_GIVEN
    }
    preset: dict[str, Any] = {}
    if "preset" in explicit:
        if explicit["preset"] not in PRESETS:
            parser.error(
                f"there is no preset {explicit['preset']!r}: --list-presets prints them"
            )
        preset = PRESETS[explicit["preset"]].values
        if explicit.get("method", preset["method"]) != preset["method"]:
            # The other method has other hyperparameters.
            kept = SETTINGS.keys() - {"recollect"}
            preset = {k: v for k, v in preset.items() if k in kept}
    base = defaults | preset
    if explicit.get("smoke"):
        base |= SMOKE
    options = argparse.Namespace(**(base | explicit))
    options.changed = {
        name: value
        for name, value in explicit.items()
        if name in (SETTINGS | hyperparameters()) and value != base[name]
    }
    check(parser, options)
    return options


def check(parser: command_line.Parser, options: argparse.Namespace) -> None:
    """Refuse what does not go together, and gather method and seeds."""
    processes.check(parser, options)
    if options.list_presets or options.report:
        return
    taken = methods.hyperparameters(options.method)
    for name, takers in hyperparameters().items():
        if getattr(options, name) is not None and name not in taken:
            parser.error(
                f"argument --{name}: {options.method} does not take it, only "
                f"{', '.join(takers)}"
            )
    options.hyperparameters = {
        name: default if getattr(options, name) is None else getattr(options, name)
        for name, default in taken.items()
    }
    if options.recollect is None:
        options.recollect = RECOLLECTED if options.method == "lagged_vasso" else 0
    if options.final_rho is not None and "rho" not in taken:
        parser.error(f"argument --final-rho: {options.method} has no radius")
    try:
        programs.make_optimizer(options, optax.constant_schedule(0.1), 0)
    except ValueError as error:
        parser.error(f"--method {options.method}: {error}")
    if options.local_ascent and options.method in ("base", "lagged_vasso"):
        parser.error(
            f"argument --local-ascent: {options.method} has no ascent of its own: "
            "choose a method of two gradients"
        )
    if options.warmup_epochs >= options.epochs:
        parser.error(
            f"argument --warmup-epochs: {options.warmup_epochs} leaves nothing of "
            f"--epochs {options.epochs}"
        )
    if options.dataset != "synthetic" and options.data_dir is None:
        parser.error(f"--dataset {options.dataset} needs --data-dir")
    listed = str(options.seed) if options.seeds is None else options.seeds
    try:
        options.seeds = [int(seed) for seed in listed.split(",")]
        if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
            raise ValueError
    except ValueError:
        parser.error(
            "argument --seeds: must be different integers >= 0 such as 0,1,2, got "
            f"{listed!r}"
        )
    if options.metrics_directory:
        try:
            import tensorboardX  # noqa: F401
        except ImportError:
            parser.error(
                "--metrics-directory needs tensorboardX: pip install tensorboardX"
            )
    options.parser = parser
