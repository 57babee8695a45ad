"""Batch size: do large batches generalize worse, and does SAM help them?

SGD, SAM and VaSSO on the digits of scikit-learn in batches of 10 to all 1,000 training
images. Every method is searched anew at every batch size, and what it finds is measured
on its training set (the question of Keskar et al., 2017). With --matched updates every
batch size gets as many steps, not as many epochs (the answer of Hoffer et al., 2017).
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from experiments import harness
from experiments.harness import command_line

SIZES = (10, 50, 250, 1000)
REFERENCE = 50  # the batch of the digits' task, whose updates all others are matched to
METHODS = ("sgd", "sam", "vasso")
MEASURED = 6  # seeds whose sharpness is measured
MEASURES = {
    "train_loss": "training loss (nats)",
    "loss_gap": "test minus training loss (nats)",
    "lambda_max": "λ_max of the Hessian",
    "keskar": "Keskar's sharpness (%)",
}
DRAWN = ("loss_gap", "lambda_max", "keskar")
ERROR = "standard_error"


def main(arguments: list[str] | None = None) -> int:
    """Search, test and measure every method at every batch size; print, write."""
    parser = command_line.experiment_parser(
        "batch_size",
        __doc__,
        seeds=8,
        methods=command_line.METHOD_LABELS,
        default_methods=METHODS,
    )
    parser.add_argument(
        "--noise",
        choices=("0", "25", "50", "75"),
        default="0",
        help="percentage of random labels",
    )
    parser.add_argument(
        "--matched",
        choices=("epochs", "updates"),
        default="epochs",
        help="what all batch sizes have in common",
    )
    parser.add_argument(
        "--sizes",
        type=command_line.numbers(
            command_line.number(int, 1, 1000, "an integer from 1 to 1000")
        ),
        default=",".join(map(str, SIZES)),
        help="examples per step, with commas between",
    )
    options = command_line.parse(parser, arguments)
    harness.rows.use_all_cores()
    plan = harness.units.Plan(seeds=options.seeds)
    if options.smoke:
        plan, options.sizes = harness.units.SMOKE, [REFERENCE, 250]
        options.methods = options.methods[:2]
    units = {
        (f"{size}", name): at_batch(options, size, name)
        for size in options.sizes
        for name in options.methods
    }
    name = f"batch_size_{options.noise}"
    name += "_updates" if options.matched == "updates" else ""
    size = round(sum(harness.units.work_of(*unit, plan) for unit in units.values()))
    command_line.check_publishing(parser, options, name, size)
    found = harness.units.run_missing("batch size", options.runs / name, units, plan)
    sizes = {f"{size}": compare(units, found, f"{size}") for size in options.sizes}
    content = {
        "noise": int(options.noise),
        "seeds": plan.seeds,
        "matched": options.matched,
        "sizes": sizes,
        "largest_minus_smallest": across(sizes),
    }
    title = f"Digits, {options.noise} % random labels, {options.matched} matched"
    harness.tables.show(f"{title}, {plan.seeds} seeds", *cells(content))
    harness.tables.show(f"{title}, {MEASURED} seeds", *sharpness_cells(content))
    for method, difference in content["largest_minus_smallest"].items():
        print(
            f"{method}, batch {options.sizes[-1]} − {options.sizes[0]}: "
            + harness.tables.plus_minus(difference)
        )
    command_line.save(
        options,
        name,
        content,
        size=size,
        done=len(found),
        of=len(units),
        unit="units",
        draw=draw,
    )
    return 0


def at_batch(options: Any, batch: int, name: str) -> tuple[Any, Any]:
    """The task in batches of this size, and a method whose search begins around it.

    The range of the learning rate is in proportion to the root of the batch size, as
    Hoffer et al. scale it: the covariance of an update is about η²/B.
    """
    from experiments import tasks

    task = tasks.load(f"digits-{options.noise}")
    epochs = 4 if options.smoke else task.epochs
    if options.matched == "updates":
        steps = epochs * (task.training // REFERENCE)
        epochs = max(1, round(steps / (task.training // batch)))
    per_call = max(1, epochs // 20)
    task = task._replace(
        network=harness.networks.mlp(64, 64, 64, 10),
        batch=batch,
        epochs=epochs // per_call * per_call,
        epochs_per_call=per_call,
    )
    method = harness.methods.METHODS[name]
    scale = math.sqrt(batch / REFERENCE)
    rate = method.space["learning_rate"]
    rate = rate._replace(low=scale * rate.low, high=scale * rate.high)
    return task, dataclasses.replace(method, own={"learning_rate": rate} | method.own)


def compare(
    units: dict[tuple[str, str], Any], found: dict[tuple[str, str], Any], size: str
) -> dict[str, Any]:
    """The rows of a batch size at both budgets; those of equal gradients measured."""
    rows: dict[str, dict[str, Any]] = {"gradients": {}, "epochs": {}}
    for (of_size, name), unit in found.items():
        if of_size == size:
            for budget in rows:
                rows[budget][name] = unit[budget]
            sharpness = measure(*units[size, name], unit["gradients"])
            rows["gradients"][name] = unit["gradients"] | {"sharpness": sharpness}
    return {budget: harness.tables.compare(row) for budget, row in rows.items()}


def measure(task: Any, method: Any, row: dict[str, Any]) -> dict[str, list[float]]:
    """Train the first seeds once more, and measure what they find."""
    seeds = min(MEASURED, len(row["last"]["values"]))
    trained = harness.training.train(
        task,
        method,
        [row["hyperparameters"]] * seeds,
        range(seeds),
        epochs=row["epochs"],
        test=True,
    )
    solutions = harness.solutions
    found = [
        solutions.measure(task, solutions.of_row(trained.params, seed), seed)
        for seed in range(seeds)
    ]
    return {key: [solution[key] for solution in found] for key in found[0]}


def across(sizes: dict[str, Any]) -> dict[str, Any]:
    """Accuracy at the largest batch minus that at the smallest, by method."""
    smallest, *_, largest = (rows["gradients"] for rows in sizes.values())
    return {
        row["label"]: harness.statistics.paired_difference(
            row["last"]["values"], smallest[name]["last"]["values"]
        )
        for name, row in largest.items()
    }


def cells(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: every batch size's comparison, at equal gradients."""
    tables, lines, header = harness.tables, [], []
    for size, budgets in content["sizes"].items():
        header, begun = tables.cells(budgets["gradients"])
        for name, line in zip(budgets["gradients"], begun, strict=True):
            at_epochs = tables.mean_and_error(budgets["epochs"][name]["last"])
            lines.append([size, *line, at_epochs])
    return ["batch", *header, "equal epochs (%)"], lines


