"""The main job: what sharpness-aware training is worth when labels are wrong.

Trains an MLP on 1,000 digits of which 75 % have a random label, with SGD, SAM,
Friendly SAM, VaSSO and lagged VaSSO, at equal gradients: a method of two gradients per
step trains for half the epochs. About two minutes on two cores.

The hyperparameters are those that ``experiments.evidence`` picked on this task, with as
many trials for every method, learning rate and weight decay included.
"""

from pathlib import Path
from typing import Any

from experiments import harness
from experiments.evidence import PUBLISHED
from experiments.harness import command_line, files

TASK = "digits-75"
# The others of the evidence run if they are named.
DEFAULT = ("sgd", "sam", "friendly_sam", "vasso", "lagged_vasso")


def picked(budget: str) -> dict[str, dict[str, float]]:
    """The hyperparameters that the evidence picked for each method at a budget."""
    found = files.read_json(PUBLISHED / "evidence.json")
    if found is None:
        raise FileNotFoundError(PUBLISHED / "evidence.json")
    rows = found["tasks"][TASK][budget]
    return {name: row["hyperparameters"] for name, row in rows.items()}


def main(arguments: list[str] | None = None) -> int:
    """Train, print, write."""
    parser = command_line.experiment_parser(
        "label_noise",
        __doc__,
        seeds=24,
        methods=picked("gradients"),
        default_methods=DEFAULT,
    )
    parser.add_argument(
        "--budget",
        choices=("gradients", "epochs"),
        default="gradients",
        help="what all trainings have in common",
    )
    options = command_line.parse(parser, arguments)

    harness.rows.use_all_cores()
    from experiments import tasks

    task = tasks.load(TASK)
    if options.smoke:
        task = task._replace(epochs=6)
    hyperparameters = picked(options.budget)
    methods = {name: harness.methods.METHODS[name] for name in options.methods}
    work = {
        name: options.seeds
        * harness.training.gradients_of(task, method, options.budget)
        for name, method in methods.items()
    }
    size = round(sum(work.values()))
    name = "label_noise" if options.budget == "gradients" else "label_noise_epochs"
    command_line.check_publishing(parser, options, name, size)
    rows: dict[str, Any] = {}
    try:
        with harness.progress.over("label noise", size) as progress:
            for method_name, method in methods.items():
                trained = harness.training.train(
                    task,
                    method,
                    [hyperparameters[method_name]] * options.seeds,
                    range(options.seeds),
                    epochs=harness.training.budget_epochs(task, method, options.budget),
                    test=True,
                    progress=progress,
                )
                rows[method_name] = harness.tables.row(
                    task, method, hyperparameters[method_name], trained
                )
    finally:
        report(options, task, name, size, rows)
    return 0


def report(options: Any, task: Any, name: str, size: int, rows: dict[str, Any]) -> None:
    """Print the table; save what was finished, and say what that is."""
    content = {
        "task": task.title,
        "budget": options.budget,
        "seeds": options.seeds,
        "methods": harness.tables.compare(rows),
    }
    if rows:
        title = f"{task.title}, {options.seeds} seeds, equal {options.budget}"
        harness.tables.show(title, *harness.tables.summary_cells(content["methods"]))
    command_line.save(
        options,
        name,
        content,
        size=size,
        done=len(rows),
        of=len(options.methods),
        unit="methods",
        draw=draw,
    )


def draw(path: Path, content: dict[str, Any]) -> None:
    """Accuracy over the gradients, and at the end."""
    figures = harness.figures
    figure, axes = figures.panels(1, 2, width=5.2)
    figures.curves(axes[0, 0], content["methods"])
    figures.ranking(axes[0, 1], content["methods"])
    figure.suptitle(
        f"{content['task']}: mean ± standard error over {content['seeds']} seeds; "
        "|: at the epoch that noisy validation picks",
        fontsize=10,
    )
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
