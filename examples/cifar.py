"""The papers' image experiments: CIFAR-10, CIFAR-100, or a folder of images.

    python examples/cifar.py --preset vasso_resnet18_cifar10 --data-dir DIR
    python examples/cifar.py --dataset cifar100 --data-dir DIR --method sam --rho 0.2
    python examples/cifar.py --report results/cifar

Trains each seed, evaluates after every epoch, and prints the test accuracy of the last
and of the best epoch beside what the papers report. Resumes from --directory by itself.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import archives
import command_line
import jax
import processes
import vision_batches
import vision_report
import vision_training
from vision_options import SETTINGS, parse_arguments


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


def load(options: argparse.Namespace) -> Callable[[int], vision_batches.Images]:
    """The data: seed -> images, whose labels may be random.

    Raises:
      DataError: it is missing or broken.
    """
    if options.dataset == "folder":
        return lambda seed: vision_batches.from_folder(options.data_dir, options, seed)
    if options.dataset == "synthetic":
        data = vision_batches.synthetic()
    else:
        data = archives.load(options.dataset, options.data_dir)
    return lambda seed: vision_batches.from_arrays(data, options, seed)


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
    return "_".join(parts)


def train_seed(
    options: argparse.Namespace,
    images: vision_batches.Images,
    seed: int,
    bar: Any,
) -> dict[str, Any]:
    """Train one seed and write its results, also those of an interrupted run."""
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
        "environment": command_line.environment(),
        "epochs": [],
    }
    configuration = chosen | {"seed": seed, "train_images": images.train_count}
    task = bar.add_task(f"seed {seed}", total=None) if first else None

    def on_step(step: int, total: int) -> None:
        if first:
            epoch = min(options.epochs, step * options.epochs // total + 1)
            described = f"seed {seed}, epoch {epoch}/{options.epochs}"
            bar.update(task, completed=step, total=total, description=described)

    try:
        with vision_report.metrics_writer(
            options.metrics_directory if first else None, f"{name}_seed{seed}"
        ) as on_epoch:
            vision_training.run_seed(
                options,
                images,
                vision_training.data_mesh(),
                seed,
                result,
                configuration,
                on_step,
                on_epoch,
            )
    except KeyboardInterrupt:
        result["interrupted"] = True
        raise
    finally:
        if result["epochs"] and first:
            result["interrupted"] = len(result["epochs"]) < options.epochs
            command_line.write_json(
                options.results / f"{name}_seed{seed}.json",
                vision_report.with_summary(result),
            )
    return result


def main(arguments: list[str] | None = None) -> int:
    """Train all seeds, or print a table of what was trained."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(given)
    if options.list_presets:
        vision_report.print_presets()
        return 0
    if options.report:
        return vision_report.report(options.report)
    if processes.starts_others(options):
        return processes.launch(__file__, given, options)
    processes.join(options)
    check_devices(options)
    results: list[dict[str, Any]] = []
    try:
        images_of = load(options)
        for seed in options.seeds:
            images = images_of(seed)
            if images.train_count < options.batch:
                raise archives.DataError(
                    f"{images.train_count} training images are not one batch of "
                    f"{options.batch}: choose a smaller --batch"
                )
            with command_line.progress_bar() as bar:
                results.append(train_seed(options, images, seed, bar))
    except (archives.DataError, OSError) as error:
        print(f"cifar.py: {error}", file=sys.stderr)
        return 2
    finally:
        if results and jax.process_index() == 0:
            vision_report.print_table(results)
    return 0


if __name__ == "__main__":
    command_line.run(main)
