"""SAM at a minimum: on a quadratic it bounces between two points and never arrives.

The two points lie along the top eigenvector, at the distance η λ ρ/(2 − η λ) from the
minimum. Measured in float64 and compared with that closed form; a few seconds.
"""

from pathlib import Path
from typing import Any

from experiments import harness
from experiments.harness import command_line

EIGENVALUES = (4.0, 2.0, 1.0, 0.5, 0.1)
SETTINGS = ((0.1, 0.1), (0.3, 0.05), (0.45, 0.1))  # learning rate η, radius ρ
STEPS = 5000


def main(arguments: list[str] | None = None) -> int:
    """Bounce, print, write."""
    parser = command_line.experiment_parser("bouncing", __doc__)
    options = command_line.parse(parser, arguments)
    size = len(SETTINGS) * STEPS * 2
    command_line.check_publishing(parser, options, "bouncing", size)
    found = [bounce(eta, rho) for eta, rho in SETTINGS]
    content = {"eigenvalues": EIGENVALUES, "steps": STEPS, "settings": found}
    harness.tables.show(f"SAM on a quadratic, {STEPS} steps", *cells(content))
    command_line.save(
        options,
        "bouncing",
        content,
        size=size,
        done=len(found),
        of=len(found),
        unit="settings",
        draw=draw,
    )
    return 0


def amplitude(eta: float, eigenvalue: float, rho: float) -> float:
    """η λ ρ/(2 − η λ), where a step of SAM leads from x to −x."""
    return eta * eigenvalue * rho / (2 - eta * eigenvalue)


def bounce(eta: float, rho: float) -> dict[str, Any]:
    """SAM with SGD on ½ Σ λ_i x_i², from a random point: its last 100 steps."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import optax_vasso as ov

    optimizer = ov.sam(optax.sgd(eta), rho)
    with jax.enable_x64(True):
        eigenvalues = jnp.array(EIGENVALUES)

        def grad_fn(x: jax.Array) -> jax.Array:
            return eigenvalues * x

        def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
            x, state = carry
            updates, state = optimizer.update(grad_fn(x), state, x, grad_fn=grad_fn)
            x = optax.apply_updates(x, updates)
            return (x, state), x

        start = jax.random.normal(jax.random.key(0), eigenvalues.shape, jnp.float64)
        path = jax.jit(
            lambda x: jax.lax.scan(step, (x, optimizer.init(x)), length=STEPS)[1]
        )(start)
        path = np.asarray(path)
    settled = path[-100:]
    measured = float(np.abs(settled[:, 0]).mean())
    expected = amplitude(eta, EIGENVALUES[0], rho)
    return {
        "eta": eta,
        "rho": rho,
        "amplitude": measured,
        "closed_form": expected,
        "relative_error": abs(measured / expected - 1),
        "across": float(np.abs(settled[:, 1:]).max()),
        "alternates": bool(
            (np.sign(settled[1:, 0]) == -np.sign(settled[:-1, 0])).all()
        ),
        "path": path[:60, :2].round(6).tolist(),
    }


def cells(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: the oscillation and its closed form."""
    header = ["learning rate η", "λ", "radius ρ", "amplitude", "ηλρ/(2 − ηλ)"]
    header += ["relative error", "in other directions", "sign"]
    return header, [
        [
            f"{row['eta']:g}",
            f"{content['eigenvalues'][0]:g}",
            f"{row['rho']:g}",
            f"{row['amplitude']:.6f}",
            f"{row['closed_form']:.6f}",
            f"{row['relative_error']:.0e}",
            f"{row['across']:.0e}",
            "alternates" if row["alternates"] else "does not alternate",
        ]
        for row in content["settings"]
    ]


def draw(path: Path, content: dict[str, Any]) -> None:
    """The iterates along the two sharpest directions, step by step."""
    figures, row = harness.figures, content["settings"][0]
    figure, axes = figures.panels(1, 1, height=2.4)
    ax, level = axes[0, 0], row["closed_form"] / row["rho"]
    for i, face in enumerate((None, "white")):
        ax.plot(
            range(1, len(row["path"]) + 1),
            [point[i] / row["rho"] for point in row["path"]],
            marker="so"[i],
            markersize=3,
            markerfacecolor=face,
            linewidth=0.8,
            linestyle=("-", ":")[i],
            color=figures.style_of("sam").color,
            label=f"along the eigenvector of λ = {content['eigenvalues'][i]:g}",
        )
    for sign in (1, -1):
        ax.axhline(sign * level, color="0.4", linewidth=0.8, linestyle="--")
    ax.annotate(
        "± ηλρ/(2 − ηλ)",
        (1, level),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
    )
    ax.set_ylim(-4 * level, 4 * level)
    ax.set_xlabel("step")
    ax.set_ylabel("distance from the minimum,\nin units of the radius ρ")
    ax.legend(loc="lower right")
    figures.save(figure, path)


if __name__ == "__main__":
    command_line.run(main)
