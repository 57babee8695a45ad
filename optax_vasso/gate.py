"""When to ascend: gates that decide, step by step, whether the adversary is asked.

A step whose gate is closed descends on the clean gradient and costs one gradient
instead of two; the averages of the ascent chain take the clean gradient in either way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_vasso.validation import (
    Hyperparameter,
    check_hyperparameter,
    check_integer,
    value_at,
)


class Gate(NamedTuple):
    """A pair of pure functions that says on which steps to ascend.

    Attributes:
      init: () -> state, a tree of arrays.
      update: state -> (ascend, state), where ``ascend`` is R_t: a boolean scalar, or
        the Python value ``True`` where the answer is known before the step runs.
    """

    init: Callable[[], Any]
    update: Callable[[Any], tuple[jax.Array | bool, Any]]


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
      key: the key of the next draw: raw uint32 words of shape (2,), so that the state
        stays a tree of plain arrays for checkpoints, ``pmap`` and NumPy.
    """

    step: jax.Array
    key: jax.Array


def always() -> Gate:
    """Ascend on every step: SAM as published, two gradients a step."""
    return Gate(lambda: (), lambda state: (True, state))


def every(k: int) -> Gate:
    """Ascend on steps 0, k, 2k, ...: 1 + 1/k gradients a step.

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
    check_integer("k", k, 1)
    return _counting(lambda step: step % k == 0)


def from_step(n: int) -> Gate:
    """Ascend from step n on: plain training first, one gradient a step until then.

    Args:
      n: the first step that ascends, counted from 0, >= 0.

    Raises:
      ValueError: if n is not an integer >= 0.
    """
    check_integer("n", n, 0)
    return _counting(lambda step: step >= n)


def bernoulli(p: Hyperparameter, seed: int | jax.Array = 0) -> Gate:
    """Ascend with probability p, independently on each step: eVASSO's gate.

    The expected cost is 1 + p gradients a step.

    Args:
      p: probability, in (0, 1]: a number, a schedule of the step, or a traced scalar.
      seed: an integer, or a raw key (uint32 of shape (2,)). Data-parallel processes
        need the same seed, or they would not ascend together.

    Raises:
      ValueError: if p is a number outside (0, 1].

    References:
      Li et al., `VASSO: Variance Suppression for Sharpness-Aware Minimization
      <https://arxiv.org/abs/2509.02433>`_, 2025.
    """
    check_hyperparameter("p", p, "in (0, 1]", lambda v: 0 < v <= 1)

    def init() -> BernoulliState:
        key = jnp.asarray(seed)
        if key.ndim == 0:
            key = jax.random.PRNGKey(key)
        return BernoulliState(jnp.zeros((), jnp.int32), key)

    def update(state: BernoulliState) -> tuple[jax.Array, BernoulliState]:
        key, draw = jax.random.split(state.key)
        ascend = jax.random.bernoulli(draw, value_at(p, state.step))
        return ascend, BernoulliState(state.step + 1, key)

    return Gate(init, update)


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
    def update(state: StepState) -> tuple[jax.Array, StepState]:
        return is_open(state.step), StepState(state.step + 1)

    return Gate(lambda: StepState(jnp.zeros((), jnp.int32)), update)


def _joined(gates: tuple[Gate, ...], combine: Callable[..., Any]) -> Gate:
    if not gates:
        raise ValueError("gates is empty: pass at least one gate.")

    def update(states: tuple) -> tuple[jax.Array | bool, tuple]:
        answers = [
            gate.update(state) for gate, state in zip(gates, states, strict=True)
        ]
        ascend, *others = (answer for answer, _ in answers)
        for other in others:
            ascend = combine(ascend, other)
        return ascend, tuple(state for _, state in answers)

    return Gate(lambda: tuple(gate.init() for gate in gates), update)
