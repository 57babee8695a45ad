"""A language model: does a second gradient pay where the loss is far from its minimum?

A character-level transformer on the source of Python's standard library, trained by
AdamW, and by SAM, VaSSO and lagged VaSSO around AdamW. Learning rate, weight decay and
radius are searched for every method on files that neither training nor the test has
seen. About five minutes on two cores.
"""

import dataclasses
from pathlib import Path
from typing import Any

from experiments import harness
from experiments.harness import command_line

METHODS = ("adamw", "sam", "vasso", "lagged_vasso")
CALLS = 12  # of 60 steps each: 720 gradients
# Less than the protocol's, since one training takes seconds: 18 trainings per search.
BUDGET = {"trials": 12, "seeds": 1, "rungs": ((4, 2), (2, 3)), "widenings": 1}
AGAIN = 2  # seeds on which the finalists are measured at equal steps


def main(arguments: list[str] | None = None) -> int:
    """Search and test every method; print, write."""
    parser = command_line.experiment_parser(
        "char_lm", __doc__, seeds=6, methods=METHODS
    )
    options = command_line.parse(parser, arguments)
    harness.rows.use_all_cores()
    from experiments.tasks import corpus as texts

    try:
        corpus = texts.read()
    except ValueError as error:
        parser.error(str(error))
    calls, budget = CALLS, harness.tuning.Budget(**BUDGET)
    width, blocks = 32, 2
    if options.smoke:
        calls, budget = 2, harness.tuning.Budget(2, 1, ((1, 2),), 0)
        width, blocks = 8, 1
        options.methods = options.methods[:2]
    model = harness.transformer.Transformer(
        width, blocks, texts.VOCABULARY, harness.language.CONTEXT
    )
    methods = {name: method_of(name) for name in options.methods}
    work = {n: work_of(m, budget, options.seeds, calls) for n, m in methods.items()}
    size = round(sum(work.values()))
    command_line.check_publishing(parser, options, "char_lm", size)
    content: dict[str, Any] = {"seeds": options.seeds, "text": corpus.describe()}
    content |= {"frequencies": texts.loss_of_frequencies(corpus)}
    units: dict[str, Any] = {}
    try:
        with harness.progress.over("language model", size) as progress:
            for name, method in methods.items():
                progress.describe(method.label)
                with harness.progress.part_of(progress, work[name]):
                    units[name] = study(corpus, model, method, budget, options, calls)
    finally:
        for key in ("gradients", "steps", "search"):
            content[key] = {name: unit[key] for name, unit in units.items()}
        for key in ("gradients", "steps") if units else ():
            content[key] = compare(content[key], content["frequencies"])
            title = f"Standard library's source, {options.seeds} seeds, equal {key}"
            harness.tables.show(title, *cells(content[key]))
        command_line.save(
            options,
            "char_lm",
            content,
            size=size,
            done=len(units),
            of=len(methods),
            unit="methods",
            draw=draw,
        )
    return 0


def method_of(name: str) -> Any:
    """A method around AdamW: as in the other experiments, with other ranges."""
    methods = harness.methods
    method = methods.METHODS["sgd" if name == "adamw" else name]
    own = {
        "learning_rate": methods.Range(0.003, 0.03),
        "weight_decay": methods.Range(0.01, 0.5, least=1e-4),
    } | method.own
    if "rho" in own:
        own["rho"] = methods.Range(0.001, 0.1, least=1e-5)
    label = "AdamW" if name == "adamw" else method.label
    return dataclasses.replace(method, label=label, own=own)


def work_of(method: Any, budget: Any, seeds: int, calls: int) -> float:
    """Gradients of the study of a method that widens nothing."""
    steps = calls * harness.language.STEPS_PER_CALL
    work = steps * (budget.trainings + seeds)
    if method.gradients > 1:
        again = budget.rungs[-1][0] * AGAIN + seeds
        work += again * steps * method.gradients
    return work


