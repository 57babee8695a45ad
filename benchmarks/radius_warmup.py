"""Whether SAM collapses because of its radius, or of its radius at the start.

SAM and VaSSO on the digits with random labels, with the whole radius from the first
step, and with a radius that grows linearly over the first third or over the whole of
training. Each at the best of several radii on validation splits, as --tune of
``examples/label_noise.py`` has it; the test images are not seen.
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import digits
from command_line import (
    Parser,
    environment,
    number,
    positive_integer,
    progress_bar,
    results_folder,
    run,
    write_json,
)
from rows import one_device_per_core
from significance import standard_error

import optax_vasso as ov

RADII = (0.35, 0.5, 0.8, 1.2, 1.6)
THETAS = (1.0, 0.2, 0.05)
WARMUPS = {"none": 0.0, "first third": 1 / 3, "all of training": 1.0}


def make_optimizer(
    base: optax.GradientTransformation, row: dict[str, jax.Array], seed: jax.Array
) -> optax.GradientTransformation:
    """VaSSO, or SAM at θ = 1, whose radius has grown to ρ after ``warmup`` steps."""
    del seed

    def radius(step: jax.Array) -> jax.Array:
        return row["rho"] * jnp.minimum(1.0, (step + 1) / row["warmup"])

    return ov.vasso(base, radius, row["theta"])


def main() -> None:
    """Train, print, write."""
    parser = Parser(description=__doc__.splitlines()[0])
    share = number(float, 0.0, 1.0, "a number from 0 to 1")
    parser.add_argument("--noise", type=share, default=0.75)
    parser.add_argument("--seeds", type=positive_integer, default=16)
    parser.add_argument("--epochs", type=positive_integer, default=digits.EPOCHS)
    parser.add_argument("--results", type=results_folder, default="results")
    options = parser.parse_args()
    splits = digits.stack([digits.validation_split(s) for s in range(options.seeds)])
    steps = options.epochs * (splits.images.shape[1] // digits.BATCH)
    points = list(itertools.product(THETAS, WARMUPS, RADII))
    rows: dict[str, Any] = {
        "theta": np.repeat([theta for theta, _, _ in points], options.seeds),
        "warmup": np.repeat(
            [max(1.0, WARMUPS[name] * steps) for _, name, _ in points], options.seeds
        ),
        "rho": np.repeat([rho for _, _, rho in points], options.seeds),
    }
    with progress_bar() as bar:
        task = bar.add_task(f"{len(rows['rho'])} trainings", total=options.epochs)
        runs = digits.train(
            make_optimizer,
            rows,
            np.tile(np.arange(options.seeds), len(points)),
            digits.tile(splits, len(points)),
            options.noise,
            epochs=options.epochs,
            evaluate_every=options.epochs,
            on_epoch=lambda: bar.advance(task),
        )
    table = runs.accuracy[:, -1].reshape(len(points), options.seeds)
    found = [
        {
            "theta": theta,
            "warmup": warmup,
            "rho": rho,
            "accuracy": float(values.mean()),
            "standard_error": standard_error(values),
            "lowest": float(values.min()),
        }
        for (theta, warmup, rho), values in zip(points, table, strict=True)
    ]
    for theta, warmup in itertools.product(THETAS, WARMUPS):
        same = [r for r in found if (r["theta"], r["warmup"]) == (theta, warmup)]
        best = max(same, key=lambda row: row["accuracy"])
        print(
            f"θ = {theta:g}, warm-up: {warmup}: {best['accuracy']:.1f} ± "
            f"{best['standard_error']:.1f} % at ρ = {best['rho']:g}; by radius",
            *(f"{row['rho']:g}: {row['accuracy']:.1f}" for row in same),
        )
    write_json(
        options.results / f"radius_warmup_{options.noise:g}.json",
        {
            "environment": environment(),
            "noise": options.noise,
            "seeds": options.seeds,
            "split": "validation",
            "rows": found,
        },
    )


if __name__ == "__main__":
    one_device_per_core()
    run(main)
