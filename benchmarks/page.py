"""Write the tables of docs/cost.md and docs/scaling.md from the result files.

    python -m benchmarks.page

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, NAME being one of
the page's in PAGES; what has not been measured says so. Figures of docs/cost.md go to
``results/``.
"""

import sys
from collections.abc import Callable
from typing import Any

from benchmarks import figures
from benchmarks.stored import ROOT, Rows, load
from experiments.harness.tables import fill, markdown

# Measure -> title of its column and format of its numbers.
STEP_COLUMNS = {
    "operations": ("operations", "{:.4f}"),
    "bytes": ("bytes", "{:.2f}"),
    "state": ("state", "{:.0f}"),
    "temporary": ("temporary", "{:.2f}"),
    "time / SGD": ("time / SGD", "{:.2f}"),
    "time / least": ("time / least", "{:.2f}"),
    "compile / contrib": ("compile / contrib", "{:.2f}"),
}


def cell(value: Any, form: str = "{:.3g}", spread: bool = True) -> str:
    """A number, with its quartiles where it has them."""
    if value is None:
        return ""
    if isinstance(value, list):
        low, median, high = (form.format(part) for part in value)
        return f"{median} ({low} to {high})" if spread else median
    return form.format(value)


def first(rows: Rows, prefix: str) -> str:
    """The first row whose name begins so; a FileNotFoundError if there is none."""
    for name in rows:
        if name.startswith(prefix):
            return name
    raise FileNotFoundError(prefix)


def measured(rows: Rows, columns: dict[str, tuple[str, str]], prefix: str = "") -> str:
    """The rows whose names begin with a prefix, with these columns."""
    chosen = {
        n.removeprefix(prefix): r for n, r in rows.items() if n.startswith(prefix)
    }
    return markdown(
        ["", *(title for title, _ in columns.values())],
        [
            [name, *(cell(row.get(key), form) for key, (_, form) in columns.items())]
            for name, row in chosen.items()
        ],
    )


def environments() -> str:
    """Device, versions and date of each file."""
    rows = []
    for name in (
        "budgets",
        "step_cost",
        "limits",
        "peers",
        "scaling",
        "layouts",
        "accelerator",
    ):
        try:
            found = load(name)["environment"]
        except FileNotFoundError:
            rows.append([name, "not measured", "", ""])
            continue
        versions = ", ".join(f"{k} {found[k]}" for k in ("jax", "jaxlib", "optax"))
        device = f"{found['device']}, {found['cpu_count']} cores"
        rows.append([name, device, versions, found["date"]])
    return markdown(["file", "device", "versions", "date"], rows)


def step_cost(width: int) -> str:
    """One network."""
    rows = load("step_cost")["rows"]
    prefix = first(rows, f"width {width},")
    return measured(rows, STEP_COLUMNS, prefix.split(": ")[0] + ": ")


def budget() -> str:
    """The figures that tests hold."""
    columns = {
        "operations": ("operations", "{:,.0f}"),
        "bytes": ("bytes", "{:,.0f}"),
        "peak_bytes": ("peak bytes", "{:,.0f}"),
        "state": ("state", "{:.0f}"),
        "buffers": ("buffers", "{}"),
        "instructions_per_leaf": ("instructions per leaf", "{:.0f}"),
        "data all-reduce: gradients": ("all-reduced", "{:.4f}"),
        "data all-reduce: number": ("in", "{}"),
        "fsdp all-gather: gradients": ("all-gathered, fsdp", "{:.2f}"),
    }
    rows = {n: r for n, r in load("budgets")["rows"].items() if "state" in r}
    return measured(rows, columns)


def peaks() -> str:
    """Peak memory beside the base optimizer, and beside plain lines."""
    columns = {
        "peak": ("peak", "{:.2f}"),
        "traffic": ("bytes read and written", "{:.1f}"),
        "instructions": ("instructions", "{:,}"),
    }
    rows = {n: r for n, r in load("budgets")["rows"].items() if "traffic" in r}
    return measured(rows, columns)


