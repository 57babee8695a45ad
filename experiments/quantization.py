"""Annealing a language model for few bits: which optimizer's weights round best?

A character-level transformer of 119,000 parameters learns the source of Python's
standard library with AdamW at a constant learning rate. From the same weights the last
fifth, in which the learning rate falls to 0, is then trained by every method, with as
many gradients and, seed by seed, the same batches. Then its weight matrices are rounded
to the nearest of 2^b − 1 levels, without further training. The validation text chooses
the learning rate and a setting of each method; differences are those of the test text,
paired by seed. About ten minutes on one core.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from experiments import harness
from experiments.harness import command_line, files
from experiments.harness.progress import Progress

GRADIENTS = 2000
RATES = (0.004, 0.008)
CHARACTERS = 16_384  # of each module: training reads most characters about once
WINDOWS = 256  # of each text that is evaluated
BITS = (8, 4, 3)
FORMATS = (
    "clean",
    *(f"{bits} bits per {unit}" for unit in ("channel", "tensor") for bits in BITS),
)
CHOSEN_BY = "4 bits per channel"
SPLITS = ("validation", "test")

# What a setting is unless it says otherwise; ``newest`` is the weight of the newest
# weights in the average that is evaluated.
DEFAULTS = {"weight_decay": 0.1, "newest": 1.0, "rho": 0.0, "theta": 0.4}
SYMBOLS = {"learning_rate": "η = ", "weight_decay": "weight decay ", "rho": "ρ = "}


class Family(NamedTuple):
    """A method, and the settings of which one is chosen.

    Attributes:
      label: in tables and figures.
      method: its name among the methods of language models.
      settings: hyperparameters that differ from the defaults.
    """

    label: str
    method: str
    settings: tuple[dict[str, float], ...] = ({},)


def over(name: str, *values: float) -> tuple[dict[str, float], ...]:
    """A setting for each value of one hyperparameter."""
    return tuple({name: value} for value in values)


FAMILIES = {
    "adamw": Family("AdamW", "adamw"),
    "momentum_sam": Family("Momentum-SAM", "momentum_sam", over("rho", 0.1, 0.3, 1.0)),
    "lagged_vasso": Family("lagged VaSSO", "lagged_vasso", over("rho", 0.03, 0.1)),
    "nadamw": Family("NAdamW", "nadamw"),
    "random": Family("random perturbation", "random", over("rho", 0.3, 2.0)),
    "average": Family("average over 50 steps", "adamw", over("newest", 0.02)),
    "decay": Family("AdamW", "adamw", over("weight_decay", 0.3, 1.0)),
    "sam": Family("SAM, half the steps", "sam", over("rho", 0.03, 0.1)),
    "split_sam": Family("split SAM", "split_sam", over("rho", 0.1, 0.3)),
    "functional_sam": Family(
        "Functional SAM, half the steps", "functional_sam", over("rho", 0.1)
    ),
}


class Plan(NamedTuple):
    """How much is trained.

    Attributes:
      seeds: of every setting.
      gradients: of a training, the last fifth at a learning rate that falls to 0.
      choosing: gradients of the trainings that choose the learning rate, on two seeds.
      width: of the transformer.
      blocks: of the transformer.
    """

    seeds: int
    gradients: int
    choosing: int = GRADIENTS
    width: int = 64
    blocks: int = 2

    @property
    def annealing(self) -> int:
        """The gradients that every setting takes."""
        return self.gradients // 5

    @property
    def pretraining(self) -> int:
        """The gradients before, which all settings share."""
        return self.gradients - self.annealing

    @property
    def for_rates(self) -> "Plan":
        """What chooses the learning rate."""
        return self._replace(seeds=2, gradients=self.choosing)

    @property
    def work_before(self) -> int:
        """Gradients that choose the learning rate, and that pretrain."""
        choosing = self.for_rates.seeds * self.choosing * len(RATES)
        return choosing + self.seeds * self.pretraining

    def work_of(self, family: Family) -> int:
        """Gradients that the annealings of a family take."""
        return len(family.settings) * self.seeds * self.annealing


def main(arguments: list[str] | None = None) -> int:
    """Do what is missing; print, write."""
    parser = command_line.experiment_parser(
        "quantization", __doc__, seeds=8, methods=FAMILIES
    )
    parser.add_argument(
        "--gradients",
        type=five_hundreds,
        default=str(GRADIENTS),
        help="length of a training; another one is written to a file of its own",
    )
    options = command_line.parse(parser, arguments)
    plan = Plan(options.seeds, options.gradients)
    names = list(dict.fromkeys(["adamw", *options.methods]))
    if options.smoke:
        length = 500 if plan.gradients == GRADIENTS else 1000
        plan, names = Plan(2, length, 500, 8, 1), names[:2]
    from experiments.tasks import corpus as texts

    try:
        corpus = texts.read(characters=CHARACTERS)
    except ValueError as error:
        parser.error(str(error))
    harness.rows.use_all_cores(options.runs / "compiled")
    size = plan.work_before + sum(plan.work_of(FAMILIES[name]) for name in names)
    file = "quantization"
    file += "" if plan.gradients == plan.choosing else f"_{plan.gradients}"
    command_line.check_publishing(parser, options, file, size)
    content: dict[str, Any] = {"text": corpus.describe(), "plan": plan._asdict()}
    losses: dict[str, Any] = {}
    try:
        with harness.progress.over("quantization", size) as progress:
            folder = options.runs / "quantization"
            content["rates"] = losses_of_rates(corpus, plan, folder, progress)
            study = Study(corpus, plan, folder, progress)
            rate = best_rate(content["rates"])
            starts = study.pretrained(rate)
            for name in names:
                losses[name] = study.annealed(name, rate, starts)
    finally:
        content["families"] = summaries(losses)
        if losses:
            harness.tables.show("Rounded weights, test text", *cells(content))
        command_line.save(
            options,
            file,
            content,
            size=size,
            done=len(losses),
            of=len(names),
            unit="methods",
            draw=draw,
        )
    return 0


class Study:
    """The trainings; those that are finished are read from files.

    Attributes:
      plan: how much.
      folder: of the files.
      progress: advanced by gradients.
    """

    def __init__(
        self, corpus: Any, plan: Plan, folder: Path, progress: Progress
    ) -> None:
        from experiments.tasks import corpus as texts

        self.plan, self.progress = plan, progress
        sizes = f"{plan.width} x {plan.blocks}, {plan.gradients}, {plan.seeds} seeds"
        self.folder = folder / f"{sizes}, {corpus.describe()['sha256'][:8]}"
        self.text = corpus.text["training"].astype("int32")
        self.windows = {split: windows_of(corpus, split) for split in SPLITS}
        self.model = harness.transformer.Transformer(
            plan.width, plan.blocks, texts.VOCABULARY, harness.language.CONTEXT
        )

    def clean(self, rate: float) -> list[float]:
        """Validation losses of AdamW at a learning rate, by seed, not rounded."""
        path, seeds = self.folder / f"rate {rate:g}.json", self.plan.seeds
        losses = files.read_json(path)
        if losses is None:
            self.progress.describe(f"learning rate {rate:g}")
            starts = self._pretrain(rate)
            losses = self._anneal(FAMILIES["adamw"], {}, rate, starts)
            files.write_json(path, losses)
        else:
            self.progress.advance(seeds * self.plan.gradients)
        return [of_seed[0] for of_seed in losses["validation"]]

    def pretrained(self, rate: float) -> Any:
        """The weights and Adam's moments of all seeds."""
        import numpy as np

        path, seeds = self.folder / f"pretrained {rate:g}.npz", self.plan.seeds
        if not path.exists():
            self.progress.describe("pretraining")
            leaves = self._pretrain(rate)
            files.write_atomically(path, lambda temporary: np.savez(temporary, *leaves))
            return leaves
        self.progress.advance(seeds * self.plan.pretraining)
        with np.load(path) as saved:
            return [saved[name] for name in saved.files]

    def annealed(self, name: str, rate: float, starts: Any) -> list[dict[str, Any]]:
        """Each setting of a family, with its losses, (seeds, formats), by text."""
        family, found = FAMILIES[name], []
        for setting in family.settings:
            values = "".join(f", {key} {value:g}" for key, value in setting.items())
            path = self.folder / f"{name} {rate:g}{values}.json"
            losses = files.read_json(path)
            if losses is None:
                self.progress.describe(label_of(family, setting))
                losses = self._anneal(family, setting, rate, starts)
                files.write_json(path, losses)
            else:
                self.progress.advance(self.plan.seeds * self.plan.annealing)
            found.append({"setting": setting, "losses": losses})
        return found

    def _pretrain(self, rate: float) -> Any:
        return harness.annealing.pretrain(
            self.model,
            self.text,
            DEFAULTS | {"learning_rate": rate},
            range(self.plan.seeds),
            steps=self.plan.pretraining,
            progress=self.progress,
        )

    def _anneal(
        self,
        family: Family,
        setting: dict[str, float],
        rate: float,
        starts: Any,
    ) -> dict[str, Any]:
        setting = DEFAULTS | setting | {"learning_rate": rate}
        losses = harness.annealing.anneal(
            self.model,
            harness.language_methods.METHODS[family.method],
            self.text,
            self.windows,
            setting,
            starts,
            range(self.plan.seeds),
            bits=BITS,
            gradients=self.plan.annealing,
            progress=self.progress,
        )
        return {split: values.round(6).tolist() for split, values in losses.items()}


