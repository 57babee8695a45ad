"""A radius that needs no search: candidates for it, compared on every task.

Each candidate is one setting for all tasks. For each task, the other tasks say which
candidate to take. Six pairs of a learning rate and a weight decay are the same for all
candidates; the pairs that are best by the labels that a user has count.
"""

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments import harness, tasks
from experiments.harness import command_line, files

GUARDED = {"theta": 0.4, "speed": 0.0, "ceiling": 1.0}


def candidate(radius: str, c: float, **changes: float) -> dict[str, Any]:
    """The settings of a candidate; guarded, unless the ceiling says otherwise."""
    return GUARDED | {"radius": radius, "c": c} | changes


CANDIDATES = {
    **{f"ρ = {c}": candidate("c", c) for c in (0.2, 0.4, 0.6)},
    **{f"r = {c}": candidate("c/cos(d, g)", c) for c in (0.2, 0.3, 0.4)},
    "r = 0.3, θ = 0.1": candidate("c/cos(d, g)", 0.3, theta=0.1),
    "r = 0.3, θ = 1": candidate("c/cos(d, g)", 0.3, theta=1.0 - 1e-6),
    "r = 0.3, θ adapts": candidate("c/cos(d, g)", 0.3, theta=0.1, speed=0.1),
    **{f"ρ = {c} √n": candidate("c √n", c) for c in (0.2, 0.3)},
    **{f"ρ = {c} σ/‖g‖": candidate("c σ/‖g‖", c) for c in (0.1, 0.2)},
    **{f"ρ = {c} η‖m‖": candidate("c η‖m‖", c) for c in (1.0, 3.0)},
    **{f"ρ = {c} η/η₀": candidate("c η/η₀", c) for c in (0.4, 0.6)},
    **{f"ρ = {c} t/T": candidate("c t/T", c) for c in (0.8, 1.2)},
    **{f"ρ = {c} ‖x‖": candidate("c ‖x‖ per leaf", c) for c in (0.02, 0.04)},
    "ρ = 0.4, no guard": candidate("c", 0.4, ceiling=1e6),
    "r = 0.3, no guard": candidate("c/cos(d, g)", 0.3, ceiling=1e6),
}
METHODS = ("auto_vasso", "auto_lagged_vasso")
# The defaults are to be chosen without the digits.
TASKS = ("wine-50", "cancer-40", "teacher-60", "teacher-tilt", "text-50", "digits-75")
# Learning rates and weight decays on which candidates are compared, how many of them
# count, and the first seed, which is neither of the test nor of the search.
POINTS, COUNTED, SEEDS, FIRST_SEED = 6, 3, 4, 20_000


def compare(name: str, method_name: str, options: Any, progress: Any) -> dict[str, Any]:
    """Validation accuracy of each candidate on one task."""
    import numpy as np
    from scipy.stats import qmc

    task, seeds = loaded(name, options), options.seeds
    of = harness.ascents.traced_method(method_name)
    space = harness.methods.SHARED
    drawn = qmc.Halton(len(space), seed=np.random.default_rng(0)).random(POINTS)
    points = [
        {
            name: r.low * (r.high / r.low) ** unit
            for (name, r), unit in zip(space.items(), point, strict=True)
        }
        for point in drawn
    ]
    trials = [
        (point | harness.ascents.as_numbers(chosen), FIRST_SEED + seed)
        for chosen in CANDIDATES.values()
        for point in points
        for seed in range(seeds)
    ]
    trained = harness.training.train(
        task,
        of,
        *map(list, zip(*trials, strict=True)),
        epochs=harness.training.budget_epochs(task, of, "gradients"),
        progress=progress,
    )
    noisy, clean = (
        accuracy[:, -1].reshape(len(CANDIDATES), POINTS, seeds)
        for accuracy in (trained.noisy_validation, trained.clean_validation)
    )
    found = {}
    for i, label in enumerate(CANDIDATES):
        best = np.argsort(-noisy[i].mean(1))[:COUNTED]
        found[label] = {
            "accuracy": round(float(clean[i, best].mean()), 3),
            "collapsed": int((clean[i] < tasks.collapsed_below(task)).sum()),
        }
    return {"candidates": found, "of": POINTS * seeds}


def gradients_of(task: tasks.Task, method: str) -> float:
    """Gradients of one training."""
    of = harness.ascents.traced_method(method)
    return harness.training.gradients_of(task, of, "gradients")


def without_digits(names: Iterable[str]) -> list[str]:
    """The tasks that the defaults may be chosen with."""
    return [name for name in names if not name.startswith("digits")]


