"""Write the tables of the pages on results from the JSON files in results/.

Run ``python docs/results_tables.py`` after a measurement. A table of a page stands
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
PAGES = [ROOT / "docs" / "results.md", *sorted((ROOT / "docs/results").glob("*.md"))]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import experiment_tables  # noqa: E402

from experiments.harness.methods import describe  # noqa: E402
from experiments.harness.statistics import standard_error  # noqa: E402
from experiments.harness.tables import markdown  # noqa: E402

PLACE = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def load(name: str) -> dict[str, Any]:
    """What a file in results/ says."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


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


def step_cost(width: int) -> str:
    """Operations, bytes, memory, time."""
    (problem,) = (
        problem
        for problem in load("step_cost")["problems"]
        if problem["problem"].startswith(f"width {width},")
    )
    rows = [
        [
            name,
            f"{cost['operations_in_gradients']:.4f}",
            f"{cost['bytes_in_gradients']:.2f}",
            f"{cost['state_in_parameters']:.2f}",
            f"{cost['temporary_in_parameters']:.2f}",
            f"{cost['compile_seconds']:.1f}",
            f"{cost['time_over_sgd']:.2f}",
        ]
        for name, cost in problem["methods"].items()
    ]
    header = ["operations", "bytes", "state", "temporary", "compile (s)", "time / SGD"]
    return (
        f"{problem['problem']}, {problem['parameters']:,} parameters:\n\n"
        + markdown(["", *header], rows)
    )


def gated_cost() -> str:
    """Time over many steps."""
    found = load("gated_cost")
    rows = [[name, f"{ratio:.3f}"] for name, ratio in found["time_over_sgd"].items()]
    low, high = (100 * share for share in found["binomial_interval"])
    return (
        f"{found['problem']}, {found['steps']} steps, p = {found['probability']:g};"
        f" {100 * found['share_of_ascents']:.1f} % of eVASSO's steps ascended"
        f" (99.9 % of the binomial: {low:.1f} to {high:.1f} %):\n\n"
        + markdown(["", "time / SGD"], rows)
    )


def hessian_cost() -> str:
    """Lanczos steps against products."""
    found = load("hessian_cost")
    labels = {"lanczos": "optax_vasso", "matfree": "matfree"}
    compared = [name for name in labels if name in found["wall"]]

    def ratio(times: dict[str, Any]) -> str:
        low, high = times["quartiles_of_paired_ratios"]
        return f"{times['median_of_paired_ratios']:.2f} ({low:.2f} to {high:.2f})"

    memory = found["temporary_bytes"]
    rows = [
        [
            "wall time, median and quartiles",
            *(ratio(found["wall"][n]) for n in compared),
        ],
        [
            "processor time, median and quartiles",
            *(ratio(found["processor"][n]) for n in compared),
        ],
        ["operations", *(f"{found['flops_ratio'][n]:.3f}" for n in compared)],
        [
            "temporary memory",
            *(f"{memory[n] / memory['products']:.2f}" for n in compared),
        ],
    ]
    steps = found["steps"]
    header = [f"{steps} Lanczos steps / {steps} products"]
    return (
        markdown([*header, *(labels[name] for name in compared)], rows)
        + "\n\nA product has"
        f" {found['product_to_gradient_flops']:.2f} times the operations of a gradient."
    )


def communication() -> str:
    """Bytes between eight devices, in gradients."""
    found = load("communication")["results"]
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute")
    names = dict.fromkeys(name.rsplit(" ", 1)[0] for name in found)
    rows = [
        [name, *(f"{found[f'{name} {kind}']:.4f}" for kind in kinds)] for name in names
    ]
    return markdown(["", *kinds], rows)


def memory() -> str:
    """Copies of the parameters held at the peak."""
    rows = [
        [
            name,
            f"{found['temporary']:.3f}",
            f"{found['peak']:.3f}",
            f"{found['above sgd']:.3f}" if "above sgd" in found else "",
        ]
        for name, found in load("memory")["results"].items()
    ]
    return markdown(["", "temporary", "peak", "peak above SGD"], rows)


def microbatches() -> str:
    """Temporary memory in copies of the parameters."""
    found = load("memory_microbatches")["results"]
    return markdown(
        ["microbatches", *found], [["temporary", *(f"{v:.2f}" for v in found.values())]]
    )


def precision() -> str:
    """What arrives of a perturbation."""
    rows = [
        [name, f"{found['cosine']:.4f}", f"{100 * found['share']:.1f}"]
        for name, found in load("precision")["results"].items()
    ]
    return markdown(["", "cosine", "parameters that move (%)"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "environments": environments,
    **experiment_tables.TABLES,
    "batch_size_0": lambda: batch_size("0"),
    "batch_size_0.5": lambda: batch_size("0.5"),
    "step_cost_128": lambda: step_cost(128),
    "step_cost_256": lambda: step_cost(256),
    **{
        table.__name__: table
        for table in (
            sweep_cost,
            char_lm,
            domains,
            flatness,
            stability,
            batches,
            bouncing,
            gated_cost,
            hessian_cost,
            communication,
            memory,
            microbatches,
            precision,
        )
    },
}


def fill(page: str) -> str:
    """A page with its tables as the files have them now."""

    def table(match: re.Match) -> str:
        try:
            text = TABLES[match[2]]()
        except FileNotFoundError:
            text = "Not measured yet."
        return f"{match[1]}\n{text}\n\n{match[4]}"

    return PLACE.sub(table, page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text()))
