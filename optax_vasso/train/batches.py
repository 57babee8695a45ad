"""Gradient makers that choose among the examples of a batch."""

from __future__ import annotations

import fractions
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_vasso._internal import checks, mapped, paths
from optax_vasso.train.gradients import GradientFn, GradientMaker, Inputs, whole_batch
from optax_vasso.train.losses import LossFn

PyTree = Any


def microbatched(count: int, gradient: GradientMaker = whole_batch) -> GradientMaker:
    """Average the gradients of several parts of the batch, one after another.

    Memory for activations falls with the number of parts; for a loss that is a mean
    over examples the result is that of the whole batch. The sums are kept in float32
    or wider. A part takes every ``count``-th example, as in
    :func:`optax.microbatching.microbatch`, so that a batch sharded over devices stays
    where it is. ``aux`` is stacked, part by part.

    The model state also ends as after one evaluation on the whole batch: every part
    starts from the same state, floats are averaged over the parts, and what cannot be
    averaged (counters, flags, random keys) is taken from the last part. So a running
    average of batch statistics keeps its decay per step, and a counter counts steps.
    Each part gets its own ``key``; a random key in the model state is the same for all
    parts.

    Args:
      count: number of parts, >= 1, which divides the number of examples.
      gradient: the gradient of one part.

    Returns:
      A gradient maker for :func:`optax_vasso.make_train_step`.

    Raises:
      ValueError: if count is not an integer >= 1; when the step is first called, if
        count does not divide the batch.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optax_vasso.train import Inputs, microbatched, whole_batch
      >>> def loss_fn(params, model_state, batch, key):
      ...     return jnp.mean((batch - params) ** 2), (model_state, ())
      >>> params, batch = jnp.zeros(()), jnp.arange(8.0)
      >>> for gradient in (whole_batch, microbatched(4)):
      ...     (loss, _), grads = gradient(loss_fn)(Inputs(params, (), batch))
      ...     print(loss, grads)
      17.5 -7.0
      17.5 -7.0
    """
    checks.check_integer("count", count, 1)

    def make(loss_fn: LossFn) -> GradientFn:
        one_part = gradient(loss_fn)

        def grad_fn(at: Inputs) -> Any:
            # The parts are those of optax.microbatching, which gathers a batch sharded
            # over an explicit mesh axis, averages in the dtype of each leaf, and takes
            # floats only.
            parts = jax.tree.map(
                lambda leaf: jnp.moveaxis(
                    leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]), 1, 0
                ),
                check_examples(at.batch, count, "microbatches"),
            )

            def evaluate(index: jax.Array, part: PyTree) -> tuple[PyTree, PyTree]:
                key = None if at.key is None else jax.random.fold_in(at.key, index)
                (loss, (model_state, aux)), grads = one_part(
                    at._replace(batch=part, key=key)
                )
                return jax.tree.map(jnp.asarray, (loss, model_state, grads)), aux

            shapes, _ = jax.eval_shape(
                evaluate,
                jnp.zeros((), jnp.int32),
                jax.tree.map(lambda leaf: leaf[0], parts),
            )

            def add(sums: PyTree, item: tuple[jax.Array, PyTree]) -> Any:
                values, aux = evaluate(*item)
                return jax.tree.map(_add, sums, values), aux

            sums, aux = jax.lax.scan(
                add, jax.tree.map(_zeros, shapes), (jnp.arange(count), parts)
            )
            loss, model_state, grads = jax.tree.map(
                lambda total, s: (
                    (total / count).astype(s.dtype) if _is_float(s) else total
                ),
                sums,
                shapes,
            )
            return (loss, (model_state, aux)), grads

        return grad_fn

    return make


