"""The tables of the pages of the experiments."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import (
    answers,
    automatic,
    automatic_candidates as candidates,
    batch_size,
    best_radius,
    bouncing,
    char_lm,
    choosing_rho as rho,
    domain_generalization,
    flatness,
    lagged_feeding,
    quantization,
    radius,
    radius_warmup,
    rise,
    sign,
    tasks,
)
from experiments.harness import statistics
from experiments.harness.tables import (
    cells,
    difference_cells,
    markdown,
    mean_and_error,
    plus_minus,
)

RESULTS = Path(__file__).parents[1] / "results"
RADIUS_FILE = "radius_digits-75"
ALONG_FILE = "radius_along_digits-75"


def load(name: str) -> dict[str, Any]:
    """What a file in results/ says."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def summary(budget: str, column: str) -> str:
    """A row per task, a column per method; the highest mean of a row is bold."""
    found = load("evidence")["tasks"]
    labels: dict[str, str] = {}
    for task in found.values():
        labels |= {name: row["label"] for name, row in task[budget].items()}
    lines = []
    for task in found.values():
        rows = task[budget]
        highest = max(row[column]["mean"] for row in rows.values())
        line = [task["task"]]
        for name in labels:
            accuracy = rows[name][column] if name in rows else None
            text = mean_and_error(accuracy) if accuracy else ""
            bold = accuracy and accuracy["mean"] == highest
            line.append(f"**{text}**" if bold else text)
        lines.append(line)
    return markdown(["task", *labels.values()], lines)


def comparison(task: str, budget: str) -> str:
    """Everything about one task at one budget."""
    return markdown(*cells(load("evidence")["tasks"][task][budget]))


def search() -> str:
    """What the searches did with their ranges, and what remains at an end of one."""
    lines = []
    for task in load("evidence")["tasks"].values():
        for name, found in task["search"].items():
            label, trials = task["gradients"][name]["label"], len(found["trials"])
            if found["widened"] or found["on_edge"]:
                widened = " ".join(found["widened"])
                lines.append(
                    [
                        task["task"],
                        label,
                        str(trials),
                        widened,
                        ", ".join(found["on_edge"]),
                    ]
                )
    header = ["task", "method", "trials", "widened", "picked at an end"]
    return markdown(header, lines)


def clean_labels() -> str:
    """What true validation labels would have picked: paired difference at the test."""
    lines = []
    for task in load("evidence")["tasks"].values():
        for name, row in task["gradients"].items():
            clean = task["gradients_clean"][name]
            if clean["hyperparameters"] != row["hyperparameters"]:
                difference = statistics.paired_difference(
                    clean["last"]["values"], row["last"]["values"]
                )
                lines.append([task["task"], row["label"], plus_minus(difference)])
    return markdown(["task", "method", "true labels − noisy labels"], lines)


def main_job(name: str) -> str:
    """The two-minute experiment."""
    return markdown(*cells(load(name)["methods"]))


def heat_map(decay: str, name: str = RADIUS_FILE) -> str:
    """Accuracy over ρ and θ at one weight decay."""
    panels = load(name)["panels"]
    return markdown(*radius.cells(panels[f"weight decay {decay}"]))


def signs(number: int) -> str:
    """Both signs of a lagged perturbation, and the rule, on one task."""
    panels = list(load("sign")["panels"].values())
    return markdown(*sign.cells(panels[number]))


QUESTIONS = dict(
    zip(
        ("second_gradient", "one_gradient", "vasso", "others", "early_stopping"),
        answers.QUESTIONS,
        strict=True,
    )
)


def question(name: str) -> str:
    """One of the questions to the evidence."""
    return markdown(*answers.cells(load("answers")["questions"][QUESTIONS[name]]))


def across_batch_sizes(noise: str) -> str:
    """Accuracy at the largest batch minus that at the smallest."""
    found = load(f"batch_size_{noise}")
    smallest, *_, largest = found["sizes"]
    header = ["method", f"batch {largest} − batch {smallest}", "p (Holm)"]
    rows = found["largest_minus_smallest"]
    return markdown(header, [[n, *difference_cells(d)] for n, d in rows.items()])


def all_batch_sizes(noise: str) -> str:
    """Accuracy at every batch size."""
    return markdown(*batch_size.cells(load(f"batch_size_{noise}")))


def sharpness_by_batch_size(noise: str) -> str:
    """Losses and sharpness at every batch size."""
    return markdown(*batch_size.sharpness_cells(load(f"batch_size_{noise}")))


TABLES: dict[str, Callable[[], str]] = {
    "evidence_gradients": lambda: summary("gradients", "last"),
    "evidence_epochs": lambda: summary("epochs", "last"),
    "evidence_picked": lambda: summary("gradients", "picked"),
    **{
        f"evidence_{budget}_{task}": lambda t=task, b=budget: comparison(t, b)
        for task in tasks.TITLES
        for budget in ("gradients", "epochs")
    },
    "evidence_search": search,
    "evidence_clean_labels": clean_labels,
    **{f"answers_{name}": lambda n=name: question(n) for name in QUESTIONS},
    **{
        f"{name}_compared": lambda n=name: markdown(
            *automatic.cells(load("automatic")["methods"][n])
        )
        for name in automatic.SEARCHED
    },
    **{
        f"{name}_candidates": lambda n=name: markdown(
            *candidates.cells(n, load("automatic_candidates")["methods"][n])
        )
        for name in automatic.SEARCHED
    },
    "collapse_guard": lambda: markdown(
        *automatic.guard_cells(load("automatic")["guard"])
    ),
    "rise": lambda: markdown(*rise.cells(load("rise"))),
    "label_noise": lambda: main_job("label_noise"),
    "label_noise_epochs": lambda: main_job("label_noise_epochs"),
    "radius_0.0005": lambda: heat_map("0.0005"),
    "radius_0.005": lambda: heat_map("0.005"),
    "radius_gains": lambda: markdown(*radius.gains(load(RADIUS_FILE))),
    "radius_along_0.0005": lambda: heat_map("0.0005", ALONG_FILE),
    "radius_along_0.005": lambda: heat_map("0.005", ALONG_FILE),
    "radius_along_gains": lambda: markdown(*radius.gains(load(ALONG_FILE))),
    "best_radius": lambda: markdown(*best_radius.cells(load("best_radius"))),
    "radius_warmup": lambda: markdown(*radius_warmup.cells(load("radius_warmup"))),
    "lagged_feeding": lambda: markdown(*lagged_feeding.cells(load("lagged_feeding"))),
    **{f"sign_{i}": lambda i=i: signs(i) for i in range(len(sign.PANELS))},
    "choosing_rho_picks": lambda: markdown(*rho.picks(load("choosing_rho"))),
    "choosing_rho_moves": lambda: markdown(*rho.movers(load("choosing_rho"))),
    "choosing_rho": lambda: markdown(*rho.to_use(load("choosing_rho"))),
    "choosing_rho_rules": lambda: markdown(*rho.all_rules(load("choosing_rho"))),
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
            ("sharpness", sharpness_by_batch_size),
        )
    },
    **{
        f"char_lm_{length}": lambda n=length: markdown(
            *char_lm.cells(load("char_lm")["lengths"][n])
        )
        for length in ("600",)
    },
    "quantization": lambda: markdown(*quantization.cells(load("quantization"))),
    **{
        f"domains_{budget}": lambda b=budget: markdown(
            *domain_generalization.cells(load("domain_generalization")[b])
        )
        for budget in ("gradients", "epochs")
    },
}
