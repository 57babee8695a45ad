"""Extra arguments of ``update``, which Optax passes to every transformation.

A line search passes those it does not know to ``value_fn``, which may refuse them. So a
wrapper that adds an argument makes ``value_fn`` ignore it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
ValueFn = Callable[..., jax.Array]
# Optax's names and those of other libraries.
_SYNONYMS = {"value": "loss", "value_fn": "obj_fn"}


def with_synonyms(extra_args: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with ``loss`` and ``obj_fn`` under Optax's names as well."""
    added = {
        name: extra_args[other]
        for name, other in _SYNONYMS.items()
        if extra_args.get(name) is None and extra_args.get(other) is not None
    }
    if callable(added.get("value")):  # some pass the function under this name
        del added["value"]
    everything = extra_args | added
    others = [name for name in _SYNONYMS.values() if name in extra_args]
    if others and everything.get("value_fn") is not None:
        everything["value_fn"] = _ignoring(everything["value_fn"], others)
    return everything


def passing(extra_args: dict[str, Any], **added: Any) -> dict[str, Any]:
    """The arguments and additional ones, which a line search ignores."""
    everything = extra_args | added
    if extra_args.get("value_fn") is not None:
        everything["value_fn"] = _ignoring(extra_args["value_fn"], added)
    return everything


def gradient_fn(grad_fn: Any, extra_args: dict[str, Any]) -> Any:
    """``grad_fn``, or else value and gradient of ``value_fn``, or None without both.

    The gradient of complex parameters is conjugated, as Optax has it.
    """
    value_fn = extra_args.get("value_fn")
    for name, function in {"grad_fn": grad_fn, "value_fn": value_fn}.items():
        if function is not None and not callable(function):
            raise ValueError(
                f"{name} must be a function of the parameters, got a "
                f"{type(function).__name__}: pass the function and not its result, as "
                "in grad_fn = jax.grad(lambda params: loss(params, batch))."
            )
    if grad_fn is not None or value_fn is None:
        return grad_fn
    names = list(_parameters(value_fn))[1:]
    bound = functools.partial(
        value_fn, **{name: extra_args[name] for name in names if name in extra_args}
    )

    def value_and_grad(params: PyTree) -> tuple[jax.Array, PyTree]:
        value, grads = jax.value_and_grad(bound)(params)
        return value, jax.tree.map(jnp.conj, grads)

    return value_and_grad


def required_gradient_fn(name: str, grad_fn: Any, extra_args: dict[str, Any]) -> Any:
    """:func:`gradient_fn`, or a ValueError if it is None."""
    grad_fn = gradient_fn(grad_fn, extra_args)
    if grad_fn is None:
        raise ValueError(
            f"{name} takes a second gradient and needs grad_fn, got None: call "
            "update(grads, state, params, grad_fn=grad_fn) with grad_fn(params) -> "
            "grads (Flax's apply_gradients and MultiSteps.gradient_transformation() "
            "drop it: call tx.update), or use lagged, which needs none."
        )
    return grad_fn


def _ignoring(value_fn: ValueFn, names: Iterable[str]) -> ValueFn:
    """The function with a signature that takes these arguments and drops them."""
    parameters = _parameters(value_fn)
    dropped = [name for name in names if name not in parameters]

    @functools.wraps(value_fn)
    def without(*args: Any, **kwargs: Any) -> jax.Array:
        return value_fn(*args, **{k: v for k, v in kwargs.items() if k not in dropped})

    rest = [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    without.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *(p for p in parameters.values() if p not in rest),
            *(inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in dropped),
            *rest,
        ]
    )
    return without


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # built in: of the parameters alone
        only = inspect.Parameter("params", inspect.Parameter.POSITIONAL_ONLY)
        return {"params": only}