def loaded(name: str, options: Any) -> tasks.Task:
    """A task; a short one for a smoke run."""
    task = tasks.load(name)
    return task._replace(epochs=2 * task.epochs_per_call) if options.smoke else task


def main(arguments: list[str] | None = None) -> int:
    """Do what is missing; print, write."""
    parser = command_line.experiment_parser("automatic_candidates", __doc__, seeds=4)
    parser.add_argument(
        "--tasks",
        type=command_line.some_of(tasks.TITLES),
        default=",".join(TASKS),
        help="'all', or some of these",
    )
    options = command_line.parse(parser, arguments)
    if options.smoke:
        options.tasks = ["wine-50"]
    harness.rows.use_all_cores(options.runs / "compiled")
    folder, trainings = (
        options.runs / "automatic_candidates",
        len(CANDIDATES) * POINTS * options.seeds,
    )
    work = {
        (name, task): trainings * gradients_of(loaded(task, options), name)
        for name in METHODS
        for task in options.tasks
    }
    size = round(sum(work.values()))
    command_line.check_publishing(parser, options, "automatic_candidates", size)
    found: dict[str, dict[str, Any]] = {name: {} for name in METHODS}
    try:
        with harness.progress.over("candidates", size) as progress:
            for name, task in work:
                path = folder / name / f"{task}.json"
                saved = files.read_json(path)
                if saved and saved["of"] == POINTS * options.seeds:
                    progress.advance(work[name, task])
                else:
                    saved = compare(task, name, options, progress)
                    files.write_json(path, saved)
                found[name][task] = saved
    finally:
        for name, tried in found.items():
            if tried:
                label = harness.methods.METHODS[name].label
                harness.tables.show(label, *cells(tried))
        content = {
            "seeds": options.seeds,
            "methods": {
                name: {"tried": tried, "chosen_by_the_others": left_out(tried)}
                for name, tried in found.items()
            },
        }
        command_line.save(
            options,
            "automatic_candidates",
            content,
            size=size,
            done=sum(map(len, found.values())),
            of=len(work),
            unit="parts",
            draw=draw,
        )
    return 0


def regrets(tried: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Points below the best candidate, by task and candidate."""
    result = {}
    for task, part in tried.items():
        accuracy = {k: v["accuracy"] for k, v in part["candidates"].items()}
        result[task] = {k: max(accuracy.values()) - a for k, a in accuracy.items()}
    return result


def left_out(tried: dict[str, Any]) -> dict[str, str]:
    """For each task the candidate that is best on average over the others.

    No digits among the others: the defaults may not be chosen with them.
    """
    below = regrets(tried)
    result = {}
    for task in below:
        others = [below[other] for other in without_digits(below) if other != task]
        if others:
            result[task] = min(
                CANDIDATES, key=lambda k, rows=others: sum(row[k] for row in rows)
            )
    return result


def cells(tried: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row per candidate: points below the best, their mean without the digits."""
    below, chosen = regrets(tried), left_out(tried)
    count = sum(part["of"] for part in tried.values())
    header = ["", *tried, "mean without digits", f"collapsed of {count}"]
    lines = []
    for name in CANDIDATES:
        counted = [
            r[name] for task, r in below.items() if not task.startswith("digits")
        ]
        lost = sum(part["candidates"][name]["collapsed"] for part in tried.values())
        each = [f"{row[name]:.1f}" for row in below.values()]
        lines.append([name, *each, f"{fmean(counted):.1f}", str(lost)])
    lines.append(["chosen by the others", *(chosen.get(t, "") for t in tried), "", ""])
    return header, lines


def draw(path: Path, content: dict[str, Any]) -> None:
    """Candidates below the best one, on average over the tasks."""
    figures = harness.figures
    figure, axes = figures.panels(1, 1, width=6.5, height=5.4)
    for shift, (name, found) in zip(
        (0.15, -0.15), content["methods"].items(), strict=True
    ):
        method = harness.methods.METHODS[name]
        if not found["tried"]:
            continue
        below = regrets(found["tried"])
        rows = [below[task] for task in without_digits(below)]
        axes[0, 0].plot(
            [fmean(row[k] for row in rows) for k in CANDIDATES],
            [shift - height for height in range(len(CANDIDATES))],
            linestyle="",
            color=method.color,
            marker=method.marker,
            label=method.label,
        )
    heights = [-height for height in range(len(CANDIDATES))]
    axes[0, 0].set_yticks(heights, list(CANDIDATES), fontsize=8)
    axes[0, 0].set_xlim(left=0)
    axes[0, 0].grid(axis="y", alpha=0.3)
    axes[0, 0].set_xlabel("points below the best candidate, mean over five tasks")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
