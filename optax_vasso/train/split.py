"""Split batches: ascend on a share of the examples, descend on the others."""

from __future__ import annotations

import fractions
from collections.abc import Callable
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from optax_vasso.train.batches import exact_share, on_chosen, take_of_groups
from optax_vasso.train.gradients import GradientMaker, whole_batch

PyTree = Any


class SplitGradients(TypedDict):
    """The two gradient makers of :func:`split_batch`, by the train step's arguments."""

    gradient: GradientMaker
    ascent_gradient: GradientMaker


def split_batch(
    share: float = 1 / 8,
    *,
    gradient: GradientMaker = whole_batch,
    ascent_gradient: GradientMaker = whole_batch,
) -> SplitGradients:
    """Ascend on a share of the batch and descend on the other examples.

    It returns both gradient arguments of the train step, so that a step of SAM costs
    one gradient of the batch::

        train_step = make_train_step(loss_fn, sam(optimizer, rho=1.0), **split_batch())

    The ascent and the descent see different examples, so to first order the
    perturbation raises the loss of the descent only as far as the two gradients agree.
    The best radius is several times that of SAM: search ρ up to 10.

    The examples of the ascent are spread evenly over the batch, which should be in
    random order. If the denominator of the share divides the examples of each device,
    every device splits its own. Otherwise the ascent gets the nearest whole number of
    examples, at least one and at most all but one; a sharded batch is then gathered,
    and on explicit mesh axes JAX raises an error. Every leaf of the batch is split,
    example weights too: a loss that divides by the sum of the weights divides by that
    of its own part.

    Loss, model state and ``aux`` of the step are those of the ascent's examples at x,
    and ``perturbed_loss`` is that of the others at x + ε.

    Args:
      share: share of the examples for the ascent, in [1e-6, 1 − 1e-6].
      gradient: the gradient of the descent. With ``microbatched(7)`` and a share of
        1/8, all passes have the same size.
      ascent_gradient: the gradient of the ascent.

    Returns:
      Gradient makers by the names ``gradient`` and ``ascent_gradient``, as
      :func:`optax_vasso.make_train_step` takes them.

    Raises:
      ValueError: if share is out of its range; when the step is first called, if the
        batch has fewer than two examples, or leaves that differ in their number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_vasso.train import Inputs, split_batch
      >>> def loss_fn(params, model_state, batch, key):
      ...     return jnp.mean(batch * params), (model_state, ())
      >>> makers = split_batch(1 / 4)
      >>> for name in ("ascent_gradient", "gradient"):
      ...     gradient = makers[name](loss_fn)
      ...     _, grads = gradient(Inputs(jnp.ones(()), (), jnp.arange(8.0)))
      ...     print(grads)  # the mean of examples 0 and 4, then that of the others
      2.0
      4.0

    References:
      Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance
      Suppression <https://arxiv.org/abs/2309.15639>`_, 2023, compare with SAM-db, whose
      two gradients are of different batches. Bahri et al., `Sharpness-Aware
      Minimization Improves Language Model Generalization
      <https://arxiv.org/abs/2110.08529>`_, 2021, take a smaller batch for the ascent,
      a part of that of the descent.
    """
    exact = exact_share("share", share, "in [1e-6, 1 - 1e-6]", 1 - 1e-6)

    def of_part(ascends: bool) -> Callable[[PyTree], PyTree]:
        return lambda batch: _part(_check_splits(batch), exact, ascends)

    return {
        "gradient": on_chosen(of_part(False), gradient),
        "ascent_gradient": on_chosen(of_part(True), ascent_gradient),
    }


def _part(batch: PyTree, share: fractions.Fraction, ascends: bool) -> PyTree:
    """The examples of the ascent, spread evenly, or the others."""
    size = len(jax.tree.leaves(batch)[0])
    taken, of = share.numerator, share.denominator
    if size % of == 0:
        within = slice(None, taken) if ascends else slice(taken, None)
        return take_of_groups(batch, of, within)
    count = min(max(1, round(share * size)), size - 1)
    chosen = np.arange(count) * size // count
    if not ascends:
        chosen = np.setdiff1d(np.arange(size), chosen)
    return jax.tree.map(lambda leaf: leaf[chosen], batch)


def _check_splits(batch: PyTree) -> PyTree:
    """The batch as arrays, if all have the same number of examples, at least two."""
    batch = jax.tree.map(jnp.asarray, batch)
    leaves = jax.tree.leaves_with_path(batch)
    if not leaves:
        raise ValueError("split_batch needs a batch with examples, got no arrays.")
    sizes = []
    for path, leaf in leaves:
        name = f"batch{jax.tree_util.keystr(path)}"
        if not leaf.ndim:
            raise ValueError(
                f"{name} is a scalar, and split_batch divides leading axes: pass it to "
                "the loss in another way, or repeat it for each example."
            )
        sizes.append(leaf.shape[0])
        if sizes[-1] != sizes[0]:
            raise ValueError(
                f"{name} has {sizes[-1]} examples, other leaves of the batch have "
                f"{sizes[0]}: split_batch needs as many in every leaf."
            )
    if sizes[0] < 2:
        raise ValueError(
            f"split_batch needs at least two examples, got {sizes[0]}: use larger "
            "batches."
        )
    return batch