def figure(name: str, alt: str, caption: str) -> str:
    """A figure that links to itself, with a caption below."""
    path = f"../results/{name}.png"
    return f"[![{alt}]({path})]({path})\n\n*{caption}*"


def forms() -> str:
    """Adapters on frozen weights, and Functional SAM."""
    columns = {
        "state in adapters": ("state, in adapters", "{:.2f}"),
        "temporary in adapters": ("temporary memory, in adapters", "{:.1f}"),
        "evaluations": ("evaluations of the frozen layers", "{:.3f}"),
        "operations in gradients": ("operations, in gradients", "{:.3f}"),
    }
    found = load("budgets")["rows"].items()
    return measured({n: r for n, r in found if columns.keys() & r.keys()}, columns)


def limits() -> str:
    """Shares of the bandwidth, by leaves."""
    found = load("limits")["rows"]
    chains = dict.fromkeys(name.split(", ")[0] for name in found if "leaves" in name)
    counts = dict.fromkeys(name.split(", ")[1] for name in found if "leaves" in name)
    rows = [
        [chain, *(cell(found[f"{chain}, {n}"]["share"], "{:.0%}") for n in counts)]
        for chain in chains
    ]
    device = ", ".join(
        f"{key.replace('_per_', '/')}: {cell(value)}"
        for key, value in found["device"].items()
    )
    picture = figure(
        "limits",
        "Share of the bandwidth limit over leaves",
        "Median and quartiles.",
    )
    return markdown(["", *counts], rows) + f"\n\nThe device: {device}.\n\n{picture}"


def peers(prefix: str) -> str:
    """One network in all libraries."""
    columns = {
        "difference of the losses": ("difference of the losses", "{:.0e}"),
        "first step (s)": ("first step (s)", "{:.1f}"),
        "milliseconds": ("milliseconds", "{:.1f}"),
        "time / ours": ("time / ours", "{:.2f}"),
    }
    rows = load("peers")["rows"]
    whole = first(rows, prefix).split(": ")[0]
    return measured(rows, columns, whole + ": ")


def digits() -> str:
    """The digits experiment against eager PyTorch."""
    row = load("peers")["rows"]["digits, 60 epochs of VaSSO"]
    picture = figure(
        "peers",
        "Time of a step of each library over ours",
        "Median and quartiles; a width is that of a transformer.",
    )
    rows = [[key, cell(value)] for key, value in row.items()]
    return markdown(["", ""], rows) + f"\n\n{picture}"


def exponents() -> str:
    """The fitted exponents."""
    columns = {
        "milliseconds": ("time", "{:.2f}"),
        "compile_s": ("compilation", "{:.2f}"),
        "instructions": ("instructions", "{:.2f}"),
        "temporary_bytes": ("temporary memory", "{:.2f}"),
        "peak_bytes": ("peak memory", "{:.2f}"),
    }
    picture = figure(
        "scaling",
        "Time and compilation over three axes",
        "Left: time per step. Middle: an ascent chain alone. Right: whole steps.",
    )
    fitted = measured(load("scaling")["rows"], columns, "exponent over ")
    return f"{fitted}\n\n{picture}"


def compilation() -> str:
    """Whole steps of transformers of more and more blocks."""
    columns = {
        "instructions": ("instructions", "{:,}"),
        "trace_s": ("to trace (s)", "{:.1f}"),
        "compile_s": ("to compile (s)", "{:.1f}"),
    }
    return measured(load("scaling")["rows"], columns, "blocks ")


def split_cost() -> str:
    """A split step against SGD and SAM, by batches."""
    rows = load("split_cost")["rows"]
    problems = dict.fromkeys(name.rpartition(": ")[0] for name in rows)
    lines = [
        [
            problem,
            cell(rows[f"{problem}: split"]["operations / SGD"], "{:.3f}"),
            cell(rows[f"{problem}: split"]["time / SGD"], "{:.2f}"),
            cell(rows[f"{problem}: SAM"]["time / SGD"], "{:.2f}"),
        ]
        for problem in problems
    ]
    header = ["", "operations / SGD", "time / SGD", "SAM: time / SGD"]
    return markdown(header, lines)


