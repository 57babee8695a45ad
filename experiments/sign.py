"""The sign of a lagged perturbation: with the average of the gradients, or against it?

Lagged VaSSO climbs along its average; Momentum-SAM goes against it, where the optimizer
is heading. Both signs, and the rule that follows the running slope, at several horizons
1/θ and learning rates, each at the best of a grid of radii. Beside the accuracy stands
the slope: the mean cosine of the newest gradient with the average, over the whole
training. Accuracy is that on held-out validation examples with their true labels, never
on the test set.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from experiments import harness
from experiments.harness import command_line

# Title -> task, examples per step.
PANELS = {
    "75 % random labels": ("digits-75", 50),
    "75 % random labels, batch 200": ("digits-75", 200),
    "text, 50 % random labels": ("text-50", 50),
    "noise added to the gradients": ("teacher-tilt", 50),
}
RATES = (0.02, 0.1, 0.3)
DECAY = 0.005
RADII = (0.1, 0.3, 1.0)
THETAS = (1.0, 0.1, 0.03)
SIGNS = {
    "with": "along the average (+)",
    "against": "against the average (−)",
    "slope": "the sign of the slope",
}
# Neither those of the test nor those of the search.
FIRST_SEED = 30_000


def main(arguments: list[str] | None = None) -> int:
    """Train, print, write."""
    parser = command_line.experiment_parser("sign", __doc__, seeds=4)
    options = command_line.parse(parser, arguments)
    harness.rows.use_all_cores()
    rates, radii, thetas = RATES, RADII, THETAS
    panels = PANELS
    if options.smoke:
        rates, radii, thetas = rates[1:2], radii[1:3], thetas[:1]
        panels = {title: PANELS[title] for title in list(PANELS)[-1:]}
    points = [
        {"learning_rate": rate, "weight_decay": DECAY, "rho": rho, "theta": theta}
        for rate in rates
        for theta in thetas
        for rho in radii
    ]
    loaded = {title: load(options, *panel) for title, panel in panels.items()}
    work = {
        title: len(SIGNS)
        * len(points)
        * options.seeds
        * harness.training.gradients_of(task, perturbed("with"), "gradients")
        for title, task in loaded.items()
    }
    size = round(sum(work.values()))
    command_line.check_publishing(parser, options, "sign", size)
    found: dict[str, Any] = {}
    try:
        with harness.progress.over("sign", size) as progress:
            for title, task in loaded.items():
                found[title] = {
                    sign: measure(task, sign, points, options.seeds, progress)
                    for sign in SIGNS
                }
    finally:
        content = {"seeds": options.seeds, "panels": found}
        for title, panel in found.items():
            harness.tables.show(
                f"{title}: accuracy (%) on validation, true labels, "
                f"{options.seeds} seeds, at the best ρ; slope",
                *cells(panel),
            )
        command_line.save(
            options,
            "sign",
            content,
            size=size,
            done=len(found),
            of=len(panels),
            unit="panels",
            draw=draw,
        )
    return 0


def load(options: Any, name: str, batch: int) -> Any:
    """A task in batches of a size, with as many steps as it has by itself."""
    from experiments import tasks

    task = tasks.load(name)
    longer = batch // task.batch
    task = task._replace(
        batch=batch,
        epochs=task.epochs * longer,
        epochs_per_call=task.epochs_per_call * longer,
    )
    return task._replace(epochs=task.epochs_per_call) if options.smoke else task


@functools.cache
def perturbed(sign: str) -> Any:
    """Lagged VaSSO with a sign."""
    import optax

    import optax_vasso as ov
    from optax_vasso.metrics import cosine, running_mean

    def make(base: Any, chosen: dict[str, Any], seed: Any) -> Any:
        ascent = optax.chain(
            ov.vasso_ema(chosen["theta"]), ov.sam_perturb(chosen["rho"])
        )
        if sign == "against":
            ascent = optax.chain(ascent, optax.scale(-1.0))
        if sign == "slope":
            ascent = follow_the_slope(ascent)
        # The mean over the whole training: its decay is as good as one.
        return ov.lagged(
            optax.chain(ov.metrics.track(running_mean(cosine, 0.9999)), base), ascent
        )

    method = harness.methods.METHODS["lagged_vasso"]
    return harness.methods.Method(
        SIGNS[sign], method.color, method.marker, 1, method.own, make
    )


def follow_the_slope(ascent: Any, decay: float = 0.98) -> Any:
    """The perturbation times the sign of the running slope of its average."""
    import jax
    import jax.numpy as jnp
    import optax

    from optax_vasso._internal import numerics

    ascent = optax.with_extra_args_support(ascent)

    def init(params: Any) -> Any:
        return jnp.zeros(()), jnp.ones(()), ascent.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        mean, sign, inner = state
        slope = sign * numerics.cosine(extra["direction"], updates)
        mean = decay * mean + (1 - decay) * slope
        perturbation, inner = ascent.update(updates, inner, params, **extra)
        sign = jnp.where(mean < 0, -1.0, 1.0)
        return jax.tree.map(lambda e: sign * e, perturbation), (mean, sign, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def measure(
    task: Any, sign: str, points: list[Any], seeds: int, progress: Any
) -> list[Any]:
    """Accuracy and slope of every point."""
    from optax_vasso._internal.trees import collect_metrics

    slopes: list[np.ndarray] = []

    def watch(epoch: int, state: Any) -> None:
        if epoch == task.epochs:
            slopes.append(np.asarray(collect_metrics(state)["mean_cosine"]))

    trained = harness.training.train(
        task,
        perturbed(sign),
        [point for point in points for _ in range(seeds)],
        list(range(FIRST_SEED, FIRST_SEED + seeds)) * len(points),
        epochs=task.epochs,
        progress=progress,
        watch=watch,
    )
    true = trained.clean_validation[:, -1].reshape(len(points), seeds)
    slope = np.concatenate(slopes).reshape(len(points), seeds).mean(1)
    # Of the average, whatever the sign of the perturbation.
    slope = -slope if sign == "against" else slope
    return [
        point
        | {
            "mean": round(float(scores.mean()), 3),
            "standard_error": round(harness.statistics.standard_error(scores), 3),
            "slope": round(float(cosine), 4),
        }
        for point, scores, cosine in zip(points, true, slope, strict=True)
    ]


def best(found: list[Any], **setting: float) -> Any:
    """The point with the best accuracy, of those with this setting."""
    chosen = [p for p in found if all(p[k] == v for k, v in setting.items())]
    return max(chosen, key=lambda point: point["mean"])


def settings(panel: dict[str, list[Any]], name: str) -> list[float]:
    """The values of a hyperparameter in a panel, in their order."""
    return list(dict.fromkeys(point[name] for point in panel["with"]))


def cells(panel: dict[str, list[Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: at each setting, the best radius of each sign."""
    lines = []
    for rate in settings(panel, "learning_rate"):
        for theta in settings(panel, "theta"):
            line = [f"{rate:g}", f"{theta:g}"]
            for found in panel.values():
                point = best(found, learning_rate=rate, theta=theta)
                line.append(
                    f"{point['mean']:.1f} ± {point['standard_error']:.1f} "
                    f"(ρ = {point['rho']:g}; {point['slope']:+.2f})".replace("-", "−")
                )
            lines.append(line)
    return ["η", "θ", *(SIGNS[sign] for sign in panel)], lines


