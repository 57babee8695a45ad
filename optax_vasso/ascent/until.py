"""A radius that is zero in the last step, so that a loop returns the clean point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_vasso._internal import checks
from optax_vasso._internal.checks import Hyperparameter, value_at


def until(steps: Any, rho: Hyperparameter) -> Callable[[jax.Array], jax.Array]:
    """A radius that is zero in the last of a number of steps.

    A loop that returns only the model would return the perturbed parameters of a lagged
    optimizer, and without the optimizer's state :func:`optax_vasso.eval_params` cannot
    correct them. With this radius the last step leaves no perturbation::

        optimizer = lagged_vasso(optax.adam(1e-3), rho=until(1000, 0.1))
        params = fit(model, optimizer, num_steps=1000)  # x_1000

    No gradient changes, since a lagged step uses the previous step's perturbation. If
    the loop continues, it trains with the base optimizer alone; if it ends earlier, its
    parameters are perturbed.

    Args:
      steps: number of updates in the loop, >= 1: an integer, or a traced one. Under
        :class:`optax.MultiSteps` it is the number of updates that are not skipped.
      rho: radius of the earlier steps, >= 0: a number, a schedule of the step, or
        traced.

    Returns:
      A schedule, to be used as the ``rho`` of any recipe or perturbation. Its value is
      a float scalar.

    Raises:
      ValueError: if steps is no integer >= 1 or rho is negative or not finite.

    Examples:
      >>> from optax_vasso.ascent import until
      >>> schedule = until(3, 0.1)
      >>> print(*(float(f"{schedule(step):.1f}") for step in range(4)))
      0.1 0.1 0.0 0.0
    """
    checks.check_integer("steps", steps, 1)
    checks.check_not_negative("rho", rho)

    def schedule(step: jax.Array) -> jax.Array:
        return jnp.where(step < steps - 1, value_at(rho, step), 0.0)

    return schedule