def part_of_batch(
    fraction: float, gradient: GradientMaker = whole_batch
) -> GradientMaker:
    """The gradient of a part of the batch: a cheaper ascent.

    As ``ascent_gradient`` of :func:`optax_vasso.make_train_step`, it makes a step cost
    1 + fraction gradients, and the descent sees the examples of the ascent again;
    :func:`optax_vasso.train.split_batch` keeps them apart. The chosen examples are
    spread evenly, so that each device takes the same share of a sharded batch.

    Args:
      fraction: share of the examples, in [1e-6, 1].
      gradient: the gradient on that share.

    Returns:
      A gradient maker.

    Raises:
      ValueError: if fraction is outside [1e-6, 1]; when the step is first called, if
        fraction times the batch is not a whole number of examples.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_vasso.train import Inputs, part_of_batch
      >>> def loss_fn(params, model_state, batch, key):
      ...     return jnp.mean(batch * params), (model_state, ())
      >>> gradient = part_of_batch(0.25)(loss_fn)
      >>> _, grads = gradient(Inputs(jnp.ones(()), (), jnp.arange(8.0)))
      >>> print(grads)  # the mean of examples 0 and 4
      2.0
    """
    share = exact_share("fraction", fraction, "in [1e-6, 1]", 1.0)
    taken, of = share.numerator, share.denominator

    def choose(batch: PyTree) -> PyTree:
        batch = check_examples(batch, of, f"a fraction of {share}")
        return take_of_groups(batch, of, slice(None, taken))

    return on_chosen(choose, gradient)


def on_batch(name: Any, gradient: GradientMaker = whole_batch) -> GradientMaker:
    """The gradient of one of several batches that a step receives together.

    ``gradient=on_batch("descent"), ascent_gradient=on_batch("ascent")`` ascends and
    descends on different examples; the batch is then
    ``{"descent": ..., "ascent": ...}``.

    Args:
      name: key or index of the batch.
      gradient: the gradient on it.
    """

    def choose(batch: PyTree) -> PyTree:
        if jax.tree_util.all_leaves([batch]):
            raise ValueError(
                f"on_batch({name!r}) needs several batches, got one array of shape "
                f"{jnp.shape(batch)}: pass them in a dict or a tuple."
            )
        try:
            return batch[name]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"on_batch({name!r}) needs a batch that has an entry {name!r}, got "
                f"{', '.join(paths.children(batch))}: pass both batches of a step "
                "under the names given to on_batch."
            ) from error

    return on_chosen(choose, gradient)


def on_chosen(
    choose: Callable[[PyTree], PyTree], gradient: GradientMaker
) -> GradientMaker:
    """The gradient on what a function chooses of the batch."""

    def make(loss_fn: LossFn) -> GradientFn:
        grad_fn = gradient(loss_fn)
        return lambda at: grad_fn(at._replace(batch=choose(at.batch)))

    return make


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros to add microbatches to, in float32 or wider, with their sharding."""
    narrow = _is_float(shape) and shape.dtype.itemsize < 4
    return mapped.zeros_like(shape, jnp.float32 if narrow else None)


def _add(total: jax.Array, value: jax.Array) -> jax.Array:
    return total + value.astype(total.dtype) if _is_float(value) else value


def exact_share(
    name: str, value: float, allowed: str, most: float
) -> fractions.Fraction:
    """A share of the examples as a fraction, which decides the sizes of arrays."""
    # The check also looks at the number in float32, where 1e-6 is a little less.
    least = np.float32(1e-6)
    checks.check_number(name, value, allowed, lambda v: least <= v <= most)
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name} is being traced, but it decides how many examples are taken: pass "
            "a number."
        )
    return fractions.Fraction(float(value)).limit_denominator(10**6)


def take_of_groups(batch: PyTree, size: int, within: slice) -> PyTree:
    """Some of each group of ``size`` examples: a sharded batch stays where it is."""

    def take(leaf: jax.Array) -> jax.Array:
        grouped = leaf.reshape(leaf.shape[0] // size, size, *leaf.shape[1:])
        return grouped[:, within].reshape(-1, *leaf.shape[1:])

    return jax.tree.map(take, batch)


def check_examples(batch: PyTree, parts: int, what: str) -> PyTree:
    """The batch as arrays, if its leading axis can be divided into ``parts``."""
    check_divisible(batch, parts, what)
    return jax.tree.map(jnp.asarray, batch)


def check_divisible(batch: PyTree, parts: int, what: str) -> None:
    """Raise a ValueError if a leading axis cannot be divided into ``parts``."""
    for path, leaf in jax.tree.leaves_with_path(batch):
        name = f"batch{jax.tree_util.keystr(path)}"
        if not jnp.ndim(leaf):
            raise ValueError(
                f"{name} is a scalar, but {what} need a leading axis divisible by "
                f"{parts}: repeat it once per example, or bind it to the loss."
            )
        size = jnp.shape(leaf)[0]
        if size % parts:
            raise ValueError(
                f"{name} has {size} examples, but {what} need a multiple of {parts}: "
                "change one of the two."
            )
