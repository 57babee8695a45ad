"""Nothing to search: how the automatic methods were set, and how far they come.

Candidates for their defaults are compared on every task, and for each task the others
say which one to take. The guard is tested on VaSSO at the edge of collapse. What
``experiments.evidence`` has finished in the same folder is compared: the automatic
methods, with learning rate and weight decay searched as for SGD, with the searched
ones.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import optax
from scipy.stats import qmc

import optax_vasso as ov
from experiments import harness, tasks
from experiments.harness import command_line, files

# Of each candidate: r along the gradient, or in shares of ‖x_0‖; the first θ and the
# speed of its adaptation; the guard's ceiling in units of the loss of guessing, and its
# margin.
BASIC = {"r": 0.2, "relative": 0.0, "start": 0.1, "speed": 0.1}
BASIC |= {"ceiling": 1e6, "margin": 0.04}
GUARDED = BASIC | {"ceiling": 1.0}
FIXED = {"start": 0.4, "speed": 0.0}
CANDIDATES = {
    "r = 0.1": BASIC | {"r": 0.1},
    "r = 0.2": BASIC,
    "r = 0.3": BASIC | {"r": 0.3},
    "r = 0.01 ‖x₀‖": BASIC | {"r": 0.0, "relative": 0.01},
    "r = 0.2, θ = 0.4": BASIC | FIXED,
    "r = 0.2, guarded": GUARDED,
    "r = 0.3, guarded": GUARDED | {"r": 0.3},
    "r = 0.3, guarded, θ = 0.4": GUARDED | {"r": 0.3} | FIXED,
    "r = 0.3, margin 0.2": GUARDED | {"r": 0.3, "margin": 0.2},
    "r = 0.5, margin 0.2": GUARDED | {"r": 0.5, "margin": 0.2},
    "r = 0.5, margin 0.2, θ = 0.4": GUARDED | {"r": 0.5, "margin": 0.2} | FIXED,
}
SEARCHED = {"auto_vasso": "vasso", "auto_lagged_vasso": "lagged_vasso"}
# Learning rates and weight decays on which candidates are compared, how many of them
# count, and the seeds, which are neither those of the test nor of the search.
POINTS, COUNTED, SEEDS, FIRST_SEED = 6, 3, 2, 20_000
EDGE = {"learning_rate": 0.05, "weight_decay": 5e-4, "rho": 0.8, "theta": 0.1}
EDGE_TASK = "digits-75"


@functools.cache
def candidate(name: str) -> harness.methods.Method:
    """An automatic method whose settings are traced: one program for all of them."""
    like = harness.methods.METHODS[name]

    def make(base: Any, h: dict[str, Any], seed: Any) -> Any:
        smoothing = ov.self_tuned_ema(h["start"], speed=h["speed"])
        ascent = ov.projected_perturb(h["r"], smoothing)
        wrap = ov.lagged if like.gradients == 1 else ov.sharpness_aware
        guarded = ov.collapse_guard(
            ascent, h["ceiling"] * h["guessing"], margin=h["margin"]
        )
        return wrap(base, guarded)

    return _traced(like, make, "r", "start", "speed", "ceiling", "margin")


@functools.cache
def guarded_vasso() -> harness.methods.Method:
    """VaSSO with a guard, which a high ceiling turns off."""

    def make(base: Any, h: dict[str, Any], seed: Any) -> Any:
        ascent = optax.chain(ov.vasso_ema(h["theta"]), ov.sam_perturb(h["rho"]))
        return ov.sharpness_aware(
            base, ov.collapse_guard(ascent, h["ceiling"] * h["guessing"])
        )

    return _traced(harness.methods.METHODS["vasso"], make, "rho", "theta", "ceiling")


def _traced(like: Any, make: Any, *own: str) -> harness.methods.Method:
    space = dict.fromkeys(own, harness.methods.Range(0.0, 1.0))
    return harness.methods.Method(
        like.label, like.color, like.marker, like.gradients, space, make
    )


def settings(task: tasks.Task, chosen: dict[str, float]) -> dict[str, float]:
    """A candidate as hyperparameters on a task."""
    first = task.network.init(np.random.default_rng([FIRST_SEED, 1]))
    r = chosen["r"] + chosen["relative"] * float(optax.tree.norm(first))
    return {
        "r": r,
        "start": chosen["start"],
        "speed": chosen["speed"],
        **{key: chosen[key] for key in ("ceiling", "margin")},
    }


def compare_candidates(
    name: str, method_name: str, options: Any, progress: Any
) -> dict[str, Any]:
    """Validation accuracy of each candidate on one task."""
    task, method = loaded(name, options), candidate(method_name)
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
        (point | settings(task, chosen), FIRST_SEED + seed)
        for chosen in CANDIDATES.values()
        for point in points
        for seed in range(SEEDS)
    ]
    trained = harness.training.train(
        task,
        method,
        *map(list, zip(*trials, strict=True)),
        epochs=harness.training.budget_epochs(task, method, "gradients"),
        progress=progress,
    )
    shape = len(CANDIDATES), POINTS, SEEDS
    noisy, clean = (
        accuracy[:, -1].reshape(shape)
        for accuracy in (trained.noisy_validation, trained.clean_validation)
    )
    found = {}
    for i, label in enumerate(CANDIDATES):
        best = np.argsort(-noisy[i].mean(1))[:COUNTED]
        found[label] = {
            "accuracy": round(float(clean[i, best].mean()), 3),
            "collapsed": int((clean[i] < tasks.collapsed_below(task)).sum()),
        }
    return {"candidates": found, "of": POINTS * SEEDS}


def test_guard(options: Any, progress: Any) -> dict[str, Any]:
    """VaSSO at the edge of collapse without and with the guard, on the same seeds."""
    task = loaded(EDGE_TASK, options)
    seeds = list(range(FIRST_SEED, FIRST_SEED + options.guard_seeds))
    rows = [EDGE | {"ceiling": ceiling} for ceiling in (1e6, 1.0) for _ in seeds]
    trained = harness.training.train(
        task, guarded_vasso(), rows, 2 * seeds, epochs=task.epochs, progress=progress
    )
    plain, guarded = trained.clean_validation[:, -1].reshape(2, -1)
    collapsed = [x < tasks.collapsed_below(task) for x in (plain, guarded)]
    healthy = ~collapsed[0]
    return {
        "seeds": len(seeds),
        "collapsed": [int(c.sum()) for c in collapsed],
        "healthy": harness.statistics.paired_difference(
            guarded[healthy], plain[healthy]
        ),
        "healthy_means": [float(x[healthy].mean()) for x in (plain, guarded)],
    }


def loaded(name: str, options: Any) -> tasks.Task:
    """A task; a short one for a smoke run."""
    task = tasks.load(name)
    return task._replace(epochs=2 * task.epochs_per_call) if options.smoke else task


def main(arguments: list[str] | None = None) -> int:
    """Do what is missing; print, write."""
    parser = command_line.experiment_parser("automatic", __doc__)
    parser.add_argument(
        "--tasks",
        type=command_line.some_of(tasks.TITLES),
        default=",".join(tasks.TITLES),
        help="'all', or some of these",
    )
    parser.add_argument(
        "--guard-seeds",
        type=command_line.positive_integer,
        default=200,
        help="seeds of the test of the guard",
    )
    options = command_line.parse(parser, arguments)
    if options.smoke:
        options.tasks, options.guard_seeds = ["wine-50"], 2
    harness.rows.use_all_cores(options.runs / "compiled")
    parts: dict[Path, tuple[Any, float]] = {}
    folder = options.runs / "automatic"
    for method in SEARCHED:
        for task in options.tasks:
            work = (
                len(CANDIDATES)
                * POINTS
                * SEEDS
                * harness.training.gradients_of(
                    tasks.load(task), candidate(method), "gradients"
                )
            )
            run = functools.partial(compare_candidates, task, method, options)
            parts[folder / method / f"{task}.json"] = run, work
    edge = tasks.load(EDGE_TASK)
    work = harness.training.gradients_of(edge, guarded_vasso(), "epochs")
    parts[folder / "guard.json"] = (
        functools.partial(test_guard, options),
        2 * options.guard_seeds * work,
    )
    size = round(sum(work for _, work in parts.values()))
    command_line.check_publishing(parser, options, "automatic", size)
    found: dict[Path, Any] = {path: files.read_json(path) for path in parts}
    try:
        with harness.progress.over("automatic", size) as progress:
            for path, (run, work) in parts.items():
                if found[path] is None:
                    found[path] = run(progress)
                    files.write_json(path, found[path])
                else:
                    progress.advance(work)
    finally:
        finished = {path: f for path, f in found.items() if f is not None}
        report(options, folder, finished, size, len(parts))
    return 0


def report(
    options: Any, folder: Path, found: dict[Path, Any], size: int, of: int
) -> None:
    """Print the tables and save everything that is there."""
    content: dict[str, Any] = {"methods": {}, "guard": found.get(folder / "guard.json")}
    for name, searched in SEARCHED.items():
        tried = {
            task: found[path]
            for task in options.tasks
            if (path := folder / name / f"{task}.json") in found
        }
        compared = {}
        for task in options.tasks:
            units = [
                files.read_json(options.runs / "evidence" / task / f"{m}.json")
                for m in (name, searched)
            ]
            if all(units):
                compared[task] = compare_units(*units)
        content["methods"][name] = {
            "tried": tried,
            "chosen_by_the_others": left_out(tried),
            "compared": compared,
        }
        if tried:
            label = harness.methods.METHODS[name].label
            harness.tables.show(label, *candidate_cells(tried))
            harness.tables.show(label, *compared_cells(compared))
    if content["guard"]:
        harness.tables.show("Guard", *guard_cells(content["guard"]))
    command_line.save(
        options,
        "automatic",
        content,
        size=size,
        done=len(found),
        of=of,
        unit="parts",
        draw=draw,
    )


def regrets(tried: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Points below the best candidate, by task and candidate."""
    result = {}
    for task, part in tried.items():
        accuracy = {k: v["accuracy"] for k, v in part["candidates"].items()}
        result[task] = {k: max(accuracy.values()) - a for k, a in accuracy.items()}
    return result


