"""The main job: what sharpness-aware training is worth when labels are wrong.

Trains an MLP on 1,000 digits of which 75 % have a random label, with SGD, SAM, VaSSO,
and three methods that take one gradient per step, at equal gradients: a method of two
gradients trains for half the epochs. About two minutes on two cores.

The hyperparameters are those that the five searches of ``experiments.evidence`` picked
on this task, learning rate and weight decay included, and the trainings are its tests:
the table is that of the evidence.
"""

from pathlib import Path
from typing import Any

from experiments import evidence, harness
from experiments.harness import command_line

TASK = "digits-75"
# The others of the evidence run if they are named.
DEFAULT = ("sgd", "sam", "vasso", "lagged_vasso", "momentum_sam", "split_sam")


def main(arguments: list[str] | None = None) -> int:
    """Train, print, write."""
    picked = {
        name: row["picked"]
        for name, row in evidence.published()["tasks"][TASK]["methods"].items()
    }
    parser = command_line.experiment_parser(
        "label_noise", __doc__, methods=picked, default_methods=DEFAULT
    )
    parser.add_argument(
        "--searches",
        type=command_line.positive_integer,
        default=len(picked["sgd"]),
        help="of how many searches the picks are trained",
    )
    options = command_line.parse(parser, arguments)

    harness.rows.use_all_cores()
    from experiments import tasks

    task, plan = tasks.load(TASK), harness.searches.Plan()
    if options.smoke:
        task, options.searches = task._replace(epochs=8), 2
        plan = plan._replace(tests=2)
    picked = {name: picked[name][: options.searches] for name in options.methods}
    work = {
        name: len(points)
        * plan.tests
        * harness.training.gradients_of(
            task, harness.methods.METHODS[name], "gradients"
        )
        for name, points in picked.items()
    }
    size = round(sum(work.values()))
    command_line.check_publishing(parser, options, "label_noise", size)
    rows: dict[str, Any] = {}
    try:
        with harness.progress.over("label noise", size) as progress:
            for name, points in picked.items():
                rows[name] = measure(task, name, points, plan, progress)
    finally:
        report(options, task, plan, size, rows)
    return 0


def measure(
    task: Any, name: str, points: list[dict[str, float]], plan: Any, progress: Any
) -> dict[str, Any]:
    """Train what each search picked, on the seeds of its tests."""
    method, searches = harness.methods.METHODS[name], harness.searches
    trained = harness.training.train(
        task,
        method,
        [point for point in points for _ in range(plan.tests)],
        [
            seed
            for number in range(len(points))
            for seed in searches.test_seeds(task, plan, number)
        ],
        epochs=harness.training.budget_epochs(task, method, "gradients"),
        test=True,
        progress=progress,
    )
    assert trained.test is not None
    of_searches = trained.test.reshape(len(points), plan.tests, -1).mean(axis=1)
    error = harness.statistics.standard_error
    return {
        "label": method.label,
        "picked": points,
        "gradients": round(float(trained.gradients.mean()), 1),
        "epochs": int(trained.epochs[-1]),
        "accuracy": harness.statistics.summary(of_searches[:, -1], 0.0),
        "curve": {
            "epochs": trained.epochs.tolist(),
            "mean": of_searches.mean(0).round(3).tolist(),
            "standard_error": [round(error(at), 4) for at in of_searches.T],
        },
    }


def report(options: Any, task: Any, plan: Any, size: int, rows: dict[str, Any]) -> None:
    """Print the table; save what was finished, and say what that is."""
    content = {
        "task": task.title,
        "searches": options.searches,
        "tests": plan.tests,
        "methods": rows,
    }
    if rows:
        title = f"{task.title}: mean ± standard error of {options.searches} searches"
        harness.tables.show(title, *harness.verdicts.cells(rows))
    command_line.save(
        options,
        "label_noise",
        content,
        size=size,
        done=len(rows),
        of=len(options.methods),
        unit="methods",
        draw=draw,
    )


def draw(path: Path, content: dict[str, Any]) -> None:
    """Accuracy over the gradients, and at the end."""
    figures, rows = harness.figures, content["methods"]
    figure, axes = figures.panels(1, 2, height=3.0)
    figures.curves(axes[0, 0], rows, legend=False)
    for height, (name, row) in enumerate(reversed(rows.items())):
        method, found = harness.methods.METHODS[name], row["accuracy"]
        axes[0, 1].errorbar(
            found["mean"],
            height,
            xerr=found["standard_error"],
            color=method.color,
            marker=method.marker,
            markersize=6,
            capsize=2,
        )
    axes[0, 1].set_yticks(
        range(len(rows)), [row["label"] for row in reversed(rows.values())]
    )
    axes[0, 1].set_xlabel("test accuracy at the end (%)")
    figure.suptitle(
        f"{content['task']}: mean ± standard error of {content['searches']} searches",
        fontsize=9,
    )
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
