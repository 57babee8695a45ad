"""One gradient a step: perturb with what the last step has left."""

from typing import Any, NamedTuple

import optax

from optax_vasso import numerics
from optax_vasso.states import find_states
from optax_vasso.validation import check_params, check_structure, require_params

PyTree = Any


class LaggedState(NamedTuple):
    """State of :func:`lagged`.

    Attributes:
      perturbation: ε_{t−1}, by which the parameters are perturbed; like them, and zero
        before the first step.
      ascent_state: the state of the ascent chain.
      optimizer_state: the state of the base optimizer.
    """

    perturbation: PyTree
    ascent_state: optax.OptState
    optimizer_state: optax.OptState


def lagged(
    optimizer: optax.GradientTransformation, ascent: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-aware training at one gradient a step, in any training loop.

    VaSSO's direction is an average over many steps, of which the newest gradient is a
    small part. Leave it out: perturb x_t by the ε_{t−1} that the last step has left,
    and feed the chain with the gradient taken there. Between steps the training loop's
    ``params`` *are* the perturbed point y_t = x_t + ε_{t−1}, so with one gradient::

        g_t = ∇f_{B_t}(y_t)
        x_{t+1} = x_t + optimizer(g_t, x_t)
        ε_t = ascent(g_t, x_t)
        y_{t+1} = x_{t+1} + ε_t

    and nothing in the loop has to know. Evaluate, and keep as the result of training,
    :func:`lagged_eval_params`::

        optimizer = lagged(
            optax.sgd(0.1, momentum=0.9),
            optax.chain(unbuffered_vasso_ema(theta=0.4), sam_perturb(rho=0.1)),
        )
        state = optimizer.init(params)
        for batch in data:
            grads = jax.grad(loss)(params, batch)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        accuracy = evaluate(lagged_eval_params(state, params))

    The base optimizer sees g_t at x_t. The state holds ε_{t−1} and passes it to the
    ascent chain as the extra argument ``perturbation``.

    Args:
      optimizer: the base optimizer.
      ascent: a transformation whose output is added to the parameters.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs no extra argument.

    Raises:
      ValueError: at ``init``, if the parameters have no leaves or an integer leaf; at
        ``update``, if ``params`` is missing, the tree has changed, or a ``grad_fn`` is
        passed.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    ascent = optax.with_extra_args_support(ascent)

    def init_fn(params: PyTree) -> LaggedState:
        check_params(params)
        return LaggedState(
            perturbation=optax.tree.zeros_like(params),
            ascent_state=ascent.init(params),
            optimizer_state=optimizer.init(params),
        )

    def update_fn(
        updates: PyTree, state: LaggedState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, LaggedState]:
        require_params(params, "lagged")
        if extra_args.get("grad_fn") is not None:
            raise ValueError(
                "lagged takes one gradient a step and got a grad_fn: leave it out, or "
                "use sharpness_aware, which takes a second gradient by it."
            )
        check_structure(updates, state.perturbation, "lagged")
        point = optax.tree.sub(params, state.perturbation)
        perturbation, ascent_state = ascent.update(
            updates,
            state.ascent_state,
            point,
            perturbation=state.perturbation,
            **extra_args,
        )
        perturbation = numerics.fill_none(perturbation, state.perturbation)
        step, optimizer_state = optimizer.update(
            updates, state.optimizer_state, point, **extra_args
        )
        new_updates = numerics.map_updates(
            lambda u, new, old: u + (new - old), step, perturbation, state.perturbation
        )
        return new_updates, LaggedState(perturbation, ascent_state, optimizer_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def lagged_eval_params(state: optax.OptState, params: PyTree) -> PyTree:
    """The parameters x_t to evaluate, from the perturbed ones that are trained.

    Args:
      state: the state of :func:`lagged`, or of an optimizer that contains exactly one.
      params: the training loop's parameters, x_t + ε_{t−1}.

    Returns:
      x_t, like ``params``, up to one rounding.

    Raises:
      ValueError: if the state holds no :class:`LaggedState`, or more than one.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso import lagged, lagged_eval_params, sam_perturb
      >>> params = jnp.array([3.0, 4.0])
      >>> optimizer = lagged(optax.sgd(0.1), sam_perturb(rho=0.5))
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params, state.perturbation)
      [3. 4.] [0.3 0.4]
      >>> print(lagged_eval_params(state, params))
      [2.7 3.6]
    """
    found = find_states(state, LaggedState)
    if len(found) != 1:
        raise ValueError(
            f"state holds {len(found)} states of lagged where one is needed: pass the "
            "optimizer state whose params these are."
        )
    return numerics.cast_like(optax.tree.sub(params, found[0].perturbation), params)
