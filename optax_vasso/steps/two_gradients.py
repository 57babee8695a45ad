"""Two gradients per step: any optimizer around any ascent chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import checks, mapped, numerics, paths, trees
from optax_vasso._internal.extra_args import (
    passing,
    required_gradient_fn,
    with_synonyms,
)
from optax_vasso.ascent.perturb import check_not_swapped
from optax_vasso.gate import Gate, always, check_gate

PyTree = Any
# params -> grads, or params -> (value, grads) as jax.value_and_grad returns them.
GradFn = Callable[[PyTree], Any]


@trees.of_ascent("ascent_state")
class SharpnessAwareState(NamedTuple):
    """State of :func:`optax_vasso.sharpness_aware`.

    Attributes:
      ascent_state: the state of the ascent chain.
      gate_state: the state of the gate.
      optimizer_state: the state of the base optimizer.
      report: of the last step, metrics that cost nothing: ``ascended``, whether it
        descended on the perturbed gradient, a boolean scalar; and ``perturbed_loss``,
        the loss at x_t + ε_t, a float32 (under x64 float64) scalar, which is zero
        without an ascent or if ``grad_fn`` returns no values.
        :func:`optax_vasso.metrics.track` measures more.
    """

    ascent_state: optax.OptState
    gate_state: Any
    optimizer_state: optax.OptState
    report: trees.Report


def sharpness_aware(
    optimizer: optax.GradientTransformation,
    ascent: optax.GradientTransformation,
    *,
    gate: Gate | None = None,
    ascent_steps: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Descend on the gradient at perturbed parameters.

    One step takes the clean gradient g_t = ∇f(x_t), turns it into a perturbation ε_t
    by the ascent chain, takes the gradient at x_t + ε_t, and hands that to the base
    optimizer **at x_t**, so that weight decay, clipping and schedules there see the
    parameters themselves::

        optimizer = sharpness_aware(
            optax.sgd(0.1, momentum=0.9),
            optax.chain(vasso_ema(theta=0.4), sam_perturb(rho=0.1)),
        )
        state = optimizer.init(params)
        grad_fn = jax.grad(lambda params: loss(params, batch))
        updates, state = optimizer.update(
            grad_fn(params), state, params, grad_fn=grad_fn
        )
        params = optax.apply_updates(params, updates)

    With ``ascent_steps = k > 1`` the perturbation is built from k parts of length ρ/k,
    each from the gradient at the point reached by the previous parts, so it stays in
    the ball of radius ρ. The averages of the ascent chain advance once per step, with
    the clean gradient; each part uses them as if its own gradient were the newest.

    When the gate is closed, the base optimizer gets g_t and ``grad_fn`` is not
    evaluated (:func:`jax.lax.cond`). Under :func:`jax.vmap` a cond computes both
    sides: a vmapped step costs two gradients whatever the gate says.

    Args:
      optimizer: the base optimizer. Beside the extra arguments of ``update`` it
        receives ``clean_grads`` (g_t, like the parameters), ``ascended`` (R_t, a
        boolean scalar) and ``perturbation`` (ε_t, whole, also after several ascent
        steps). The descent transforms and :func:`optax_vasso.metrics.track` read them;
        other transformations ignore them.
      ascent: a transformation whose output is added to the parameters.
      gate: when to ascend; by default :func:`optax_vasso.gate.always`.
      ascent_steps: number of gradients for the ascent, >= 1.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with
      ``update(grads, state, params, *, grad_fn, **extra_args)``. ``grad_fn(params)``
      returns gradients, or ``(value, gradients)`` as :func:`jax.value_and_grad` does;
      the value is then the metric ``perturbed_loss``. The loss itself, passed as
      ``value_fn`` (a line search's name for it) or ``obj_fn``, serves instead. The
      perturbed gradient is cast to the dtypes of the clean one, and may come in other
      containers, as :func:`flax.nnx.grad` returns it, if its leaves are the same.

    Raises:
      ValueError: if optimizer or ascent is no transformation, gate is no gate, or
        ascent_steps is not an integer >= 1; at ``init``, if the parameters have no
        leaves or optimizer is itself sharpness-aware; at ``update``, if ``params`` or
        ``grad_fn`` is missing, ``grad_fn`` returns another tree, an integer leaf or
        masked nodes would be perturbed, the state is not one of this transformation,
        or, in :func:`jax.shard_map`, the gate's decision differs between devices that
        share their parameters.

    Examples:
      Weighted SAM with variance suppression, every second step:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_vasso as ov
      >>> optimizer = ov.sharpness_aware(
      ...     optax.chain(ov.descent.weighted_descent(gamma=0.7), optax.sgd(0.1)),
      ...     optax.chain(ov.vasso_ema(theta=0.4), ov.sam_perturb(rho=0.1)),
      ...     gate=ov.gate.every(2),
      ... )
      >>> params = jnp.array([3.0, 4.0])
      >>> state = optimizer.init(params)
      >>> grad_fn = jax.value_and_grad(lambda x: jnp.sum(x**2) / 2)
      >>> for _ in range(2):
      ...     loss, grads = grad_fn(params)
      ...     updates, state = optimizer.update(grads, state, params, grad_fn=grad_fn)
      ...     params = optax.apply_updates(params, updates)
      ...     print(*state.report.metrics.values())
      True 13.005
      False 0.0

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021, Algorithm 1.
    """
    checks.check_transformation("optimizer", optimizer)
    checks.check_transformation("ascent", ascent)
    checks.check_integer("ascent_steps", ascent_steps, 1)
    optimizer = optax.with_extra_args_support(optimizer)
    ascent = optax.with_extra_args_support(ascent)
    gate = always() if gate is None else gate
    check_gate(gate)

    def init_fn(params: PyTree) -> SharpnessAwareState:
        checks.check_leaves(params)
        ascent_state, optimizer_state = ascent.init(params), optimizer.init(params)
        trees.check_not_nested(ascent=ascent_state, optimizer=optimizer_state)
        check_not_swapped(ascent_state, optimizer_state)
        report = trees.Report(
            {
                "ascended": jnp.zeros((), bool),
                "perturbed_loss": numerics.state_scalar(),
            }
        )
        # On a mapped axis the scalars vary with the parameters from the start.
        ascent_state, gate_state, report = mapped.vary(
            (ascent_state, gate.init(), report), mapped.varying_axes(params)
        )
        return SharpnessAwareState(ascent_state, gate_state, optimizer_state, report)

    def update_fn(
        updates: PyTree,
        state: SharpnessAwareState,
        params: PyTree = None,
        *,
        grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SharpnessAwareState]:
        checks.check_update(state, SharpnessAwareState, params, "sharpness_aware")
        checks.check_structure(updates, params, "sharpness_aware")
        extra_args = with_synonyms(extra_args)
        grad_fn = required_gradient_fn("sharpness_aware", grad_fn, extra_args)

        def perturb(grads: PyTree) -> tuple[PyTree, optax.OptState]:
            parts, ascent_state = ascent.update(
                grads, state.ascent_state, params, **extra_args
            )
            return optax.tree.scale(1 / ascent_steps, parts), ascent_state

        def point(perturbation: PyTree) -> PyTree:
            # Without an update there is no perturbation: the parameter is not trained.
            checks.check_inexact(
                numerics.map_updates(lambda e, x: x, perturbation, params)
            )
            return trees.displaced(params, perturbation)

        first, ascent_state = perturb(updates)

        def climb(total: PyTree) -> PyTree:
            for _ in range(ascent_steps - 1):
                part, _ = perturb(gradient_at(point(total), grad_fn, updates)[0])
                total = numerics.map_updates(jnp.add, total, part)
            return total

        def ascend() -> tuple[PyTree, jax.Array, PyTree]:
            total = climb(first)
            grads, value = gradient_at(point(total), grad_fn, updates)
            if value is None and trees.follows_loss(ascent_state):
                raise ValueError(
                    "The ascent follows the perturbed loss and needs a grad_fn that "
                    "returns it, got gradients alone: pass grad_fn = "
                    "jax.value_and_grad(loss)."
                )
            # With one ascent step it is known outside, so the cond need not return it.
            return grads, as_loss(value), () if ascent_steps == 1 else total

        def stay() -> tuple[PyTree, jax.Array, PyTree]:
            return updates, as_loss(0.0), () if ascent_steps == 1 else first

        def as_loss(value: jax.typing.ArrayLike | None) -> jax.Array:
            dtype = state.report.metrics["perturbed_loss"].dtype
            value = 0.0 if value is None else value
            return jnp.asarray(value).astype(dtype)

        ascended, gate_state = gate.update(
            state.gate_state, **{**extra_args, "grads": updates, "params": params}
        )
        apart = mapped.disagreement(ascended, params)
        if apart:
            raise ValueError(
                f"gate decides for each device of axis {apart[0]!r} separately, but "
                "the devices share their parameters: let it decide from a value that "
                "is the same on all, "
                f"such as jax.lax.pmean(value, {apart[0]!r})."
            )
        if ascended is True:
            descent, value, total = ascend()
        else:
            descent, value, total = mapped.cond(ascended, ascend, stay)
        ascended = jnp.asarray(ascended)
        if trees.follows_loss(ascent_state):
            # NaN is ignored: a step that did not ascend has no perturbed loss.
            found = jnp.where(ascended, value, jnp.nan)
            ascent_state = trees.tell_loss(ascent_state, found)
        new_updates, optimizer_state = optimizer.update(
            descent,
            state.optimizer_state,
            params,
            **passing(
                extra_args,
                clean_grads=updates,
                ascended=ascended,
                perturbation=first if ascent_steps == 1 else total,
            ),
        )
        report = trees.Report({"ascended": ascended, "perturbed_loss": value})
        ascent_state, gate_state, report = mapped.vary_like(
            (ascent_state, gate_state, report),
            (state.ascent_state, state.gate_state, state.report),
        )
        return new_updates, SharpnessAwareState(
            ascent_state, gate_state, optimizer_state, report
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def gradient_at(
    params: PyTree, grad_fn: GradFn, clean_grads: PyTree
) -> tuple[PyTree, jax.Array | None]:
    """Gradient, with the dtypes of the clean one, and value, if there is one."""
    try:
        result = grad_fn(params)
    except Exception as error:
        if not _is_masked(params):
            raise
        raise ValueError(
            "grad_fn was given masked nodes in place of parameters, since optax.masked "
            "or optax.partition stands around the optimizer: put it into the base "
            "optimizer, and choose the perturbed leaves by mask=."
        ) from error
    found: list[Any] = [(None, result)]
    if isinstance(result, tuple) and len(result) == 2:
        found.append(result)
    # No finite tree equals (leaf, itself), so the two contracts cannot be confused.
    for value, grads in found:
        aligned = _aligned(grads, clean_grads)
        if aligned is not None and _is_scalar(value):
            return numerics.cast_updates(aligned, clean_grads), value
    raise ValueError(
        "grad_fn must return gradients like those passed to update, or (value, "
        f"gradients) with a scalar value, got {_in_words(result)} "
        f"({checks.tree_difference(result, clean_grads)}): differentiate the loss by "
        "the same parameters, as in grad_fn = jax.grad(lambda params: loss(params, "
        "batch)), and leave auxiliary outputs out."
    )


def _is_masked(params: PyTree) -> bool:
    leaves = jax.tree.leaves(params, is_leaf=checks.is_left_out)
    return any(isinstance(leaf, optax.MaskedNode) for leaf in leaves)


def _is_scalar(value: Any) -> bool:
    return value is None or (
        jax.tree_util.all_leaves([value]) and jnp.shape(value) == ()
    )


def _aligned(grads: PyTree, clean_grads: PyTree) -> PyTree | None:
    """The gradients in the containers of the clean ones, or None if they differ.

    :func:`flax.nnx.grad` returns others, around arrays of the same names.
    """
    try:
        leaves = paths.match_names(grads, clean_grads)
    except paths.PathError:
        return None
    structure: Any = jax.tree.structure(clean_grads)
    is_whole = all(leaf is not None for leaf in leaves)
    return structure.unflatten(leaves) if is_whole else None


def _in_words(value: Any) -> str:
    """What a value is, in a few words."""
    if jax.tree_util.all_leaves([value]):
        return f"an array of shape {jnp.shape(value)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_in_words, value))})"
    return f"a {type(value).__name__} of {len(jax.tree.leaves(value))} arrays"
