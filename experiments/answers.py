"""What the evidence answers: paired differences between methods, task by task.

Reads the results of ``experiments.evidence`` and trains nothing. Where does a second
gradient pay, at equal gradients? Where does one gradient equal two? Does VaSSO gain
over SAM when both are searched alike? Does early stopping do as well? And how does the
gain over SGD depend on the share of random labels?
"""

from pathlib import Path
from typing import Any

from experiments import evidence, harness
from experiments.harness import command_line

LEVEL = 0.05
Compared = tuple[str, str, str, str]
# Question -> (method, what it is compared with, budget, last epoch or epoch picked).
QUESTIONS: dict[str, tuple[Compared, ...]] = {
    "Where does a second gradient pay, at equal gradients?": (
        ("sam", "sgd", "gradients", "last"),
        ("vasso", "sgd", "gradients", "last"),
        ("sam", "lagged_vasso", "gradients", "last"),
        ("vasso", "lagged_vasso", "gradients", "last"),
    ),
    "Where does one gradient equal two, at equal epochs?": (
        ("lagged_vasso", "sam", "epochs", "last"),
        ("lagged_vasso", "vasso", "epochs", "last"),
        ("momentum_sam", "sam", "epochs", "last"),
        ("single_step_sam", "sam", "epochs", "last"),
    ),
    "Does VaSSO gain over SAM, when both are searched alike?": (
        ("vasso", "sam", "gradients", "last"),
        ("vasso", "sam", "epochs", "last"),
    ),
    "How do other methods compare with SAM, at equal gradients?": (
        ("friendly_sam", "sam", "gradients", "last"),
        ("evasso", "sam", "gradients", "last"),
        ("asam", "sam", "gradients", "last"),
        ("gsam", "sam", "gradients", "last"),
        ("momentum_sam", "sam", "gradients", "last"),
    ),
    "What is left of the gain, when all are stopped early?": (
        ("sam", "sgd", "gradients", "picked"),
        ("vasso", "sgd", "gradients", "picked"),
        ("lagged_vasso", "sgd", "gradients", "picked"),
    ),
}
# Share of random labels of the tasks that differ in nothing else.
NOISE = {"digits-0": 0, "digits-25": 25, "digits-50": 50, "digits-75": 75}
GAINING = ("sam", "friendly_sam", "vasso", "lagged_vasso")


def main(arguments: list[str] | None = None) -> int:
    """Read, print, write."""
    parser = command_line.experiment_parser("answers", __doc__)
    options = command_line.parse(parser, arguments)
    found = evidence.read(parser, options)
    content = {
        "seeds": found["seeds"],
        "questions": {
            question: answer(found["tasks"], compared)
            for question, compared in QUESTIONS.items()
        },
        "gain_over_noise": gain_over_noise(found["tasks"]),
    }
    show(content)
    command_line.save(
        options,
        "answers",
        content,
        size=found["size"],
        done=1,
        of=1,
        unit="reports",
        draw=draw,
    )
    return 0


def answer(
    found: dict[str, Any], compared: tuple[Compared, ...]
) -> list[dict[str, Any]]:
    """Rows of one table; the p-values are corrected over all of them."""
    several = len({(budget, epoch) for *_, budget, epoch in compared}) > 1
    rows = []
    for task in found.values():
        for method, reference, budget, epoch in compared:
            methods = task[budget]
            if method not in methods or reference not in methods:
                continue
            values = [methods[name][epoch]["values"] for name in (method, reference)]
            difference = harness.statistics.paired_difference(*values)
            names = [methods[name]["label"] for name in (method, reference)]
            rows.append(
                {
                    "task": task["task"],
                    "compared": " − ".join(names)
                    + (f", equal {budget}" if several else ""),
                    **difference,
                    "interval": harness.statistics.interval(
                        difference["mean"], difference["standard_error"], len(values[0])
                    ),
                }
            )
    corrected = harness.statistics.holm([row["p"] for row in rows])
    return [
        row | {"p_holm": p, "certain": p < LEVEL}
        for row, p in zip(rows, corrected, strict=True)
    ]


def gain_over_noise(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What methods gain over SGD at equal gradients, by the share of random labels."""
    return {
        name: [
            {
                "random_labels": share,
                **found[task]["gradients"][name]["differences"]["sgd"],
            }
            for task, share in NOISE.items()
            if name in found.get(task, {}).get("gradients", {})
        ]
        for name in GAINING
    }


def cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one table."""
    lines = []
    for row in rows:
        low, high = map(harness.tables.signed, row["interval"])
        sign = "above" if row["mean"] > 0 else "below"
        lines.append(
            [
                row["task"],
                row["compared"],
                harness.tables.plus_minus(row),
                f"{low} to {high}",
                harness.tables.p_value(row["p_holm"]),
                sign if row["certain"] else "no difference found",
            ]
        )
    return ["task", "compared", "points", "95 %", "p (Holm)", "verdict"], lines


def show(content: dict[str, Any]) -> None:
    """Print a table per question."""
    for question, rows in content["questions"].items():
        harness.tables.show(question, *cells(rows))


def draw(path: Path, content: dict[str, Any]) -> None:
    """A panel per question, and the gain over SGD by label noise."""
    figures, questions = harness.figures, content["questions"]
    tasks = dict.fromkeys(row["task"] for rows in questions.values() for row in rows)
    figure, axes = figures.panels(2, 3, width=5.2, height=6.2)
    for ax, (question, rows) in zip(axes.flat, questions.items(), strict=False):
        figures.differences(ax, rows, list(tasks))
        if ax not in axes[:, 0]:
            ax.set_yticklabels([])
        ax.set_title(question.replace(", ", ",\n"), fontsize=9)
    for ax in axes.flat[len(questions) + 1 :]:
        ax.set_visible(False)
    ax = axes.flat[len(questions)]
    for name, gains in content["gain_over_noise"].items():
        method = harness.methods.METHODS[name]
        ax.errorbar(
            [gain["random_labels"] for gain in gains],
            [gain["mean"] for gain in gains],
            [gain["standard_error"] for gain in gains],
            color=method.color,
            marker=method.marker,
            capsize=2,
            label=method.label,
        )
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xlabel="random labels (%)", ylabel="gain over SGD (points)")
    ax.set_title("Digits: gain at equal gradients, by label noise", fontsize=9)
    ax.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"Paired differences over {content['seeds']} seeds, 95 % intervals; filled: "
        f"p < {LEVEL:g} after Holm's correction over the panel",
        fontsize=10,
    )
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
