"""How to choose ρ for a new task: rules made on all tasks but one, tried on that one.

Reads the results of ``experiments.evidence`` and trains nothing. First the radius that
the search picked on each task; then how it moves with θ, weight decay, learning rate,
label noise and the norm of the parameters; then rules that predict it from what is
known before training, and their error on the task that they were made without.
"""

from pathlib import Path
from typing import Any

import numpy as np

from experiments import evidence, harness
from experiments.harness import command_line

METHODS = ("sam", "vasso", "lagged_vasso")
# The searches from which it is seen what the radius moves with.
TOGETHER = {"SAM and VaSSO": ("sam", "vasso"), "lagged VaSSO": ("lagged_vasso",)}
# Rule -> what it is told of a task before training.
RULES: dict[str, tuple[str, ...]] = {
    "ρ = c": (),
    "ρ = c ‖x₀‖^a": ("log_norm",),
    "ρ = c exp(b w)": ("wrong_labels",),
    "ρ = c ‖x₀‖^a exp(b w)": ("log_norm", "wrong_labels"),
}
SYMBOLS = {"log_norm": "a", "wrong_labels": "b"}
WRONG = (0, 0.25, 0.5, 0.7)  # within what the tasks have


def main(arguments: list[str] | None = None) -> int:
    """Read, print, write."""
    parser = command_line.experiment_parser("choosing_rho", __doc__)
    options = command_line.parse(parser, arguments)
    found = evidence.read(parser, options)
    if len(found["tasks"]) < 5:
        parser.error(
            f"the evidence has {len(found['tasks'])} tasks, too few to make a rule: "
            "run python -m experiments.evidence to its end"
        )
    rules = harness.radius_rules
    units = [
        rules.unit(task, method, content["search"][method])
        for task, content in found["tasks"].items()
        for method in METHODS
        if method in content["search"]
    ]
    content = {
        "good": rules.GOOD,
        "units": units,
        "moves": {
            name: rules.moves([u for u in units if u["method"] in methods])
            for name, methods in TOGETHER.items()
        },
        "rules": [
            {"method": method, "rule": name}
            | rules.leave_one_out([u for u in units if u["method"] == method], features)
            for method in METHODS
            for name, features in RULES.items()
        ],
    }
    show(content)
    command_line.save(
        options,
        "choosing_rho",
        content,
        size=found["size"],
        done=1,
        of=1,
        unit="reports",
        draw=draw,
    )
    return 0


