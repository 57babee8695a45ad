"""How much of a perturbation arrives at parameters with few bits.

11 M weights of scale 0.03, a log-normal gradient, ρ = 0.05, 0.1 and 0.5: the cosine of
what the loss sees moved with the perturbation intended, for weights in bfloat16, for
the same with :func:`optax_vasso.wrappers.in_float32`, for float32 weights, and for
float32 weights that the model casts to bfloat16 before it computes with them.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_vasso as ov
from benchmarks import measuring

SIZE = 11_000_000


def setting(size: int) -> tuple[jax.Array, jax.Array]:
    """Weights and gradient in float32."""
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    weights = 0.03 * jax.random.normal(keys[0], (size,), jnp.float32)
    signs = jax.random.rademacher(keys[1], (size,), jnp.float32)
    grads = signs * jnp.exp(jax.random.normal(keys[2], (size,), jnp.float32))
    return weights, grads


def arrives(wrap: Any, params: jax.Array, grads: jax.Array, rho: float, seen: Any):
    """Cosine of what moves in ``seen(parameters)`` with the gradient; share moved."""
    points = []

    def grad_fn(point: jax.Array) -> jax.Array:
        points.append(point)
        return jnp.zeros_like(point)

    optimizer = wrap(ov.sam(optax.sgd(0.1), rho))
    optimizer.update(grads, optimizer.init(params), params, grad_fn=grad_fn)
    moved = np.asarray(seen(points[0]), np.float64) - np.asarray(
        seen(params), np.float64
    )
    g = np.asarray(grads, np.float64)
    cosine = float(moved @ g / np.sqrt((moved @ moved) * (g @ g)))
    return {"cosine": round(cosine, 4), "share": round(float((moved != 0).mean()), 4)}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = measuring.parse(measuring.parser("precision", __doc__), arguments)
    wide, grads = setting(1000 if options.smoke else SIZE)
    narrow, narrow_grads = wide.astype(jnp.bfloat16), grads.astype(jnp.bfloat16)
    results: dict[str, measuring.Measures] = {}
    for rho in (0.05, 0.1, 0.5):
        rows = {
            "bfloat16": (lambda o: o, narrow, narrow_grads, lambda x: x),
            "bfloat16, in_float32": (
                ov.wrappers.in_float32,
                narrow,
                narrow_grads,
                lambda x: x,
            ),
            "float32": (lambda o: o, wide, grads, lambda x: x),
            "float32, bfloat16 compute": (
                lambda o: o,
                wide,
                grads,
                lambda x: x.astype(jnp.bfloat16),
            ),
        }
        for name, (wrap, params, g, seen) in rows.items():
            results[f"rho {rho}, {name}"] = arrives(wrap, params, g, rho, seen)
    measuring.show(results)
    measuring.save(options, "precision", results)


if __name__ == "__main__":
    sys.exit(main())
