"""Domain generalization: rotated digits, tested at a rotation never trained on.

Each digit of scikit-learn is rotated by one of six angles. Every angle in turn is the
unseen domain: hyperparameters are searched on held-out digits of the other five, and
the unseen one is only tested (Gulrajani and Lopez-Paz, "In Search of Lost Domain
Generalization", 2021). About five minutes on two cores.
"""

from pathlib import Path
from typing import Any

from experiments import harness
from experiments.harness import command_line

ANGLES = (0, 15, 30, 45, 60, 75)
METHODS = ("sgd", "sam", "friendly_sam", "vasso", "lagged_vasso")


def load(unseen: int) -> Any:
    """The task that is tested on the digits of one angle, and trained on the others.

    The digits are dealt out to the angles by a fixed permutation, so that no digit is
    in two domains. Rotation is counterclockwise, linear between pixels, black outside.
    """
    import numpy as np
    from scipy import ndimage
    from sklearn.datasets import load_digits

    from experiments.harness.networks import mlp
    from experiments.tasks import Task

    images, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(images))
    images, labels = images[order].reshape(-1, 8, 8) / 16, labels[order]
    angles = np.resize(ANGLES, len(images))
    rotated = [
        ndimage.rotate(image, angle, reshape=False, order=1)
        for image, angle in zip(images, angles, strict=True)
    ]
    seen = np.flatnonzero(angles != unseen)
    return Task(
        name=f"{unseen}°",
        inputs=np.array(rotated, np.float32).reshape(-1, 64),
        labels=labels.astype(np.int32),
        given_labels=lambda random: labels,
        pool=seen,
        test=np.flatnonzero(angles == unseen),
        groups=np.arange(len(images)),
        training=1200,
        validation=len(seen) - 1200,
        classes=10,
        network=mlp(64, 64, 64, 10),
        epochs=30,
        batch=50,
        epochs_per_call=3,
    )


def main(arguments: list[str] | None = None) -> int:
    """Search and test every method on every unseen domain; print, write."""
    parser = command_line.experiment_parser(
        "domain_generalization",
        __doc__,
        seeds=24,
        methods=command_line.METHOD_LABELS,
        default_methods=METHODS,
    )
    options = command_line.parse(parser, arguments)
    harness.rows.use_all_cores()
    tasks = {angle: load(angle) for angle in ANGLES}
    plan = harness.units.Plan(seeds=options.seeds)
    if options.smoke:
        plan, options.methods = harness.units.SMOKE, options.methods[:2]
        tasks = {angle: tasks[angle]._replace(epochs=6) for angle in ANGLES[:2]}
    units = {
        (f"{angle}", name): (task, harness.methods.METHODS[name])
        for name in options.methods
        for angle, task in tasks.items()
    }
    size = round(sum(harness.units.work_of(*unit, plan) for unit in units.values()))
    command_line.check_publishing(parser, options, "domain_generalization", size)
    found = harness.units.run_missing(
        "domain generalization", options.runs / "domain_generalization", units, plan
    )
    content: dict[str, Any] = {"seeds": plan.seeds, "angles": list(tasks)}
    for budget in ("gradients", "epochs"):
        content[budget] = compare(found, list(tasks), options.methods, budget)
        title = f"Rotated digits, {plan.seeds} seeds, equal {budget}"
        harness.tables.show(title, *cells(content[budget]))
    command_line.save(
        options,
        "domain_generalization",
        content,
        size=size,
        done=len(found),
        of=len(units),
        unit="units",
        draw=draw,
    )
    return 0


def compare(
    found: dict[tuple[str, str], Any],
    angles: list[int],
    methods: list[str],
    budget: str,
) -> dict[str, Any]:
    """Every method, by domain and on average.

    Differences are those of the average over domains, paired by seed.
    """
    import numpy as np

    rows: dict[str, Any] = {}
    for name in methods:
        tested = [found[f"{angle}", name][budget] for angle in angles]
        values = np.mean([row["last"]["values"] for row in tested], axis=0)
        average = harness.statistics.summary(values, 0)
        average["collapsed"] = sum(row["last"]["collapsed"] for row in tested)
        rows[name] = {
            "label": tested[0]["label"],
            "gradients": float(np.mean([row["gradients"] for row in tested])),
            "average": average,
            "picked": harness.statistics.summary(
                np.mean([row["picked"]["values"] for row in tested], axis=0), 0
            ),
            "domains": {
                f"{angle}": row["last"] | {"hyperparameters": row["hyperparameters"]}
                for angle, row in zip(angles, tested, strict=True)
            },
        }
    differences = harness.statistics.comparisons(
        {name: row["average"]["values"] for name, row in rows.items()}, ("sgd", "sam")
    )
    return {
        name: row | {"differences": differences[name]} for name, row in rows.items()
    }


def cells(rows: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: accuracy in percent by unseen domain, and on average."""
    tables = harness.tables
    angles = list(next(iter(rows.values()))["domains"])
    header = ["method", *(f"{angle}°" for angle in angles), "average (%)"]
    known = [name for name in ("sgd", "sam") if name in rows]
    header += [f"− {rows[name]['label']}" for name in known]
    lines = []
    for row in rows.values():
        line = [row["label"]]
        line += [tables.mean_and_error(row["domains"][angle]) for angle in angles]
        line.append(tables.mean_and_error(row["average"]))
        for name in known:
            line += tables.difference_cells(row["differences"].get(name))
        lines.append(line)
    return header, lines


def draw(path: Path, content: dict[str, Any]) -> None:
    """Accuracy on each domain while it is the unseen one, and the average."""
    figures, rows = harness.figures, content["gradients"]
    figure, axes = figures.panels(1, 2, height=3.0)
    names = [f"{angle}°" for angle in content["angles"]]
    for name, shift in zip(rows, figures.dodged(len(rows), 0.7), strict=True):
        domains = list(rows[name]["domains"].values())
        figures.points(
            axes[0, 0],
            name,
            [place + shift for place in range(len(domains))],
            [domain["mean"] for domain in domains],
            [domain["standard_error"] for domain in domains],
        )
    axes[0, 0].set_xticks(range(len(names)), names)
    axes[0, 0].set_xlabel("rotation of the unseen domain")
    axes[0, 0].set_ylabel("accuracy on the unseen domain (%)")
    figures.ranking(
        axes[0, 1],
        {name: row | {"last": row["average"]} for name, row in rows.items()},
        {n: r | {"last": r["average"]} for n, r in content["epochs"].items()},
        label="average over the domains (%)",
    )
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