def picks(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The radius that was picked on each task, and those that are about as good."""
    found = {(u["task"], u["method"]): u for u in content["units"]}
    lines = []
    for task in dict.fromkeys(u["task"] for u in content["units"]):
        line = [task, f"{found[task, 'sam']['wrong_labels']:.0%}"]
        for method in METHODS:
            u = found[task, method]
            low, high = u["good_radii"]
            line += [
                harness.methods.describe(
                    {k: v for k, v in u["picked"].items() if k in ("rho", "theta")}
                ),
                f"{low:.2g} to {high:.2g}",
            ]
        lines.append(line)
    header = ["task", "wrong labels"]
    for method in METHODS:
        header += [command_line.METHOD_LABELS[method], "as good"]
    return header, lines


def movers(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """How the radius moves."""
    lines = [
        [
            methods,
            row["mover"],
            f"{row['factor']:.2f}",
            f"{row['interval'][0]:.2f} to {row['interval'][1]:.2f}",
        ]
        for methods, rows in content["moves"].items()
        for row in rows
    ]
    return ["methods", "change", "factor", "95 %"], lines


def all_rules(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The rules with their errors on the tasks that they were made without."""
    lines = []
    for rule in content["rules"]:
        errors = rule["errors"]
        factors = [error["factor"] for error in errors]
        constant, *slopes = rule["coefficients"]
        numbers = [np.exp(constant), *slopes]
        names = ["c", *(SYMBOLS[feature] for feature in RULES[rule["rule"]])]
        lines.append(
            [
                command_line.METHOD_LABELS[rule["method"]],
                rule["rule"],
                ", ".join(
                    f"{n} = {x:.2g}" for n, x in zip(names, numbers, strict=True)
                ),
                f"{np.median(factors):.2f}",
                f"{max(factors):.2f}",
                f"{sum(error['good'] for error in errors)} of {len(errors)}",
            ]
        )
    return [
        "method",
        "rule",
        "made on all tasks",
        "median factor",
        "largest",
        "among the good",
    ], lines


def safest(content: dict[str, Any], method: str) -> dict[str, Any]:
    """The rule of a method whose largest error is the smallest."""
    rules = [rule for rule in content["rules"] if rule["method"] == method]
    return min(rules, key=lambda rule: max(e["factor"] for e in rule["errors"]))


def to_use(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What those rules say, for a network with the median norm at the start."""
    known = {"log_norm": np.median([u["log_norm"] for u in content["units"]])}
    lines = []
    for method in METHODS:
        rule = safest(content, method)
        constant, *slopes = rule["coefficients"]
        line = [command_line.METHOD_LABELS[method], rule["rule"]]
        for wrong in WRONG:
            told = [
                slope * (known | {"wrong_labels": wrong})[feature]
                for slope, feature in zip(slopes, RULES[rule["rule"]], strict=True)
            ]
            line.append(f"{np.exp(constant + sum(told)):.2f}")
        lines.append([*line, f"{max(e['factor'] for e in rule['errors']):.1f}"])
    shares = [f"w = {wrong:.0%}" for wrong in WRONG]
    return ["method", "rule", *shares, "wrong by at most a factor of"], lines


def show(content: dict[str, Any]) -> None:
    """Print the tables."""
    harness.tables.show("The radius that the search picked", *picks(content))
    harness.tables.show("What the radius moves with", *movers(content))
    harness.tables.show("ρ by the share w of wrong labels", *to_use(content))
    harness.tables.show(
        "Rules for ρ: ‖x₀‖ is the norm of the parameters at the start, w the share of "
        "wrong labels; errors on the task that the rule was made without",
        *all_rules(content),
    )


def draw(path: Path, content: dict[str, Any]) -> None:
    """The picked radii by task, and against those of the rule that errs least."""
    figures = harness.figures
    names = list(dict.fromkeys(u["task"] for u in content["units"]))
    figure, axes = figures.panels(1, 2, width=5.4, height=4.6)
    for axis in (axes[0, 0].xaxis, axes[0, 1].xaxis, axes[0, 1].yaxis):
        figures.logarithmic(axis)
    for number, name in enumerate(METHODS):
        method = harness.methods.METHODS[name]
        of_method = [u for u in content["units"] if u["method"] == name]
        style = {"color": method.color, "marker": method.marker, "linestyle": "none"}
        for u in of_method:
            height = 0.22 * (1 - number) - names.index(u["task"])
            axes[0, 0].plot(u["good_radii"], [height, height], color=method.color)
        axes[0, 0].plot(
            [u["picked"]["rho"] for u in of_method],
            [0.22 * (1 - number) - names.index(u["task"]) for u in of_method],
            label=method.label,
            **style,
        )
        rule = safest(content, name)
        axes[0, 1].plot(
            [e["rho"] for e in rule["errors"]],
            [u["picked"]["rho"] for u in of_method],
            label=f"{method.label}: {rule['rule']}",
            **style,
        )
    figures.task_axis(axes[0, 0], names)
    axes[0, 0].set_xlabel("radius ρ")
    axes[0, 0].set_title("picked; the line spans radii that are as good", fontsize=9)
    ends = np.array(axes[0, 0].get_xlim())
    for factor, dashes in ((1, "-"), (2, ":"), (0.5, ":")):
        axes[0, 1].plot(ends, factor * ends, dashes, color="black", linewidth=0.8)
    axes[0, 1].set(xlabel="ρ of the rule", ylabel="picked ρ (dotted: a factor of 2)")
    axes[0, 1].set_title("a rule that was made on the other tasks", fontsize=9)
    axes[0, 1].set_xlim(ends)
    for ax in axes[0]:
        ax.legend(frameon=False, fontsize=8)
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
