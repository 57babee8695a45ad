"""A language model: which methods pay where the loss is far from its minimum?

A character-level transformer on the source of Python's standard library, trained by
AdamW, and by methods of one and of two gradients per step around it. Learning rate,
weight decay and radius are searched for every method, at equal gradients, on files that
neither training nor the test has seen; the best two of a search go on to longer
trainings, for which AdamW also tries what all others picked. About five minutes on two
cores. ``--width 64 --lengths 600,2000`` trains 119,000 parameters on more of the text,
in about two minutes per method.
"""

import argparse
from collections.abc import Callable, Sequence
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
    "functional_sam",
    "vasso",
)
REFERENCES = ("adamw",)
# Of each module, by the width of the network: even its longest training reads most of
# them about once.
CHARACTERS = {32: 2048, 64: 16_384}


class Plan(NamedTuple):
    """How much is trained; lengths in gradients.

    Attributes:
      seeds: of the test at each length.
      search: how much; less than the protocol, since one training takes seconds.
      searched: the length of the search's trainings.
      lengths: of the test's trainings; multiples of a hundred, so that methods of two
        gradients take as many.
      going_on: how many finalists are measured at another length.
      again: seeds that they are measured on.
      width: of the transformer.
      blocks: of the transformer.
    """

    seeds: int
    search: Any
    searched: int
    lengths: tuple[int, ...]
    going_on: int = 2
    again: int = 2
    width: int = 32
    blocks: int = 2

    @property
    def work_of_search(self) -> int:
        """Gradients of a search that widens nothing."""
        return self.searched * self.search.trainings

    def work_of(self, length: int, others: int = 0) -> int:
        """Gradients of the trainings of one method at a length.

        Args:
          length: of a training.
          others: how many points of other methods are tried.
        """
        again = 0 if length == self.searched else (self.going_on + others) * self.again
        return length * (self.seeds + again)

    def work(self, methods: Sequence[str]) -> int:
        """Gradients of all methods."""
        others = {name: len(methods) - 1 for name in REFERENCES}
        return len(methods) * self.work_of_search + sum(
            self.work_of(length, others.get(name, 0))
            for name in methods
            for length in self.lengths
        )


def main(arguments: list[str] | None = None) -> int:
    """Search and test every method; print, write."""
    parser = command_line.experiment_parser(
        "char_lm", __doc__, seeds=6, methods=METHODS
    )
    parser.add_argument(
        "--lengths",
        type=command_line.numbers(hundreds),
        default="600",
        help="gradients of the tested trainings, with commas between",
    )
    parser.add_argument(
        "--width",
        type=int,
        choices=tuple(CHARACTERS),
        default=32,
        help="of the transformer; another one is written to a file of its own",
    )
    options = command_line.parse(parser, arguments)
    harness.rows.use_all_cores(options.runs / "compiled")
    from experiments.tasks import corpus as texts

    try:
        corpus = texts.read(characters=CHARACTERS[options.width])
    except ValueError as error:
        parser.error(str(error))
    budget = harness.tuning.Budget
    search = budget(12, 1, ((4, 2), (2, 3)), 1)
    plan = Plan(options.seeds, search, 600, tuple(options.lengths), width=options.width)
    file = "char_lm" if options.width == 32 else f"char_lm_width_{options.width}"
    if options.smoke:
        search = budget(2, 1, ((1, 2),), 0)
        plan = Plan(2, search, 100, (100, 200), 1, 1, 8, 1)
        options.methods = options.methods[:2]
    size = plan.work(options.methods)
    command_line.check_publishing(parser, options, file, size)
    content: dict[str, Any] = {"seeds": plan.seeds, "width": plan.width}
    content |= {"text": corpus.describe()}
    content |= {"frequencies": texts.loss_of_frequencies(corpus)}
    folder = options.runs / "char_lm" / content["text"]["sha256"][:8]
    content |= {"search": {}, "lengths": {str(n): {} for n in plan.lengths}}
    done = 0
    try:
        with harness.progress.over("language model", size) as progress:
            studies = {
                name: Study(corpus, name, plan, folder, progress)
                for name in options.methods
            }
            searches = content["search"]
            searches |= {name: study.search() for name, study in studies.items()}
            for name, study in studies.items():
                others = [found["picked"] for n, found in searches.items() if n != name]
                others = others if name in REFERENCES else []
                for length in plan.lengths:
                    found = study.test(length, searches[name], others)
                    content["lengths"][str(length)][name] = found
                done += 1
    finally:
        for length, rows in content["lengths"].items() if done else ():
            compared = compare(rows, content["frequencies"])
            content["lengths"][length] = compared
            title = f"Standard library's source, {plan.seeds} seeds, {length} gradients"
            harness.tables.show(title, *cells(compared))
        command_line.save(
            options,
            file,
            content,
            size=size,
            done=done,
            of=len(options.methods),
            unit="methods",
            draw=draw,
        )
    return 0


