"""What lagged VaSSO's average should be fed with, measured on the digits.

``lagged`` feeds it the gradient at the perturbed point. The alternative needs no second
gradient either: leave every k-th perturbation out (ρ = 0 on that step), so that the
next gradient is a clean one. Both are trained on the label-noise protocol of
``examples/digits.py``, each at the radius and θ that are best for it among those tried.
"""

import argparse
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
from command_line import environment, progress_bar, write_json

import optax_vasso as ov

RADII = (0.4, 0.5, 0.6)
THETAS = (0.3, 0.5)
PERIODS = (0, 2, 5)


def lagged_with_rests(period: int) -> digits.MakeOptimizer:
    """Lagged VaSSO whose perturbation is left out on every ``period``-th step."""

    def make(base: Any, row: dict[str, jax.Array], seed: jax.Array) -> Any:
        def radius(step: jax.Array) -> jax.Array:
            rests = (step % period == period - 1) if period else False
            return jnp.where(rests, 0.0, row["rho"])

        # The buffered average: it must outlive a step without a perturbation.
        ascent = optax.chain(ov.vasso_ema(row["theta"]), ov.sam_perturb(radius))
        return ov.lagged(base, ascent)

    return make


def main() -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--noise", type=float, default=0.75, help="share of noise")
    parser.add_argument("--seeds", type=int, default=8, help="validation seeds")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    points = list(itertools.product(RADII, THETAS))
    splits = digits.stack([digits.validation_split(s) for s in range(options.seeds)])
    rows = []
    with progress_bar() as bar:
        task = bar.add_task("feeding", total=len(PERIODS) * digits.EPOCHS)
        for period in PERIODS:
            runs = digits.train(
                lagged_with_rests(period),
                {
                    "rho": np.repeat([rho for rho, _ in points], options.seeds),
                    "theta": np.repeat([theta for _, theta in points], options.seeds),
                },
                np.tile(np.arange(options.seeds), len(points)),
                digits.tile(splits, len(points)),
                options.noise,
                evaluate_every=digits.EPOCHS,
                on_epoch=lambda: bar.advance(task),
            )
            table = runs.accuracy[:, -1].reshape(len(points), options.seeds)
            best = int(table.mean(axis=1).argmax())
            rows.append(
                {
                    "clean_every": period or None,
                    "rho": points[best][0],
                    "theta": points[best][1],
                    "accuracy": float(table[best].mean()),
                    "standard_error": float(
                        table[best].std(ddof=1) / np.sqrt(options.seeds)
                    ),
                }
            )
    for row in rows:
        print(row)
    write_json(
        options.results / f"lagged_feeding_{options.noise:g}.json",
        {
            "environment": environment(),
            "noise": options.noise,
            "seeds": options.seeds,
            "split": "validation",
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