def windows_of(corpus: Any, split: str) -> Any:
    """What losses of a text are measured on, (windows, length)."""
    from experiments.tasks import corpus as texts

    length = harness.language.CONTEXT + 1
    return texts.evenly_spaced_windows(corpus.text[split], WINDOWS, length)


def losses_of_rates(
    corpus: Any, plan: Plan, folder: Path, progress: Progress
) -> dict[str, list[float]]:
    """By learning rate, what AdamW's clean loss on the validation text is, by seed."""
    study = Study(corpus, plan.for_rates, folder, progress)
    return {f"{rate:g}": study.clean(rate) for rate in RATES}


def five_hundreds(text: str) -> int:
    """An argparse type: a length whose fifth any method divides into calls."""
    value = command_line.positive_integer(text)
    if value % 500:
        raise argparse.ArgumentTypeError(f"must be a multiple of 500, got {text!r}")
    return value


def best_rate(rates: dict[str, list[float]]) -> float:
    """The learning rate with the lowest mean loss."""
    return float(min(rates, key=lambda rate: sum(rates[rate])))


def label_of(family: Family, setting: dict[str, float]) -> str:
    """A family with one of its settings, as a table shows it."""
    values = [f"{SYMBOLS[k]}{v:g}" for k, v in setting.items() if k in SYMBOLS]
    return ", ".join([family.label, *values])


