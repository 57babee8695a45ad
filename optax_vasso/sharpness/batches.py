"""Data in batches: checks of what is measured, and means over batches.

Every measure is a mean over the examples of one data set that need not fit through
the network at once. The batches are stacked and scanned over, so that a measure is one
compiled program that holds the activations of one batch at a time.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_vasso import numerics

PyTree = Any
Batch = PyTree
# loss_fn(params, batch) -> scalar: the mean loss over the examples of the batch.
LossFn = Callable[[PyTree, Batch], jax.Array]


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


def split_batches(data: Batch, batch_size: int) -> list[Batch]:
    """Cut a data set that is one tree of arrays into consecutive batches.

    Args:
      data: a tree of arrays with the same first axis, one row an example.
      batch_size: the number of examples in a batch; the last may have fewer.

    Returns:
      A list of trees like ``data``.

    Raises:
      ValueError: for a batch size below 1, and where the first axes differ.

    Examples:
      >>> import numpy as np
      >>> from optax_vasso import sharpness
      >>> data = {"x": np.zeros((10, 3)), "y": np.zeros(10)}
      >>> [len(batch["y"]) for batch in sharpness.split_batches(data, 4)]
      [4, 4, 2]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    lengths = {np.shape(leaf)[0] for leaf in jax.tree.leaves(data)}
    if len(lengths) != 1:
        raise ValueError(f"The arrays of data differ in length: {sorted(lengths)}.")
    return [
        jax.tree.map(lambda leaf, i=i: leaf[i : i + batch_size], data)
        for i in range(0, lengths.pop(), batch_size)
    ]


def stack_batches(batches: Batch | Iterable[Batch]) -> tuple[Batch, ...]:
    """Stack batches of the same shapes, so that a program can scan over them.

    Args:
      batches: a list or an iterator of batches, or a data loader. A tuple, a
        dictionary, a dataclass or an array is one batch, and ``None`` is the batch of
        a loss that takes no data.

    Returns:
      A tuple of groups in the order of the batches. Each is a tree like a batch with
      one more leading axis, the number of batches in the group; there is more than
      one group only where shapes differ, as for a smaller last batch.

    Raises:
      ValueError: if there are no batches, or a batch has no examples.
    """
    if _is_one_batch(batches):
        batches = [batches]
    groups = tuple(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *group)
        for _, group in itertools.groupby(batches, key=_signature)
    )
    if not groups:
        raise ValueError(
            "There are no batches to measure on: the list is empty or the iterator was"
            " already used up (measure twice from a list, not from a generator)."
        )
    if any(_group_shape(group)[1] == 0 for group in groups):
        raise ValueError("A batch has no examples: its first axis has length 0.")
    return groups


def mean_over_batches(
    function: Callable[[Batch], PyTree], groups: tuple[Batch, ...]
) -> PyTree:
    """The mean of ``function(batch)``, each batch weighted by its number of examples.

    Args:
      function: maps a batch to a tree of arrays, each the mean over its examples.
      groups: what :func:`stack_batches` returned.

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


def mean_loss(loss_fn: LossFn, params: PyTree, groups: tuple[Batch, ...]) -> jax.Array:
    """The loss over all batches, a scalar."""
    return mean_over_batches(lambda batch: loss_fn(params, batch), groups)


def mean_loss_and_grad(
    loss_fn: LossFn, params: PyTree, groups: tuple[Batch, ...]
) -> tuple[jax.Array, PyTree]:
    """The loss over all batches and its gradient.

    Each batch is differentiated by itself: the derivative of the scan as a whole would
    keep the activations of all batches.
    """
    value_and_grad = jax.value_and_grad(loss_fn)
    return mean_over_batches(lambda batch: value_and_grad(params, batch), groups)


def checked_batches(
    loss_fn: LossFn, params: PyTree, batches: Batch | Iterable[Batch]
) -> tuple[Batch, ...]:
    """The stacked batches, after :func:`check_params` and :func:`check_loss`.

    Raises:
      ValueError: as the checks do, and :func:`stack_batches`.
    """
    check_params(params)
    groups = stack_batches(batches)
    check_loss(loss_fn, params, groups)
    return groups


def check_params(params: PyTree) -> None:
    """Refuse parameters on which nothing can be measured.

    Raises:
      ValueError: if there are none, if a leaf is not float32 or float64 (half precision
        rounds the perturbations away that are to be measured), or, where the values
        are known, if one is infinite or NaN.
    """
    leaves = {
        f"params{jax.tree_util.keystr(path)}": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    if not leaves:
        raise ValueError("params holds no arrays.")
    for name, leaf in leaves.items():
        dtype = jnp.result_type(leaf)
        if dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"{name} has dtype {dtype}: sharpness is measured in float32 or"
                " float64. Cast half-precision parameters up, and close over those"
                " that are not trained."
            )
    # The values are known even where a closure brings them into a traced function.
    known = {k: v for k, v in leaves.items() if not isinstance(v, jax.core.Tracer)}
    with jax.ensure_compile_time_eval():
        finite = {name: bool(flag) for name, flag in _are_finite(known).items()}
    for name, is_finite in finite.items():
        if not is_finite:
            raise ValueError(f"{name} has entries that are NaN or infinite.")


def check_loss(loss_fn: LossFn, params: PyTree, groups: tuple[Batch, ...]) -> None:
    """Refuse a loss that is not one real number.

    Raises:
      ValueError: if the loss of a batch is not a scalar array of a float dtype.
    """
    batch = jax.tree.map(lambda leaf: leaf[0], groups[0])
    loss = jax.eval_shape(loss_fn, params, batch)
    if not isinstance(loss, jax.ShapeDtypeStruct):
        raise ValueError(
            "The loss function must return the loss alone, a scalar, but returned"
            f" a {type(loss).__name__}. Leave auxiliary outputs out."
        )
    if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            "The loss function must return a real scalar, the mean over the batch, but"
            f" returned an array of shape {loss.shape} and dtype {loss.dtype}."
        )


def check_positive(name: str, value: Any) -> None:
    """Refuse a number that is not above 0 and finite; traced values pass.

    Raises:
      ValueError: names the argument and its value.
    """
    if isinstance(value, jax.core.Tracer):
        return
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}.")


def check_at_least(name: str, value: int, minimum: int) -> None:
    """Refuse a count below its minimum.

    Raises:
      ValueError: names the argument and its value.
    """
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")


@jax.jit
def _are_finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(leaf).all() for name, leaf in leaves.items()}


def _is_one_batch(batches: Any) -> bool:
    """Whether this is a batch itself, not something to iterate over for batches."""
    if batches is None or hasattr(batches, "dtype"):
        return True
    return isinstance(batches, (tuple, dict)) or dataclasses.is_dataclass(batches)


def _signature(batch: Batch) -> Any:
    leaves, structure = jax.tree.flatten(batch)
    return structure, [(np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def _group_shape(group: Batch) -> tuple[int, int]:
    """The number of batches in a group and of examples in each of them."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(group)]
    number = shapes[0][0] if shapes else 1
    size = next((shape[1] for shape in shapes if len(shape) > 1), 1)
    return number, size


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
    zeros = jax.tree.map(
        lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(widened, first)
    )

    def add(total: PyTree, batch: Batch) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, widened(batch)), None

    return jax.lax.scan(add, zeros, group)[0]
