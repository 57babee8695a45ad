"""Curvature without matrices: products of a Hessian with vectors.

A curvature is a *matrix-vector product*, a function from a tree like the parameters to
another that is linear and symmetric; :mod:`~optax_vasso.sharpness.spectrum` measures
any such function.

The products here are :class:`jax.tree_util.Partial` objects, trees whose leaves are the
parameters and the data. They pass through :func:`jax.jit` as arguments, so a measure
compiles once for a loss function and serves every later set of parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from optax_vasso.sharpness import batches, checks, programs

PyTree = Any
Matvec = Callable[[PyTree], PyTree]


def hessian(
    loss_fn: batches.LossFn, params: PyTree, data: batches.Batch | batches.Batches
) -> Matvec:
    """The Hessian of the mean loss as a matrix-vector product.

    Forward over reverse differentiation: one product costs between two and four
    gradients in time, and the memory of about two.

    The matrix products of the loss keep the precision that JAX gives them. On GPUs and
    TPUs that is too low for a curvature: use the product within
    ``jax.default_matmul_precision("highest")``.

    Args:
      loss_fn: ``loss_fn(params, batch)``, a scalar, the mean over the batch. Bind what
        else the network needs, such as batch statistics, with
        :class:`jax.tree_util.Partial`; it must not depend on the batch.
      params: a tree of float32 or float64 arrays.
      data: one batch (a tuple, a dictionary or an array, one row per example), several
        as :func:`split_batches` or :func:`stack_batches` makes them, or ``None`` for a
        loss that takes no data.

    Returns:
      A function of a tree like ``params`` that returns another.

    Raises:
      ValueError: if the loss is not a scalar, the data are not batches, or the
        parameters are not finite.
      TypeError: if JAX cannot differentiate the gradient, as for a
        :func:`jax.custom_vjp` around a kernel or callback without a derivative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_vasso import sharpness
      >>> def loss_fn(params, batch):
      ...     return jnp.sum(jnp.array([4.0, 1.0]) * params**2) / 2
      >>> curvature = sharpness.hessian(loss_fn, jnp.zeros(2), None)
      >>> print(curvature(jnp.array([1.0, 1.0])))
      [4. 1.]
    """
    loss = batches.prepare(loss_fn, params, data)
    matvec = Partial(_hessian_product, loss, params)
    _check_product(matvec, params, "Hessian", "differences of gradients")
    return matvec


def gauss_newton(
    model_fn: Callable[[PyTree, batches.Batch], PyTree],
    output_loss_fn: Callable[[PyTree, batches.Batch], jax.Array],
    params: PyTree,
    data: batches.Batch | batches.Batches,
) -> Matvec:
    """The Gauss-Newton matrix as a matrix-vector product.

    JᵀHJ, J the Jacobian of the model's outputs and H the Hessian of the loss in the
    outputs: the Hessian without the curvature of the model. It is positive semidefinite
    for a convex loss, equals the Hessian where the model is linear, and is the Fisher
    information for cross-entropy.

    Args:
      model_fn: ``model_fn(params, batch)``, the outputs, as logits; any tree.
      output_loss_fn: ``output_loss_fn(outputs, batch)``, a scalar, the mean over the
        batch.
      params: a tree of float32 or float64 arrays.
      data: as for :func:`hessian`.

    Returns:
      A function of a tree like ``params`` that returns another.

    Raises:
      ValueError: as :func:`hessian`.
      TypeError: if JAX has no forward derivative of the model, as for a
        :func:`jax.custom_vjp`; :func:`hessian` can do without.

    References:
      Schraudolph, `Fast Curvature Matrix-Vector Products for Second-Order Gradient
      Descent <https://doi.org/10.1162/08997660260028683>`_, 2002
    """
    model = checks.as_partial("model_fn", model_fn)
    output_loss = checks.as_partial("output_loss_fn", output_loss_fn)
    loss = Partial(_loss_of_outputs, model, output_loss)
    groups = batches.prepare(loss, params, data).groups
    matvec = Partial(_gauss_newton_product, model, output_loss, params, groups)
    _check_product(matvec, params, "Gauss-Newton", "sharpness.hessian")
    return matvec


def _loss_of_outputs(
    model_fn: Callable[..., PyTree],
    output_loss_fn: Callable[..., jax.Array],
    params: PyTree,
    batch: batches.Batch,
) -> jax.Array:
    return output_loss_fn(model_fn(params, batch), batch)


def _check_product(
    matvec: Partial, params: PyTree, name: str, alternative: str
) -> None:
    """Lower a product, since JAX may refuse it there and not in tracing."""
    (weak, vector), functions = programs.weakened((matvec, params))
    leaves, structure = jax.tree.flatten((weak, vector))
    shapes = tuple(
        jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves
    )
    lowered = programs.kept_with(functions).setdefault(_check_product, set())
    if (structure, shapes) in lowered:
        return
    try:
        jax.jit(lambda product, vector: product(vector)).lower(
            *jax.tree.unflatten(structure, shapes)
        )
    except (TypeError, ValueError, NotImplementedError) as error:
        raise TypeError(
            f"JAX cannot form the {name}-vector product of this loss, since something"
            " in it has no forward derivative (a custom_vjp without a jvp, a kernel, a"
            f" callback): use {alternative}, which needs none. JAX said: {error}"
        ) from error
    lowered.add((structure, shapes))


@programs.compiled
def _hessian_product(loss: batches.Loss, params: PyTree, vector: PyTree) -> PyTree:
    def of_batch(batch: batches.Batch) -> PyTree:
        gradient = jax.grad(lambda x: loss.loss_fn(x, batch))
        return jax.jvp(gradient, (params,), (vector,))[1]

    return batches.mean_over_batches(of_batch, loss.groups)


@programs.compiled
def _gauss_newton_product(
    model_fn: Callable[[PyTree, batches.Batch], PyTree],
    output_loss_fn: Callable[[PyTree, batches.Batch], jax.Array],
    params: PyTree,
    groups: tuple[batches.Batch, ...],
    vector: PyTree,
) -> PyTree:
    def of_batch(batch: batches.Batch) -> PyTree:
        outputs, pull_back = jax.vjp(lambda x: model_fn(x, batch), params)
        tangent = jax.jvp(lambda x: model_fn(x, batch), (params,), (vector,))[1]
        gradient = jax.grad(lambda z: output_loss_fn(z, batch))
        return pull_back(jax.jvp(gradient, (outputs,), (tangent,))[1])[0]

    return batches.mean_over_batches(of_batch, groups)