def hessian_cost() -> str:
    """Lanczos against products."""
    columns = {
        "time": ("time", "{:.2f}"),
        "processor time": ("processor time", "{:.2f}"),
        "operations": ("operations", "{:.3f}"),
        "temporary": ("temporary memory", "{:.2f}"),
    }
    return measured(load("hessian_cost")["rows"], columns)


def precision() -> str:
    """What arrives of a perturbation."""
    columns = {"cosine": ("cosine", "{:.4f}"), "share": ("share that moves", "{:.1%}")}
    return measured(load("precision")["rows"], columns)


def accelerator() -> str:
    """What one command measures on an accelerator."""
    columns = {
        "milliseconds": ("milliseconds", "{:.2f}"),
        "time / SGD": ("time / SGD", "{:.2f}"),
        "peak_bytes": ("peak bytes", "{:,.0f}"),
        "host waits": ("host waits", "{}"),
        "GB_per_s": ("GB/s", "{:,.0f}"),
        "share": ("share of a copy's", "{:.0%}"),
        "largest eigenvalue": ("largest eigenvalue", "{:.4g}"),
    }
    return measured(load("accelerator")["rows"], columns)


def layouts() -> str:
    """Collectives by mesh, and a billion parameters on 64 devices."""
    rows = load("layouts")["rows"]
    meshes = ("8", "4 × 2", "16 × 4")
    large = "1 B on 16 × 4"

    def sent(row: dict[str, Any]) -> str:
        return f"{row['collectives']} + {row['scalars']}"

    lines = []
    for method in methods(rows):
        row = rows[f"{large}: {method}"]
        lines.append(
            [
                method,
                *(sent(rows[f"{mesh}: {method}"]) for mesh in meshes),
                cell(row["sent_MB"] / 1e3, "{:.1f}"),
                cell(row["arguments_MB"], "{:,.0f}"),
                cell(row["temporary_MB"], "{:,.0f}"),
            ]
        )
    header = ["", *meshes, "1 B: GB sent", "MB of arguments", "MB of temporaries"]
    return markdown(header, lines)


def layouts_in_parts() -> str:
    """Temporary memory in one part and in four microbatches."""
    rows = load("layouts")["rows"]
    meshes = [f"{mesh}{how}" for mesh in ("8", "16 × 4") for how in ("", " in 4 parts")]
    lines = [
        [
            method,
            *(cell(rows[f"{m}: {method}"]["temporary_MB"], "{:.1f}") for m in meshes),
        ]
        for method in methods(rows)
    ]
    return markdown(["MB", *meshes], lines)


def methods(rows: Rows) -> list[str]:
    """The methods of a table of layouts, in its order."""
    return list(dict.fromkeys(name.split(": ")[1] for name in rows))


TABLES: dict[str, Callable[[], str]] = {
    "step_cost_128": lambda: step_cost(128),
    "step_cost_256": lambda: step_cost(256),
    "peers_perceptron": lambda: peers("perceptron"),
    "peers_128": lambda: peers("width 128"),
    "peers_256": lambda: peers("width 256"),
    "peers_resnet": lambda: peers("ResNet-18"),
    **{
        made.__name__: made
        for made in (
            *(environments, budget, peaks, forms, limits, digits, exponents),
            compilation,
            *(split_cost, hessian_cost, precision, accelerator),
        )
    },
}


PAGES = {
    ROOT / "docs" / "cost.md": TABLES,
    ROOT / "docs" / "scaling.md": {
        "layouts": layouts,
        "layouts_in_parts": layouts_in_parts,
    },
}


def main() -> None:
    """Fill the pages and draw the figures."""
    for page, tables in PAGES.items():
        page.write_text(fill(page.read_text(), tables))
    for path in figures.draw(ROOT / "results"):
        print(f"Wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
