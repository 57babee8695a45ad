"""What SGD, SAM and VaSSO find: curvature, sharpness, and their adversaries.

Trains each on digits of which 75 % have a random label, at equal gradients and with
hyperparameters that one search picked, and measures every solution on its own training
set. About four minutes on two cores.
"""

import dataclasses
from pathlib import Path
from typing import Any

from experiments import harness
from experiments.harness import command_line
from experiments.label_noise import TASK

# Learning rate, weight decay, ρ and θ that one search picked for each method.
PICKED: dict[str, dict[str, float]] = {
    "sgd": {"learning_rate": 0.119, "weight_decay": 0.00671},
    "sam": {"learning_rate": 0.0455, "weight_decay": 0.00581, "rho": 0.0808},
    "vasso": {
        "learning_rate": 0.0834,
        "weight_decay": 0.00706,
        "rho": 0.0872,
        "theta": 0.433,
    },
    "lagged_vasso": {
        "learning_rate": 0.0182,
        "weight_decay": 0.00731,
        "rho": 0.192,
        "theta": 0.437,
    },
}
METHODS = tuple(PICKED)
RADIUS = 0.1  # of the ball in which all solutions are compared
SMOOTHING = 0.4  # θ where VaSSO is compared with SAM at SAM's hyperparameters
FOLLOWED = 3  # seeds that are measured while training
MEASURES = {
    "test_accuracy": ("test accuracy (%)", 1),
    "train_loss": ("training loss (nats)", 1),
    "loss_gap": ("test minus training loss (nats)", 1),
    "lambda_max": ("largest eigenvalue of the Hessian, λ_max", 1),
    "lambda_min": ("smallest eigenvalue of the Hessian, λ_min", 1),
    "trace": ("trace of the Hessian", 1),
    "worst": ("rise in the worst direction, ρ = 0.1 (10⁻³ nats)", 1e3),
    "ascent": ("rise in the ascent direction, ρ = 0.1 (10⁻³ nats)", 1e3),
    "average": ("rise in an average direction, ρ = 0.1 (10⁻⁶ nats)", 1e6),
    "adaptive_worst": ("adaptive worst direction, ρ = 0.1 (10⁻³ nats)", 1e3),
    "m_sharpness": ("m-sharpness, m = 50, ρ = 0.1 (10⁻³ nats)", 1e3),
    "keskar": ("Keskar's sharpness, ε = 10⁻³ (%)", 1),
}
ADVERSARY = {
    "stability": ("move of the perturbation per step, ‖ε_t − ε_{t−1}‖/ρ", 1),
    "lowered": ("batches whose loss it lowers (%)", 100),
    "misaligned": ("batches to whose gradient it is at more than 90° (%)", 100),
    "cosine_to_batch": ("cosine to the gradient of a batch", 1),
    "cosine_to_full_gradient": ("cosine to the gradient of all examples", 1),
    "squared_error": ("‖d_t − ∇f‖², that of a batch's gradient = 1", 1),
}


def main(arguments: list[str] | None = None) -> int:
    """Train, measure, print, write."""
    parser = command_line.experiment_parser(
        "flatness", __doc__, seeds=8, methods=METHODS
    )
    options = command_line.parse(parser, arguments)
    harness.rows.use_all_cores()
    from experiments import tasks

    task, measured = tasks.load(TASK), options.seeds
    if options.smoke:
        small = harness.networks.mlp(64, 16, 10)
        task, measured = task._replace(epochs=6, network=small), 1
    names = options.methods[:2] if options.smoke else list(options.methods)
    if "sam" in names and "vasso" in names:
        names.append("smoothed")
    # A solution takes about as long to measure as so many gradients to train with.
    work = {
        name: measured * (20_000 if name != "smoothed" else 4_000) for name in names
    }
    command_line.check_publishing(parser, options, "flatness", sum(work.values()))
    content: dict[str, Any] = {"seeds": measured, "radius": RADIUS, "methods": {}}
    try:
        with harness.progress.over("flatness", sum(work.values())) as progress:
            for name in names:
                progress.describe(name)
                content["methods"][name] = study(task, name, measured)
                progress.advance(work[name])
    finally:
        found = content["methods"]
        for measures in (MEASURES, ADVERSARY) if found else ():
            title = f"{task.title}, {measured} seeds, mean ± standard error"
            harness.tables.show(title, *cells(found, measures))
        command_line.save(
            options,
            "flatness",
            {"task": task.title} | content,
            size=sum(work.values()),
            done=len(found),
            of=len(names),
            unit="methods",
            draw=FIGURES,
        )
    return 0


