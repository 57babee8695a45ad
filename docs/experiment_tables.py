"""The tables of the pages of the experiments."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import (
    batch_size,
    best_radius,
    bouncing,
    char_lm,
    domain_generalization,
    flatness,
    forgetting,
    lagged_feeding,
    quantization,
    radius,
    radius_warmup,
    sign,
)
from experiments.harness import verdicts
from experiments.harness.tables import markdown, plus_minus

RESULTS = Path(__file__).parents[1] / "results"
RADIUS_FILE = "radius_digits-75"
ALONG_FILE = "radius_along_digits-75"


def load(name: str) -> dict[str, Any]:
    """What a file in results/ says."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def signs(number: int) -> str:
    """Both signs of a lagged perturbation, and the rule, on one task."""
    panels = list(load("sign")["panels"].values())
    return markdown(*sign.cells(panels[number]))


def across_batch_sizes(noise: str) -> str:
    """Accuracy at the largest batch minus that at the smallest."""
    found = load(f"batch_size_{noise}")
    smallest, *_, largest = found["sizes"]
    header = ["method", f"batch {largest} − batch {smallest}"]
    rows = found["largest_minus_smallest"]
    return markdown(header, [[n, plus_minus(d)] for n, d in rows.items()])


def all_batch_sizes(noise: str) -> str:
    """Accuracy at every batch size."""
    return markdown(*batch_size.cells(load(f"batch_size_{noise}")))


TABLES: dict[str, Callable[[], str]] = {
    **{
        f"evidence_{name}": lambda make=make: markdown(*make(load("evidence")))
        for name, make in (
            ("tasks", verdicts.of_all_tasks),
            ("methods", verdicts.of_all_methods),
            ("splits", verdicts.of_splits),
            ("convolutions", verdicts.of_convolutions),
            ("radii", verdicts.picked_radii),
            ("trials", verdicts.after_trials),
            ("validation", verdicts.known_to_a_user),
        )
    },
    **{
        f"evidence_over_{over}": lambda o=over: markdown(
            *verdicts.of_all_gains(load("evidence"), o)
        )
        for over in ("sgd", "sam")
    },
    "label_noise": lambda: markdown(*verdicts.cells(load("label_noise")["methods"])),
    "radius_gains": lambda: markdown(*radius.gains(load(RADIUS_FILE))),
    "radius_along_gains": lambda: markdown(*radius.gains(load(ALONG_FILE))),
    "best_radius": lambda: markdown(*best_radius.cells(load("best_radius"))),
    "radius_warmup": lambda: markdown(*radius_warmup.cells(load("radius_warmup"))),
    "lagged_feeding": lambda: markdown(*lagged_feeding.cells(load("lagged_feeding"))),
    "sign_0": lambda: signs(0),
    "sign_1": lambda: signs(1),
    "flatness": lambda: markdown(
        *flatness.cells(load("flatness")["methods"], flatness.MEASURES)
    ),
    "adversaries": lambda: markdown(
        *flatness.cells(load("flatness")["methods"], flatness.ADVERSARY)
    ),
    "bouncing": lambda: markdown(*bouncing.cells(load("bouncing"))),
    **{
        f"batch_size_{noise}_{name}": lambda n=noise, make=make: make(n)
        for noise in ("0", "50")
        for name, make in (
            ("across", across_batch_sizes),
            ("sizes", all_batch_sizes),
        )
    },
    **{
        f"{file}_{length}": lambda file=file, n=length: markdown(
            *char_lm.cells(load(file)["lengths"][n])
        )
        for file, lengths in (
            ("char_lm", ("600",)),
            ("char_lm_width_64", ("600", "2000")),
        )
        for length in lengths
    },
    **{
        file: lambda file=file: markdown(*quantization.cells(load(file)))
        for file in ("quantization", "quantization_5000", "quantization_10000")
    },
    "forgetting": lambda: markdown(*forgetting.cells(load("forgetting"))),
    **{
        f"domains_{budget}": lambda b=budget: markdown(
            *domain_generalization.cells(load("domain_generalization")[b])
        )
        for budget in ("gradients", "epochs")
    },
}
