"""What the evidence says: its tables and figures."""

import statistics
import textwrap
from pathlib import Path
from typing import Any

from experiments import tasks
from experiments.harness import (
    figures,
    methods,
    searches,
    statistics as between,
    tables,
)
from experiments.harness.command_line import (
    CNN_METHODS,
    COMPARED,
    SPLIT_TASKS,
    SPLITS,
)


def gain(rows: dict[str, Any], method: str, over: str = "sgd") -> dict[str, float]:
    """What a method gains over another on one task, search by search, in points."""
    return between.paired_difference(
        rows[method]["accuracy"]["values"], rows[over]["accuracy"]["values"]
    )


def cells(rows: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one task, in 80 columns; the results file has the rest."""
    known = [name for name in ("sgd", "sam") if name in rows]
    header = ["method", "accuracy (%)"]
    header += [f"over {rows[name]['label']}" for name in known]
    lines = []
    for name, row in rows.items():
        line = [row["label"], tables.mean_and_error(row["accuracy"])]
        for number, other in enumerate(known):
            compared = name != other and (number == 0 or name != known[0])
            line.append(tables.plus_minus(gain(rows, name, other)) if compared else "")
        lines.append(line)
    return header, lines


def compared_tasks(content: dict[str, Any]) -> dict[str, Any]:
    """The tasks at all lengths that all methods are compared on."""
    return {n: task for n, task in content["tasks"].items() if not tasks.is_cnn(n)}


def main_tasks(content: dict[str, Any]) -> dict[str, Any]:
    """The tasks at their own length, not at a third or thrice of it."""
    return {
        name: task
        for name, task in compared_tasks(content).items()
        if not tasks.parted(name)[1] and "sgd" in task["methods"]
    }


def of_all_tasks(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Accuracy of every method on every task, the highest mean of a task in bold."""
    found = compared_tasks(content)
    labels = {n: methods.METHODS[n].label for n in COMPARED}
    lines = []
    for task in found.values():
        rows = {n: row for n, row in task["methods"].items() if n in labels}
        best = max(row["accuracy"]["mean"] for row in rows.values())
        line = [task["task"], f"{task['gradients']:,.0f}"]
        for name in labels:
            text = ""
            if name in rows:
                text = tables.mean_and_error(rows[name]["accuracy"])
                text = f"**{text}**" if rows[name]["accuracy"]["mean"] == best else text
            line.append(text)
        lines.append(line)
    return ["task", "gradients", *labels.values()], lines


def of_all_gains(
    content: dict[str, Any], over: str
) -> tuple[list[str], list[list[str]]]:
    """What every method gains over another on every task, search by search."""
    found = compared_tasks(content)
    names = [name for name in COMPARED if name not in ("sgd", over)]
    lines = []
    for task in found.values():
        rows = task["methods"]
        gains = [
            tables.plus_minus(gain(rows, name, over))
            if name in rows and over in rows
            else ""
            for name in names
        ]
        lines.append([task["task"], *gains])
    return ["task", *(methods.METHODS[name].label for name in names)], lines


def of_all_methods(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What each method gains over SGD and SAM, over all tasks at their own length.

    The ± is between tasks. A task counts as above or below where the 95 % interval of
    the difference between searches leaves out zero.
    """
    found = main_tasks(content)
    names = [
        n for n in COMPARED if all(n in task["methods"] for task in found.values())
    ]
    lines = []
    for name in names:
        line = [methods.METHODS[name].label]
        for other in ("sgd", "sam"):
            if name in ("sgd", other):
                line += ["", ""]
                continue
            gains = [gain(task["methods"], name, other) for task in found.values()]
            signs = [sign(one, content["searches"]) for one in gains]
            means = [one["mean"] for one in gains]
            average = {
                "mean": statistics.fmean(means),
                "standard_error": between.standard_error(means),
            }
            line += [
                tables.plus_minus(average),
                f"{signs.count(1)}, {signs.count(0)}, {signs.count(-1)}",
            ]
        rows = [task["methods"][name] for task in found.values()]
        trained = sum(len(values) for row in rows for values in row["tests"])
        line.append(f"{sum(row['collapsed'] for row in rows)} of {trained}")
        lines.append(line)
    counted = "above, level, below"
    return ["method", "over SGD", counted, "over SAM", counted, "collapsed"], lines


def of_splits(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Other shares of the batch for the ascent, and other ascents on split batches."""
    found = {n: content["tasks"][n] for n in SPLIT_TASKS if n in content["tasks"]}
    header, lines = ["method"], []
    for task in found.values():
        header += [f"{task['task']} (%)", "over SGD"]
    for name in ("sgd", "sam", "split_sam", *SPLITS):
        line = [methods.METHODS[name].label]
        line[0] += ", 1/8" if name == "split_sam" else ""
        for task in found.values():
            if name not in task["methods"]:
                line += ["", ""]
                continue
            line.append(tables.mean_and_error(task["methods"][name]["accuracy"]))
            gained = gain(task["methods"], name)
            line.append("" if name == "sgd" else tables.plus_minus(gained))
        lines.append(line)
    return header, lines


def of_convolutions(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The convolutional networks, a line per task and method."""
    lines = []
    for task_name, task in content["tasks"].items():
        if not tasks.is_cnn(task_name):
            continue
        rows = task["methods"]
        for name in (n for n in CNN_METHODS if n in rows):
            row, first = rows[name], name == next(iter(rows))
            radii = sorted(one["rho"] for one in row["picked"] if "rho" in one)
            line = [task["task"] if first else "", row["label"]]
            line += [f"{task['gradients']:,.0f}", str(len(row["accuracy"]["values"]))]
            line += [tables.mean_and_error(row["accuracy"])]
            line += [
                tables.plus_minus(gain(rows, name, other))
                if other in rows and name not in ("sgd", other)
                else ""
                for other in ("sgd", "sam")
            ]
            lines.append([*line, ", ".join(f"{rho:.2g}" for rho in radii)])
    header = ["task", "method", "gradients", "searches", "accuracy (%)"]
    return [*header, "over SGD", "over SAM", "picked ρ"], lines


def sign(difference: dict[str, float], count: int) -> int:
    """1 or −1 if the 95 % interval of a mean of ``count`` is above or below zero."""
    low, high = between.interval(
        difference["mean"], difference["standard_error"], count
    )
    return (low > 0) - (high < 0)


def picked_radii(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The radii that the searches picked, from the smallest to the largest."""
    found = main_tasks(content)
    names = [n for n in COMPARED if "rho" in methods.METHODS[n].own]
    lines = []
    for task in found.values():
        line = [task["task"]]
        for name in names:
            picked = task["methods"].get(name, {"picked": []})["picked"]
            line.append(
                ", ".join(f"{rho:.2g}" for rho in sorted(p["rho"] for p in picked))
            )
        lines.append(line)
    return ["task", *(methods.METHODS[n].label for n in names)], lines


def after_trials(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What noisy validation picks after some trials, less what SGD's search picks."""
    counts, found = searches.TRIALS, main_tasks(content)
    lines = []
    for name in COMPARED:
        if not any(name in task["methods"] for task in found.values()):
            continue
        line = [methods.METHODS[name].label]
        for count in counts:
            gains = [
                statistics.fmean(task["methods"][name]["after_trials"][str(count)])
                - statistics.fmean(task["methods"]["sgd"]["after_trials"][str(count)])
                for task in found.values()
                if name in task["methods"]
            ]
            average = {
                "mean": statistics.fmean(gains),
                "standard_error": between.standard_error(gains),
            }
            line.append("" if name == "sgd" else tables.plus_minus(average))
        lines.append(line)
    return ["method", *(f"{c} trial{'s' * (c > 1)}" for c in counts)], lines


def known_to_a_user(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """How far validation tells the methods apart, and what true labels would give."""
    lines = []
    for task in main_tasks(content).values():
        rows = {n: row for n, row in task["methods"].items() if n in COMPARED}
        scores = {name: statistics.fmean(r["validation"]) for name, r in rows.items()}
        accuracy = {name: row["accuracy"]["mean"] for name, row in rows.items()}
        best = max(scores, key=lambda name: scores[name])
        error = statistics.fmean(
            between.standard_error(row["validation"]) for row in rows.values()
        )
        regret = statistics.fmean(
            row["picked_by_true_labels"] - row["picked_by_noisy_labels"]
            for row in rows.values()
        )
        lines.append(
            [
                task["task"],
                f"{min(scores.values()):.1f} to {max(scores.values()):.1f}",
                f"{error:.1f}",
                rows[best]["label"],
                tables.signed(accuracy[best] - max(accuracy.values())),
                tables.signed(regret),
            ]
        )
    return [
        "task",
        "validation (%), lowest to highest method",
        "standard error",
        "validates best",
        "its accuracy less the best method's",
        "gain of picking by true labels",
    ], lines


def draw_gains(path: Path, content: dict[str, Any]) -> None:
    """What each method gains over SGD, by task: mean ± standard error of searches."""
    found = main_tasks(content)
    names = [n for n in COMPARED[1:] if any(n in t["methods"] for t in found.values())]
    figure, axes = figures.panels(1, 1, height=1 + 0.75 * len(found))
    ax = axes[0, 0]
    for shift, name in zip(figures.dodged(len(names), 0.8)[::-1], names, strict=True):
        method = methods.METHODS[name]
        shown = [i for i, t in enumerate(found.values()) if name in t["methods"]]
        gains = [gain(list(found.values())[i]["methods"], name) for i in shown]
        ax.errorbar(
            [one["mean"] for one in gains],
            [shift - i for i in shown],
            xerr=[one["standard_error"] for one in gains],
            color=method.color,
            marker=method.marker,
            markersize=4,
            linestyle="",
            capsize=2,
            linewidth=1,
            label=method.label,
        )
    ax.axvline(0, color="black", linewidth=0.8)
    figures.task_axis(ax, [task["task"] for task in found.values()])
    ax.set_xscale("symlog", linthresh=4)
    figures.round_ticks(ax)
    ax.set_xlabel(
        "test accuracy less SGD's, in points: mean ± standard error of "
        f"{content['searches']} searches"
    )
    figures.shared_legend(figure, ax)
    figures.save(figure, path)


def draw_lengths(path: Path, content: dict[str, Any]) -> None:
    """Gain over SGD against the gradients of a training, a panel per task."""
    found = compared_tasks(content)
    series = {
        base: [
            found[base + length]
            for length in tasks.LENGTHS
            if "sgd" in found.get(base + length, {"methods": {}})["methods"]
        ]
        for base in dict.fromkeys(tasks.parted(name)[0] for name in found)
    }
    series = {base: some for base, some in series.items() if len(some) > 1}
    series = series or {n: [task] for n, task in list(main_tasks(content).items())[:1]}
    figure, axes = figures.panels(1, len(series), height=3.4)
    for ax, (base, some) in zip(axes.flat, series.items(), strict=True):
        for name in COMPARED[1:]:
            shown = [task for task in some if name in task["methods"]]
            if not shown:
                continue
            gains = [gain(task["methods"], name) for task in shown]
            figures.points(
                ax,
                name,
                [task["gradients"] for task in shown],
                [one["mean"] for one in gains],
                [one["standard_error"] for one in gains],
                label=methods.METHODS[name].label,
                line="-",
            )
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xscale("log")
        ax.set_xticks(
            [task["gradients"] for task in some],
            [f"{task['gradients']:,.0f}" for task in some],
        )
        ax.minorticks_off()
        ax.set_title(textwrap.fill(tasks.title(base), 26), fontsize=9)
        ax.set_xlabel("gradients of a training")
    axes[0, 0].set_ylabel("test accuracy less SGD's (points)")
    figures.shared_legend(figure, axes[0, 0])
    figures.save(figure, path)


def draw_trials(path: Path, content: dict[str, Any]) -> None:
    """What validation picks after some trials, less what it picks of SGD's, by task."""
    found = main_tasks(content)
    chosen = dict(list(found.items())[:4])
    columns = min(2, len(chosen))
    figure, axes = figures.panels(-(-len(chosen) // columns), columns, height=2.8)
    counts = searches.TRIALS
    for ax, task in zip(axes.flat, chosen.values(), strict=False):
        for name in COMPARED:
            row = task["methods"].get(name)
            if row is None:
                continue
            values = [row["after_trials"][str(count)] for count in counts]
            figures.points(
                ax,
                name,
                counts,
                [statistics.fmean(some) for some in values],
                [0.0] * len(values),
                label=row["label"],
                line="-",
            )
        ax.set_xscale("log")
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.minorticks_off()
        ax.set_title(task["task"], fontsize=9)
        ax.set_xlabel("trials of the search")
        ax.set_ylabel("test accuracy (%)")
    for ax in axes.flat[len(chosen) :]:
        ax.set_visible(False)
    figures.shared_legend(figure, axes[0, 0])
    figures.save(figure, path)


FIGURES = {"": draw_gains, "_length": draw_lengths, "_trials": draw_trials}
