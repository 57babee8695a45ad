"""Data in batches, and means over their examples.

Every measure is a mean over the examples of a data set. Its batches are stacked and
scanned over, so a measure is one compiled program that holds the activations of one
batch at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from optax_vasso._internal import numerics
from optax_vasso._internal.checks import shown
from optax_vasso.sharpness import checks

PyTree = Any
Batch = PyTree
# loss_fn(params, batch) -> scalar: the mean loss over the examples of the batch.
LossFn = Callable[[PyTree, Batch], jax.Array]


class Loss(NamedTuple):
    """A loss with all of its data, as a compiled measure takes it.

    Attributes:
      loss_fn: what it binds is its leaves, so the same program serves other values.
      groups: stacked batches; a loss without data has one batch, ``None``.
    """

    loss_fn: Partial
    groups: tuple[Batch, ...]


class Estimate(NamedTuple):
    """A Monte Carlo mean.

    Attributes:
      mean: a scalar.
      standard_error: of the mean, a scalar.
    """

    mean: jax.Array
    standard_error: jax.Array


def estimate(samples: jax.Array) -> Estimate:
    """The mean of independent samples, shape ``(num_samples,)``, and its error."""
    return Estimate(samples.mean(), samples.std(ddof=1) / samples.size**0.5)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["groups"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Several batches, made by :func:`split_batches` or :func:`stack_batches`.

    Iterating over it gives the batches one by one, ``len`` their number. It passes
    through :func:`jax.jit` as an argument.

    Attributes:
      groups: trees like a batch with an additional leading axis, the number of batches
        in the group; there are several groups only if shapes differ, as for a smaller
        last batch.
    """

    groups: tuple[Batch, ...]

    def __len__(self) -> int:
        return sum(_group_shape(group)[0] for group in self.groups)

    def __iter__(self) -> Iterator[Batch]:
        for group in self.groups:
            for i in range(_group_shape(group)[0]):
                yield jax.tree.map(lambda leaf, i=i: leaf[i], group)


def split_batches(data: Batch, batch_size: int) -> Batches:
    """Cut a data set that is one tree of arrays into consecutive batches.

    Args:
      data: a tree of arrays, each with one row per example.
      batch_size: the number of examples in a batch; the last may have fewer.

    Returns:
      :class:`Batches`.

    Raises:
      ValueError: for a batch size that is not an integer of at least 1, and for data
        that is not one tree of arrays with the same first axis.

    Examples:
      >>> import numpy as np
      >>> from optax_vasso import sharpness
      >>> data = {"x": np.zeros((10, 3)), "y": np.zeros(10)}
      >>> [len(batch["y"]) for batch in sharpness.split_batches(data, 4)]
      [4, 4, 2]
    """
    batch_size = checks.count("batch_size", batch_size, 1)
    checks.check_batch("data", data)
    num_examples = jax.tree.leaves(data)[0].shape[0]
    number, rest = divmod(num_examples, batch_size)
    data = jax.tree.map(jnp.asarray, data)

    def rows(start: int, number: int, size: int) -> Batch:
        return jax.tree.map(
            lambda leaf: leaf[start : start + number * size].reshape(
                number, size, *leaf.shape[1:]
            ),
            data,
        )

    whole = [rows(0, number, batch_size)] if number else []
    return Batches((*whole, *([rows(num_examples - rest, 1, rest)] if rest else [])))


def stack_batches(batches: Iterable[Batch]) -> Batches:
    """Take several batches as the data of one measure.

    Args:
      batches: a list, an iterator or a data loader of batches. Each is a tree of arrays
        with one row per example. All are held in memory together.

    Returns:
      :class:`Batches`, in the order given.

    Raises:
      ValueError: for a tuple, a dictionary or an array, which is one batch; if there
        are no batches; if an array of a batch has not one row per example.

    Examples:
      >>> import numpy as np
      >>> from optax_vasso import sharpness
      >>> loader = ((np.zeros((n, 3)), np.zeros(n)) for n in (4, 4, 2))
      >>> len(sharpness.stack_batches(loader))
      3
    """
    if isinstance(batches, Batches):
        return batches
    if isinstance(batches, tuple | dict) or hasattr(batches, "dtype"):
        raise ValueError(
            "stack_batches needs a list or an iterator of batches, got a"
            f" {type(batches).__name__}, which is one batch: pass it to the measure"
            " itself, or cut it with split_batches."
        )
    try:
        listed = list(batches)
    except TypeError:
        raise ValueError(
            "stack_batches needs a list or an iterator of batches, got"
            f" {shown(batches)}: put a single batch into a list."
        ) from None
    for i, batch in enumerate(listed):
        checks.check_batch(f"batches[{i}]", batch)
    groups = tuple(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *group)
        for _, group in itertools.groupby(listed, key=_signature)
    )
    if not groups:
        raise ValueError(
            "batches is empty, so there is nothing to measure on: pass at least one"
            " batch (an exhausted iterator gives none)."
        )
    return Batches(groups)


