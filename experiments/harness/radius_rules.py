"""What a best radius moves with over tasks, and rules that predict it for a new one."""

from typing import Any

import numpy as np

from experiments import tasks
from experiments.harness import networks, statistics

# What the radius may move with -> how its effect is said.
MOVERS = {
    "log_theta": "θ halved: ρ times",
    "log_weight_decay": "weight decay doubled: ρ times",
    "log_learning_rate": "learning rate doubled: ρ times",
    "log_norm": "‖x₀‖ doubled: ρ times",
    "wrong_labels": "25 points more wrong labels: ρ times",
}
STEPS = {"log_theta": -np.log(2), "wrong_labels": 0.25}
# A trial is good if its validation accuracy is so near to the best, in points.
GOOD = 1.0

Unit = dict[str, Any]


def unit(name: str, method: str, search: dict[str, Any]) -> Unit:
    """What a search says of the radius, and what is known of its task beforehand."""
    task = tasks.load(name)
    params = task.network.init(np.random.default_rng(0))
    wrong = tasks.split(task, 0).given_labels != task.labels
    known = {
        "log_norm": float(np.log(networks.norm(params))),
        "wrong_labels": float(wrong.mean()),
    }
    trials = [
        {
            "rho": trial["rho"],
            "score": float(np.mean(trial["scores"])),
            "seeds": len(trial["scores"]),
            "log_theta": float(np.log(trial.get("theta", 1.0))),
            "log_weight_decay": float(np.log(trial["weight_decay"])),
            "log_learning_rate": float(np.log(trial["learning_rate"])),
        }
        | known
        for trial in search["trials"]
    ]
    most, fewest = (pick(trial["seeds"] for trial in trials) for pick in (max, min))
    finalists = [trial for trial in trials if trial["seeds"] == most]
    best = max(trial["score"] for trial in finalists)
    # Trials of the first stage only are too uncertain to be called good.
    good = [
        trial["rho"]
        for trial in trials
        if trial["score"] >= best - GOOD and trial["seeds"] > fewest
    ]
    return {
        "task": task.title,
        "method": method,
        "picked": search["picked"],
        "good_radii": [min(good), max(good)],
        "finalists": finalists,
    } | known


def fit(rows: list[dict[str, Any]], features: list[str]) -> np.ndarray:
    """Least squares of log ρ: the constant, and a coefficient per feature."""
    known = np.array([[1.0, *(row[name] for name in features)] for row in rows])
    return np.linalg.lstsq(known, np.log([row["rho"] for row in rows]))[0]


def moves(units: list[Unit]) -> list[dict[str, Any]]:
    """Factors on ρ, with 95 % intervals by leaving out one task after another."""
    features = [
        name
        for name in MOVERS
        if len({trial[name] for u in units for trial in u["finalists"]}) > 1
    ]

    def coefficients(leaving_out: str | None) -> np.ndarray:
        kept = [u for u in units if u["task"] != leaving_out]
        return fit([trial for u in kept for trial in u["finalists"]], features)[1:]

    names = list(dict.fromkeys(u["task"] for u in units))
    whole, parts = coefficients(None), np.array([coefficients(n) for n in names])
    count = len(names)
    errors = np.sqrt((count - 1) / count * ((parts - parts.mean(0)) ** 2).sum(0))
    rows = []
    for name, value, error in zip(features, whole, errors, strict=True):
        step = STEPS.get(name, np.log(2))
        ends = statistics.interval(value * step, abs(error * step), count)
        rows.append(
            {
                "mover": MOVERS[name],
                "factor": float(np.exp(value * step)),
                "interval": [float(np.exp(end)) for end in ends],
            }
        )
    return rows


def leave_one_out(units: list[Unit], features: tuple[str, ...]) -> dict[str, Any]:
    """The error of a rule on each task, when it is made on the others."""
    rows = [u | {"rho": u["picked"]["rho"]} for u in units]
    errors = []
    for row in rows:
        others = [other for other in rows if other is not row]
        constant, *slopes = fit(others, list(features))
        told = (slope * row[name] for slope, name in zip(slopes, features, strict=True))
        rho = float(np.exp(constant + sum(told)))
        errors.append(
            {
                "task": row["task"],
                "rho": rho,
                "factor": max(rho / row["rho"], row["rho"] / rho),
                "good": row["good_radii"][0] <= rho <= row["good_radii"][1],
            }
        )
    return {"coefficients": fit(rows, list(features)).tolist(), "errors": errors}
