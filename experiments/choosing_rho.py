"""How to choose ρ for a new task: rules made on all tasks but one, tried on that one.

Reads the results of ``experiments.evidence`` and trains nothing. First the radius that
the search picked on each task; then how it moves with θ, weight decay, learning rate,
label noise and the norm of the parameters; then rules that predict it from what is
known before training, and their error on the task that they were made without.
"""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from experiments import evidence, harness, tasks
from experiments.harness import command_line

METHODS = ("sam", "vasso", "lagged_vasso")
# Rule -> what it is told of a task before training.
RULES: dict[str, tuple[str, ...]] = {
    "ρ = c": (),
    "ρ = c ‖x₀‖^a": ("log_norm",),
    "ρ = c exp(b w)": ("wrong_labels",),
    "ρ = c ‖x₀‖^a exp(b w)": ("log_norm", "wrong_labels"),
}
SYMBOLS = {"log_norm": "a", "wrong_labels": "b"}
# What the radius may move with -> how its effect is said.
MOVERS = {
    "log_theta": "θ halved: ρ times",
    "log_weight_decay": "weight decay doubled: ρ times",
    "log_learning_rate": "learning rate doubled: ρ times",
    "log_norm": "‖x₀‖ doubled: ρ times",
    "wrong_labels": "25 points more wrong labels: ρ times",
}
STEPS = {"log_theta": -np.log(2), "wrong_labels": 0.25}
# A trial is good if its validation accuracy is so near to the best, in points.
GOOD = 1.0
# Trials within this factor of a rule's radius say what it would have reached.
NEAR = 1.5