def prepare(loss_fn: LossFn, params: PyTree, data: Batch | Batches) -> Loss:
    """Check the loss and the data, and return them as a compiled measure takes them.

    Raises:
      ValueError: if the parameters, the data or the loss cannot be measured.
    """
    loss = checks.as_partial("loss_fn", loss_fn)
    checks.check_float_params("params", params)
    groups = as_groups(data)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), groups[0]
    )
    checks.check_loss(loss, params, shapes)
    return Loss(loss, groups)


def as_groups(data: Batch | Batches) -> tuple[Batch, ...]:
    """Stacked batches; one batch is a group of one, and ``None`` is no data.

    Raises:
      ValueError: for a list, which may be one batch or several, and for what is not a
        tree of arrays with one row per example.
    """
    if isinstance(data, Batches):
        return data.groups
    if data is None:
        return (None,)
    checks.check_batch("data", data)
    return (jax.tree.map(lambda leaf: jnp.asarray(leaf[None]), data),)


def mean_over_batches(
    function: Callable[[Batch], PyTree], groups: tuple[Batch, ...]
) -> PyTree:
    """The mean of ``function(batch)``, each batch weighted by its number of examples.

    Args:
      function: maps a batch to a tree of arrays, each the mean over its examples.
      groups: what :func:`as_groups` returned.

    Returns:
      A tree like that of ``function``, summed in float32 or wider.
    """
    shapes = [_group_shape(group) for group in groups]
    num_examples = sum(number * size for number, size in shapes)
    total = None
    for group, (number, size) in zip(groups, shapes, strict=True):
        part = _sum_over_group(function, group, number)
        part = jax.tree.map(lambda x, size=size: x * (size / num_examples), part)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return total


def map_over_batches(
    function: Callable[[Batch], PyTree], groups: tuple[Batch, ...]
) -> PyTree:
    """``function(batch)`` of every batch, stacked along a new first axis."""

    def over(group: Batch) -> PyTree:
        if not jax.tree.leaves(group):  # The one batch of a loss without data.
            return jax.tree.map(lambda leaf: leaf[None], function(group))
        return jax.lax.map(function, group)

    parts = [over(group) for group in groups]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def batch_weights(groups: tuple[Batch, ...], dtype: jnp.dtype) -> jax.Array:
    """Each batch's share of all examples, a vector that sums to 1."""
    shapes = [_group_shape(group) for group in groups]
    sizes = np.concatenate([np.full(number, float(size)) for number, size in shapes])
    return jnp.asarray(sizes / sizes.sum(), dtype)


def mean_loss(loss: Loss, params: PyTree) -> jax.Array:
    """The loss over all batches, a scalar."""
    return mean_over_batches(lambda batch: loss.loss_fn(params, batch), loss.groups)


def mean_loss_and_grad(loss: Loss, params: PyTree) -> tuple[jax.Array, PyTree]:
    """The loss over all batches and its gradient.

    Each batch is differentiated separately, because the derivative of the whole scan
    would keep the activations of all batches.
    """
    value_and_grad = jax.value_and_grad(loss.loss_fn)
    return mean_over_batches(lambda batch: value_and_grad(params, batch), loss.groups)


def _signature(batch: Batch) -> Any:
    leaves, structure = jax.tree.flatten(batch)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _group_shape(group: Batch) -> tuple[int, int]:
    """The number of batches in a group and of examples in each of them."""
    leaves = jax.tree.leaves(group)
    return leaves[0].shape[:2] if leaves else (1, 1)


def _sum_over_group(
    function: Callable[[Batch], PyTree], group: Batch, number: int
) -> PyTree:
    def widened(batch: Batch) -> PyTree:
        return jax.tree.map(
            lambda leaf: numerics.widen(leaf, numerics.accumulation_dtype(leaf)),
            function(batch),
        )

    first = jax.tree.map(lambda leaf: leaf[0], group)
    if number == 1:
        return widened(first)
    zeros = optax.tree.zeros_like(jax.eval_shape(widened, first))

    def add(total: PyTree, batch: Batch) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, widened(batch)), None

    return jax.lax.scan(add, zeros, group)[0]
