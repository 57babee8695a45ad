"""Every method by name, with its label and hyperparameters."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import optax_vasso as ov


class Method(NamedTuple):
    """A method to train with.

    Attributes:
      label: its name in tables.
      recipe: (base optimizer, hyperparameters by name) -> optimizer.
    """

    label: str
    recipe: Callable[..., optax.GradientTransformation]


METHODS = {
    "base": Method("base optimizer", lambda base: base),
    "sam": Method("SAM", ov.sam),
    "vasso": Method("VaSSO", ov.vasso),
    "evasso": Method("eVASSO", ov.evasso),
    "lagged_vasso": Method("lagged VaSSO", ov.lagged_vasso),
    "friendly_sam": Method("Friendly SAM", ov.friendly_sam),
    "asam": Method("ASAM", ov.asam),
    "fisher_sam": Method("Fisher SAM", ov.fisher_sam),
    "gsam": Method("GSAM", ov.gsam),
    "looksam": Method("LookSAM", ov.looksam),
}


def hyperparameters(name: str) -> dict[str, float]:
    """The names and defaults of a method's hyperparameters."""
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(METHODS[name].recipe).parameters.values()
        if isinstance(parameter.default, int | float) and parameter.name != "seed"
    }


def make_optimizer(
    name: str,
    base: optax.GradientTransformation,
    chosen: dict[str, Any] | None = None,
    seed: Any = 0,
) -> optax.GradientTransformation:
    """A method around a base optimizer; what is not ``chosen`` is at its default."""
    extra = {"seed": seed} if name == "evasso" else {}
    return METHODS[name].recipe(base, **(chosen or {}), **extra)