def hundreds(text: str) -> int:
    """An argparse type: a positive multiple of a hundred."""
    value = command_line.positive_integer(text)
    if value % 100:
        raise argparse.ArgumentTypeError(f"must be a multiple of 100, got {text!r}")
    return value


class Study:
    """The trainings of one method; those that are finished are read from files.

    Attributes:
      name: of the method.
      method: what it is.
      plan: how much.
      folder: of the files.
      progress: advanced by gradients.
    """

    def __init__(
        self, corpus: Any, name: str, plan: Plan, folder: Path, progress: Any
    ) -> None:
        from experiments.tasks.corpus import VOCABULARY

        self.corpus, self.name, self.plan = corpus, name, plan
        self.folder, self.progress = folder / f"{plan.width} x {plan.blocks}", progress
        self.method = harness.language_methods.METHODS[name]
        self.model = harness.transformer.Transformer(
            plan.width, plan.blocks, VOCABULARY, harness.language.CONTEXT
        )
        self.first = harness.units.FIRST_SEARCH_SEED

    def search(self) -> dict[str, Any]:
        """What a results file says of the search, and ``finalists``, best first."""
        search, length = self.plan.search, self.plan.searched
        file = f"{self.name}, search, {length}, {search.trainings}.json"

        def make() -> dict[str, Any]:
            found = harness.tuning.search(
                self.method.space,
                lambda points, seeds: self._score(points, seeds, length),
                search,
                first_seed=self.first,
            )
            finalists = [found.trials[i].hyperparameters for i in found.finalists]
            return harness.tuning.as_json(found) | {"finalists": finalists}

        return self._saved(file, self.plan.work_of_search, make)

    def test(
        self, length: int, search: dict[str, Any], others: Sequence[dict[str, float]]
    ) -> dict[str, Any]:
        """The row of the test at a length.

        Args:
          length: of a training.
          search: of :meth:`search`.
          others: points of other methods, which are tried beside the finalists at a
            length that was not searched.
        """
        plan = self.plan
        others = [] if length == plan.searched else others
        file = f"{self.name}, test, {length}, {plan.seeds} seeds"
        file += f", {len(others)} others.json" if others else ".json"

        def make() -> dict[str, Any]:
            point = search["picked"]
            if length != plan.searched:
                points = search["finalists"][: plan.going_on]
                points += [{k: point[k] for k in self.method.space} for point in others]
                seeds = [self.first + number for number in range(plan.again)]
                scores = self._score(
                    [p for p in points for _ in seeds], seeds * len(points), length
                )
                means = scores.reshape(len(points), -1).mean(axis=1)
                point = points[int(means.argmax())]
            seeds = list(range(plan.seeds))
            trained = self._train([point] * plan.seeds, seeds, length, test=True)
            return row(self.method, point, trained)

        return self._saved(file, plan.work_of(length, len(others)), make)

    def _saved(
        self, file: str, work: int, make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        path = self.folder / file
        found = files.read_json(path)
        if found is None:
            self.progress.describe(self.method.label)
            before = self.progress.done
            found = make()
            files.write_json(path, found)
            work -= self.progress.done - before
        self.progress.advance(work)
        return found

    def _score(self, points: Any, seeds: Any, length: int) -> Any:
        """Higher is better: minus the loss on the validation files."""
        return -self._train(points, seeds, length).validation

    def _train(self, points: Any, seeds: Any, length: int, test: bool = False) -> Any:
        return harness.language.train(
            *(self.corpus, self.model, self.method, points, seeds),
            calls=length // self.method.gradients // harness.language.STEPS_PER_CALL,
            test=test,
            progress=self.progress,
        )


def row(method: Any, point: dict[str, float], trained: Any) -> dict[str, Any]:
    """What a results file says of the test trainings of one method."""
    gradients = float(trained.gradients.mean())
    return {
        "label": method.label,
        "hyperparameters": point,
        "gradients": gradients,
        "steps": round(gradients / method.gradients),
        "last": harness.statistics.summary(trained.test, 0),
        "training": harness.statistics.summary(trained.training, 0),
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
    header += ["training loss (nats)", "− AdamW"]
    lines = []
    for found in rows.values():
        last = found["last"]
        line = [found["label"], describe(found["hyperparameters"])]
        line += [f"{found['steps']}", tables.mean_and_error(last, 3)]
        line += [f"{last['collapsed']} of {len(last['values'])}"]
        line += [tables.mean_and_error(found["training"], 3)]
        line += tables.difference_cells(found["differences"].get("adamw"), 3)
        lines.append(line)
    return header, lines


def draw(path: Path, content: dict[str, Any]) -> None:
    """Test loss less AdamW's, a line per method and a panel per length."""
    figures, methods = harness.figures, harness.language_methods.METHODS
    lengths = content["lengths"]
    most = max(map(len, lengths.values())) - 1  # without AdamW
    width, height = 7 / len(lengths), 1 + 0.22 * most
    figure, axes = figures.panels(1, len(lengths), width=width, height=height)
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
        ax.set_ylim(0.4 - len(shown), 0.6)
        ax.sharex(axes[0, 0])
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