def sharpness_cells(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: what was measured of the solutions at equal gradients."""
    lines = [
        [
            size,
            row["label"],
            *(harness.tables.to_its_error(row["sharpness"][key]) for key in MEASURES),
        ]
        for size, budgets in content["sizes"].items()
        for row in budgets["gradients"].values()
    ]
    return ["batch", "method", *MEASURES.values()], lines


def draw(path: Path, content: dict[str, Any]) -> None:
    """Accuracy, gap and sharpness over the batch size."""
    import numpy as np

    figures, standard_error = harness.figures, harness.statistics.standard_error
    sizes = [int(size) for size in content["sizes"]]
    rows = [budgets["gradients"] for budgets in content["sizes"].values()]
    figure, axes = figures.panels(2, 2, height=2.1)
    accuracy, *measured = axes.flat
    for name, shift in zip(rows[0], figures.dodged(len(rows[0]), 0.24), strict=True):
        places = np.array(sizes) * np.exp(shift)
        shown = {"label": rows[0][name]["label"], "line": "-"}
        last = [row[name]["last"] for row in rows]
        means, errors = ([a[key] for a in last] for key in ("mean", ERROR))
        figures.points(accuracy, name, places, means, errors, **shown)
        for ax, key in zip(measured, DRAWN, strict=True):
            values = [row[name]["sharpness"][key] for row in rows]
            means, errors = np.mean(values, 1), [standard_error(v) for v in values]
            figures.points(ax, name, places, means, errors, **shown)
    accuracy.set_ylabel("test accuracy (%)")
    for ax, key in zip(measured, DRAWN, strict=True):
        ax.set_ylabel(MEASURES[key])
        if key != "loss_gap":
            figures.logarithmic(ax.yaxis)
    for ax in axes.flat:
        ax.set_xscale("log")
        ax.set_xticks(sizes, [f"{size}" for size in sizes])
        ax.xaxis.minorticks_off()
        ax.set_xlabel("batch size (images)" if ax in axes[-1] else "")
    figures.shared_legend(figure, accuracy)
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