def study(
    corpus: Any, model: Any, method: Any, budget: Any, options: Any, calls: int
) -> dict[str, Any]:
    """Search a method at equal gradients; test at equal gradients and equal steps."""
    import numpy as np

    first = harness.units.FIRST_SEARCH_SEED
    shorter = round(calls / method.gradients)
    total = work_of(method, budget, options.seeds, calls)
    with harness.progress.over(method.label, total) as progress:

        def train(points: Any, seeds: Any, calls: int, test: bool = False) -> Any:
            return harness.language.train(
                *(corpus, model, method, points, seeds),
                calls=calls,
                test=test,
                progress=progress,
            )

        def measure(points: Any, seeds: Any, calls: int = shorter) -> Any:
            """Higher is better: minus the loss on the validation files."""
            return -train(points, seeds, calls).validation[:, -1]

        def test(point: dict[str, float], calls: int) -> dict[str, Any]:
            seeds = range(options.seeds)
            trained = train([point] * options.seeds, seeds, calls, test=True)
            return row(method, point, trained)

        found = harness.tuning.search(method.space, measure, budget, first_seed=first)
        tested = test(found.picked, shorter)
        result = {"gradients": tested, "steps": tested}
        if shorter != calls:
            points = [found.trials[i].hyperparameters for i in found.finalists]
            seeds = list(range(first, first + AGAIN))
            scores = measure(
                [p for p in points for _ in seeds], seeds * len(points), calls
            )
            best = int(np.reshape(scores, (len(points), -1)).mean(1).argmax())
            result["steps"] = test(points[best], calls)
    return result | {"search": harness.tuning.as_json(found)}


def row(method: Any, point: dict[str, float], trained: Any) -> dict[str, Any]:
    """What a results file says of the test trainings of one method."""
    statistics = harness.statistics
    picked = statistics.early_stopped(-trained.validation, trained.test)
    errors = [statistics.standard_error(column) for column in trained.test.T]
    return {
        "label": method.label,
        "hyperparameters": point,
        "epochs": int(trained.steps[-1]),
        "gradients": float(trained.gradients.mean()),
        "last": statistics.summary(trained.test[:, -1], 0),
        "picked": statistics.summary(picked, 0),
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
    return harness.tables.compare(rows, ("adamw", "sam"))


def cells(rows: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells; losses in nats per character."""
    tables, describe = harness.tables, harness.methods.describe
    known = [name for name in ("adamw", "sam") if name in rows]
    header = ["method", "hyperparameters", "steps", "gradients"]
    header += ["test loss (nats)", "quartiles", "collapsed", "training loss (nats)"]
    header += [f"− {rows[name]['label']}" for name in known]
    lines = []
    for found in rows.values():
        last = found["last"]
        line = [found["label"], describe(found["hyperparameters"])]
        line += [f"{found[key]:.0f}" for key in ("epochs", "gradients")]
        line += [tables.mean_and_error(last, 3)]
        line += [f"{last['lower_quartile']:.3f} to {last['upper_quartile']:.3f}"]
        line += [f"{last['collapsed']} of {len(last['values'])}"]
        line += [tables.mean_and_error(found["training"], 3)]
        for name in known:
            line += tables.difference_cells(found["differences"].get(name), 3)
        lines.append(line)
    return header, lines


def draw(path: Path, content: dict[str, Any]) -> None:
    """Test loss over the gradients, and at the end at both budgets."""
    figures = harness.figures
    figure, axes = figures.panels(1, 2)
    label = "test loss (nats per character)"
    rows = content["gradients"]
    figures.curves(axes[0, 0], rows, label)
    # The first evaluations are far above the rest, and the same for all.
    shown = [loss for row in rows.values() for loss in row["curve"]["mean"][2:]]
    if shown:
        room = 0.05 * (max(shown) - min(shown))
        axes[0, 0].set_ylim(min(shown) - room, max(shown) + room)
    figures.ranking(axes[0, 1], rows, content["steps"], label)
    figure.suptitle(
        "Character-level transformer, equal gradients (hollow: equal steps): mean ± "
        f"standard error, {content['seeds']} seeds",
        fontsize=10,
    )
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