def watched(name: str) -> tuple[Any, dict[str, float]]:
    """A method that tracks its adversary, and its hyperparameters.

    SAM is VaSSO with θ = 1, which keeps the slope that it last ascended along; the
    smoothed one has SAM's hyperparameters and another θ.
    """
    import optax

    import optax_vasso as ov

    if name == "sgd":
        return harness.methods.METHODS[name], PICKED[name]
    vasso = harness.methods.METHODS["lagged_vasso" if "lagged" in name else "vasso"]
    label = {"sam": "SAM", "smoothed": f"VaSSO at SAM's ρ, θ = {SMOOTHING}"}.get(
        name, vasso.label
    )
    theta = {"sam": 1.0, "smoothed": SMOOTHING}.get(name)
    chosen = PICKED[name] if theta is None else PICKED["sam"] | {"theta": theta}

    def make(base: Any, hyperparameters: Any, seed: Any) -> Any:
        tracked = optax.chain(ov.metrics.track(ov.metrics.stability), base)
        return vasso.make(tracked, hyperparameters, seed)

    return dataclasses.replace(vasso, label=label, make=make), chosen


def study(task: Any, name: str, seeds: int) -> dict[str, Any]:
    """Train all seeds of a method and measure what they found and how they went."""
    import jax
    import numpy as np
    import optax

    import optax_vasso as ov

    solutions, (method, chosen) = harness.solutions, watched(name)
    parts: dict[int, list[Any]] = {}

    def keep(epoch: int, state: Any) -> None:
        """The parameters, and the adversary, which the measure of it remembers."""
        kept = [ov.eval_params(state.opt_state, state.params)]
        if name != "sgd":
            found = optax.tree.get(state.opt_state, "measure_states")
            kept += [optax.tree.get(state.opt_state, "stability"), *found]
            kept += [optax.tree.get(state.opt_state, "ema")]
        parts.setdefault(epoch, []).append(jax.tree.map(np.asarray, kept))

    epochs = harness.training.budget_epochs(task, method, "gradients")
    trained = harness.training.train(
        task,
        method,
        [chosen] * seeds,
        range(seeds),
        epochs=epochs,
        test=True,
        watch=keep,
    )
    at = {
        epoch: jax.tree.map(lambda *leaves: np.concatenate(leaves), *groups)
        for epoch, groups in parts.items()
    }
    gradients = {epoch: epoch * task.steps_per_epoch * method.gradients for epoch in at}
    found: dict[str, Any] = {"label": method.label, "hyperparameters": chosen}
    if name != "sgd":
        moves = np.array([kept[1] for kept in at.values()])
        found["moves"] = {
            "gradients": list(gradients.values()),
            "mean": moves.mean(1).round(4).tolist(),
        }
        found["adversaries"] = [
            {"stability": float(moves[:, seed].mean())}
            | solutions.adversary(
                task, *solutions.of_row([at[epochs][i] for i in (0, 2, 3)], seed), seed
            )
            for seed in range(seeds)
        ]
    if name == "smoothed":
        return found
    found["solutions"] = [
        {"test_accuracy": float(trained.test[seed, -1])}
        | solutions.measure(task, params, seed)
        | solutions.measure_more(task, params, seed, RADIUS)
        for seed in range(seeds)
        for params in [solutions.of_row(trained.params, seed)]
    ]
    followed = list(at)[:: max(1, len(at) // 5)]
    found["over_training"] = {
        "gradients": [gradients[epoch] for epoch in followed],
        "worst": [
            [
                solutions.worst(
                    task, solutions.of_row(at[epoch][0], seed), seed, RADIUS
                )
                for seed in range(min(FOLLOWED, seeds))
            ]
            for epoch in followed
        ],
    }
    return found | solutions.landscape(task, solutions.of_row(trained.params, 0), 0)


def cells(
    methods: dict[str, Any], measures: dict[str, tuple[str, float]]
) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a row per measure, a column per method; of MEASURES or not."""
    key = "solutions" if measures is MEASURES else "adversaries"
    shown = [row for row in methods.values() if key in row]
    lines = [
        [title]
        + [
            harness.tables.to_its_error([scale * s[measure] for s in row[key]])
            if measure in row[key][0]
            else ""
            for row in shown
        ]
        for measure, (title, scale) in measures.items()
    ]
    return ["", *(row["label"] for row in shown)], lines


def style(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """Colour, line and label of a method; VaSSO is dashed at SAM's hyperparameters."""
    method = harness.methods.METHODS["vasso" if name == "smoothed" else name]
    line = "--" if name == "smoothed" else "-"
    return {"color": method.color, "linestyle": line, "label": row["label"]}


def solved(content: dict[str, Any]) -> dict[str, Any]:
    """The methods whose solutions were measured."""
    return {n: row for n, row in content["methods"].items() if "solutions" in row}


def draw_planes(path: Path, content: dict[str, Any]) -> None:
    """The loss around one solution of each method."""
    import numpy as np

    found = solved(content)
    figure, axes = harness.figures.panels(1, len(found), height=2.0)
    harness.figures.planes(
        axes[0],
        {row["label"]: np.array(row["plane"]) for row in found.values()},
        "rise of the loss (nats)",
        [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1],
    )
    harness.figures.save(figure, path)


def draw_curvature(path: Path, content: dict[str, Any]) -> None:
    """Spectra of the solutions, and their gaps over their traces."""
    import numpy as np

    figures = harness.figures
    figure, axes = figures.panels(1, 2, height=2.8)
    spectrum, gap = axes[0]
    for name, row in solved(content).items():
        look = style(name, row)
        grid, density = map(np.array, row["spectrum"])
        above = np.cumsum((np.diff(grid) * (density[1:] + density[:-1]) / 2)[::-1])
        spectrum.plot(grid[-2::-1], above, **look)
        gap.plot(
            [solution["trace"] for solution in row["solutions"]],
            [solution["loss_gap"] for solution in row["solutions"]],
            marker=figures.style_of(name).marker,
            markersize=figures.marker_size(figures.style_of(name).marker) + 1,
            markerfacecolor="none",
            **look | {"linestyle": "none"},
        )
    spectrum.set(xscale="log", yscale="log", xlim=(0.1, 6), ylim=(1e-5, 1e-3))
    ticks = (0.1, 0.2, 0.5, 1, 2, 5)
    spectrum.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    spectrum.minorticks_off()
    spectrum.set_xlabel("eigenvalue λ of the Hessian")
    spectrum.set_ylabel("share of eigenvalues above λ")
    gap.set_xlabel("trace of the Hessian")
    gap.set_ylabel("test minus training loss (nats)")
    lines = zip(spectrum.lines, gap.lines, strict=True)
    figure.legend(
        list(lines),
        [row["label"] for row in solved(content).values()],
        ncols=4,
        loc="outside lower center",
    )
    figures.save(figure, path)


def draw_training(path: Path, content: dict[str, Any]) -> None:
    """How far the perturbation moves, and sharpness, while training."""
    import numpy as np

    figures = harness.figures
    figure, axes = figures.panels(1, 2, height=2.8)
    move, over = axes[0]
    for name, row in content["methods"].items():
        look = style(name, row)
        if "moves" in row:
            move.plot(row["moves"]["gradients"], row["moves"]["mean"], **look)
        if "over_training" in row:
            gradients, rises = row["over_training"].values()
            logs = np.log(1e3 * np.array(rises))
            low, high = np.exp([logs.min(1), logs.max(1)])
            over.plot(gradients, np.exp(logs.mean(1)), marker=".", **look)
            over.fill_between(
                gradients, low, high, color=look["color"], alpha=0.15, lw=0
            )
    move.axhline(2**0.5, color="0.6", linewidth=0.8, zorder=0)
    move.text(
        *(1, 2**0.5 + 0.06, "√2, unrelated directions"),
        ha="right",
        va="bottom",
        transform=move.get_yaxis_transform(),
    )
    move.set_ylim(0, 1.8)
    move.set_ylabel("move of the perturbation,\n‖ε$_t$ − ε$_{t−1}$‖/ρ")
    over.set_yscale("log")
    over.set_yticks([10, 20, 50], ["10", "20", "50"])
    over.minorticks_off()
    over.set_ylabel(
        f"worst rise of the loss\nwithin ρ = {content['radius']} (10⁻³ nats)"
    )
    for ax in (move, over):
        ax.set_xlabel("gradients")
    lines = {line.get_label(): line for ax in (over, move) for line in ax.lines}
    shown = [row["label"] for row in content["methods"].values()]
    figure.legend(
        [lines[label] for label in shown],
        shown,
        ncols=5,
        loc="outside lower center",
    )
    figures.save(figure, path)


FIGURES = {
    "": draw_planes,
    "_curvature": draw_curvature,
    "_training": draw_training,
}


if __name__ == "__main__":
    command_line.run(main)
