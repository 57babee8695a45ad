"""Sharpness in a ball: how far the loss can rise within a radius of the parameters.

The ball holds the perturbations ε with ‖ε/T‖_p ≤ ρ, for p = 2 or infinity. T is a tree
of scales: ones by default, abs(x) for the adaptive form of Kwon et al., abs(x) + 1 for
Keskar's. Three directions differ:

- *ascent*, along the gradient, as in SAM's step;
- *worst*, the maximum over the ball: ½ρ²λ_max at a minimum;
- *average*, the mean over directions: ρ² trace/(2n) at a minimum, n the number of
  parameters.

Each is the rise f(x + ε) − f(x). In float32 a rise below about 1e-7 of the loss is
rounding: measure small radii in float64. All measures take the arguments of
:func:`ascent_sharpness`.

References:
  Wen et al., `How Does Sharpness-Aware Minimization Minimize Sharpness?
  <https://arxiv.org/abs/2211.05729>`_, 2023
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import numerics
from optax_vasso.sharpness import batches, checks, programs
from optax_vasso.sharpness.batches import Estimate, estimate
from optax_vasso.sharpness.directions import random_direction

PyTree = Any


class Sharpness(NamedTuple):
    """The rise of the loss, and its perturbation.

    Attributes:
      rise: f(x + ε) − f(x), a scalar in the units of the loss.
      loss: f(x), a scalar.
      perturbation: ε, a tree like the parameters.
    """

    rise: jax.Array
    loss: jax.Array
    perturbation: PyTree


class MSharpness(NamedTuple):
    """The sharpness of each batch.

    Attributes:
      mean: mean over the batches, weighted by their examples, a scalar.
      rises: rise of each batch, shape ``(num_batches,)``.
    """

    mean: jax.Array
    rises: jax.Array


def ascent_sharpness(
    loss_fn: batches.LossFn,
    params: PyTree,
    data: batches.Batch | batches.Batches,
    rho: float,
    *,
    p: float = 2,
    scale: PyTree | None = None,
) -> Sharpness:
    """The rise of the loss along its gradient, the direction of SAM.

    For p = 2, ε = ρ T²g/‖Tg‖₂; for p = infinity, ε = ρ T sign(g). The cost is one
    gradient and one loss. If the gradient is zero, so is ε.

    Args:
      loss_fn: ``loss_fn(params, batch)``, a scalar, the mean over the batch.
      params: a tree of float32 or float64 arrays.
      data: one batch, several or None, as for :func:`hessian`.
      rho: the radius, positive; in units of the parameters, or of T.
      p: the norm of the ball, 2 or infinity.
      scale: T, a tree like ``params`` of non-negative scales; None for ones. With
        ``jax.tree.map(jnp.abs, params)`` the ball follows the sizes of the parameters,
        and rescaling two layers against each other, which does not change the network,
        does not change its sharpness.

    Returns:
      :class:`Sharpness`.

    Raises:
      ValueError: for a radius that is not positive, another p, a scale of another
        structure, a loss that is not a scalar, data that are not batches, parameters
        that are not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_vasso import sharpness
      >>> def loss_fn(params, batch):
      ...     return jnp.sum(jnp.array([4.0, 1.0]) * params**2) / 2
      >>> params = jnp.array([1.0, 0.0])
      >>> found = sharpness.ascent_sharpness(loss_fn, params, None, rho=0.1)
      >>> print(found.rise, found.perturbation)
      0.42 [0.1 0. ]

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021

      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization
      <https://arxiv.org/abs/2102.11600>`_, 2021
    """
    return _ascent(*_checked(loss_fn, params, data, rho, p, scale), p)


def worst_sharpness(
    loss_fn: batches.LossFn,
    params: PyTree,
    data: batches.Batch | batches.Batches,
    rho: float,
    *,
    p: float = 2,
    scale: PyTree | None = None,
    num_steps: int = 50,
    num_restarts: int = 3,
    key: jax.Array | None = None,
) -> Sharpness:
    """The largest rise of the loss in the ball, by projected ascent with restarts.

    Steepest ascent in the norm of the ball starts at the centre, in the ascent
    direction, and from ``num_restarts`` random directions. The length of its steps
    falls evenly from 2ρ to 0, and each is projected onto the ball. The result is the
    best point of all, so it is a lower bound of the maximum that is never below the
    rise of :func:`ascent_sharpness`, nor below 0. For p = infinity even the maximum of
    a quadratic is a hard problem, and the bound may be loose.

    Arguments and errors are those of :func:`ascent_sharpness`, and:

    - ``num_steps``, of each ascent, at least 1;
    - ``num_restarts``, from random directions, at least 1: at a minimum the gradient
      alone leads nowhere;
    - ``key``, of the random directions, ``jax.random.key(0)`` if None.

    The cost is ``(1 + num_restarts) * num_steps`` gradients.

    Returns:
      :class:`Sharpness`.

    Examples:
      At a minimum it is ½ρ²λ_max, where the gradient leads nowhere:

      >>> import jax.numpy as jnp
      >>> from optax_vasso import sharpness
      >>> def loss_fn(params, batch):
      ...     return jnp.sum(jnp.array([4.0, 1.0]) * params**2) / 2
      >>> params = jnp.zeros(2)
      >>> print(sharpness.worst_sharpness(loss_fn, params, None, rho=0.1).rise)
      0.02
      >>> print(sharpness.ascent_sharpness(loss_fn, params, None, rho=0.1).rise)
      0.0
    """
    arguments = _checked(loss_fn, params, data, rho, p, scale)
    num_steps = checks.count("num_steps", num_steps, 1)
    num_restarts = checks.count("num_restarts", num_restarts, 1)
    keys = jax.random.split(checks.key_or_default(key), num_restarts)
    return _worst(*arguments, keys, p, num_steps)


def average_sharpness(
    loss_fn: batches.LossFn,
    params: PyTree,
    data: batches.Batch | batches.Batches,
    rho: float,
    *,
    p: float = 2,
    scale: PyTree | None = None,
    num_samples: int = 32,
    key: jax.Array | None = None,
) -> Estimate:
    """The mean rise of the loss over random directions, by Monte Carlo.

    A direction is ε = ρ T z/‖z‖_p with z standard normal: uniform on the sphere for
    p = 2. A sample is the mean of the rises at ε and at −ε, so that the gradient, which
    does not contribute to the mean, does not contribute to its error. A sample costs
    two losses.

    Arguments and errors are those of :func:`ascent_sharpness`, and:

    - ``num_samples``, pairs of directions, at least 2;
    - ``key``, of the directions, ``jax.random.key(0)`` if None.

    Returns:
      :class:`Estimate` of the mean rise and of its standard error.
    """
    arguments = _checked(loss_fn, params, data, rho, p, scale)
    num_samples = checks.count("num_samples", num_samples, 2)
    keys = jax.random.split(checks.key_or_default(key), num_samples)
    return _average(*arguments, keys, p)


def keskar_sharpness(
    loss_fn: batches.LossFn,
    params: PyTree,
    data: batches.Batch | batches.Batches,
    epsilon: float = 1e-3,
    *,
    num_steps: int = 50,
    num_restarts: int = 3,
    key: jax.Array | None = None,
) -> jax.Array:
    """Keskar's sharpness in percent: 100 · (max f(x + ε) − f(x)) / (1 + f(x)).

    The maximum is over the box abs(ε) ≤ epsilon·(abs(x) + 1), in the full space, and is
    sought as :func:`worst_sharpness` seeks it, whose arguments and errors these are,
    where Keskar et al. ran ten iterations of L-BFGS-B. ``epsilon`` is the size of the
    box, positive: the paper has 1e-3 and 5e-4.

    Returns:
      A scalar, in percent.

    References:
      Keskar et al., `On Large-Batch Training for Deep Learning: Generalization Gap and
      Sharp Minima <https://arxiv.org/abs/1609.04836>`_, 2017
    """
    checks.check_positive("epsilon", epsilon)
    checks.check_float_params("params", params)
    worst = worst_sharpness(
        loss_fn,
        params,
        data,
        epsilon,
        p=math.inf,
        scale=jax.tree.map(lambda x: jnp.abs(x) + 1, params),
        num_steps=num_steps,
        num_restarts=num_restarts,
        key=key,
    )
    return 100 * worst.rise / (1 + worst.loss)


def m_sharpness(
    loss_fn: batches.LossFn,
    params: PyTree,
    data: batches.Batch | batches.Batches,
    rho: float,
    *,
    p: float = 2,
    scale: PyTree | None = None,
) -> MSharpness:
    """The mean over batches of the rise along each batch's own gradient.

    m is the number of examples in a batch: cut the data with
    :func:`~optax_vasso.sharpness.split_batches`. With all data in one batch this is
    :func:`ascent_sharpness`, whose arguments and errors these are; the smaller m, the
    larger it is. The cost is one gradient and one loss of all data.

    Returns:
      :class:`MSharpness`.

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021, section 4.1
    """
    return _of_each_batch(*_checked(loss_fn, params, data, rho, p, scale), p)


def _checked(
    loss_fn: batches.LossFn,
    params: PyTree,
    data: Any,
    rho: float,
    p: float,
    scale: PyTree | None,
) -> tuple[batches.Loss, PyTree, PyTree]:
    """The arguments of a compiled measure: the loss, the parameters, and ρT."""
    checks.check_positive("rho", rho)
    if not isinstance(p, numbers.Real) or p not in (2, math.inf):
        raise ValueError(f"p must be 2 or infinity, got {p!r}.")
    loss = batches.prepare(loss_fn, params, data)
    if scale is None:
        scale = jax.tree.map(jnp.ones_like, params)
    else:
        checks.check_scale(scale, params)
    return loss, params, jax.tree.map(lambda t: jnp.asarray(rho, t.dtype) * t, scale)


def _project(point: PyTree, p: float) -> PyTree:
    """The nearest point of the unit ball."""
    if p == math.inf:
        return jax.tree.map(lambda x: jnp.clip(x, -1, 1), point)
    length = jnp.maximum(numerics.norm(point), 1)
    return jax.tree.map(lambda x: x / length.astype(x.dtype), point)


def _times(tree: PyTree, radii: PyTree) -> PyTree:
    """Leaf by leaf, in the dtypes of ρT: ε of a point in the unit ball."""
    return jax.tree.map(lambda x, r: x.astype(r.dtype) * r, tree, radii)


@programs.compiled(static_argnames="p")
def _ascent(loss: batches.Loss, params: PyTree, radii: PyTree, p: float) -> Sharpness:
    value, gradient = batches.mean_loss_and_grad(loss, params)
    unit = numerics.dual_direction(_times(gradient, radii), p)
    perturbation = _times(unit, radii)
    perturbed = batches.mean_loss(loss, optax.apply_updates(params, perturbation))
    return Sharpness(perturbed - value, value, perturbation)


@programs.compiled(static_argnames="p")
def _of_each_batch(
    loss: batches.Loss, params: PyTree, radii: PyTree, p: float
) -> MSharpness:
    def rise(batch: batches.Batch) -> jax.Array:
        alone = (jax.tree.map(lambda leaf: leaf[None], batch),)
        return _ascent(loss._replace(groups=alone), params, radii, p).rise

    rises = batches.map_over_batches(rise, loss.groups)
    weights = batches.batch_weights(loss.groups, rises.dtype)
    return MSharpness(jnp.sum(rises * weights), rises)


@programs.compiled(static_argnames=("p", "num_steps"))
def _worst(
    loss: batches.Loss,
    params: PyTree,
    radii: PyTree,
    keys: jax.Array,
    p: float,
    num_steps: int,
) -> Sharpness:
    def at(unit: PyTree) -> PyTree:
        return optax.apply_updates(params, _times(unit, radii))

    def better(a: tuple[jax.Array, PyTree], b: tuple[jax.Array, PyTree]) -> Any:
        # NaN counts as the best, as in argmax below, so that it is not hidden.
        take_b = (b[0] > a[0]) | jnp.isnan(b[0])
        return optax.tree.where(take_b, b, a)

    def step(carry: Any, length: jax.Array) -> tuple[Any, None]:
        unit, best = carry
        value, gradient = batches.mean_loss_and_grad(loss, at(unit))
        direction = numerics.dual_direction(_times(gradient, radii), p)
        moved = numerics.add_scaled(unit, length, direction)
        return (_project(moved, p), better(best, (value, unit))), None

    def climb(start: PyTree) -> tuple[jax.Array, PyTree]:
        lengths = 2 * (1 - jnp.arange(num_steps, dtype=clean.dtype) / num_steps)
        (unit, best), _ = jax.lax.scan(step, (start, (clean, centre)), lengths)
        return better(best, (batches.mean_loss(loss, at(unit)), unit))

    clean = batches.mean_loss(loss, params)
    centre = optax.tree.zeros_like(params)
    random = jax.vmap(lambda key: random_direction(key, params, p))(keys)
    starts = jax.tree.map(
        lambda one, more: jnp.concatenate([one[None], more]), centre, random
    )
    tops, units = jax.lax.map(climb, starts)
    best = jnp.argmax(tops)
    unit = jax.tree.map(lambda leaf: leaf[best], units)
    return Sharpness(tops[best] - clean, clean, _times(unit, radii))


@programs.compiled(static_argnames="p")
def _average(
    loss: batches.Loss, params: PyTree, radii: PyTree, keys: jax.Array, p: float
) -> Estimate:
    clean = batches.mean_loss(loss, params)

    def sample(key: jax.Array) -> jax.Array:
        perturbation = _times(random_direction(key, params, p), radii)
        ahead, behind = (
            batches.mean_loss(loss, numerics.add_scaled(params, sign, perturbation))
            for sign in (1, -1)
        )
        return ((ahead - clean) + (behind - clean)) / 2

    return estimate(jax.lax.map(sample, keys))
