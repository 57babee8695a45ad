"""Write the tables of results.md from the JSON files in results/.

Run ``python docs/results_tables.py`` after a measurement. A table of the page stands
between ``<!-- table: NAME -->`` and ``<!-- end -->``, NAME being one of TABLES.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
sys.path.insert(0, str(ROOT / "examples"))

from methods import describe  # noqa: E402
from significance import standard_error  # noqa: E402

PLACE = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def load(name: str) -> dict[str, Any]:
    """What a file in results/ says."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of GitHub's Markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plus_minus(values: Iterable[float], scale: float = 1.0) -> str:
    """Mean ± standard error, to two digits of the error."""
    values = scale * np.asarray(list(values), float)
    error = standard_error(values)
    digits = 0 if error == 0 else max(0, 1 - int(np.floor(np.log10(error))))
    return f"{signed(values.mean(), digits)} ± {error:.{digits}f}"


def signed(value: float, digits: int, plus: str = "") -> str:
    """A number with a true minus sign."""
    return f"{value:{plus}.{digits}f}".replace("-", "−")


def environments() -> str:
    """Versions and devices, and which files have which."""
    files: dict[tuple[str, str], list[str]] = {}
    for path in sorted((ROOT / "results").glob("*.json")):
        found = json.loads(path.read_text())["environment"]
        versions = ", ".join(
            f"{name} {found[name]}" for name in ("jax", "optax", "python")
        )
        device = f"{found['device']}, {found['cpu_count']} cores"
        files.setdefault((versions, device), []).append(path.stem)
    most = max(map(len, files.values()))
    rows = [
        [*key, "all" if len(files) == 1 else "all others"]
        if len(names) == most
        else [*key, ", ".join(names)]
        for key, names in files.items()
    ]
    return markdown(["versions", "device", "files"], rows)


def label_noise(noise: str) -> str:
    """Test accuracy of each method."""

    def row(method: dict[str, Any]) -> list[str]:
        difference = method.get("difference_to_sam")
        return [
            method["label"],
            f"{method['gradients_per_step']:.1f}",
            describe(method["hyperparameters"]),
            f"{method['mean']:.1f} ± {method['standard_error']:.1f}",
            f"{signed(difference['mean'], 1, '+')} ± {difference['standard_error']:.1f}"
            if difference
            else "",
            f"{difference['p_two_sided']:.1g}" if difference else "",
        ]

    return markdown(
        [
            "method",
            "gradients a step",
            "hyperparameters",
            "accuracy (%)",
            "paired difference to SAM",
            "p",
        ],
        map(row, load(f"label_noise_{noise}")["methods"].values()),
    )


def tuning(noise: str) -> str:
    """Validation accuracy of every point that was tried."""
    labels = load(f"label_noise_{noise}")["methods"]
    rows = []
    for name, points in load(f"label_noise_{noise}_tuning")["methods"].items():
        for point in points:
            accuracy, error = point.pop("accuracy"), point.pop("standard_error")
            rows.append(
                [
                    labels[name]["label"],
                    describe(point),
                    f"{accuracy:.1f} ± {error:.1f}",
                ]
            )
    return markdown(["method", "tried", "validation accuracy (%)"], rows)


def radii(noise: str) -> str:
    """Test accuracy over the radius, the other hyperparameters as tuned."""
    found = load(f"label_noise_{noise}")
    sweep, rows = found["radius_sweep"], []
    for name, accuracy in sweep["accuracy"].items():
        other = {k: v for k, v in sweep["fixed"][name].items() if k != "rho"}
        label = ", ".join(
            filter(None, [found["methods"][name]["label"], describe(other)])
        )
        rows.append([label, *(f"{np.mean(seeds):.1f}" for seeds in accuracy)])
    return markdown(["ρ", *(f"{rho:g}" for rho in sweep["radii"])], rows)


def by_theta() -> str:
    """VaSSO's best validation accuracy at each θ, and its ρ, by noise."""
    levels = load("noise_levels")["levels"]
    names = [
        "SAM" if row["theta"] == 1 else f"θ = {row['theta']:g}"
        for row in levels[0]["by_theta"]
    ]
    rows = [
        [
            f"{level['noise']:.0%}",
            *(
                f"{row['accuracy']:.1f} ± {row['standard_error']:.1f} ({row['rho']:g})"
                for row in level["by_theta"]
            ),
        ]
        for level in levels
    ]
    return markdown(["random labels", *names], rows)


def sweep(name: str) -> str:
    """Mean accuracy over the grid of θ and ρ, collapsed seeds in brackets."""
    grid = load(name)
    rows = []
    for summary in grid["by_theta"]:
        accuracy = grid["accuracy"][grid["thetas"].index(summary["theta"])]
        cells = [
            f"{np.mean(seeds):.1f}" + (f" ({collapsed})" if collapsed else "")
            for seeds, collapsed in zip(accuracy, summary["collapsed"], strict=True)
        ]
        sign = "≥ " if summary["largest_radius_is_stable"] else ""
        radius = summary["robust_radius"]
        cells.append(f"{sign}{radius:g}" if radius else f"< {grid['radii'][0]:g}")
        name = "1 (SAM)" if summary["theta"] == 1 else f"{summary['theta']:g}"
        rows.append([f"θ = {name}", *cells])
    radii = (f"{rho:g}" for rho in grid["radii"])
    return markdown(["ρ", *radii, "robust radius"], rows)


