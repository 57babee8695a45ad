"""The losses that users write, as the one form that the train step works with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
# (params, model_state, batch, key) -> (loss, (model_state, aux))
LossFn = Callable[..., tuple[jax.Array, tuple[PyTree, PyTree]]]
_FORM = (
    "loss_fn must take (params, batch) and, if it needs them, arguments named "
    "model_state and key"
)


def as_canonical(loss_fn: Callable[..., Any], has_aux: bool) -> LossFn:
    """A loss that takes and returns everything, from one that takes what it needs.

    Args:
      loss_fn: takes the parameters first, the batch under any name, and what it needs
        of ``model_state`` and ``key`` by these names.
      has_aux: whether it returns auxiliary output.

    Returns:
      ``canonical(params, model_state, batch, key) -> (loss, (model_state, aux))``;
      ``aux`` is ``()`` without ``has_aux``.

    Raises:
      ValueError: if the signature is another; when it is called, if what the loss
        returns is not what was announced, or it needs a key and there is none.
    """
    if not callable(loss_fn):
        raise ValueError(
            f"{_FORM}, got a {type(loss_fn).__name__}: pass the loss first, then the "
            "optimizer."
        )
    try:
        parameters = dict(inspect.signature(loss_fn).parameters)
    except (TypeError, ValueError):  # built in: nothing is known of it
        parameters = {}
    optional = {
        name: parameters.pop(name)
        for name in ("model_state", "key")
        if name in parameters
    }
    batch_name = _batch_name(parameters, loss_fn)

    def canonical(
        params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[PyTree, PyTree]]:
        named: dict[str, Any] = {}
        if "model_state" in optional:
            named["model_state"] = model_state
        if "key" in optional:
            if key is None and optional["key"].default is inspect.Parameter.empty:
                raise ValueError(
                    "loss_fn takes a key, but the state has none: pass "
                    "key=jax.random.key(0) to init_train_state."
                )
            named["key"] = key
        if batch_name is None:
            result = loss_fn(params, batch, **named)
        else:
            result = loss_fn(params, **{batch_name: batch}, **named)
        return _split(result, "model_state" in optional, has_aux, model_state)

    return canonical


def _batch_name(
    parameters: dict[str, inspect.Parameter], loss_fn: Callable[..., Any]
) -> str | None:
    """The name of the argument for the batch; None if it has to go by position."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    plain = [p for p in parameters.values() if p.kind not in variadic]
    needed = [p for p in plain if p.default is inspect.Parameter.empty]
    if len(plain) < 2:
        if not parameters or len(plain) < len(parameters):  # built in, or *args
            return None
        fits = False
    else:
        fits = all(p in plain[:2] for p in needed)
    if not fits:
        raise ValueError(
            f"{_FORM}, but takes ({', '.join(inspect.signature(loss_fn).parameters)}): "
            "bind other arguments with functools.partial, or put them into the batch."
        )
    positional = inspect.Parameter.POSITIONAL_ONLY
    return None if plain[1].kind is positional else plain[1].name


def _split(
    result: Any, has_state: bool, has_aux: bool, model_state: PyTree
) -> tuple[jax.Array, tuple[PyTree, PyTree]]:
    forms = {
        (False, False): "the loss alone",
        (True, False): "(loss, new_model_state), since it takes model_state",
        (False, True): "(loss, aux), since has_aux is True",
        (True, True): "(loss, (new_model_state, aux)), since it takes model_state and "
        "has_aux is True",
    }
    form = forms[has_state, has_aux]
    aux: PyTree = ()
    loss = result
    if has_state or has_aux:
        loss, rest = _pair(result, form)
        if has_state and has_aux:
            model_state, aux = _pair(rest, form)
        elif has_state:
            model_state = rest
        else:
            aux = rest
    elif isinstance(result, tuple):
        raise ValueError(
            f"loss_fn must return {form}, got a tuple of {len(result)}: pass "
            "has_aux=True for auxiliary output, or name an argument model_state."
        )
    if not jax.tree_util.all_leaves([loss]) or jnp.shape(loss) != ():
        found = getattr(loss, "shape", type(loss).__name__)
        raise ValueError(
            f"loss_fn must return {form}, with a scalar loss, got {found}: average "
            "over the batch."
        )
    return loss, (model_state, aux)


def _pair(value: Any, form: str) -> tuple[Any, Any]:
    if not isinstance(value, tuple) or len(value) != 2:
        size = f" of {len(value)}" if isinstance(value, tuple) else ""
        found = "array" if hasattr(value, "shape") else type(value).__name__
        raise ValueError(
            f"loss_fn must return {form}, got one {found}{size}: return both as a pair."
        )
    return value
