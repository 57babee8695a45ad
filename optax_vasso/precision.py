"""Low precision: keeping a perturbation from being rounded away."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_vasso import numerics
from optax_vasso.one_gradient import LaggedState
from optax_vasso.states import find_states
from optax_vasso.validation import check_transformation, require_params

PyTree = Any


def in_float32(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Run an optimizer on float32 copies of parameters and gradients.

    For parameters in bfloat16 or float16: x + ε is formed in float32, ``grad_fn`` gets
    it in float32, and averages and moments are kept in float32. The model has to
    compute with what it is given: a layer that casts its weights to bfloat16 rounds
    the perturbation away again. Updates come back in the dtypes of the parameters,
    as :func:`optax.apply_updates` adds them.

    A lagged optimizer keeps x_t in float32 by itself, which no wrapper can do for it:
    there only the base optimizer is wrapped, as in
    ``lagged_vasso(in_float32(optimizer), accumulator_dtype=jnp.float32)``.

    Args:
      optimizer: any optimizer but a lagged one, typically a sharpness-aware one.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that passes every extra argument
      on; ``update`` needs ``params``.

    Raises:
      ValueError: if optimizer is no transformation; at ``init``, if it is lagged.

    Examples:
      Near 1 a bfloat16 has neighbours at 1/128: a perturbation of 1/1000 is lost in it.

      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso import in_float32, sam
      >>> params = jnp.ones(4, jnp.bfloat16)
      >>> grad_fn = lambda x: 1000 * (x - 1)
      >>> plain = sam(optax.sgd(0.5), rho=0.002)
      >>> for optimizer in (plain, in_float32(plain)):
      ...     updates, _ = optimizer.update(
      ...         jnp.ones_like(params), optimizer.init(params), params, grad_fn=grad_fn
      ...     )
      ...     print(abs(updates))
      [0 0 0 0]
      [0.5 0.5 0.5 0.5]
    """
    check_transformation("optimizer", optimizer)
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params: PyTree) -> optax.OptState:
        state = optimizer.init(_widen(params))
        if find_states(state, LaggedState):
            raise ValueError(
                "optimizer is lagged, and the float32 parameters that it would be "
                "given end with the step: wrap its base optimizer instead, as in "
                "lagged_vasso(in_float32(optimizer), accumulator_dtype=jnp.float32)."
            )
        return state

    def update_fn(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree = None,
        **extra_args: Any,
    ) -> tuple[PyTree, optax.OptState]:
        require_params(params, "in_float32")
        new_updates, state = optimizer.update(
            _widen(updates), state, _widen(params), **extra_args
        )
        return _cast_to_params(new_updates, params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _cast_to_params(updates: PyTree, params: PyTree) -> PyTree:
    return numerics.map_updates(lambda u, x: u.astype(x.dtype), updates, params)


def _widen(tree: PyTree) -> PyTree:
    """Floats of less than 32 bits as float32."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if numerics.has_few_bits(leaf) else leaf,
        tree,
    )