def left_out(tried: dict[str, Any]) -> dict[str, str]:
    """For each task the candidate that is best on average over the others."""
    below = regrets(tried)
    return {
        task: min(
            CANDIDATES,
            key=lambda k: np.mean([below[t][k] for t in below if t != task]),
        )
        for task in (below if len(below) > 1 else ())
    }


def compare_units(automatic: dict[str, Any], searched: dict[str, Any]) -> Any:
    """Test accuracy of both at equal gradients, and the paired difference."""
    rows = [unit["gradients"]["last"] for unit in (automatic, searched)]
    keys = ("mean", "standard_error", "minimum", "collapsed")
    return {
        "automatic": {key: rows[0][key] for key in keys},
        "searched": {key: rows[1][key] for key in keys},
        "difference": harness.statistics.paired_difference(
            rows[0]["values"], rows[1]["values"]
        ),
    }


def candidate_cells(tried: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Points below the best candidate; the last row is their mean and the collapsed."""
    below, chosen = regrets(tried), left_out(tried)
    lines = [
        [task, *(f"{r:.1f}" for r in row.values()), chosen.get(task, "")]
        for task, row in below.items()
    ]
    mean = [f"{np.mean([row[k] for row in below.values()]):.1f}" for k in CANDIDATES]
    lost = [
        str(sum(p["candidates"][k]["collapsed"] for p in tried.values()))
        for k in CANDIDATES
    ]
    count = sum(part["of"] for part in tried.values())
    lines += [["mean", *mean, ""], [f"collapsed of {count}", *lost, ""]]
    return ["task", *CANDIDATES, "chosen by the others"], lines


def compared_cells(compared: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Automatic and searched side by side."""
    lines = [
        [
            tasks.TITLES[task],
            *(
                f"{found[k]['mean']:.1f} ± {found[k]['standard_error']:.1f}"
                for k in ("automatic", "searched")
            ),
            harness.tables.plus_minus(found["difference"]),
            f"{found['automatic']['collapsed']}, {found['searched']['collapsed']}",
        ]
        for task, found in compared.items()
    ]
    return ["task", "automatic (%)", "searched (%)", "difference", "collapsed"], lines


def guard_cells(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """VaSSO at the edge of collapse without and with the guard."""
    header = [
        "",
        "collapsed",
        "accuracy of the seeds that did not collapse without (%)",
    ]
    with_and_without = zip(
        ("without", "with"), found["collapsed"], found["healthy_means"], strict=True
    )
    return header, [
        [name, f"{lost} of {found['seeds']}", f"{mean:.1f}"]
        for name, lost, mean in with_and_without
    ]


def draw(path: Path, content: dict[str, Any]) -> None:
    """Left: automatic less searched, by task; right: candidates below the best."""
    figures = harness.figures
    figure, axes = figures.panels(1, 2, width=6, height=4.2)
    for shift, (name, found) in zip(
        (0.12, -0.12), content["methods"].items(), strict=True
    ):
        method = harness.methods.METHODS[name]
        style = {"color": method.color, "marker": method.marker, "label": method.label}
        compared = list(found["compared"].items())[::-1]
        for height, (_, both) in enumerate(compared):
            difference = both["difference"]
            axes[0, 0].errorbar(
                difference["mean"],
                height + shift,
                xerr=difference["standard_error"],
                capsize=2,
                linestyle="",
                **(style if height == 0 else style | {"label": None}),
            )
        axes[0, 0].set_yticks(range(len(compared)), [task for task, _ in compared])
        if found["tried"]:
            below = regrets(found["tried"]).values()
            mean = [np.mean([row[k] for row in below]) for k in CANDIDATES]
            heights = np.arange(len(CANDIDATES))[::-1] + shift
            axes[0, 1].plot(mean, heights, linestyle="", **style)
    axes[0, 0].axvline(0, color="black", linewidth=0.8)
    axes[0, 0].set_xlabel("automatic − searched, test accuracy (points)")
    axes[0, 1].set_yticks(range(len(CANDIDATES)), list(CANDIDATES)[::-1])
    axes[0, 1].set_xlim(left=0)
    axes[0, 1].set_xlabel("below the best candidate, mean over tasks (points)")
    axes[0, 1].legend(frameon=False, fontsize=8)
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
