"""Annealing a language model on another text: how much of the old one is lost?

The networks that ``experiments.quantization --gradients 5000`` pretrains on Python's
source are annealed on English: the topics of Python's language reference. Every method
takes 400 gradients, and its loss on the old text is compared with that of AdamW *at the
same loss on the new text*: AdamW is annealed for five lengths, and what it has lost
when it has learned as much lies between two of them. Differences are paired by seed,
and all settings are shown. About four minutes on one core, and four for the
pretraining.
"""

from pathlib import Path
from typing import Any

from experiments import harness, quantization
from experiments.harness import command_line, files
from experiments.harness.progress import Progress
from experiments.quantization import Family, Plan, over

GRADIENTS = 400  # of every annealing
LENGTHS = (100, 200, 300, 400, 500)  # of AdamW's
PRETRAINED = 5000  # the length of the trainings whose first part is shared
TEXTS = ("new", "old")

Losses = dict[str, list[float]]  # by text and seed

ADAMW = quantization.FAMILIES["adamw"]
FAMILIES = {
    "slower": Family("AdamW", "adamw", over("learning_rate", 0.002)),
    **{
        name: quantization.FAMILIES[name]
        for name in ("nadamw", "momentum_sam", "sam", "lagged_vasso", "split_sam")
    },
}


def main(arguments: list[str] | None = None) -> int:
    """Do what is missing; print, write."""
    parser = command_line.experiment_parser(
        "forgetting", __doc__, seeds=8, methods=FAMILIES
    )
    options = command_line.parse(parser, arguments)
    plan, gradients, lengths = Plan(options.seeds, PRETRAINED), GRADIENTS, LENGTHS
    names = options.methods
    if options.smoke:
        plan, gradients, lengths = Plan(2, 500, 500, 8, 1), 100, (100, 200)
        names = names[:2]
    from experiments.tasks import corpus as texts

    try:
        old = texts.read(characters=quantization.CHARACTERS)
        new = texts.read_reference()
    except ValueError as error:
        parser.error(str(error))
    harness.rows.use_all_cores(options.runs / "compiled")
    settings = sum(len(FAMILIES[name].settings) for name in names)
    size = plan.work_before + plan.seeds * (sum(lengths) + gradients * settings)
    command_line.check_publishing(parser, options, "forgetting", size)
    content: dict[str, Any] = {"text": old.describe(), "new_text": new.describe()}
    content |= {"plan": plan._asdict(), "gradients": gradients}
    curve: dict[int, Losses] = {}
    found: dict[str, Any] = {}
    try:
        with harness.progress.over("forgetting", size) as progress:
            before = options.runs / "quantization"
            rates = quantization.losses_of_rates(old, plan, before, progress)
            content["rate"] = rate = quantization.best_rate(rates)
            pretrained = quantization.Study(old, plan, before, progress)
            study = Study(pretrained, new, rate, options.runs / "forgetting")
            for length in (0, *lengths):
                curve[length] = study.annealed("adamw", ADAMW, {}, length)
            for name in names:
                family = FAMILIES[name]
                found[name] = [
                    (setting, study.annealed(name, family, setting, gradients))
                    for setting in family.settings
                ]
    finally:
        if found:
            content |= summaries(curve, found, gradients)
            harness.tables.show("Forgetting, test texts", *cells(content))
        command_line.save(
            options,
            "forgetting",
            content,
            size=size,
            done=len(found),
            of=len(names),
            unit="methods",
            draw=draw,
        )
    return 0


class Study:
    """The annealings; those that are finished are read from files.

    Attributes:
      pretrained: the networks that are annealed.
      text: that they are annealed on.
      windows: of the test splits of both texts.
      rate: the learning rate.
      folder: of the files.
    """

    def __init__(
        self, pretrained: quantization.Study, new: Any, rate: float, folder: Path
    ) -> None:
        self.pretrained, self.rate = pretrained, rate
        self.starts = pretrained.pretrained(rate)
        self.text = new.text["training"].astype("int32")
        self.windows = {
            "new": quantization.windows_of(new, "test"),
            "old": pretrained.windows["test"],
        }
        self.folder = folder / f"{pretrained.folder.name}"

    @property
    def _progress(self) -> Progress:
        return self.pretrained.progress

    def annealed(
        self, name: str, family: Family, setting: dict[str, float], gradients: int
    ) -> Losses:
        """The losses after so many gradients; after none those before annealing."""
        seeds = self.pretrained.plan.seeds
        values = "".join(f", {key} {value:g}" for key, value in setting.items())
        path = self.folder / f"{name} {self.rate:g}{values}, {gradients}.json"
        losses = files.read_json(path)
        if losses is not None:
            self._progress.advance(seeds * gradients)
            return losses
        self._progress.describe(quantization.label_of(family, setting))
        of_texts = harness.annealing.anneal(
            self.pretrained.model,
            harness.language_methods.METHODS[family.method],
            self.text,
            self.windows,
            quantization.DEFAULTS | {"learning_rate": self.rate} | setting,
            self.starts,
            range(seeds),
            bits=(),
            gradients=gradients,
            progress=self._progress,
        )
        losses = {text: of_texts[text][:, 0].round(6).tolist() for text in TEXTS}
        files.write_json(path, losses)
        return losses


