"""When to ascend: gates decide, step by step, whether to perturb.

A step whose gate is closed descends on the clean gradient and costs one gradient
instead of two. The clean gradient enters the averages of the ascent either way.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_vasso._internal import checks, mapped, numerics
from optax_vasso._internal.checks import Hyperparameter, value_at

__all__ = [
    "Gate",
    "adaptive",
    "all_of",
    "always",
    "any_of",
    "bernoulli",
    "every",
    "from_step",
]


class Gate(NamedTuple):
    """A pair of pure functions that decides on which steps to ascend.

    Attributes:
      init: () -> state, a tree of arrays.
      update: ``(state, **extra_args) -> (ascend, state)``, where ``ascend`` is R_t: a
        boolean scalar, or the Python value ``True`` where the answer is known before
        the step runs. As in the condition functions of Optax, the extra arguments are
        those of the optimizer's ``update`` (the loss as ``value``, if it was passed),
        together with the clean gradient as ``grads``, and ``params``.
    """

    init: Callable[[], Any]
    update: Callable[..., tuple[jax.Array | bool, Any]]


class StepState(NamedTuple):
    """State of :func:`every` and :func:`from_step`.

    Attributes:
      step: steps so far, an int32 scalar.
    """

    step: jax.Array


class BernoulliState(NamedTuple):
    """State of :func:`bernoulli`.

    Attributes:
      step: steps so far, an int32 scalar.
      key: the key of the next draw: its raw uint32 words, of shape (2,) for JAX's
        default keys, so that the state stays a tree of plain arrays for checkpoints,
        ``pmap`` and NumPy.
    """

    step: jax.Array
    key: jax.Array


class AdaptiveState(NamedTuple):
    """State of :func:`adaptive`.

    Attributes:
      step: steps so far, an int32 scalar.
      weight: sum of the weights in the averages, a float32 (under x64 float64) scalar:
        0 before the first step, then it approaches 1.
      length: √μ_t, the root of the running mean of ‖g‖², likewise.
      variance: σ²_t/μ²_t, the running variance of ‖g‖² in units of its mean, likewise.
    """

    step: jax.Array
    weight: jax.Array
    length: jax.Array
    variance: jax.Array


def always() -> Gate:
    """Ascend on every step: SAM as published, two gradients per step."""
    return Gate(lambda: (), lambda state, **extra_args: (True, state))


def every(k: int) -> Gate:
    """Ascend at steps 0, k, 2k, ...: 1 + 1/k gradients per step.

    Args:
      k: the period in steps, >= 1.

    Raises:
      ValueError: if k is not an integer >= 1.

    Examples:
      >>> from optax_vasso import gate
      >>> every_third = gate.every(3)
      >>> state = every_third.init()
      >>> for _ in range(4):
      ...     ascend, state = every_third.update(state)
      ...     print(ascend)
      True
      False
      False
      True
    """
    checks.check_integer("k", k, 1)
    return _counting(lambda step: step % k == 0)


def from_step(n: int) -> Gate:
    """Ascend from step n on, after plain training at one gradient per step.

    Args:
      n: the first step that ascends, counted from 0, >= 0.

    Raises:
      ValueError: if n is not an integer >= 0.
    """
    checks.check_integer("n", n, 0)
    return _counting(lambda step: step >= n)


def bernoulli(probability: Hyperparameter, seed: int | jax.Array = 0) -> Gate:
    """Ascend with a probability, independently on each step: eVASSO's gate.

    The expected cost is 1 + probability gradients per step.

    Args:
      probability: in (0, 1]: a number, a schedule of the step, or a traced scalar.
      seed: an integer, or a key of :func:`jax.random.key` or
        :func:`jax.random.PRNGKey` in any implementation, which is copied. Data-parallel
        processes need the same seed, or they would not ascend together.

    Raises:
      ValueError: if probability is a number outside (0, 1] or seed is no integer and no
        key.

    References:
      Li et al., `VASSO: Variance Suppression for Sharpness-Aware Minimization
      <https://arxiv.org/abs/2509.02433>`_, 2025.
    """
    checks.check_hyperparameter(
        "probability", probability, "in (0, 1]", lambda v: 0 < v <= 1
    )
    _check_seed(seed)
    impl = _key_impl(seed)

    def init() -> BernoulliState:
        if checks.is_key(seed):
            key = jax.random.key_data(seed)
        elif jnp.ndim(seed):
            key = jnp.array(seed)
        else:
            key = jax.random.PRNGKey(seed)
        # A copy, so that a train step that donates its state leaves the caller's alone.
        return BernoulliState(jnp.zeros((), jnp.int32), jnp.copy(key))

    def update(
        state: BernoulliState, **extra_args: Any
    ) -> tuple[jax.Array, BernoulliState]:
        del extra_args
        key, draw = jax.random.split(jax.random.wrap_key_data(state.key, impl=impl))
        # JAX refuses an integer, such as a probability of 1.
        ascend = jax.random.bernoulli(draw, 1.0 * value_at(probability, state.step))
        return ascend, BernoulliState(
            optax.safe_increment(state.step), jax.random.key_data(key)
        )

    return Gate(init, update)


def adaptive(threshold: Hyperparameter = 0.0, decay: Hyperparameter = 0.9) -> Gate:
    """Ascend if the gradient is large compared with its history: the gate of AE-SAM.

    R_t = 1 if ‖g_t‖² >= μ_t + c σ_t, with the moving averages
    μ_t = δ μ_{t−1} + (1 − δ) ‖g_t‖² and σ²_t = δ σ²_{t−1} + (1 − δ) (‖g_t‖² − μ_t)²,
    which start at zero. SAM differs from plain training mainly on batches on which the
    loss is steep.

    One bad step does not close the gate for long. A non-finite gradient does not ascend
    and leaves the averages unchanged. A gradient above ten times the root mean square
    of its predecessors ascends and counts as twice that, so that the averages follow
    gradients that stay large.

    Args:
      threshold: number c of deviations above the mean at which a step ascends: a finite
        number, a schedule of the step, or a traced scalar. The authors let it fall
        linearly from 1 to −1 over the training,
        ``optax.linear_schedule(1.0, -1.0, num_steps)``: few ascents at first, most of
        them at the end.
      decay: δ of both averages, in [0, 1): a number, a schedule, or traced.

    Raises:
      ValueError: if threshold is not a finite number or decay is outside [0, 1); at
        ``update``, if ``grads`` is missing.

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, 2023.
    """
    checks.check_hyperparameter(
        "threshold", threshold, "a finite number", math.isfinite
    )
    checks.check_hyperparameter("decay", decay, "in [0, 1)", lambda v: 0 <= v < 1)

    def init() -> AdaptiveState:
        scalars = [numerics.state_scalar() for _ in range(3)]
        return AdaptiveState(jnp.zeros((), jnp.int32), *scalars)

    def update(
        state: AdaptiveState, *, grads: Any = None, **extra_args: Any
    ) -> tuple[jax.Array, AdaptiveState]:
        if grads is None:
            raise ValueError(
                "gate.adaptive needs the clean gradient: call "
                "update(state, grads=grads), as sharpness_aware does."
            )
        dtype = state.length.dtype
        newest = numerics.norm(grads).astype(dtype)
        axes = mapped.disagreement(
            newest, extra_args.get("params"), extra_args.get("axis_name")
        )
        if axes:  # a local ascent: all devices decide alike
            newest = _root_mean_square(newest, axes)
        share, bar = (
            jnp.asarray(value_at(value, state.step), dtype)
            for value in (decay, threshold)
        )

        # A length and ratios: ‖g‖² and its variance leave the range of float32 for
        # gradients of 1e10.
        is_first = state.length == 0
        usual = state.length / jnp.sqrt(_or_one(state.weight))
        is_extreme = ~is_first & (newest > 10 * usual)
        counted = jnp.where(is_extreme, 2 * usual, newest)
        square = jnp.where(is_first, 1, (counted / _or_one(state.length)) ** 2)
        old, new = jnp.where(is_first, 0, share), 1 - share
        growth = old + new * square  # μ_t/μ_{t−1}
        ratio = square / _or_one(growth)  # ‖g‖²/μ_t
        variance = old * state.variance / _or_one(growth) ** 2 + new * (ratio - 1) ** 2
        averages = (
            share * state.weight + new,
            jnp.where(is_first, counted, state.length) * jnp.sqrt(growth),
            # It grows while gradients vanish, and would stay infinite.
            jnp.minimum(variance, 1e24),
        )

        bound = 1 + bar * jnp.sqrt(averages[2])
        is_finite = jnp.isfinite(newest)
        return ((ratio >= bound) | is_extreme) & is_finite, AdaptiveState(
            optax.safe_increment(state.step),
            *(
                jnp.where(is_finite, *pair)
                for pair in zip(averages, state[1:], strict=True)
            ),
        )

    return Gate(init, update)


def _root_mean_square(value: jax.Array, axis_name: tuple[str, ...]) -> jax.Array:
    """Over a mapped axis, squaring no number above one."""
    largest = jax.lax.pmax(value, axis_name)
    mean = jax.lax.pmean((value / _or_one(largest)) ** 2, axis_name)
    return largest * jnp.sqrt(mean)


def _or_one(divisor: jax.Array) -> jax.Array:
    return jnp.where(divisor == 0, 1, divisor)


def _check_seed(seed: Any) -> None:
    if isinstance(seed, jax.Array | np.ndarray):
        is_integer = seed.ndim == 0 and jnp.issubdtype(seed.dtype, jnp.integer)
        is_valid = is_integer or checks.is_key(seed) or seed.dtype == jnp.uint32
    else:
        is_valid = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
    if not is_valid:
        raise ValueError(
            f"seed must be an integer or a random key, got {checks.shown(seed)}: pass "
            "0, or jax.random.key(0)."
        )


def _key_impl(seed: int | jax.Array) -> Any:
    """The implementation of a key; that of raw words follows from their number."""
    if checks.is_key(seed):
        return jax.random.key_impl(seed)
    default = jax.random.key_data(jax.random.key(0)).shape
    if jnp.ndim(seed) == 0 or jnp.shape(seed)[-1:] == default:
        return None  # the one that jax.config names
    return "rbg" if jnp.shape(seed)[-1] == 4 else "threefry2x32"


def all_of(*gates: Gate) -> Gate:
    """Ascend when every one of the gates is open.

    Examples:
      Plain training for two steps, then every second one:

      >>> from optax_vasso import gate
      >>> late = gate.all_of(gate.from_step(2), gate.every(2))
      >>> state = late.init()
      >>> for _ in range(4):
      ...     ascend, state = late.update(state)
      ...     print(ascend)
      False
      False
      True
      False
    """
    return _joined(gates, jnp.logical_and)


def any_of(*gates: Gate) -> Gate:
    """Ascend when at least one of the gates is open."""
    return _joined(gates, jnp.logical_or)


def _counting(is_open: Callable[[jax.Array], jax.Array]) -> Gate:
    def update(state: StepState, **extra_args: Any) -> tuple[jax.Array, StepState]:
        del extra_args
        return is_open(state.step), StepState(optax.safe_increment(state.step))

    return Gate(lambda: StepState(jnp.zeros((), jnp.int32)), update)


def check_gate(value: Any) -> None:
    """Raise a ValueError for anything but a gate, such as a function that makes one."""
    if not isinstance(value, Gate):
        raise ValueError(
            f"gate must be a Gate such as gate.every(2), got "
            f"{getattr(value, '__name__', repr(value))}: make one with a function of "
            "optax_vasso.gate, and call it."
        )


def _joined(gates: tuple[Gate, ...], combine: Callable[..., Any]) -> Gate:
    if not gates:
        raise ValueError("gates is empty: pass at least one gate.")
    for gate in gates:
        check_gate(gate)

    def update(states: tuple, **extra_args: Any) -> tuple[jax.Array | bool, tuple]:
        answers = [
            gate.update(state, **extra_args)
            for gate, state in zip(gates, states, strict=True)
        ]
        ascend, *others = (answer for answer, _ in answers)
        for other in others:
            ascend = combine(ascend, other)
        return ascend, tuple(state for _, state in answers)

    return Gate(lambda: tuple(gate.init() for gate in gates), update)