def summaries(losses: dict[str, Any]) -> dict[str, Any]:
    """What a results file says of all settings.

    Args:
      losses: of :meth:`Study.annealed`, by family, AdamW's among them.

    Returns:
      By family, a list of its settings: ``label``, ``setting``, ``chosen``, whether it
      is the family's best on the validation text, and by text and format ``mean``,
      ``standard_error`` and ``values`` of the loss, and the paired ``difference`` to
      AdamW, which AdamW lacks.
    """
    found: dict[str, Any] = {}
    for name, settings in losses.items():
        found[name] = [
            {
                "label": label_of(FAMILIES[name], one["setting"]),
                "setting": one["setting"],
                "validation": _rows(one, losses, "validation"),
                "test": _rows(one, losses, "test"),
            }
            for one in settings
        ]
        best = min(found[name], key=lambda one: one["validation"][CHOSEN_BY]["mean"])
        for one in found[name]:
            one["chosen"] = one is best
    return found


def _rows(one: dict[str, Any], losses: dict[str, Any], split: str) -> dict[str, Any]:
    """Losses of one setting on one text, by format."""
    statistics = harness.statistics
    (reference,) = losses["adamw"]
    found: dict[str, Any] = {}
    for form, values, others in zip(
        FORMATS,
        zip(*one["losses"][split], strict=True),
        zip(*reference["losses"][split], strict=True),
        strict=True,
    ):
        found[form] = {
            "mean": sum(values) / len(values),
            "standard_error": statistics.standard_error(values),
            "values": values,
        }
        if one is not reference:
            difference = statistics.paired_difference(values, others)
            found[form]["difference"] = difference
    return found


