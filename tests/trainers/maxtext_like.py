"""The parts of MaxText that meet an optimizer, with its names and interface.

Written after its repository at commit e591f30: the train state of NNX, the wrapper that
skips steps on spikes, a train step and an evaluation of one small layer.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx


class TrainStateNNX(nnx.Module):
    def __init__(self, model, optimizer):
        self.model = model
        self.optimizer = optimizer

    def apply_gradients(self, grads, **kwargs):
        self.optimizer.update(self.model, grads, **kwargs)


def skip_step_on_spikes(inner_opt, interval, scaling_factor):
    """Keeps a dictionary as its state, and the inner state whole when it skips."""

    def init_fn(params):
        return {
            "inner_state": inner_opt.init(params),
            "losses": jnp.zeros(interval),
            "count": jnp.zeros((), jnp.int32),
            "is_skipped": jnp.zeros((), bool),
        }

    def update_fn(updates, state, params=None, **extra_args):
        loss = extra_args.pop("loss")
        extra_args.pop("grad_norm", None)
        known = jnp.arange(interval) < state["count"]
        mean = jnp.mean(state["losses"], where=known)
        spread = jnp.std(state["losses"], where=known)
        calm = (state["count"] < interval // 2) | (
            loss - mean <= scaling_factor * spread
        )
        new_updates, inner_state = jax.lax.cond(
            calm,
            lambda: inner_opt.update(
                updates, state["inner_state"], params, **extra_args
            ),
            lambda: (jax.tree.map(jnp.zeros_like, updates), state["inner_state"]),
        )
        return new_updates, {
            "inner_state": inner_state,
            "losses": state["losses"].at[state["count"] % interval].set(loss),
            "count": state["count"] + 1,
            "is_skipped": ~calm,
        }

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def loss_fn(model, data):
    inputs, targets = data
    return jnp.mean((model(inputs) - targets) ** 2)


def train_step(model, state, data, loss=None, *, two_gradients=False, skips=False):
    """As MaxText's: of graph definition and state, with Intermediates left out.

    ``loss`` replaces the loss that the skip wrapper is told.
    """
    state = nnx.merge(model, state)
    graph, params, rest = nnx.split(state.model, nnx.Param, ...)

    def diff_wrapper(params, rest, data):
        local_model = nnx.merge(graph, params, rest, copy=True)
        return loss_fn(local_model, data), nnx.state(local_model, nnx.Not(nnx.Param))

    grad_func = jax.value_and_grad(diff_wrapper, has_aux=True)
    before = nnx.clone(rest)  # the state of the model is updated in place

    def grad_fn(params):
        _, grads = grad_func(params, before, data)
        return grads

    (value, new_rest), grads = grad_func(params, rest, data)
    nnx.update(state.model, new_rest)

    extra = {"grad_fn": grad_fn} if two_gradients else {}
    if skips:
        extra |= {"loss": value if loss is None else loss, "grad_norm": jnp.ones(())}
    state.apply_gradients(grads, **extra)
    return nnx.state(state, nnx.Not(nnx.Intermediate)), value


def eval_step(model, state, data, prepare=lambda state: state):
    """``prepare`` is the line that a lagged optimizer needs."""
    state = prepare(nnx.merge(model, state))
    return loss_fn(state.model, data)
