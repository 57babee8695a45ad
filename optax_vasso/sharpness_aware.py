"""Two gradients a step: any optimizer around any ascent chain."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso import numerics
from optax_vasso.gate import Gate, always
from optax_vasso.validation import (
    check_integer,
    check_params,
    require_params,
)

PyTree = Any
# params -> grads, or params -> (value, grads) as jax.value_and_grad returns them.
GradFn = Callable[[PyTree], Any]


class AscentMetrics(NamedTuple):
    """What the adversary did on the last step, scalars that cost no evaluation.

    All but ``ascended`` are float32 (float64 under x64), and zero after a step that
    did not ascend.

    Attributes:
      ascended: whether the last step descended on the perturbed gradient, a boolean.
      perturbed_loss: the loss at x_t + ε_t; zero unless ``grad_fn`` returns values.
      perturbation_norm: ‖ε_t‖₂, in the units of the parameters.
      cosine: of the angle between ε_t and the clean gradient g_t. For
        :func:`sam_perturb` it is that between d_t and g_t.
    """

    ascended: jax.Array
    perturbed_loss: jax.Array
    perturbation_norm: jax.Array
    cosine: jax.Array


class SharpnessAwareState(NamedTuple):
    """State of :func:`sharpness_aware`.

    Attributes:
      ascent_state: the state of the ascent chain.
      gate_state: the state of the gate.
      optimizer_state: the state of the base optimizer.
      metrics: what the adversary did on the last step.
    """

    ascent_state: optax.OptState
    gate_state: Any
    optimizer_state: optax.OptState
    metrics: AscentMetrics


def sharpness_aware(
    optimizer: optax.GradientTransformation,
    ascent: optax.GradientTransformation,
    *,
    gate: Gate | None = None,
    ascent_steps: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Descend on the gradient at the point that an adversary picks.

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
    each from the gradient at the point that the parts before it have reached, so it
    stays in the ball of radius ρ. The averages of the ascent chain advance once a
    step, by the clean gradient; at part j they stand as if the gradient there had been
    the newest.

    When the gate is closed, the base optimizer gets g_t and ``grad_fn`` is not
    evaluated (:func:`jax.lax.cond`). Under :func:`jax.vmap` a cond computes both
    sides: a vmapped step costs two gradients whatever the gate says.

    Args:
      optimizer: the base optimizer. It receives, as extra arguments, ``clean_grads``
        (g_t, like the parameters) and ``ascended`` (R_t, a boolean scalar) beside
        those passed to ``update``.
      ascent: a transformation whose output is added to the parameters.
      gate: when to ascend; by default :func:`optax_vasso.gate.always`.
      ascent_steps: gradients spent on the ascent, >= 1.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with
      ``update(grads, state, params, *, grad_fn, **extra_args)``. ``grad_fn(params)``
      returns gradients, or ``(value, gradients)`` as :func:`jax.value_and_grad` does;
      the value is then kept in ``state.metrics.perturbed_loss``.

    Raises:
      ValueError: if ascent_steps is not an integer >= 1; at ``init``, if the
        parameters have no leaves or an integer leaf; at ``update``, if ``params`` or
        ``grad_fn`` is missing, or ``grad_fn`` returns another tree.

    Examples:
      Weighted SAM with variance suppression, every second step:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_vasso as ov
      >>> optimizer = ov.sharpness_aware(
      ...     optax.chain(ov.weighted_descent(gamma=0.7), optax.sgd(0.1)),
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
      ...     print(state.metrics.ascended, state.metrics.perturbation_norm)
      True 0.1
      False 0.0

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021, Algorithm 1.
    """
    check_integer("ascent_steps", ascent_steps, 1)
    optimizer = optax.with_extra_args_support(optimizer)
    ascent = optax.with_extra_args_support(ascent)
    gate = always() if gate is None else gate

    def init_fn(params: PyTree) -> SharpnessAwareState:
        check_params(params)
        zero = jnp.zeros((), _metrics_dtype())
        return SharpnessAwareState(
            ascent_state=ascent.init(params),
            gate_state=gate.init(),
            optimizer_state=optimizer.init(params),
            metrics=AscentMetrics(jnp.zeros((), bool), zero, zero, zero),
        )

    def update_fn(
        updates: PyTree,
        state: SharpnessAwareState,
        params: PyTree = None,
        *,
        grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SharpnessAwareState]:
        require_params(params, "sharpness_aware")
        if grad_fn is None:
            raise ValueError(
                "sharpness_aware takes a second gradient and needs grad_fn, got None: "
                "call update(grads, state, params, grad_fn=grad_fn) with "
                "grad_fn(params) -> grads, or use lagged, which needs none."
            )

        def perturbation(grads: PyTree) -> tuple[PyTree, optax.OptState]:
            parts, ascent_state = ascent.update(
                grads, state.ascent_state, params, **extra_args
            )
            return optax.tree.scale(1 / ascent_steps, parts), ascent_state

        first, ascent_state = perturbation(updates)

        def ascend() -> tuple[PyTree, AscentMetrics]:
            total = first
            for _ in range(ascent_steps - 1):
                grads, _ = _gradient(grad_fn, params, total, updates)
                part, _ = perturbation(grads)
                total = optax.tree.add(total, part)
            length, cosine = _measure(total, updates)
            total = _after(length + jnp.abs(cosine), total)
            grads, value = _gradient(grad_fn, params, total, updates)
            return grads, _as_metrics(True, value, length, cosine)

        ascended, gate_state = gate.update(state.gate_state)
        if ascended is True:
            descent, metrics = ascend()
        else:
            descent, metrics = jax.lax.cond(
                ascended, ascend, lambda: (updates, _as_metrics(False, 0.0, 0.0, 0.0))
            )
        new_updates, optimizer_state = optimizer.update(
            descent,
            state.optimizer_state,
            params,
            clean_grads=updates,
            ascended=metrics.ascended,
            **extra_args,
        )
        return new_updates, SharpnessAwareState(
            ascent_state, gate_state, optimizer_state, metrics
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _gradient(
    grad_fn: GradFn, params: PyTree, perturbation: PyTree, clean_grads: PyTree
) -> tuple[PyTree, jax.Array]:
    """Gradient and value at the perturbed parameters; value 0 if there is none."""
    result = grad_fn(
        jax.tree.map(
            # No update is no perturbation: the parameter is left out of training.
            lambda e, x: x if e is None else optax.apply_updates(x, e),
            perturbation,
            params,
            is_leaf=lambda e: e is None,
        )
    )
    # A finite tree cannot be (leaf, itself): the two contracts are never confused.
    structure: Any = jax.tree.structure(clean_grads)
    if jax.tree.structure(result) == structure:
        return result, jnp.zeros(())
    if (
        isinstance(result, tuple)
        and len(result) == 2
        and jax.tree.structure(result[1]) == structure
        and jnp.shape(result[0]) == ()
    ):
        return result[1], result[0]
    raise ValueError(
        "grad_fn must return gradients with the tree structure of those passed to "
        f"update, or (value, gradients); they have {structure}, it returned "
        f"{jax.tree.structure(result)}."
    )


def _measure(perturbation: PyTree, grads: PyTree) -> tuple[jax.Array, jax.Array]:
    """‖ε‖, and the cosine between ε and g.

    In plain sums: ε has the size of a radius, so only a gradient out of all proportion
    could overflow here, and no more than this metric. Leaf after leaf, or XLA's
    scheduler for CPUs would make the perturbation of all leaves before it sums any.
    """
    dtype = numerics.accumulation_dtype(perturbation, grads)
    square = product = jnp.zeros((), dtype)
    leaves = zip(jax.tree.leaves(perturbation), jax.tree.leaves(grads), strict=True)
    for e, g in leaves:
        e = _after(square, e)
        square += numerics.dot(e, e).astype(dtype)
        product += numerics.dot(e, g).astype(dtype)
    length = jnp.sqrt(square)
    lengths = length * numerics.norm(grads).astype(dtype)
    cosine = product / jnp.where(lengths == 0, 1, lengths)
    return length, jnp.clip(cosine, -1, 1)


def _after(not_negative: jax.Array, tree: PyTree) -> PyTree:
    """The tree itself, computed after the scalar.

    The condition is never true, but XLA does not know. Measuring before the second
    gradient lets the perturbed parameters take the place of the clean gradient: peak
    memory falls by a copy of the parameters. (XLA drops an optimization barrier on a
    CPU, so it takes a dependency in the data.)
    """
    one = jnp.where(not_negative < 0, jnp.nan, 1.0)
    return jax.tree.map(lambda leaf: leaf * one.astype(leaf.dtype), tree)


def _metrics_dtype() -> jnp.dtype:
    return jax.dtypes.canonicalize_dtype(float)


def _as_metrics(ascended: bool, *values: jax.typing.ArrayLike) -> AscentMetrics:
    dtype = _metrics_dtype()
    return AscentMetrics(
        jnp.asarray(ascended), *(jnp.asarray(value, dtype) for value in values)
    )
