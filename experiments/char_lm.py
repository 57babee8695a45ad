"""A language model: which methods pay where the loss is far from its minimum?

A character-level transformer on the source of Python's standard library, trained by
AdamW, and by methods of one and of two gradients per step around it. Learning rate,
weight decay and radius are searched for every method, at equal gradients, on files that
neither training nor the test has seen; the best two of a search go on to the longer
training. About ten minutes on two cores.
"""

from pathlib import Path
from typing import Any, NamedTuple

from experiments import harness
from experiments.harness import command_line, files

METHODS = (
    "adamw",
    "nadamw",
    "momentum_sam",
    "momentum_sam_nadamw",
    "lagged_vasso",
    "split_sam",
    "sam",
    "vasso",
    "functional_sam",
)
REFERENCES = ("adamw",)


class Plan(NamedTuple):
    """How much is trained; lengths in gradients.

    Attributes:
      seeds: of the test at each length.
      search: at the first length. Less than the protocol's, since one training takes
        seconds.
      lengths: of trainings; a multiple of a hundred, so that methods of two gradients
        take as many.
      going_on: how many finalists are measured at the other lengths.
      again: seeds that they are measured on.
      width: of the transformer.
      blocks: of the transformer.
    """

    seeds: int
    search: Any
    lengths: tuple[int, ...] = (600, 2000)
    going_on: int = 2
    again: int = 2
    width: int = 32
    blocks: int = 2

    @property
    def trainings(self) -> dict[int, int]:
        """How many there are of each length, if the search widens nothing."""
        count = dict.fromkeys(self.lengths, self.seeds + self.going_on * self.again)
        count[self.lengths[0]] = self.seeds + self.search.trainings
        return count

    @property
    def work(self) -> int:
        """Gradients of the study of one method."""
        return sum(length * count for length, count in self.trainings.items())


def main(arguments: list[str] | None = None) -> int:
    """Search and test every method; print, write."""
    parser = command_line.experiment_parser(
        "char_lm", __doc__, seeds=6, methods=METHODS
    )
    options = command_line.parse(parser, arguments)
    harness.rows.use_all_cores(options.runs / "compiled")
    from experiments.tasks import corpus as texts

    try:
        corpus = texts.read()
    except ValueError as error:
        parser.error(str(error))
    budget = harness.tuning.Budget
    plan = Plan(options.seeds, budget(12, 1, ((4, 2), (2, 3)), 1))
    if options.smoke:
        plan = Plan(2, budget(2, 1, ((1, 2),), 0), (100, 200), 1, 1, 8, 1)
        options.methods = options.methods[:2]
    size = plan.work * len(options.methods)
    command_line.check_publishing(parser, options, "char_lm", size)
    content: dict[str, Any] = {"seeds": plan.seeds, "text": corpus.describe()}
    content |= {"frequencies": texts.loss_of_frequencies(corpus)}
    folder = options.runs / "char_lm" / content["text"]["sha256"][:8]
    units: dict[str, Any] = {}
    try:
        with harness.progress.over("language model", size) as progress:
            for name in options.methods:
                units[name] = saved_study(folder, corpus, name, plan, progress)
    finally:
        content["search"] = {name: unit["search"] for name, unit in units.items()}
        content["lengths"] = {}
        for length in map(str, plan.lengths if units else ()):
            rows = {name: unit["tests"][length] for name, unit in units.items()}
            rows = compare(rows, content["frequencies"])
            content["lengths"][length] = rows
            title = f"Standard library's source, {plan.seeds} seeds, {length} gradients"
            harness.tables.show(title, *cells(rows))
        command_line.save(
            options,
            "char_lm",
            content,
            size=size,
            done=len(units),
            of=len(options.methods),
            unit="methods",
            draw=draw,
        )
    return 0


def saved_study(
    folder: Path, corpus: Any, name: str, plan: Plan, progress: Any
) -> dict[str, Any]:
    """The study of a method, read if it was finished before."""
    sizes = "-".join(map(str, (plan.width, *plan.lengths, plan.seeds)))
    path = folder / f"{name} {sizes}-{plan.search.trainings}.json"
    found = files.read_json(path)
    if found is None:
        method = harness.language_methods.METHODS[name]
        progress.describe(method.label)
        with harness.progress.part_of(progress, plan.work):
            found = study(corpus, method, plan)
        files.write_json(path, found)
    else:
        progress.advance(plan.work)
    return found


