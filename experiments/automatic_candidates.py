"""A radius that needs no search: candidates for it, compared on every task.

Each candidate is one setting for all tasks. Learning rate and weight decay are searched
for each as the evidence searches them, and what is picked is scored on fresh seeds, by
the true labels of validation examples. For each task, the other tasks say which
candidate to take.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

from experiments import evidence, harness, tasks
from experiments.automatic import SEARCHED
from experiments.harness import command_line, files

# In proportion to what is learned: of all of ε at 85 % of the loss of guessing.
WIDE = {"theta": 0.4, "speed": 0.0, "ceiling": 1.0, "margin": 0.15, "patience": 0.0}


def candidate(radius: str, c: float, **changes: float) -> dict[str, Any]:
    """The settings of a candidate."""
    return WIDE | {"radius": radius, "c": c} | changes


CANDIDATES = {
    **{f"ρ = {c}": candidate("c", c) for c in (0.2, 0.3, 0.4)},
    "ρ = 0.3, θ = 0.1": candidate("c", 0.3, theta=0.1),
    "ρ = 0.3, θ = 1": candidate("c", 0.3, theta=1 - 1e-6),
    "ρ = 0.3, margin 0.04": candidate("c", 0.3, margin=0.04),
    "ρ = 0.3, margin 0.3": candidate("c", 0.3, margin=0.3),
    "ρ = 0.3, patience 20": candidate("c", 0.3, margin=0.02, patience=20),
    "ρ = 0.3, no guard": candidate("c", 0.3, ceiling=1e6),
    "ρ = 0.2/cos": candidate("c/cos(d, g)", 0.2),
    "ρ = 0.2/cos, θ adapts": candidate("c/cos(d, g)", 0.2, theta=0.1, speed=0.1),
    "ρ = 0.1 σ/‖g‖": candidate("c σ/‖g‖", 0.1),
    "ρ = η‖m‖": candidate("c η‖m‖", 1),
    "ρ = 0.4 η/η₀": candidate("c η/η₀", 0.4),
    "ρ = 0.8 t/T": candidate("c t/T", 0.8),
    "ρ = 0.05 ‖x‖": candidate("c ‖x‖ per leaf", 0.05),
}
TASKS = ("wine-50", "cancer-40", "teacher-60", "teacher-tilt", "text-50")


def compare(
    name: str,
    method_name: str,
    searched: dict[str, Any],
    plan: Any,
    options: Any,
    progress: Any,
) -> dict[str, Any]:
    """Score each candidate on one task, and the searched methods of the evidence."""
    task = evidence.loaded(options, name)
    of = harness.ascents.traced_method(method_name)

    def train(method: Any, points: list[dict[str, float]], seeds: list[int]) -> Any:
        return harness.training.train(
            *(task, method, points, seeds),
            epochs=harness.training.budget_epochs(task, method, "gradients"),
            progress=progress,
        )

    def score(method: Any, point: dict[str, float]) -> dict[str, Any]:
        first = harness.grids.FIRST_SEED
        seeds = list(range(first, first + options.seeds))
        accuracy = train(method, [point] * len(seeds), seeds).clean_validation[:, -1]
        return harness.statistics.summary(accuracy, tasks.collapsed_below(task))

    known = searched["tasks"][name]["gradients"]
    found: dict[str, Any] = {}
    for label in ("sgd", "sam", SEARCHED[method_name]):
        point = known[label]["hyperparameters"]
        found[label] = score(harness.methods.METHODS[label], point)
    for label, chosen in candidates_of(options).items():
        settings = harness.ascents.as_numbers(chosen)

        def measure(points: Any, seeds: Any, settings: Any = settings) -> Any:
            trained = train(of, [point | settings for point in points], seeds)
            return trained.noisy_validation[:, -1]

        picked = harness.tuning.search(
            harness.methods.SHARED,
            measure,
            plan.search,
            first_seed=harness.units.FIRST_SEARCH_SEED,
        ).picked
        found[label] = score(of, picked | settings) | {"hyperparameters": picked}
    return {"seeds": options.seeds, "found": found}


def candidates_of(options: Any) -> dict[str, dict[str, Any]]:
    """All candidates; three for a smoke run."""
    return dict(list(CANDIDATES.items())[: 3 if options.smoke else None])


def work_of(task: tasks.Task, method_name: str, plan: Any, options: Any) -> float:
    """Gradients of the comparison on one task that widens nothing."""
    gradients = harness.training.gradients_of(
        task, harness.ascents.traced_method(method_name), "gradients"
    )
    each = plan.search.trainings + options.seeds
    trainings = len(candidates_of(options)) * each + 3 * options.seeds
    return trainings * gradients


def main(arguments: list[str] | None = None) -> int:
    """Do what is missing; print, write."""
    parser = command_line.experiment_parser(
        "automatic_candidates",
        __doc__,
        seeds=16,
        tasks=tasks.TITLES,
        default_tasks=TASKS,
    )
    options = command_line.parse(parser, arguments)
    if options.smoke:
        options.tasks = ["wine-50"]
    harness.rows.use_all_cores(options.runs / "compiled")
    searched, plan = evidence.read(parser, options), evidence.plan_of(options)
    folder = options.runs / "automatic_candidates"
    work = {
        (name, task): work_of(evidence.loaded(options, task), name, plan, options)
        for name in SEARCHED
        for task in options.tasks
    }
    size = round(sum(work.values()))
    command_line.check_publishing(parser, options, "automatic_candidates", size)
    tried: dict[str, dict[str, Any]] = {name: {} for name in SEARCHED}
    try:
        with harness.progress.over("candidates", size) as progress:
            for name, task in work:
                path = folder / name / f"{task}.json"
                saved = files.read_json(path)
                with harness.progress.part_of(progress, work[name, task]):
                    if not saved or saved["seeds"] < options.seeds:
                        saved = compare(task, name, searched, plan, options, progress)
                        files.write_json(path, saved)
                tried[name][task] = saved["found"]
    finally:
        for name, found in tried.items():
            if found:
                label = harness.methods.METHODS[name].label
                harness.tables.show(label, *cells(name, found))
        content = {"seeds": options.seeds, "methods": tried}
        command_line.save(
            options,
            "automatic_candidates",
            content,
            size=size,
            done=sum(map(len, tried.values())),
            of=len(work),
            unit="parts",
            draw=draw,
        )
    return 0


def compared(found: dict[str, Any]) -> list[str]:
    """The candidates that every task has."""
    return [k for k in CANDIDATES if all(k in scores for scores in found.values())]


def gains(name: str, found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Points above the searched method, by task and row of the table."""
    return {
        task: {
            row: values["mean"] - scores[SEARCHED[name]]["mean"]
            for row, values in scores.items()
        }
        for task, scores in found.items()
    }


