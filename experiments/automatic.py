"""Nothing to search: how far the automatic methods come, and what their guard does.

The automatic methods are searched over learning rate and weight decay, as SGD is, in as
many trials as the evidence gave to the methods that they stand for, and tested on the
same seeds. The guard is tested on VaSSO below, at and beyond the edge of collapse.
"""

from pathlib import Path
from typing import Any

from experiments import evidence, harness, tasks
from experiments.harness import command_line, files

# Automatic methods, and the searched ones that they stand for.
SEARCHED = {"auto_vasso": "vasso", "auto_lagged_vasso": "lagged_vasso"}
EDGE_TASK = "digits-75"
EDGE = {"learning_rate": 0.1, "rho": 0.8, "theta": 0.1}
EDGES = {
    "below the edge": EDGE | {"weight_decay": 5e-4},
    "at the edge": EDGE | {"weight_decay": 2e-3},
    "beyond the edge": EDGE | {"weight_decay": 5e-3},
}


def test_guard(edge: dict[str, float], options: Any, progress: Any) -> dict[str, Any]:
    """VaSSO without and with the guard, on the same seeds."""
    task, method = evidence.loaded(options, EDGE_TASK), harness.ascents.guarded_vasso()
    first = harness.grids.FIRST_SEED
    seeds = list(range(first, first + options.guard_seeds))
    rows = [edge | {"ceiling": ceiling} for ceiling in (1e6, 1.0) for _ in seeds]
    trained = harness.training.train(
        task, method, rows, 2 * seeds, epochs=task.epochs, progress=progress
    )
    plain, guarded = trained.clean_validation[:, -1].reshape(2, -1)
    collapsed = [x < tasks.collapsed_below(task) for x in (plain, guarded)]
    healthy = ~collapsed[0]
    return {
        "hyperparameters": edge,
        "seeds": len(seeds),
        "collapsed": [int(c.sum()) for c in collapsed],
        "means": [float(x.mean()) for x in (plain, guarded)],
        "healthy": harness.statistics.paired_difference(
            guarded[healthy], plain[healthy]
        )
        if healthy.sum() > 1
        else None,
    }


def main(arguments: list[str] | None = None) -> int:
    """Do what is missing; print, write."""
    parser = command_line.experiment_parser(
        "automatic", __doc__, seeds=24, tasks=tasks.TITLES
    )
    parser.add_argument(
        "--guard-seeds",
        type=command_line.positive_integer,
        default=200,
        help="seeds of the tests of the guard",
    )
    options = command_line.parse(parser, arguments)
    if options.smoke:
        options.tasks, options.guard_seeds = ["wine-50"], 2
    harness.rows.use_all_cores(options.runs / "compiled")
    searched, folder = evidence.read(parser, options), options.runs / "automatic"
    plan = evidence.plan_of(options)
    units = {
        (task, name): (evidence.loaded(options, task), harness.methods.METHODS[name])
        for name in SEARCHED
        for task in options.tasks
    }
    guards = {name: folder / f"guard, {name}.json" for name in EDGES}
    each = harness.training.gradients_of(
        evidence.loaded(options, EDGE_TASK), harness.ascents.guarded_vasso(), "epochs"
    )
    guard_work = 2 * options.guard_seeds * each
    size = sum(harness.units.work_of(*unit, plan) for unit in units.values())
    size = round(size + len(guards) * guard_work)
    command_line.check_publishing(parser, options, "automatic", size)
    measured: dict[tuple[str, str], Any] = {}
    guarded = {name: files.read_json(path) for name, path in guards.items()}
    try:
        measured = harness.units.run_missing("automatic", folder, units, plan)
        with harness.progress.over("guard", len(guards) * guard_work) as progress:
            for name, path in guards.items():
                if guarded[name] is None:
                    guarded[name] = test_guard(EDGES[name], options, progress)
                    files.write_json(path, guarded[name])
                else:
                    progress.advance(guard_work)
    finally:
        content = {
            "seeds": options.seeds,
            "methods": compare(measured, searched),
            "guard": {name: found for name, found in guarded.items() if found},
        }
        show(content)
        command_line.save(
            options,
            "automatic",
            content,
            size=size,
            done=len(measured) + len(content["guard"]),
            of=len(units) + len(guards),
            unit="parts",
            draw=draw,
        )
    return 0


def compare(
    measured: dict[tuple[str, str], Any], searched: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """By automatic method and task: test accuracy of both, and the difference."""
    keys = ("mean", "standard_error", "minimum", "collapsed")
    result: dict[str, dict[str, Any]] = {name: {} for name in SEARCHED}
    for (task, name), unit in measured.items():
        own = unit["gradients"]["last"]
        other = searched["tasks"][task]["gradients"][SEARCHED[name]]["last"]
        common = min(len(own["values"]), len(other["values"]))
        result[name][task] = {
            "automatic": {key: own[key] for key in keys},
            "searched": {key: other[key] for key in keys},
            "difference": harness.statistics.paired_difference(
                own["values"][:common], other["values"][:common]
            ),
            "hyperparameters": unit["gradients"]["hyperparameters"],
        }
    return result


def show(content: dict[str, Any]) -> None:
    """Print what there is."""
    for name, compared in content["methods"].items():
        if compared:
            label = harness.methods.METHODS[name].label
            harness.tables.show(label, *cells(compared))
    if content["guard"]:
        harness.tables.show("Guard", *guard_cells(content["guard"]))


def cells(compared: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Automatic and searched side by side."""
    lines = [
        [
            tasks.TITLES[task],
            *(
                harness.tables.mean_and_error(found[k])
                for k in ("automatic", "searched")
            ),
            harness.tables.plus_minus(found["difference"]),
            f"{found['automatic']['collapsed']}, {found['searched']['collapsed']}",
        ]
        for task, found in compared.items()
    ]
    return ["task", "automatic (%)", "searched (%)", "difference", "collapsed"], lines


def guard_cells(guard: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """VaSSO without and with the guard."""
    header = ["", "weight decay", "collapsed without", "with", "accuracy without (%)"]
    header += ["with (%)", "difference of those that did not collapse without"]
    return header, [
        [
            name,
            f"{found['hyperparameters']['weight_decay']:g}",
            *(f"{lost} of {found['seeds']}" for lost in found["collapsed"]),
            *(f"{mean:.1f}" for mean in found["means"]),
            harness.tables.plus_minus(found["healthy"]) if found["healthy"] else "",
        ]
        for name, found in guard.items()
    ]


def draw(path: Path, content: dict[str, Any]) -> None:
    """Automatic less searched, by task."""
    figures = harness.figures
    figure, axes = figures.panels(1, 1, width=7, height=4.4)
    both = content["methods"].values()
    shown = [task for task in tasks.TITLES if all(task in found for found in both)]
    for shift, (name, compared) in zip(
        (0.12, -0.12), content["methods"].items(), strict=True
    ):
        method = harness.methods.METHODS[name]
        differences = [compared[task]["difference"] for task in shown]
        axes[0, 0].errorbar(
            [difference["mean"] for difference in differences],
            [shift - number for number in range(len(shown))],
            xerr=[difference["standard_error"] for difference in differences],
            capsize=2,
            linestyle="",
            color=method.color,
            marker=method.marker,
            label=method.label,
        )
    figures.task_axis(axes[0, 0], [tasks.TITLES[task] for task in shown])
    axes[0, 0].axvline(0, color="black", linewidth=0.8)
    axes[0, 0].set_xlabel("automatic − searched: test accuracy (points)")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