def study(corpus: Any, method: Any, plan: Plan) -> dict[str, Any]:
    """Search a method at the first length; test it at all."""
    import numpy as np

    from experiments.tasks.corpus import VOCABULARY

    language, first = harness.language, harness.units.FIRST_SEARCH_SEED
    model = harness.transformer.Transformer(
        plan.width, plan.blocks, VOCABULARY, language.CONTEXT
    )
    with harness.progress.over(method.label, plan.work) as progress:

        def train(points: Any, seeds: Any, length: int, test: bool = False) -> Any:
            return language.train(
                *(corpus, model, method, points, seeds),
                calls=length // method.gradients // language.STEPS_PER_CALL,
                test=test,
                progress=progress,
            )

        def measure(points: Any, seeds: Any, length: int = plan.lengths[0]) -> Any:
            """Higher is better: minus the loss on the validation files."""
            return -train(points, seeds, length).validation[:, -1]

        found = harness.tuning.search(
            method.space, measure, plan.search, first_seed=first
        )
        picked = dict.fromkeys(plan.lengths, found.picked)
        finalists = found.finalists[: plan.going_on]
        points = [found.trials[i].hyperparameters for i in finalists]
        seeds = list(range(first, first + plan.again))
        for length in plan.lengths[1:]:
            scores = measure(
                [p for p in points for _ in seeds], seeds * len(points), length
            )
            best = np.reshape(scores, (len(points), -1)).mean(1).argmax()
            picked[length] = points[int(best)]
        tests = {}
        for length, point in picked.items():
            trained = train([point] * plan.seeds, range(plan.seeds), length, test=True)
            tests[str(length)] = row(method, point, trained)
    return {"tests": tests, "search": harness.tuning.as_json(found)}


def row(method: Any, point: dict[str, float], trained: Any) -> dict[str, Any]:
    """What a results file says of the test trainings of one method."""
    statistics = harness.statistics
    errors = [statistics.standard_error(column) for column in trained.test.T]
    return {
        "label": method.label,
        "hyperparameters": point,
        "epochs": int(trained.steps[-1]),
        "gradients": float(trained.gradients.mean()),
        "last": statistics.summary(trained.test[:, -1], 0),
        "training": statistics.summary(trained.training, 0),
        "curve": {
            "epochs": trained.steps.tolist(),
            "mean": trained.test.mean(0).round(4).tolist(),
            "standard_error": [round(error, 5) for error in errors],
        },
    }


def compare(rows: dict[str, Any], frequencies: float) -> dict[str, Any]:
    """The rows with paired differences to AdamW, and who learned less than counts."""
    for found in rows.values():
        values = found["last"]["values"]
        found["last"]["collapsed"] = sum(value > frequencies for value in values)
    return harness.tables.compare(rows, REFERENCES)


def cells(rows: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells; losses in nats per character."""
    tables, describe = harness.tables, harness.methods.describe
    header = ["method", "hyperparameters", "steps", "test loss (nats)", "collapsed"]
    header += ["training loss (nats)", "− AdamW", "p (Holm)"]
    lines = []
    for found in rows.values():
        last = found["last"]
        line = [found["label"], describe(found["hyperparameters"])]
        line += [f"{found['epochs']}", tables.mean_and_error(last, 3)]
        line += [f"{last['collapsed']} of {len(last['values'])}"]
        line += [tables.mean_and_error(found["training"], 3)]
        line += tables.difference_cells(found["differences"].get("adamw"), 3)
        lines.append(line)
    return header, lines


def draw(path: Path, content: dict[str, Any]) -> None:
    """Test loss less AdamW's, a line per method and a panel per length."""
    figures, methods = harness.figures, harness.language_methods.METHODS
    lengths = content["lengths"]
    figure, axes = figures.panels(1, len(lengths), width=7 / len(lengths), height=2.8)
    for ax, (length, rows) in zip(axes[0], lengths.items(), strict=True):
        ax.axvline(0, color="black", linewidth=0.8)
        shown = {name: row for name, row in rows.items() if row["differences"]}
        for number, (name, row) in enumerate(shown.items()):
            difference, method = row["differences"]["adamw"], methods[name]
            ax.errorbar(
                difference["mean"],
                -number,
                xerr=difference["standard_error"],
                color=method.color,
                marker=method.marker,
                capsize=2,
            )
        ax.set_title(f"{length} gradients", fontsize=9)
        ax.tick_params(labelsize=8)
        labels = [row["label"] for row in shown.values()]
        ax.set_yticks(range(0, -len(shown), -1), labels, fontsize=8)
        if ax is not axes[0, 0]:
            ax.tick_params(labelleft=False)
    figure.supxlabel(
        "test loss minus AdamW's (nats per character): mean ± standard error, "
        f"{content['seeds']} seeds",
        size=9,
    )
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