def left_out(name: str, found: dict[str, Any]) -> dict[str, str]:
    """For each task the candidate that is best on average over the others."""
    gained, result = gains(name, found), {}
    for task in gained:
        others = [row for other, row in gained.items() if other != task]
        if others:
            result[task] = max(
                compared(found), key=lambda k, rows=others: sum(row[k] for row in rows)
            )
    return result


def cells(name: str, found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row per candidate: points above the searched method, and their mean."""
    gained, chosen = gains(name, found), left_out(name, found)
    lines = []
    for row in ("sgd", "sam", *compared(found)):
        label = row if row in CANDIDATES else harness.methods.METHODS[row].label
        each = [
            harness.tables.plus_minus(scores[row] | {"mean": gain[row]})
            for gain, scores in zip(gained.values(), found.values(), strict=True)
        ]
        mean = harness.tables.signed(fmean(gain[row] for gain in gained.values()), 1)
        lost = sum(scores[row]["collapsed"] for scores in found.values())
        lines.append([label, *each, mean, str(lost)])
    lines.append(["chosen by the others", *(chosen.get(t, "") for t in found), "", ""])
    return ["", *found, "mean", "collapsed"], lines


def draw(path: Path, content: dict[str, Any]) -> None:
    """Candidates less the searched method: each task faintly, and the mean."""
    figures = harness.figures
    figure, axes = figures.panels(1, 2, width=5.4, height=5.4)
    shown = compared(next(iter(content["methods"].values())))
    heights = [-height for height in range(len(shown))]
    for ax, (name, found) in zip(axes[0], content["methods"].items(), strict=True):
        method, gained = harness.methods.METHODS[name], gains(name, found)
        for gain in gained.values():
            ax.plot([gain[k] for k in shown], heights, "o", color="0.75", ms=4)
        if gained:
            means = [fmean(gain[k] for gain in gained.values()) for k in shown]
            ax.plot(means, heights, "D", color=method.color, ms=6)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_xlim(-16, 13)
        ax.set_yticks(heights, shown, fontsize=8)
        ax.set_title(method.label, fontsize=10)
        ax.set_xlabel("points above the searched method")
    axes[0, 1].set_yticklabels([])
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