def sweep_cost() -> str:
    """One program against a step for each batch."""
    found = load("sweep_cost")
    each = found["one_by_one_seconds_each"]
    rows = [
        ["trainings", str(found["trainings"])],
        ["one by one, seconds each", f"{min(each):.2f} to {max(each):.2f}"],
        ["all of them as one program, seconds", f"{found['sweep_seconds']:.1f}"],
        ["cores busy, one by one", f"{found['one_by_one_cores']:.2f}"],
        ["cores busy, one program", f"{found['sweep_cores']:.2f}"],
        ["ratio, both compiled", f"{found['ratio']:.2f}"],
        ["ratio, compilation included", f"{found['ratio_with_compilation']:.2f}"],
    ]
    return markdown(["", ""], rows)


def radius_warmup() -> str:
    """Validation accuracy by how the radius begins."""
    found = load("radius_warmup_0.75")["rows"]
    thetas = list(dict.fromkeys(row["theta"] for row in found))
    radii = list(dict.fromkeys(row["rho"] for row in found))
    rows = [
        [
            "SAM" if theta == 1 else f"VaSSO, θ = {theta:g}",
            warmup,
            *(
                f"{row['accuracy']:.1f} ± {row['standard_error']:.1f}"
                for row in found
                if (row["theta"], row["warmup"]) == (theta, warmup)
            ),
        ]
        for theta in thetas
        for warmup in dict.fromkeys(row["warmup"] for row in found)
    ]
    return markdown(["", "ρ grows over", *(f"ρ = {rho:g}" for rho in radii)], rows)


def char_lm() -> str:
    """Losses and sharpness of the language models."""
    rows = []
    for method in load("char_lm")["methods"].values():
        compared = method.get("difference_to_adamw", {}).get("validation_loss")
        seeds = method["seeds"]
        rows.append(
            [
                method["label"],
                describe(method["hyperparameters"]),
                str(method["steps"]),
                f"{np.mean(method['gradients']):.0f}",
                plus_minus(seeds["validation_loss"]),
                f"{signed(compared['mean'], 3, '+')} ± {compared['standard_error']:.3f}"
                if compared
                else "",
                f"{compared['p_two_sided']:.1g}" if compared else "",
                plus_minus(seeds["training_loss"]),
                plus_minus(seeds["gap"]),
                plus_minus(seeds["lambda_max"]),
            ]
        )
    header = ["", "hyperparameters", "steps", "gradients", "validation loss"]
    header += ["difference to AdamW", "p", "training loss", "gap", "λ_max"]
    return markdown(header, rows)


def domains() -> str:
    """Accuracy on unseen domains, averaged over which one is unseen."""
    rows = []
    for method in load("domain_generalization")["methods"].values():
        difference = method.get("difference_to_sam")
        rows.append(
            [
                method["label"],
                f"{method['gradients_per_step']:.1f}",
                plus_minus(method["average"]),
                f"{signed(difference['mean'], 1, '+')} ± "
                f"{difference['standard_error']:.1f}"
                if difference
                else "",
                f"{difference['p_two_sided']:.1g}" if difference else "",
            ]
        )
    header = ["", "gradients a step", "average (%)", "paired difference to SAM", "p"]
    return markdown(header, rows)


def batch_size(noise: str) -> str:
    """Test accuracy and λ_max of each method by batch size."""
    found = load(f"batch_size_{noise}")
    sizes = [row["batch_size"] for row in found["epochs"]]
    rows = []
    for key, name in (("test_accuracy", "test accuracy (%)"), ("lambda_max", "λ_max")):
        for method, label in (("sgd", "SGD"), ("sam", "SAM"), ("vasso", "VaSSO")):
            for matched in ("epochs", "updates"):
                values = (row["methods"][method][key] for row in found[matched])
                cells = (plus_minus(seeds) for seeds in values)
                rows.append([name, label, matched, *cells])
    return markdown(["", "method", "matched", *(f"{size}" for size in sizes)], rows)


def lagged_feeding() -> str:
    """Validation accuracy by how often the average is fed a clean gradient."""
    by_noise = {
        noise: {
            row["clean_every"]: row for row in load(f"lagged_feeding_{noise}")["rows"]
        }
        for noise in ("0.75", "0.5")
    }
    rows = []
    for every in (None, 5, 2):
        cells = [
            f"{row['accuracy']:.1f} ± {row['standard_error']:.1f}"
            f" (ρ = {row['rho']:g}, θ = {row['theta']:g})"
            for row in (rows_of[every] for rows_of in by_noise.values())
        ]
        rows.append(["never" if every is None else f"every {every} steps", *cells])
    return markdown(["clean gradient", "75 % noise", "50 % noise"], rows)


