"""One gradient per step: perturb with what the last step has left."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import mapped, numerics
from optax_vasso._internal.checks import (
    check_inexact,
    check_leaves,
    check_state,
    check_structure,
    check_transformation,
    is_left_out,
    require_params,
)
from optax_vasso._internal.extra_args import (
    ValueFn,
    gradient_fn,
    passing,
    with_synonyms,
)
from optax_vasso._internal.trees import check_not_nested, of_ascent

PyTree = Any


@of_ascent("ascent_state")
class LaggedState(NamedTuple):
    """State of :func:`optax_vasso.lagged`.

    Attributes:
      perturbation: ε_{t−1}, by which the parameters are perturbed: like them, but in
        float32 or wider, zero before the first step, and ``None`` where the ascent
        chain perturbs nothing. For parameters of fewer than 32 bits it is y_t − x_t,
        with what rounding made of x_t + ε_{t−1}.
      ascent_state: the state of the ascent chain.
      optimizer_state: the state of the base optimizer.
    """

    perturbation: PyTree
    ascent_state: optax.OptState
    optimizer_state: optax.OptState


def lagged(
    optimizer: optax.GradientTransformation, ascent: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-aware training at one gradient per step, in any training loop.

    VaSSO's direction is an average over many steps, of which the newest gradient is a
    small part. Leave it out: perturb x_t by the ε_{t−1} that the last step has left,
    and feed the chain with the gradient taken there. Between steps the training loop's
    ``params`` *are* the perturbed point y_t = x_t + ε_{t−1}, so with one gradient::

        g_t = ∇f_{B_t}(y_t)
        x_{t+1} = x_t + optimizer(g_t, x_t)
        ε_t = ascent(g_t, x_t)
        y_{t+1} = x_{t+1} + ε_t

    and nothing in the loop has to know. Evaluate, and keep as the result of training,
    :func:`optax_vasso.eval_params`::

        optimizer = lagged(
            optax.sgd(0.1, momentum=0.9),
            optax.chain(vasso_ema(theta=0.4), sam_perturb(rho=0.1)),
        )
        state = optimizer.init(params)
        for batch in data:
            grads = jax.grad(loss)(params, batch)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        accuracy = evaluate(eval_params(state, params))

    The loop has to add the updates as they are: what clips, scales or freezes them
    afterwards changes the perturbation as well. Put such transformations into
    ``optimizer``, and perturb a part of the parameters with
    :func:`optax_vasso.ascent.masked_ascent`; :func:`optax_vasso.metrics.track_arrival`
    checks it.

    Parameters of fewer than 32 bits round x_t + ε_{t−1} when the loop adds the updates.
    The state holds in float32 how far they are from x_t, so that x_t itself moves by
    the base optimizer's steps alone, however small they are.

    Args:
      optimizer: the base optimizer. It sees g_t at x_t and, as extra arguments beside
        those of ``update``, ``perturbation`` (ε_{t−1}) and ``ascended`` (true). A
        ``value_fn`` is passed on as a function of x_t, perturbed as g_t is.
      ascent: a transformation whose output is added to the parameters. It receives
        ε_{t−1} as the extra argument ``perturbation``, and a ``grad_fn`` if ``update``
        was given one, for :func:`optax_vasso.clean_gradient`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs no extra argument.

    Raises:
      ValueError: if optimizer or ascent is no transformation; at ``init``, if the
        parameters have no leaves, an integer leaf would be perturbed, or one of the two
        is itself sharpness-aware; at ``update``, if ``params`` is missing, the tree has
        changed, the parameters were averaged over a mapped axis and the perturbation
        was not, or the state is not one of this transformation.
    """
    check_transformation("optimizer", optimizer)
    check_transformation("ascent", ascent)
    optimizer = optax.with_extra_args_support(optimizer)
    ascent = optax.with_extra_args_support(ascent)

    def init_fn(params: PyTree) -> LaggedState:
        check_leaves(params)
        ascent_state, optimizer_state = ascent.init(params), optimizer.init(params)
        check_not_nested(ascent=ascent_state, optimizer=optimizer_state)
        # Where the chain gives nothing there is nothing to keep.
        perturbed, _ = jax.eval_shape(
            lambda x, state: ascent.update(
                x,
                state,
                x,
                perturbation=x,
                grad_fn=lambda _: x,
                value=jnp.zeros(()),
            ),
            params,
            ascent_state,
        )
        # What a mask leaves out may be an integer, such as a quantized base.
        check_inexact(
            jax.tree.map(lambda x, e: None if is_left_out(e) else x, params, perturbed)
        )
        return LaggedState(
            perturbation=jax.tree.map(
                lambda x, e: None if is_left_out(e) else _zeros(x), params, perturbed
            ),
            # On a mapped axis its scalars vary with the parameters from the start.
            ascent_state=mapped.vary(ascent_state, mapped.varying_axes(params)),
            optimizer_state=optimizer_state,
        )

    def update_fn(
        updates: PyTree, state: LaggedState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, LaggedState]:
        require_params(params, "lagged")
        check_state(state, LaggedState, "lagged")
        check_structure(updates, state.perturbation, "lagged")
        extra_args = with_synonyms(extra_args)
        grad_fn = gradient_fn(extra_args.pop("grad_fn", None), extra_args)
        for name in ("value_fn", "obj_fn"):
            if extra_args.get(name) is not None:
                extra_args[name] = _perturbed(extra_args[name], state.perturbation)
        point = jax.tree.map(
            lambda e, x: unperturbed(x, e),
            perturbation_of(state),
            params,
            is_leaf=is_left_out,
        )
        perturbation, ascent_state = ascent.update(
            updates,
            state.ascent_state,
            point,
            **passing(extra_args, perturbation=state.perturbation, grad_fn=grad_fn),
        )
        step, optimizer_state = optimizer.update(
            updates,
            state.optimizer_state,
            point,
            **passing(
                extra_args,
                perturbation=state.perturbation,
                ascended=jnp.ones((), bool),
            ),
        )
        # One tree of pairs, and two trees of it: the updates may hold None.
        moves = jax.tree.map(
            _move,
            updates,
            step,
            perturbation,
            state.perturbation,
            params,
            is_leaf=lambda g: g is None,
        )
        new_updates, new_perturbation = (
            jax.tree.map(lambda move, i=i: move[i], moves, is_leaf=_is_move)
            for i in range(2)
        )
        ascent_state = mapped.vary_like(ascent_state, state.ascent_state)
        return new_updates, LaggedState(new_perturbation, ascent_state, optimizer_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def perturbation_of(state: LaggedState) -> PyTree:
    """ε_{t−1}, by which the parameters that belong to a state are perturbed.

    A tree like the parameters, ``None`` or empty where they are not perturbed. The
    state may have any containers in place of those that ``init`` made: a restored one
    has dictionaries and lists.
    """
    return state.perturbation


def read_state(fields: Mapping[str, Any]) -> LaggedState | None:
    """The state of :func:`lagged` whose fields are among these, by their names.

    One name alone may be that of a parameter. Not all of them need be there, since some
    containers, such as the states of NNX, keep no field that is empty.
    """
    siblings = {"ascent_state", "optimizer_state"}
    if "perturbation" not in fields or siblings.isdisjoint(fields):
        return None
    values: list[Any] = [fields.get(name) for name in LaggedState._fields]
    return LaggedState(*values)


def unperturbed(param: Any, perturbation: Any) -> Any:
    """One leaf of the parameters without its perturbation, in its own dtype."""
    if is_left_out(perturbation):
        return param
    param = jnp.asarray(param)
    # Of x + ε, what varies with ε has been averaged away: x is not known any more.
    averaged = mapped.varying_axes(perturbation) - mapped.varying_axes(param)
    if averaged:
        raise ValueError(
            f"params do not vary over the mapped axes {sorted(averaged)}, but their "
            "perturbation does: average x = eval_params(state, params), and add the "
            "change of x to params."
        )
    wide = param.astype(perturbation.dtype)
    return (wide - perturbation).astype(param.dtype)


class _Move(NamedTuple):
    """What becomes of one leaf: its update and its perturbation."""

    update: jax.Array | None
    perturbation: jax.Array | None


def _is_move(node: Any) -> bool:
    return isinstance(node, _Move)


def _move(grad: Any, step: Any, new: Any, old: Any, param: jax.Array) -> _Move:
    """From y = x + ε to the same of the next step."""
    if grad is None or is_left_out(old):
        return _Move(step, old)
    new = old if is_left_out(new) else new.astype(old.dtype)
    if not numerics.has_few_bits(param):
        change = new - old
        update = change if step is None else step + change.astype(step.dtype)
        return _Move(update, new)
    wide = param.astype(old.dtype)
    clean = wide - old
    if step is not None:
        clean = clean + step.astype(clean.dtype)
    update = numerics.round_to(clean + new - wide, param.dtype)
    # The sum that the training loop will form, with its rounding.
    there = numerics.round_to(wide + update, param.dtype)
    return _Move(update.astype(param.dtype), there - clean)


def _perturbed(value_fn: ValueFn, perturbation: PyTree) -> ValueFn:
    """The loss at x + ε as a function of x, with all arguments that it has."""

    @functools.wraps(value_fn)
    def value_at_perturbed(params: PyTree, *args: Any, **kwargs: Any) -> jax.Array:
        point = jax.tree.map(
            lambda e, x: x if is_left_out(e) else optax.apply_updates(x, e),
            perturbation,
            params,
            is_leaf=is_left_out,
        )
        return value_fn(point, *args, **kwargs)

    return value_at_perturbed


def _zeros(leaf: jax.Array) -> jax.Array:
    """Zeros like a leaf, in float32 or wider."""
    dtype = numerics.accumulation_dtype(leaf)
    return numerics.widen(jnp.zeros_like(leaf), dtype)