# Eight bits per tensor say nothing that eight per channel do not say.
COLUMNS = tuple(form for form in FORMATS if form != "8 bits per tensor")


def cells(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """AdamW's losses on the test text, and what all others are above them."""
    tables = harness.tables
    header = ["test loss (nats)", *COLUMNS]
    lines = []
    for settings in content["families"].values():
        for one in settings:
            label = one["label"]
            line = [f"**{label}**" if one["chosen"] and len(settings) > 1 else label]
            for form in COLUMNS:
                row = one["test"][form]
                line.append(
                    tables.plus_minus(row["difference"], 3)
                    if "difference" in row
                    else tables.mean_and_error(row, 3)
                )
            lines.append(line)
    return header, lines


# Of each panel of the figure: the format, and its title.
PANELS = {
    "clean": "not rounded",
    "4 bits per channel": "4 bits per channel",
    "3 bits per channel": "3 bits per channel",
}
SHOWN = 0.07  # Differences beyond are written at the edge.


def draw(path: Path, content: dict[str, Any]) -> None:
    """What the test loss is above AdamW's: a line per setting, a panel per format."""
    figures, methods = harness.figures, harness.language_methods.METHODS
    shown = [
        (FAMILIES[name], one)
        for name, settings in content["families"].items()
        for one in settings
        if name != "adamw"
    ]
    figure, axes = figures.panels(
        1, len(PANELS), width=7 / len(PANELS), height=1 + 0.2 * len(shown)
    )
    heights = range(0, -len(shown), -1)
    for ax, (form, title) in zip(axes[0], PANELS.items(), strict=True):
        ax.axvline(0, color="black", linewidth=0.8)
        for height, (family, one) in zip(heights, shown, strict=True):
            method, found = methods[family.method], one["test"][form]["difference"]
            mean = found["mean"]
            if abs(mean) > SHOWN:
                edge = SHOWN if mean > 0 else -SHOWN
                text = harness.tables.signed(mean, 3)
                side = "right" if mean > 0 else "left"
                ax.text(edge, height, text, ha=side, va="center", fontsize=8)
                continue
            ax.errorbar(
                mean,
                height,
                xerr=found["standard_error"],
                color=method.color,
                marker=method.marker,
                markerfacecolor=method.color if one["chosen"] else "white",
                markersize=5,
                capsize=2,
            )
        ax.set_title(title, fontsize=9)
        ax.tick_params(labelsize=8)
        ax.set_xlim(-SHOWN, SHOWN)
        ax.set_xticks([-0.05, 0, 0.05], ["−0.05", "0", "0.05"])
        ax.set_ylim(heights[-1] - 0.6, 0.6)
        ax.set_yticks(heights, [one["label"] for _, one in shown], fontsize=8)
        ax.tick_params(labelleft=ax is axes[0, 0])
    seeds = len(content["families"]["adamw"][0]["test"]["clean"]["values"])
    figure.supxlabel(
        "test loss minus AdamW's (nats per character): mean ± standard error, "
        f"{seeds} seeds",
        size=9,
    )
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
