"""Curvature without matrices: products of the Hessian and its kin with vectors.

A curvature is a *matrix-vector product*, a function from a tree like the parameters to
another that is linear and symmetric; :mod:`~optax_vasso.sharpness.spectrum` measures
any such function.

The products here are :class:`jax.tree_util.Partial` objects, trees whose leaves are the
parameters and the data. They pass through :func:`jax.jit` as arguments, so a measure
compiles once for a loss function and serves every later set of parameters.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from optax_vasso import numerics
from optax_vasso.sharpness import batches as data

PyTree = Any
Matvec = Callable[[PyTree], PyTree]


def hessian(
    loss_fn: data.LossFn,
    params: PyTree,
    batches: data.Batch | Iterable[data.Batch],
) -> Matvec:
    """The Hessian of the mean loss as a matrix-vector product.

    Forward over reverse differentiation: one product costs between two and four
    gradients in time, and the memory of about two.

    Args:
      loss_fn: ``loss_fn(params, batch)``, a scalar, the mean over the batch. What the
        network keeps besides parameters, as the statistics of batch normalization, is
        closed over: it must not depend on the batch.
      params: a tree of float32 or float64 arrays.
      batches: a list or an iterator of batches, or one batch (a tuple, a dictionary or
        an array); ``None`` for a loss that takes no data. They are held in memory
        together.

    Returns:
      A function of a tree like ``params`` that returns another.

    Raises:
      ValueError: if the loss is not a scalar, there are no batches, or the parameters
        are not finite.
      TypeError: if JAX cannot differentiate the gradient, as where a
        :func:`jax.custom_vjp` wraps what has no derivative of its own (a kernel, a
        callback); :func:`hessian_by_differences` needs the gradient alone.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_vasso import sharpness
      >>> def loss_fn(params, batch):
      ...     return jnp.sum(jnp.array([4.0, 1.0]) * params**2) / 2
      >>> curvature = sharpness.hessian(loss_fn, jnp.zeros(2), None)
      >>> print(curvature(jnp.array([1.0, 1.0])))
      [4. 1.]
    """
    groups = data.checked_batches(loss_fn, params, batches)
    matvec = Partial(_hessian_product, Partial(loss_fn), params, groups)
    _check_product(matvec, params, "Hessian", "sharpness.hessian_by_differences")
    return matvec


def hessian_by_differences(
    loss_fn: data.LossFn,
    params: PyTree,
    batches: data.Batch | Iterable[data.Batch],
) -> Matvec:
    """The Hessian of a loss of which JAX can form the gradient only.

    (∇f(x + hv) − ∇f(x − hv)) / 2h with h = √eps·(1 + ‖x‖)/‖v‖, eps the machine
    precision: two gradients a product. Rounding of the gradients and the third
    derivative leave an error of about √eps, so use :func:`hessian` where it works.

    Args:
      loss_fn: as for :func:`hessian`.
      params: a tree of float32 or float64 arrays.
      batches: as for :func:`hessian`.

    Returns:
      A function of a tree like ``params`` that returns another.

    Raises:
      ValueError: as :func:`hessian`.
    """
    groups = data.checked_batches(loss_fn, params, batches)
    return Partial(_difference_product, Partial(loss_fn), params, groups)


def gauss_newton(
    model_fn: Callable[[PyTree, data.Batch], PyTree],
    output_loss_fn: Callable[[PyTree, data.Batch], jax.Array],
    params: PyTree,
    batches: data.Batch | Iterable[data.Batch],
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
      batches: as for :func:`hessian`.

    Returns:
      A function of a tree like ``params`` that returns another.

    Raises:
      ValueError: as :func:`hessian`.
      TypeError: if JAX has no forward derivative of the model, as for a
        :func:`jax.custom_vjp`; :func:`hessian` and :func:`hessian_by_differences` can
        do without.

    References:
      Schraudolph, `Fast Curvature Matrix-Vector Products for Second-Order Gradient
      Descent <https://doi.org/10.1162/08997660260028683>`_, 2002
    """

    def loss_fn(params: PyTree, batch: data.Batch) -> jax.Array:
        return output_loss_fn(model_fn(params, batch), batch)

    groups = data.checked_batches(loss_fn, params, batches)
    matvec = Partial(
        _gauss_newton_product,
        Partial(model_fn),
        Partial(output_loss_fn),
        params,
        groups,
    )
    _check_product(matvec, params, "Gauss-Newton", "sharpness.hessian")
    return matvec


def _check_product(matvec: Matvec, params: PyTree, name: str, alternative: str) -> None:
    leaves, structure = jax.tree.flatten((matvec, params))
    shapes = tuple(
        jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves
    )
    try:
        _lower_product(structure, shapes)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise TypeError(
            f"JAX cannot form the {name}-vector product of this loss, since something"
            " in it has no forward derivative (a custom_vjp without a jvp, a kernel, a"
            f" callback). Use {alternative}, which does without. JAX said: {error}"
        ) from error


@functools.lru_cache(maxsize=8)
def _lower_product(structure: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> None:
    """Lower a product: it is there, not in tracing, that JAX may refuse."""
    _apply.lower(*jax.tree.unflatten(structure, shapes))


@jax.jit
def _apply(matvec: Matvec, vector: PyTree) -> PyTree:
    return matvec(vector)


def _hessian_product(
    loss_fn: data.LossFn, params: PyTree, groups: tuple[data.Batch, ...], vector: PyTree
) -> PyTree:
    def of_batch(batch: data.Batch) -> PyTree:
        gradient = jax.grad(lambda x: loss_fn(x, batch))
        return jax.jvp(gradient, (params,), (vector,))[1]

    return data.mean_over_batches(of_batch, groups)


def _difference_product(
    loss_fn: data.LossFn, params: PyTree, groups: tuple[data.Batch, ...], vector: PyTree
) -> PyTree:
    length = numerics.norm(vector)
    eps = jnp.finfo(length.dtype).eps
    step = eps**0.5 * (1 + numerics.norm(params)) / jnp.where(length == 0, 1, length)

    def gradient(sign: int) -> PyTree:
        point = jax.tree.map(
            lambda x, v: x + (sign * step).astype(x.dtype) * v, params, vector
        )
        return data.mean_loss_and_grad(loss_fn, point, groups)[1]

    return jax.tree.map(
        lambda ahead, behind: (ahead - behind) / (2 * step).astype(ahead.dtype),
        gradient(1),
        gradient(-1),
    )


def _gauss_newton_product(
    model_fn: Callable[[PyTree, data.Batch], PyTree],
    output_loss_fn: Callable[[PyTree, data.Batch], jax.Array],
    params: PyTree,
    groups: tuple[data.Batch, ...],
    vector: PyTree,
) -> PyTree:
    def of_batch(batch: data.Batch) -> PyTree:
        outputs, pull_back = jax.vjp(lambda x: model_fn(x, batch), params)
        tangent = jax.jvp(lambda x: model_fn(x, batch), (params,), (vector,))[1]
        gradient = jax.grad(lambda z: output_loss_fn(z, batch))
        return pull_back(jax.jvp(gradient, (outputs,), (tangent,))[1])[0]

    return data.mean_over_batches(of_batch, groups)
