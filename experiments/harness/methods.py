"""Every method: how it looks, what it costs, what is searched, how it is made.

Learning rate and weight decay are searched for every method alike; momentum is 0.9 and
the learning rate falls to 0 along a half cosine.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_vasso as ov
from experiments.harness.command_line import METHOD_LABELS

MOMENTUM = 0.9
SYMBOLS = {
    "learning_rate": "η",
    "weight_decay": "wd",
    "rho": "ρ",
    "theta": "θ",
    "lmbda": "λ",
    "alpha": "α",
    "sigma": "σ",
    "eta": "η",
    "probability": "p",
    "k": "k",
}
# Hyperparameters of one training: Python numbers or traced scalars.
Hyperparameters = dict[str, Any]


class Range(NamedTuple):
    """The values of a hyperparameter that a search tries first.

    Attributes:
      low, high: where the search begins; it may leave this range.
      least, most: what it may never leave, such as θ ≤ 1.
      linear: whether values are spread evenly, not evenly in their logarithm.
    """

    low: float
    high: float
    least: float = 1e-6
    most: float = 1e6
    linear: bool = False


SHARED = {
    "learning_rate": Range(0.01, 0.3),
    "weight_decay": Range(5e-4, 0.1, least=1e-5),
}
RHO = Range(0.01, 2.0, least=1e-3)
THETA = Range(0.04, 1.0, least=0.01, most=1.0)


@dataclasses.dataclass(frozen=True, eq=False)  # to be found in a cache by identity
class Method:
    """A method to train with.

    Attributes:
      label: its name in tables and figures.
      color: colour-blind safe (Okabe and Ito, Tol), and of this method alone.
      marker: of Matplotlib.
      gradients: per step, on average.
      own: the ranges of its own hyperparameters.
      make: (base optimizer, hyperparameters, seed) -> optimizer.
      makers: () -> the gradient makers of the train step, by its arguments.
    """

    label: str
    color: str
    marker: str
    gradients: float
    own: dict[str, Range]
    make: Callable[[optax.GradientTransformation, Hyperparameters, Any], Any]
    makers: Callable[[], Any] = dict

    @property
    def space(self) -> dict[str, Range]:
        """All that is searched."""
        return SHARED | self.own


def base(hyperparameters: Hyperparameters, steps: Any) -> optax.GradientTransformation:
    """SGD with momentum, weight decay and a learning rate that falls to 0 at ``steps``.

    Args:
      hyperparameters: of which ``learning_rate`` and ``weight_decay`` are used.
      steps: length of the schedule; may be traced.
    """

    def schedule(step: jax.Array) -> jax.Array:
        gone = jnp.minimum(step / steps, 1.0)
        return hyperparameters["learning_rate"] * 0.5 * (1 + jnp.cos(jnp.pi * gone))

    return optax.chain(
        optax.add_decayed_weights(hyperparameters["weight_decay"]),
        optax.sgd(schedule, momentum=MOMENTUM),
    )


# The order of tables and figures.
METHODS = {
    "sgd": Method("SGD", "#000000", "o", 1, {}, lambda base, h, seed: base),
    "sam": Method(
        "SAM", "#0072B2", "s", 2, {"rho": RHO}, lambda b, h, s: ov.sam(b, h["rho"])
    ),
    "friendly_sam": Method(
        "Friendly SAM",
        "#E69F00",
        "D",
        2,
        {"rho": RHO, "lmbda": Range(0.3, 0.95, least=0.0, most=0.99, linear=True)},
        lambda b, h, s: ov.friendly_sam(b, h["rho"], sigma=1.0, lmbda=h["lmbda"]),
    ),
    "vasso": Method(
        "VaSSO",
        "#D55E00",
        "^",
        2,
        {"rho": RHO, "theta": THETA},
        lambda b, h, s: ov.vasso(b, h["rho"], theta=h["theta"]),
    ),
    "evasso": Method(
        "eVASSO, p = 0.5",
        "#AA4499",
        "v",
        1.5,
        {"rho": RHO, "theta": THETA},
        lambda b, h, s: ov.evasso(
            b, h["rho"], theta=h["theta"], probability=0.5, seed=s
        ),
    ),
    "asam": Method(
        "ASAM",
        "#44AA99",
        "P",
        2,
        {"rho": Range(0.5, 8.0, least=0.05)},
        lambda b, h, s: ov.asam(b, h["rho"]),
    ),
    "gsam": Method(
        "GSAM",
        "#999933",
        "X",
        2,
        {"rho": RHO, "alpha": Range(0.03, 1.0, least=1e-3)},
        lambda b, h, s: ov.gsam(b, h["rho"], alpha=h["alpha"]),
    ),
    "lagged_vasso": Method(
        "lagged VaSSO",
        "#8B0000",
        "*",
        1,
        {"rho": RHO, "theta": THETA},
        lambda b, h, s: ov.lagged_vasso(b, h["rho"], theta=h["theta"]),
    ),
    "split_sam": Method(
        "split SAM",
        "#009E73",
        "d",
        1,
        {"rho": RHO._replace(high=10.0)},
        lambda b, h, s: ov.sam(b, h["rho"]),
        ov.train.split_batch,
    ),
    "held_rise": Method(
        "split SAM, held rise",
        "#56B4E9",
        "p",
        1,
        {},
        lambda b, h, s: ov.sharpness_aware(b, ov.ascent.hold_rise(ov.sam_perturb(1.0))),
        ov.train.split_batch,
    ),
    "momentum_sam": Method(
        "Momentum-SAM",
        "#999999",
        "<",
        1,
        {"rho": RHO._replace(high=5.0)},
        lambda b, h, s: ov.momentum_sam(b, h["rho"], momentum=MOMENTUM),
    ),
    "single_step_sam": Method(
        "single-step SAM",
        "#332288",
        ">",
        1,
        {"rho": RHO},
        lambda b, h, s: ov.lagged(b, ov.sam_perturb(h["rho"])),
    ),
}
# Split batches with other shares for the ascent, and with other ascents.
METHODS |= {
    f"split_{parts}": dataclasses.replace(
        METHODS["split_sam"],
        label=f"split SAM, 1/{parts}",
        makers=functools.partial(ov.train.split_batch, 1 / parts),
    )
    for parts in (64, 32, 4, 2)
} | {
    f"split_{name}": dataclasses.replace(
        METHODS[name],
        label=f"split {METHODS[name].label}",
        gradients=1,
        own=METHODS[name].own | {"rho": wider},
        makers=ov.train.split_batch,
    )
    for name, wider in (
        ("vasso", RHO._replace(high=10.0)),
        ("friendly_sam", RHO._replace(high=10.0)),
        ("asam", Range(0.5, 50.0, least=0.05)),
    )
}
assert METHODS.keys() == METHOD_LABELS.keys()


def describe(hyperparameters: dict[str, float]) -> str:
    """Hyperparameters as a table shows them: ``η = 0.1, wd = 0.005, ρ = 0.5``."""
    return ", ".join(f"{SYMBOLS[k]} = {v:.2g}" for k, v in hyperparameters.items())