FLATNESS = {
    "test_accuracy": ("test accuracy (%)", 1),
    "train_loss": ("training loss (nats)", 1),
    "gap": ("test minus training loss (nats)", 1),
    "lambda_max": ("λ_max of the Hessian", 1),
    "lambda_5": ("fifth eigenvalue", 1),
    "lambda_min": ("λ_min", 1),
    "gauss_newton_lambda_max": ("λ_max of the Gauss-Newton matrix", 1),
    "trace": ("trace of the Hessian", 1),
    "ascent": ("ascent direction, ρ = 0.1 (10⁻³ nats)", 1e3),
    "worst": ("worst direction, ρ = 0.1 (10⁻³ nats)", 1e3),
    "average": ("average direction, ρ = 0.1 (10⁻⁶ nats)", 1e6),
    "adaptive_worst": ("adaptive worst direction, ρ = 0.1 (10⁻³ nats)", 1e3),
    "m_sharpness": ("m-sharpness, m = 50, ρ = 0.1 (10⁻³ nats)", 1e3),
    "keskar": ("Keskar's, ε = 10⁻³ (%)", 1),
}
STABILITY = {
    "stability": ("‖ε_t − ε_{t−1}‖/ρ", 1),
    "lowered": ("batches on which it lowers the loss (%)", 100),
    "misaligned": ("batches at more than a right angle (%)", 100),
    "cosine_to_batch": ("cosine to the gradient of a batch", 1),
    "cosine_to_full_gradient": ("cosine to the full gradient", 1),
    "relative_squared_error": ("‖d_t − ∇f‖², that of a batch = 1", 1),
}
BOUNCING = {
    "training_loss": ("training loss (10⁻³ nats)", 1e3),
    "training_accuracy": ("training accuracy (%)", 1),
    "test_accuracy": ("test accuracy (%)", 1),
    "keskar_1e-3": ("Keskar's sharpness, ε = 10⁻³ (%)", 1),
    "keskar_5e-4": ("Keskar's sharpness, ε = 5·10⁻⁴ (%)", 1),
    "lambda_max": ("λ_max of the Hessian", 1),
}


def columns(
    quantities: dict[str, tuple[str, float]], solutions: dict[str, list]
) -> str:
    """One row a quantity, one column a way of training."""
    rows = [
        [
            title,
            *(
                plus_minus([s[key] for s in seeds], scale)
                for seeds in solutions.values()
            ),
        ]
        for key, (title, scale) in quantities.items()
    ]
    return markdown(["", *solutions], rows)


def flatness() -> str:
    """What training has found."""
    return columns(
        FLATNESS,
        {
            " ".join(filter(None, [name, describe(seeds[0]["hyperparameters"])])): seeds
            for name, seeds in load("flatness")["solutions"].items()
        },
    )


def stability() -> str:
    """What the adversary is like."""
    rows = load("flatness")["stability"]
    return columns(STABILITY, {row["label"]: row["adversaries"] for row in rows})


def batches() -> str:
    """Keskar's experiment."""
    ways = load("bouncing")["batches"]
    return columns(
        BOUNCING,
        {
            f"{name}: {way['batch_size']} images, {way['steps']} steps": way[
                "solutions"
            ]
            for name, way in ways.items()
        },
    )


def bouncing() -> str:
    """SAM on a quadratic."""
    found = load("bouncing")["bouncing"]
    return markdown(
        ["η", "λ", "ρ", "amplitude", "ηλρ/(2 − ηλ)", "relative error"],
        [
            [
                f"{found['eta']:g}",
                f"{found['eigenvalues'][0]:g}",
                f"{found['rho']:g}",
                f"{found['amplitude']:.6f}",
                f"{found['closed_form']:.6f}",
                f"{found['relative_error']:.1g}",
            ]
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    "environments": environments,
    **{
        f"{table.__name__}_{noise}": lambda table=table, noise=noise: table(noise)
        for table in (label_noise, tuning, radii)
        for noise in ("0.75", "0.5", "0.25")
    },
    "sweep": lambda: sweep("sweep"),
    "sweep_wide": lambda: sweep("sweep_wide"),
    "batch_size_0": lambda: batch_size("0"),
    "batch_size_0.5": lambda: batch_size("0.5"),
    **{
        table.__name__: table
        for table in (
            by_theta,
            sweep_cost,
            radius_warmup,
            char_lm,
            domains,
            lagged_feeding,
            flatness,
            stability,
            batches,
            bouncing,
        )
    },
}


def fill(page: str) -> str:
    """The page with its tables as the files have them now."""

    def table(match: re.Match) -> str:
        try:
            text = TABLES[match[2]]()
        except FileNotFoundError:
            text = "Not measured yet."
        return f"{match[1]}\n{text}\n\n{match[4]}"

    return PLACE.sub(table, page)


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
