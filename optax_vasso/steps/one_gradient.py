"""One gradient per step: perturb with the previous step's perturbation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import checks, mapped, numerics, trees
from optax_vasso._internal.checks import Hyperparameter, value_at
from optax_vasso._internal.extra_args import (
    ValueFn,
    gradient_fn,
    passing,
    with_synonyms,
)
from optax_vasso.ascent.perturb import check_not_swapped

PyTree = Any


@trees.of_ascent("ascent_state")
class LaggedState(NamedTuple):
    """State of :func:`optax_vasso.lagged`; ``perturbation_of`` reads ε_{t−1} from it.

    Attributes:
      step: updates so far, an int32 scalar: where ``rho`` is read.
      direction: the last output of the ascent chain, with ``rho`` at norm one. Like the
        parameters, but in float32 or wider, zero before the first step, and ``None``
        where the chain perturbs nothing.
      scale: ε_{t−1} over the direction, a float32 (under x64 float64) scalar: the last
        ρ, or one without ``rho``.
      norm: the 2-norm of the last output, likewise; one without ``rho``.
      rounding: rounding error of x_t + ε_{t−1}: a tree like ``direction`` if parameters
        have fewer than 32 bits, else of ``None``. Without ``rho`` the direction
        includes it.
      ascent_state: the state of the ascent chain.
      optimizer_state: the state of the base optimizer.
    """

    step: jax.Array
    direction: PyTree
    scale: jax.Array
    norm: jax.Array
    rounding: PyTree
    ascent_state: optax.OptState
    optimizer_state: optax.OptState


class LaggedTransformation(optax.GradientTransformationExtraArgs):
    """The result of :func:`optax_vasso.lagged`, which can also move parameters.

    ``move(updates, state, params, **extra_args)`` is ``update``, but returns the new
    parameters instead of their updates. It saves a copy of the parameters, since
    x_{t+1} replaces y_t before ‖d_t‖ is known.
    """

    move: Callable[..., tuple[PyTree, LaggedState]]


def lagged(
    optimizer: optax.GradientTransformation,
    ascent: optax.GradientTransformation,
    *,
    rho: Hyperparameter | None = None,
) -> LaggedTransformation:
    """Sharpness-aware training at one gradient per step, in any training loop.

    VaSSO's direction is an average over many steps, of which the newest gradient is a
    small part. So drop it: perturb x_t by the previous step's ε_{t−1}, and feed the
    chain with the gradient at that point. During training the loop's ``params`` *are*
    the perturbed point y_t = x_t + ε_{t−1}, so with one gradient::

        g_t = ∇f_{B_t}(y_t)
        x_{t+1} = x_t + optimizer(g_t, x_t)
        ε_t = ascent(g_t, x_t)
        y_{t+1} = x_{t+1} + ε_t

    and the loop does not change. Evaluate and save :func:`optax_vasso.eval_params`::

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

    The loop has to add the updates unchanged: clipping, scaling or freezing them
    afterwards changes the perturbation too. Put such transformations into
    ``optimizer``; :func:`optax_vasso.metrics.track_arrival` checks it. To perturb a
    part of the parameters, use :func:`optax_vasso.ascent.masked_ascent`.

    If the chain returns a non-finite value, the last perturbation stays, so that x_t
    can still be computed.

    Parameters of fewer than 32 bits round x_t + ε_{t−1} when the loop adds the updates.
    The state holds their distance from x_t in float32, so that x_t moves exactly by the
    base optimizer's steps, however small.

    Args:
      optimizer: the base optimizer. It sees g_t at x_t and, as extra arguments beside
        those of ``update``, ``perturbation`` (ε_{t−1}) and ``ascended`` (true). A
        ``value_fn`` is passed on as a function of x_t, perturbed as g_t is.
      ascent: a transformation whose output is added to the parameters. It receives
        its own last output as the extra argument ``direction``, zero in the first step,
        and a ``grad_fn`` if ``update`` was given one, for
        :func:`optax_vasso.clean_gradient`.
      rho: if given, the output of ``ascent`` counts as a direction only, to which ε_t
        is parallel with the 2-norm ρ: a number >= 0, a schedule of the step, or a
        traced scalar. The result is that of :func:`optax_vasso.sam_perturb` at the end
        of the chain, for less memory.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs no extra argument.

    Raises:
      ValueError: if optimizer or ascent is no transformation, or rho is negative or not
        finite; at ``init``, if the parameters have no leaves, an integer leaf would be
        perturbed, or one of the two is itself sharpness-aware; at ``update``, if
        ``params`` is missing, the tree has changed, the parameters were averaged over a
        mapped axis and the perturbation was not, or the state is not one of this
        transformation.
    """
    checks.check_transformation("optimizer", optimizer)
    checks.check_transformation("ascent", ascent)
    if rho is not None:
        checks.check_not_negative("rho", rho)
    optimizer = optax.with_extra_args_support(optimizer)
    ascent = optax.with_extra_args_support(ascent)

    def init_fn(params: PyTree) -> LaggedState:
        checks.check_leaves(params)
        ascent_state, optimizer_state = ascent.init(params), optimizer.init(params)
        trees.check_not_nested(ascent=ascent_state, optimizer=optimizer_state)
        check_not_swapped(ascent_state, optimizer_state)
        if trees.follows_loss(ascent_state):
            raise ValueError(
                "the radius of the ascent follows the loss at unperturbed parameters, "
                "which lagged does not have: use sharpness_aware with split_batch()."
            )
        try:
            given, _ = jax.eval_shape(
                lambda x, state: ascent.update(
                    x, state, x, direction=x, grad_fn=lambda _: x, value=jnp.zeros(())
                ),
                params,
                ascent_state,
            )
        except (TypeError, ValueError):
            # It needs an argument of the training loop; update reports other errors.
            given = params
        # Leaves that the chain does not perturb need no direction, and may be integers,
        # such as a quantized base.
        perturbed = jax.tree.map(
            lambda x, d: None if checks.is_left_out(d) else x, params, given
        )
        checks.check_inexact(perturbed)
        rounds = rho is not None and any(
            map(numerics.has_few_bits, jax.tree.leaves(perturbed))
        )
        one = float(rho is None)
        # On a mapped axis its scalars vary with the parameters from the start.
        axes = mapped.varying_axes(params)
        return LaggedState(
            step=mapped.vary(jnp.zeros((), jnp.int32), axes),
            direction=jax.tree.map(_zeros, perturbed),
            scale=mapped.vary(numerics.state_scalar(one), axes),
            norm=mapped.vary(numerics.state_scalar(one), axes),
            rounding=jax.tree.map(lambda x: _zeros(x) if rounds else None, perturbed),
            ascent_state=mapped.vary(ascent_state, axes),
            optimizer_state=optimizer_state,
        )

    def advance(
        moves: bool,
        updates: PyTree,
        state: LaggedState,
        params: PyTree = None,
        **extra_args: Any,
    ) -> tuple[PyTree, LaggedState]:
        checks.check_update(state, LaggedState, params, "lagged")
        checks.check_structure(updates, state.direction, "lagged")
        before = perturbation_of(state)
        extra_args = with_synonyms(extra_args)
        grad_fn = gradient_fn(extra_args.pop("grad_fn", None), extra_args)
        for name in ("value_fn", "obj_fn"):
            if extra_args.get(name) is not None:
                extra_args[name] = _perturbed(extra_args[name], before)
        point = jax.tree.map(
            lambda e, x: unperturbed(x, e), before, params, is_leaf=checks.is_left_out
        )
        last = _scaled(state.norm, state.direction)
        output, ascent_state = ascent.update(
            updates,
            state.ascent_state,
            point,
            **passing(extra_args, direction=last, grad_fn=grad_fn),
        )
        # A non-finite perturbation could not be subtracted from the parameters again.
        output = jax.tree.map(
            lambda d, old: d if checks.is_left_out(d) else numerics.finite_or(d, old),
            output,
            last,
            is_leaf=checks.is_left_out,
        )
        step, optimizer_state = optimizer.update(
            updates,
            state.optimizer_state,
            point,
            **passing(extra_args, perturbation=before, ascended=jnp.ones((), bool)),
        )
        (start,) = _by_leaf(
            functools.partial(_start, moves), params, step, before, output
        )
        scale = norm = jnp.ones_like(state.scale)
        if rho is not None:
            scale = jnp.asarray(value_at(rho, state.step)).astype(scale.dtype)
            output, norm, start = numerics.normalize_beside(output, start)
        new, direction, rounding = _by_leaf(
            functools.partial(_finish, moves, state.scale, scale),
            params,
            step,
            start,
            output,
            state.direction,
            state.rounding,
        )
        return new, LaggedState(
            step=optax.safe_increment(state.step),
            direction=direction,
            scale=mapped.vary_like(scale, state.scale),
            norm=mapped.vary_like(norm.astype(state.norm.dtype), state.norm),
            rounding=rounding,
            ascent_state=mapped.vary_like(ascent_state, state.ascent_state),
            optimizer_state=optimizer_state,
        )

    made = LaggedTransformation(init_fn, functools.partial(advance, False))
    made.move = functools.partial(advance, True)
    return made


def perturbation_of(state: LaggedState) -> PyTree:
    """ε_{t−1}, by which the parameters that belong to a state are perturbed.

    A tree like the parameters, ``None`` or empty where they are not perturbed. The
    state may have other containers than ``init`` made, as a restored one has, and may
    be many states, stacked along leading axes.
    """
    perturbation = _scaled(state.scale, state.direction)
    if not jax.tree.leaves(state.rounding):
        return perturbation
    return jax.tree.map(jnp.add, perturbation, state.rounding)


def read_state(fields: Mapping[str, Any]) -> LaggedState | None:
    """The state of :func:`lagged` whose fields are among these, by their names.

    Several names are required, since a parameter may have one of them, but not all:
    some containers, such as the states of NNX, drop empty fields.
    """
    siblings = {"ascent_state", "optimizer_state"}
    if not {"direction", "scale"} <= fields.keys() or siblings.isdisjoint(fields):
        return None
    values: list[Any] = [fields.get(name) for name in LaggedState._fields]
    return LaggedState(*values)


def unperturbed(param: Any, perturbation: Any) -> Any:
    """One leaf of the parameters without its perturbation, in its own dtype."""
    if checks.is_left_out(perturbation):
        return param
    param = jnp.asarray(param)
    # The part of x + ε that varied with ε has been averaged away, so x is unknown.
    averaged = mapped.varying_axes(perturbation) - mapped.varying_axes(param)
    if averaged:
        raise ValueError(
            f"params do not vary over the mapped axes {sorted(averaged)}, but their "
            "perturbation does: average x = eval_params(state, params), and add the "
            "change of x to params."
        )
    wide = param.astype(perturbation.dtype)
    return (wide - perturbation).astype(param.dtype)


def _by_leaf(
    function: Callable[..., tuple[Any, ...]], params: PyTree, *trees: PyTree
) -> tuple[PyTree, ...]:
    """Trees of the results of a function of each parameter and its leaf in each tree.

    The leaves of these trees may be ``None``.
    """
    structure: Any = jax.tree.structure(params)
    rows = zip(
        jax.tree.leaves(params), *map(structure.flatten_up_to, trees), strict=True
    )
    columns = zip(*(function(*row) for row in rows), strict=True)
    return tuple(structure.unflatten(column) for column in columns)


def _start(
    moves: bool, param: jax.Array, step: Any, before: Any, output: Any
) -> tuple[jax.Array | None]:
    """What ε_t is added to: x_{t+1}, or x_{t+1} − y_t if an update is wanted.

    Computed in the precision of ε, however few bits the step has.
    """
    if checks.is_left_out(before) or checks.is_left_out(output):
        return (None,)
    start = -before if step is None else step.astype(before.dtype) - before
    if moves or numerics.has_few_bits(param):
        start = jnp.asarray(param, before.dtype) + start
    return (start,)


def _finish(
    moves: bool,
    last_scale: jax.Array,
    scale: jax.Array,
    param: jax.Array,
    step: Any,
    start: Any,
    output: Any,
    last: Any,
    rounding: Any,
) -> tuple[Any, Any, Any]:
    """A new parameter or its update, the new direction and the new rounding."""
    if start is None:
        new = param if moves else None
        if step is not None:
            new = optax.apply_updates(param, step) if moves else step
        if checks.is_left_out(last):
            return new, last, rounding
        # Without a gradient for the chain the perturbation stays as it was.
        kept = last_scale / jnp.where(scale == 0, 1, scale)
        return new, _scaled(kept, last), rounding
    direction = output.astype(last.dtype)
    target = start + _scaled(scale, direction)
    if not numerics.has_few_bits(param):
        return target.astype(jnp.result_type(param)), direction, rounding
    wide = param.astype(target.dtype)
    update = numerics.round_to(target - wide, param.dtype)
    # The sum that the training loop will form, with its rounding.
    there = numerics.round_to(wide + update, param.dtype)
    new = (there if moves else update).astype(param.dtype)
    if rounding is None:
        return new, direction + (there - target), None
    return new, direction, there - target


def _scaled(scale: PyTree, tree: PyTree) -> PyTree:
    """A tree times a scalar; or stacked trees times a vector of scalars."""
    (factor,) = map(jnp.asarray, jax.tree.leaves(scale))

    def times(leaf: jax.Array) -> jax.Array:
        leaf = jnp.asarray(leaf)
        axes = (1,) * (leaf.ndim - factor.ndim)
        return factor.reshape(factor.shape + axes).astype(leaf.dtype) * leaf

    return jax.tree.map(times, tree)


def _perturbed(value_fn: ValueFn, perturbation: PyTree) -> ValueFn:
    """The loss at x + ε as a function of x, with all arguments that it has."""

    @functools.wraps(value_fn)
    def value_at_perturbed(params: PyTree, *args: Any, **kwargs: Any) -> jax.Array:
        return value_fn(trees.displaced(params, perturbation), *args, **kwargs)

    return value_at_perturbed


def _zeros(leaf: jax.Array) -> jax.Array:
    """Zeros like a leaf, in float32 or wider."""
    dtype = numerics.accumulation_dtype(leaf)
    return numerics.widen(jnp.zeros_like(leaf), dtype)
