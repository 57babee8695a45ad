"""Two gradients of a network whose layers are stacked for ``jax.lax.scan``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optax_vasso._internal import mapped
from optax_vasso.train.gradients import GradientFn, GradientMaker, Inputs, whole_batch
from optax_vasso.train.losses import LossFn


def apart(gradient: GradientMaker = whole_batch) -> GradientMaker:
    """Compute each gradient separately: for networks that scan their layers.

    A scan keeps the activations of all layers in a stack that begins with zeros. If two
    gradients are in one computation, as in a step of SAM, XLA makes one such stack for
    both and copies it before the first, so the peak has the activations twice. Computed
    separately, it has them once, as in plain training. Neither the gradients nor their
    operations change.

    Without a scan over layers do not use it: the whole gradient is then complete before
    the optimizer reads its first leaf, which takes up to one more copy of the
    parameters. In :func:`microbatched` parts the gradients are nearly apart already:
    there it saves about a shard of the parameters.

    Args:
      gradient: the gradient to compute.

    Returns:
      A gradient maker for :func:`optax_vasso.make_train_step`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optax_vasso.train import Inputs, apart
      >>> def loss_fn(params, model_state, batch, key):
      ...     def layer(x, weight):
      ...         return jnp.tanh(weight * x), None
      ...     return jnp.sum(jax.lax.scan(layer, batch, params)[0]), (model_state, ())
      >>> (loss, _), grads = apart()(loss_fn)(Inputs(jnp.zeros(3), (), jnp.ones(2)))
      >>> print(loss, grads)
      0.0 [0. 0. 0.]
    """

    def make(loss_fn: LossFn) -> GradientFn:
        grad_fn = gradient(loss_fn)

        def in_loop(at: Inputs) -> Any:
            def once(carry: Any) -> Any:
                del carry
                return jnp.zeros((), bool), jax.tree.map(jnp.asarray, grad_fn(at))

            # XLA does not evaluate the condition, so it keeps this loop of one round.
            nothing = jax.tree.map(mapped.zeros_like, jax.eval_shape(grad_fn, at))
            start = (jnp.ones((), bool), nothing)
            return jax.lax.while_loop(lambda carry: carry[0], once, start)[1]

        return in_loop

    return make