def summaries(
    curve: dict[int, Losses],
    found: dict[str, list[tuple[dict[str, float], Losses]]],
    gradients: int,
) -> dict[str, Any]:
    """What a results file says of all annealings.

    Args:
      curve: of AdamW, by length, that of no gradient among them.
      found: by family, the settings and their losses.
      gradients: that the families have taken.

    Returns:
      ``curve``, by length, and ``families``, by name a list of settings with ``label``
      and ``setting``: of each the mean, standard error and values of the loss on both
      texts; of a family also ``lost``, the paired difference on the old text to AdamW
      at the same loss on the new one, ``None`` where a seed is beyond AdamW's lengths.
      AdamW itself, compared with its other lengths, is the first family: what it seems
      to lose is the error of the interpolation.
    """
    others = {n: one for n, one in curve.items() if n}
    rest = {n: one for n, one in others.items() if n != gradients}
    families = {"adamw": [_row(ADAMW, {}, curve[gradients], rest)]}
    for name, settings in found.items():
        families[name] = [
            _row(FAMILIES[name], setting, losses, others)
            for setting, losses in settings
        ]
    of_lengths = {str(n): _means(losses) for n, losses in curve.items()}
    return {"curve": of_lengths, "families": families}


def _row(
    family: Family,
    setting: dict[str, float],
    losses: Losses,
    curve: dict[int, Losses],
) -> dict[str, Any]:
    expected = lost_by_adamw(curve, losses["new"])
    lost = None
    if None not in expected:
        lost = harness.statistics.paired_difference(losses["old"], expected)
    label = quantization.label_of(family, setting)
    return {"label": label, "setting": setting, **_means(losses), "lost": lost}


def _means(losses: Losses) -> dict[str, Any]:
    return {
        text: {
            "mean": sum(losses[text]) / len(losses[text]),
            "standard_error": harness.statistics.standard_error(losses[text]),
            "values": losses[text],
        }
        for text in TEXTS
    }


def lost_by_adamw(curve: dict[int, Losses], learned: list[float]) -> list[float | None]:
    """AdamW's loss on the old text where its loss on the new one is ``learned``.

    By seed; linear between two lengths, and ``None`` beyond all of them.
    """
    import numpy as np

    found: list[float | None] = []
    for seed, loss in enumerate(learned):
        points = [(one["new"][seed], one["old"][seed]) for one in curve.values()]
        new, old = zip(*sorted(points), strict=True)
        inside = new[0] <= loss <= new[-1]
        found.append(float(np.interp(loss, new, old)) if inside else None)
    return found


def cells(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Losses on both texts, and what was lost more than by AdamW."""
    tables = harness.tables
    header = ["", "gradients", "loss on the new text", "loss on the old text"]
    header += ["− AdamW at the same loss on the new text"]
    annealing = str(content["gradients"])
    lines = []
    for length, one in content["curve"].items():
        if length != annealing:
            label = "AdamW" if length != "0" else "before annealing"
            lines.append([label, length, *_cells(one), ""])
    for settings in content["families"].values():
        for one in settings:
            lost = one["lost"]
            cell = tables.plus_minus(lost, 3) if lost else "outside AdamW's range"
            lines.append([one["label"], annealing, *_cells(one), cell])
    return header, lines


def _cells(one: dict[str, Any]) -> list[str]:
    return [harness.tables.mean_and_error(one[text], 3) for text in TEXTS]


def draw(path: Path, content: dict[str, Any]) -> None:
    """The losses on both texts, and what was lost more than by AdamW."""
    figures, methods = harness.figures, harness.language_methods.METHODS
    shown = [
        (FAMILIES.get(name, ADAMW), one)
        for name, settings in content["families"].items()
        for one in settings
        if one["lost"]
    ]
    figure, axes = figures.panels(1, 2, height=max(2.4, 0.9 + 0.19 * len(shown)))
    losses, lost = axes[0]
    curve = {n: one for n, one in content["curve"].items() if n != "0"}
    points = {n: [one[text]["mean"] for text in TEXTS] for n, one in curve.items()}
    losses.plot(*zip(*points.values(), strict=True), color="black", marker=".", lw=1)
    for length, point in points.items():
        place = {"xytext": (-4, -8), "textcoords": "offset points", "ha": "right"}
        losses.annotate(length, point, **place)
    losses.locator_params(nbins=5)
    lost.locator_params(axis="x", nbins=5)
    heights = range(0, -len(shown), -1)
    lost.axvline(0, color="black", linewidth=0.8)
    for height, (family, one) in zip(heights, shown, strict=True):
        method = methods[family.method]
        style = {"color": method.color, "marker": method.marker, "markersize": 5}
        losses.plot(one["new"]["mean"], one["old"]["mean"], **style)
        lost.errorbar(
            one["lost"]["mean"],
            height,
            xerr=one["lost"]["standard_error"],
            capsize=2,
            **style,
        )
    losses.set_xlabel("loss on the new text (nats per character)")
    losses.set_ylabel("loss on the old text")
    lost.set_yticks(heights, [one["label"] for _, one in shown])
    lost.set_xlabel(
        "loss on the old text minus AdamW's\nat the same loss on the new one"
    )
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
