"""Parameters with few bits: where a perturbation is rounded away, and what helps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso import numerics
from optax_vasso.validation import require_params

PyTree = Any


class ArrivalState(NamedTuple):
    """State of :func:`track_arrival`.

    Attributes:
      arrived: cosine of the perturbation that the parameters take in with the one
        intended, a float32 (under x64 float64) scalar; 0 before the first step.
      ascent_state: the state of the ascent chain.
    """

    arrived: jax.Array
    ascent_state: optax.OptState


def track_arrival(
    ascent: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Measure how much of a perturbation survives the rounding of x + ε.

    The output is that of ``ascent``. A weight of 0.03 in bfloat16 has neighbours at a
    distance of 1e-4, and a smaller perturbation leaves it where it is.

    Args:
      ascent: any ascent chain.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; read the number with
      ``optax.tree.get(state, "arrived")``, or among the metrics of
      :func:`optax_vasso.make_train_step`.
    """
    ascent = optax.with_extra_args_support(ascent)

    def init_fn(params: PyTree) -> ArrivalState:
        dtype = jax.dtypes.canonicalize_dtype(float)
        return ArrivalState(jnp.zeros((), dtype), ascent.init(params))

    def update_fn(
        updates: PyTree, state: ArrivalState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, ArrivalState]:
        require_params(params, "track_arrival")
        perturbation, ascent_state = ascent.update(
            updates, state.ascent_state, params, **extra_args
        )
        # Not optax.tree.sub: the two are close, so their difference is exact.
        taken_in = jax.tree.map(
            lambda x, e: (
                jax.lax.reduce_precision(
                    numerics.widen(x, jnp.dtype(jnp.float32)) + e,
                    jnp.finfo(x.dtype).nexp,
                    jnp.finfo(x.dtype).nmant,
                )
                - x
                if jnp.finfo(x.dtype).bits < 32
                else (x + e) - x
            ),
            params,
            perturbation,
        )
        arrived = numerics.cosine(taken_in, perturbation)
        return perturbation, ArrivalState(
            arrived.astype(state.arrived.dtype), ascent_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def in_float32(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Run an optimizer on float32 copies of parameters and gradients.

    For parameters in bfloat16 or float16: x + ε is formed in float32, ``grad_fn`` gets
    it in float32, and averages and moments are kept in float32. The model has to
    compute with what it is given: a layer that casts its weights to bfloat16 rounds
    the perturbation away again. Updates come back in the dtypes of the parameters,
    as :func:`optax.apply_updates` adds them.

    Args:
      optimizer: any optimizer, typically a sharpness-aware one.

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
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params: PyTree) -> optax.OptState:
        return optimizer.init(_widen(params))

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
        return numerics.cast_like(new_updates, params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _widen(tree: PyTree) -> PyTree:
    """Floats of less than 32 bits as float32."""
    return jax.tree.map(
        lambda leaf: (
            leaf.astype(jnp.float32)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            and jnp.finfo(leaf.dtype).bits < 32
            else leaf
        ),
        tree,
    )
