"""The papers' image experiments: CIFAR-10, CIFAR-100, or a folder of images.

    python -m experiments.vision.cifar --preset vasso_resnet18_cifar10 --data-dir DIR
    python -m experiments.vision.cifar --dataset cifar100 --data-dir DIR --method sam
    python -m experiments.vision.cifar --report runs/cifar

Trains each seed, evaluates after every epoch, and prints the test accuracy of the last
and of the best epoch beside what the papers report. Resumes from --directory by itself.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from experiments.harness import command_line, files, progress
from experiments.vision import (
    archives,
    batches,
    processes,
    programs,
    report,
    training,
)
from experiments.vision.options import SETTINGS, parse_arguments


def check_devices(options: argparse.Namespace) -> None:
    """Refuse batches that the devices or the parts do not divide."""
    devices = jax.device_count()
    if options.local_ascent == -1:
        options.local_ascent = options.changed["local_ascent"] = devices
    groups = options.local_ascent or 1
    if groups > 1 and devices > 1 and groups != devices:
        options.parser.error(
            f"argument --local-ascent: {groups} groups do not fit {devices} devices: "
            "leave the number out"
        )
    for name, size, what in (
        ("batch", devices, "devices"),
        ("batch", groups * options.microbatches, "groups or microbatches"),
        ("evaluation_batch", devices, "devices"),
    ):
        batch = getattr(options, name)
        if batch % size:
            options.parser.error(
                f"argument --{name.replace('_', '-')}: {batch} is not divided by "
                f"{size} {what}"
            )


def load(options: argparse.Namespace) -> Callable[[int], batches.Images]:
    """The data: seed -> images, whose labels may be random.

    Raises:
      DataError: it is missing or broken, or too small for a batch.
    """
    if options.dataset == "folder":

        def of_seed(seed: int) -> batches.Images:
            return batches.from_folder(options.data_dir, options, seed)

    else:
        if options.dataset == "synthetic":
            data = batches.synthetic()
        else:
            data = archives.load(options.dataset, options.data_dir)

        def of_seed(seed: int) -> batches.Images:
            return batches.from_arrays(data, options, seed)

    def checked(seed: int) -> batches.Images:
        images = of_seed(seed)
        if images.train_count < options.batch:
            raise archives.DataError(
                f"{images.train_count} training images are not one batch of "
                f"{options.batch}: choose a smaller --batch"
            )
        return images

    return checked


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What makes the run what it is, as a results file has it."""
    chosen = {name: getattr(options, name) for name in SETTINGS}
    return chosen | options.hyperparameters


def run_name(options: argparse.Namespace) -> str:
    """The preset, or method, model and dataset; and what was changed."""
    data = options.dataset
    if data == "folder":
        data = options.data_dir.resolve().name
    parts = [options.preset or f"{options.method}_{options.model}_{data}"]
    shown = {} if options.preset else {"method": 0, "model": 0, "dataset": 0}
    parts += [f"{k}={v}" for k, v in options.changed.items() if k not in shown]
    return "_".join(parts + ["smoke"] * options.smoke)


def results_file(options: argparse.Namespace, seed: int) -> Path:
    """Where the results of a seed go."""
    return options.results / f"{run_name(options)}_seed{seed}.json"


def train_seed(
    options: argparse.Namespace,
    run: programs.Run,
    images: batches.Images,
    seed: int,
    on_step: Callable[[int, int], Any] = lambda step, total: None,
    on_epoch: Callable[[dict[str, Any]], Any] = lambda epoch: None,
) -> dict[str, Any]:
    """Train one seed and write its results, also those of an interrupted run.

    What an interrupted run has so far never takes the place of a finished run.
    """
    name, chosen = run_name(options), settings(options)
    first = jax.process_index() == 0
    result: dict[str, Any] = {
        "name": name,
        "preset": options.preset,
        "changed": options.changed,
        "seed": seed,
        "settings": chosen,
        "train_images": images.train_count,
        "wrong_labels": images.wrong_labels,
        "environment": files.environment(),
        "epochs": [],
    }
    configuration = chosen | {"seed": seed, "train_images": images.train_count}
    try:
        with report.metrics_writer(
            options.metrics_directory if first else None, f"{name}_seed{seed}"
        ) as write:

            def after_epoch(epoch: dict[str, Any]) -> None:
                write(epoch)
                on_epoch(epoch)

            training.run_seed(
                *(options, run, images, seed, result, configuration),
                *(on_step, after_epoch),
            )
    finally:
        interrupted = len(result["epochs"]) < options.epochs
        result["interrupted"] = interrupted
        path = results_file(options, seed)
        if result["epochs"] and first and not (interrupted and report.finished(path)):
            # The loss of a run that diverged is no number.
            files.write_json(path, files.finite(report.with_summary(result)))
    return result


def train_seeds(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Train all seeds, with a progress bar for each; ``results`` is filled."""
    images_of, run = load(options), None
    for seed in options.seeds:
        images = images_of(seed)
        run = run or programs.prepare(options, images, programs.data_mesh())
        with seed_progress(options, seed) as on_step:
            results.append(train_seed(options, run, images, seed, on_step))


@contextlib.contextmanager
def seed_progress(
    options: argparse.Namespace, seed: int
) -> Iterator[Callable[[int, int], None]]:
    """The progress over the epochs of a seed, in the first process."""
    if jax.process_index():
        yield lambda step, total: None
        return
    with progress.over(f"seed {seed}", options.epochs) as bar:

        def on_step(step: int, total: int) -> None:
            done = step * options.epochs / total
            bar.doing = f"epoch {min(options.epochs, int(done) + 1)}/{options.epochs}"
            bar.advance(done - bar.done)

        yield on_step


def main(arguments: list[str] | None = None) -> int:
    """Train all seeds, or print a table of what was trained."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(given)
    if options.list_presets:
        report.print_presets()
        return 0
    if options.report:
        return report.report(options.report)
    if processes.starts_others(options):
        return processes.launch("experiments.vision.cifar", given, options)
    processes.join(options)
    check_devices(options)
    results: list[dict[str, Any]] = []
    try:
        train_seeds(options, results)
    except (archives.DataError, OSError) as error:
        print(f"cifar.py: {error}", file=sys.stderr)
        return 2
    finally:
        if results and jax.process_index() == 0:
            report.print_table(results)
    return 0


if __name__ == "__main__":
    command_line.run(main)
