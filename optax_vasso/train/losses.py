"""Adapt the losses that users write to the signature of the train step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
# (params, model_state, batch, key) -> (loss, (model_state, aux))
LossFn = Callable[..., tuple[jax.Array, tuple[PyTree, PyTree]]]
_EMPTY = inspect.Parameter.empty
_FORM = (
    "must take (params, batch) and, if it needs them, arguments named model_state and "
    "key"
)


def as_canonical(loss_fn: Callable[..., Any], has_aux: bool) -> LossFn:
    """A loss with all arguments and results, from one with those that it needs.

    Args:
      loss_fn: takes the parameters first, the batch under any name, and, if it needs
        them, ``model_state`` and ``key`` under these names.
      has_aux: whether it returns auxiliary output.

    Returns:
      ``canonical(params, model_state, batch, key) -> (loss, (model_state, aux))``;
      ``aux`` is ``()`` without ``has_aux``.

    Raises:
      ValueError: for another signature; when it is called, if the loss returns
        something else, or needs a key and there is none.
    """
    call, has_state = _by_role(loss_fn, "loss_fn")

    def canonical(params: PyTree, model_state: PyTree, *rest: Any) -> Any:
        result = call(params, model_state, *rest)
        return _split(result, has_state, has_aux, model_state)

    return canonical


def as_network(network: Callable[..., Any]) -> Callable[..., tuple[PyTree, PyTree]]:
    """A network with all arguments and results, as :func:`as_canonical`.

    Returns:
      ``canonical(params, model_state, batch, key) -> (outputs, model_state)``.
    """
    call, has_state = _by_role(network, "network")

    def canonical(params: PyTree, model_state: PyTree, *rest: Any) -> Any:
        result = call(params, model_state, *rest)
        if not has_state:
            return result, model_state
        form = "(outputs, new_model_state), since it takes model_state"
        return _pair(result, form, "network")

    return canonical


def _by_role(
    function: Callable[..., Any], what: str
) -> tuple[Callable[..., Any], bool]:
    """The function of ``(params, model_state, batch, key)``; whether it has a state."""
    if not callable(function):
        raise ValueError(
            f"{what} {_FORM}, got a {type(function).__name__}: pass the loss first, "
            "then the optimizer."
        )
    arguments = _arguments(function, what)

    def call(
        params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array | None
    ) -> Any:
        given = {"params": params, "batch": batch, "model_state": model_state}
        if key is not None:
            given["key"] = key
        positional, named = [], {}
        for parameter, role in arguments:
            value = given.get(role, parameter.default)
            if value is _EMPTY:
                raise ValueError(
                    f"{what} takes a key, but the state has none: pass "
                    "key=jax.random.key(0) to init_train_state."
                )
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                named[parameter.name] = value
            else:
                positional.append(value)
        return function(*positional, **named)

    return call, any(role == "model_state" for _, role in arguments)


def _arguments(
    function: Callable[..., Any], what: str
) -> list[tuple[inspect.Parameter, str]]:
    """The arguments to call a function with, in order, and the role of each.

    They are passed by position if possible, because a function made by
    :func:`functools.wraps` or :func:`jax.shard_map` shows the signature of another one,
    which it calls with ``*args``. An argument without a role keeps its default.
    """
    kind = inspect.Parameter
    two = [kind(name, kind.POSITIONAL_ONLY) for name in ("params", "batch")]
    try:
        signature = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # built in: nothing is known of it
        signature = two
    # What functools.partial binds by name stays in the signature.
    bound = function.keywords if isinstance(function, functools.partial) else {}
    known = [
        p
        for p in signature
        if p.kind not in (kind.VAR_POSITIONAL, kind.VAR_KEYWORD) and p.name not in bound
    ]
    positional = [p for p in known if p.kind is not kind.KEYWORD_ONLY]
    plain = [p for p in known if p.name not in ("model_state", "key")]
    if any(p.kind is kind.VAR_POSITIONAL for p in signature):
        positional += two[len(plain) :]
        plain += two[len(plain) :]
    if len(plain) < 2 or any(p.default is _EMPTY for p in plain[2:]):
        raise ValueError(
            f"{what} {_FORM}, but takes ({', '.join(p.name for p in signature)}): "
            "bind other arguments with functools.partial, or put them into the batch."
        )
    roles = {plain[0].name: "params", plain[1].name: "batch"}
    roles |= {name: name for name in ("model_state", "key")}
    while positional and positional[-1].name not in roles:
        del positional[-1]
    by_name = [p for p in known if p.kind is kind.KEYWORD_ONLY and p.name in roles]
    return [(p, roles.get(p.name, "")) for p in (*positional, *by_name)]


def _split(
    result: Any, has_state: bool, has_aux: bool, model_state: PyTree
) -> tuple[jax.Array, tuple[PyTree, PyTree]]:
    form, loss, aux = "the loss alone", result, ()
    if has_state and has_aux:
        form = (
            "(loss, (new_model_state, aux)), since it takes model_state and has_aux is "
            "True"
        )
        loss, rest = _pair(result, form)
        model_state, aux = _pair(rest, form)
    elif has_state:
        form = "(loss, new_model_state), since it takes model_state"
        loss, model_state = _pair(result, form)
    elif has_aux:
        form = "(loss, aux), since has_aux is True"
        loss, aux = _pair(result, form)
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


def _pair(value: Any, form: str, what: str = "loss_fn") -> tuple[Any, Any]:
    if not isinstance(value, tuple) or len(value) != 2:
        size = f" of {len(value)}" if isinstance(value, tuple) else ""
        found = "array" if hasattr(value, "shape") else type(value).__name__
        raise ValueError(
            f"{what} must return {form}, got one {found}{size}: return both as a pair."
        )
    return value