Unit = dict[str, Any]


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
    units = [
        unit(task, method, content["search"][method])
        for task, content in found["tasks"].items()
        for method in METHODS
        if method in content["search"]
    ]
    content = {
        "good": GOOD,
        "near": NEAR,
        "units": units,
        "moves": {
            "SAM and VaSSO": moves([u for u in units if u["method"] != METHODS[2]]),
            "lagged VaSSO": moves([u for u in units if u["method"] == METHODS[2]]),
        },
        "rules": [
            {"method": method, "rule": name}
            | leave_one_out([u for u in units if u["method"] == method], features)
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


def unit(name: str, method: str, search: dict[str, Any]) -> Unit:
    """What a search says of the radius, and what is known of its task beforehand."""
    task = tasks.load(name)
    params = task.network.init(np.random.default_rng(0))
    wrong = tasks.split(task, 0).given_labels != task.labels
    known = {
        "log_norm": float(np.log(harness.networks.norm(params))),
        "wrong_labels": float(wrong.mean()),
    }
    trials = [
        {
            "rho": trial["rho"],
            "score": float(np.mean(trial["scores"])),
            "seeds": len(trial["scores"]),
            "log_theta": float(np.log(trial.get("theta", 1.0))),
            "log_weight_decay": float(np.log(trial["weight_decay"])),
            "log_learning_rate": float(np.log(trial["learning_rate"])),
        }
        | known
        for trial in search["trials"]
    ]
    most, fewest = (pick(trial["seeds"] for trial in trials) for pick in (max, min))
    finalists = [trial for trial in trials if trial["seeds"] == most]
    best = max(trial["score"] for trial in finalists)
    # Trials of the first stage only are too uncertain to be called good.
    good = [
        trial["rho"]
        for trial in trials
        if trial["score"] >= best - GOOD and trial["seeds"] > fewest
    ]
    return {
        "task": task.title,
        "method": method,
        "picked": search["picked"],
        "best": best,
        "good_radii": [min(good), max(good)],
        "finalists": finalists,
        "trials": [{k: trial[k] for k in ("rho", "score")} for trial in trials],
    } | known


def fit(rows: list[dict[str, Any]], features: list[str]) -> np.ndarray:
    """Least squares of log ρ: the constant, and a coefficient per feature."""
    known = np.array([[1.0, *(row[name] for name in features)] for row in rows])
    return np.linalg.lstsq(known, np.log([row["rho"] for row in rows]))[0]


def moves(units: list[Unit]) -> list[dict[str, Any]]:
    """Factors on ρ, with 95 % intervals by leaving out one task after another."""
    features = [
        name
        for name in MOVERS
        if len({trial[name] for u in units for trial in u["finalists"]}) > 1
    ]

    def coefficients(leaving_out: str | None) -> np.ndarray:
        kept = [u for u in units if u["task"] != leaving_out]
        return fit([trial for u in kept for trial in u["finalists"]], features)[1:]

    names = list(dict.fromkeys(u["task"] for u in units))
    whole, parts = coefficients(None), np.array([coefficients(n) for n in names])
    count = len(names)
    errors = np.sqrt((count - 1) / count * ((parts - parts.mean(0)) ** 2).sum(0))
    rows = []
    for name, value, error in zip(features, whole, errors, strict=True):
        step = STEPS.get(name, np.log(2))
        ends = harness.statistics.interval(value * step, abs(error * step), count)
        rows.append(
            {
                "mover": MOVERS[name],
                "factor": float(np.exp(value * step)),
                "interval": [float(np.exp(end)) for end in ends],
            }
        )
    return rows


def leave_one_out(units: list[Unit], features: tuple[str, ...]) -> dict[str, Any]:
    """The error of a rule on each task, when it is made on the others."""
    rows = [u | {"rho": u["picked"]["rho"]} for u in units]
    errors = []
    for row in rows:
        others = [other for other in rows if other is not row]
        constant, *slopes = fit(others, list(features))
        told = (slope * row[name] for slope, name in zip(slopes, features, strict=True))
        rho = float(np.exp(constant + sum(told)))
        near = [
            trial["score"]
            for trial in row["trials"]
            if max(trial["rho"] / rho, rho / trial["rho"]) <= NEAR
        ]
        errors.append(
            {
                "task": row["task"],
                "rho": rho,
                "factor": max(rho / row["rho"], row["rho"] / rho),
                "good": row["good_radii"][0] <= rho <= row["good_radii"][1],
                "lost": row["best"] - max(near) if near else None,
            }
        )
    return {"coefficients": fit(rows, list(features)).tolist(), "errors": errors}


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


def rules(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The rules with their errors on the tasks that they were made without."""
    lines = []
    for rule in content["rules"]:
        errors = rule["errors"]
        factors = [error["factor"] for error in errors]
        lost = [error["lost"] for error in errors if error["lost"] is not None]
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
                f"{np.mean(lost):.1f}",
                f"{max(lost):.1f}",
            ]
        )
    return [
        "method",
        "rule",
        "made on all tasks",
        "median factor",
        "largest",
        "among the good",
        "points lost, mean",
        "most",
    ], lines


def show(content: dict[str, Any]) -> None:
    """Print the tables."""
    harness.tables.show("The radius that the search picked", *picks(content))
    harness.tables.show("What the radius moves with", *movers(content))
    harness.tables.show(
        "Rules for ρ: ‖x₀‖ is the norm of the parameters at the start, w the share of "
        "wrong labels; errors on the task that the rule was made without",
        *rules(content),
    )


def draw(path: Path, content: dict[str, Any]) -> None:
    """The picked radii by task, and against those of the best rule."""
    figures = harness.figures
    names = list(dict.fromkeys(u["task"] for u in content["units"]))
    figure, axes = figures.panels(1, 2, width=5.4, height=4.6)
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
        rule = min(
            (rule for rule in content["rules"] if rule["method"] == name),
            key=lambda rule: np.median([e["factor"] for e in rule["errors"]]),
        )
        axes[0, 1].plot(
            [e["rho"] for e in rule["errors"]],
            [u["picked"]["rho"] for u in of_method],
            label=f"{method.label}: {rule['rule']}",
            **style,
        )
    wrapped = [textwrap.fill(name, 30) for name in names]
    axes[0, 0].set_yticks(range(0, -len(names), -1), wrapped)
    axes[0, 0].set(xscale="log", xlabel="radius ρ", title="picked; line: as good")
    ends = np.array(axes[0, 0].get_xlim())
    for factor, dashes in ((1, "-"), (2, ":"), (0.5, ":")):
        axes[0, 1].plot(ends, factor * ends, dashes, color="black", linewidth=0.8)
    axes[0, 1].set(
        xscale="log", yscale="log", xlabel="ρ of the rule", ylabel="picked ρ"
    )
    axes[0, 1].set_title("rule made on the other tasks; dotted: a factor of 2")
    for ax in axes[0]:
        ax.legend(frameon=False, fontsize=8)
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