def draw(path: Path, content: dict[str, Any]) -> None:
    """Accuracy over the learning rate, a panel per task."""
    figures, panels = harness.figures, content["panels"]
    figure, axes = figures.panels(-(-len(panels) // 2), min(2, len(panels)))
    looks = {
        "with": ("lagged_vasso", "-"),
        "against": ("momentum_sam", "-"),
        "slope": ("lagged_vasso", "--"),
    }
    for ax, (title, panel) in zip(axes.flat, panels.items(), strict=False):
        rates = settings(panel, "learning_rate")
        shifts = figures.dodged(len(panel), 0.15)
        for shift, (sign, found) in zip(shifts, panel.items(), strict=True):
            chosen = [best(found, learning_rate=rate) for rate in rates]
            name, line = looks[sign]
            ax.errorbar(
                np.arange(len(rates)) + shift,
                [point["mean"] for point in chosen],
                yerr=[point["standard_error"] for point in chosen],
                color=figures.style_of(name).color,
                marker=figures.style_of(name).marker,
                markerfacecolor="white" if sign == "slope" else None,
                linestyle=line,
                markersize=figures.marker_size(figures.style_of(name).marker),
                capsize=2,
                label=SIGNS[sign],
            )
        ax.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        ax.set_title(title)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("validation accuracy (%)")
    for ax in axes[-1]:
        ax.set_xlabel("learning rate η")
    figures.shared_legend(figure, axes[0, 0])
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
