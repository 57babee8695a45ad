"""The clean point is found in whatever a checkpoint or a wrapper made of the state."""

import dataclasses
import functools
from typing import Any, NamedTuple

import cases
import equinox as eqx
import flax
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState
from jax.tree_util import GetAttrKey

import optax_vasso as ov

RHO = 0.5


class Layers(NamedTuple):
    kernel: jax.Array
    direction: jax.Array  # a name that our state has too


# Twelve equal layers: as keys in alphabetic order, '10' comes before '2'.
PARAMS = {
    "layers": [jnp.full(2, float(i)) for i in range(12)],
    "head": Layers(jnp.asarray([[3.0, 1.0], [-1.0, 2.0]]), jnp.asarray([1.0, -2.0])),
    "frozen": jnp.ones(3),
}
MASK = {"layers": True, "head": True, "frozen": False}


def loss(params):
    # Another gradient in every layer, so that no two of them can be exchanged.
    leaves = jax.tree.leaves(params)
    return sum(jnp.sum(jnp.sin(x + i) + x**2) for i, x in enumerate(leaves))


@functools.cache
def trained(name):
    """Parameters and state of a loop after three steps."""
    return train(OPTIMIZERS[name], PARAMS)


def train(optimizer, params):
    @jax.jit
    def run(params):
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    return run(params)


def lagged(base=None, **kwargs):
    """With a learning rate of zero, so that the clean point is the start."""
    return ov.lagged_vasso(base or optax.sgd(0.0), rho=RHO, **kwargs)


OPTIMIZERS = {
    "sgd": lagged(),
    "adam": lagged(optax.adam(0.0)),
    "mask": lagged(mask=MASK),
    "any chain": ov.lagged(
        optax.sgd(0.0), optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(RHO))
    ),
    "chain": optax.chain(optax.clip(1e9), lagged()),
    "partition": optax.partition(
        {"a": lagged(), "b": optax.set_to_zero()},
        {"layers": "a", "head": "a", "frozen": "b"},
    ),
    "flatten": optax.flatten(lagged()),
    "MultiSteps": optax.MultiSteps(lagged(), 1),
}


def by_msgpack(tree, path):
    return serialization.msgpack_restore(serialization.to_bytes(tree))


def by_state_dict(tree, path):
    return serialization.to_state_dict(tree)


def by_orbax(tree, path):
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(path / "state", tree)
    checkpointer.wait_until_finished()
    return checkpointer.restore(path / "state")


RESTORED = {"msgpack": by_msgpack, "state dict": by_state_dict, "orbax": by_orbax}


def assert_clean(found, start=PARAMS):
    assert jax.tree.structure(found) == jax.tree.structure(start)
    jax.tree.map(
        # ε is added and taken off: each rounds once, and all entries are below 16.
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=16 * 2.0**-23),
        found,
        start,
    )


def test_the_smallest_case():
    optimizer = ov.lagged_vasso(optax.sgd(0.1), rho=0.1)
    params = jnp.ones(4)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    params = optax.apply_updates(params, updates)
    raw = serialization.msgpack_restore(serialization.to_bytes(state))
    np.testing.assert_allclose(params, 0.95, rtol=1e-6)
    np.testing.assert_allclose(ov.eval_params(raw, params), 0.9, rtol=1e-6)


@pytest.mark.parametrize(("name", "way"), cases.in_turn(OPTIMIZERS, RESTORED))
def test_a_state_restored_without_a_target(name, way, tmp_path):
    params, state = trained(name)
    assert optax.tree.norm(optax.tree.sub(params, PARAMS)) > 0.9 * RHO
    raw = RESTORED[way](state, tmp_path)
    assert_clean(ov.eval_params(raw, params))
    if name != "flatten":
        # One vector has lost the names, and parameters in dictionaries the order.
        found = ov.eval_params(raw, by_msgpack(params, None))
        assert_clean(serialization.from_state_dict(PARAMS, found))


@pytest.mark.parametrize("way", RESTORED)
def test_a_whole_train_state_restored(way, tmp_path):
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=lagged())
    state = state.apply_gradients(grads=jax.grad(loss)(PARAMS))
    raw = RESTORED[way](state, tmp_path)
    assert_clean(ov.eval_params(raw["opt_state"], state.params))
    assert_clean(ov.eval_params(raw, state.params))
    assert_clean(ov.eval_params(state, state.params))


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class SplicedState:
    """The fields of another state and one more, as Levanter's SkipStepState has them.

    Made after levanter/optim/skipstep.py, so that it loads what was saved without it.
    """

    inner: Any
    losses: jax.Array

    def tree_flatten_with_keys(self):
        pairs, structure = jax.tree_util.tree_flatten_with_path(
            self.inner, is_leaf=lambda node: node is not self.inner
        )
        below = [(path[0], child) for path, child in pairs]
        return [*below, (GetAttrKey("_skipstep_losses"), self.losses)], structure

    @classmethod
    def tree_unflatten(cls, structure, children):
        return cls(jax.tree.unflatten(structure, children[:-1]), children[-1])


@dataclasses.dataclass
class Unregistered:
    inner: Any


@flax.struct.dataclass
class Registered:
    inner: Any


class Module(eqx.Module):
    inner: Any
    name: str = eqx.field(static=True, default="a state")


FOREIGN = {
    "spliced": lambda state: SplicedState(state, jnp.zeros(3)),
    "spliced twice": lambda s: SplicedState(SplicedState(s, jnp.zeros(3)), jnp.ones(2)),
    "a dataclass": Unregistered,
    "a Flax dataclass": Registered,
    "an Equinox module": Module,
    "lists": lambda state: [[], [None, [state]]],
    "several": lambda state: Unregistered({"a": Module([Registered(state)])}),
}


@pytest.mark.parametrize("container", FOREIGN)
@pytest.mark.parametrize("name", ["sgd", "chain", "partition"])
def test_a_state_in_foreign_containers(container, name):
    params, state = trained(name)
    wrapped = FOREIGN[container](state)
    assert_clean(ov.eval_params(wrapped, params))


def test_inside_a_compiled_function():
    params, state = trained("partition")

    @jax.jit
    def evaluate(state, raw, params):
        wrapped = FOREIGN["several"](state)
        return ov.eval_params(wrapped, params), ov.eval_params(raw, params)

    for clean in evaluate(state, by_msgpack(state, None), params):
        assert_clean(clean)


@pytest.mark.parametrize("way", ["state dict", "orbax"])
def test_a_spliced_state_restored_without_a_target(way, tmp_path):
    params, state = trained("sgd")
    spliced = SplicedState(state, jnp.zeros(3))
    if way == "orbax":
        raw = by_orbax(spliced, tmp_path)
    else:
        raw = {**by_state_dict(state, None), "_skipstep_losses": jnp.zeros(3)}
    assert_clean(ov.eval_params(raw, params))


def test_a_wrapper_that_keeps_the_leaves_in_a_list():
    leaves, structure = jax.tree.flatten(PARAMS)
    points, state = train(lagged(), leaves)
    params = structure.unflatten(points)
    assert_clean(ov.eval_params(state, params))
    assert_clean(ov.eval_params(by_msgpack(state, None), params))


@pytest.mark.parametrize("rate", [optax.sgd(0.0), optax.adam(0.0)], ids=["sgd", "adam"])
@pytest.mark.parametrize("form", ["state", "pure", "orbax", "split", "optimizer"])
def test_the_states_of_nnx(rate, form, tmp_path):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    start = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, lagged(rate), wrt=nnx.Param)
    for _ in range(2):
        grads = nnx.grad(lambda m: jnp.sum((m(jnp.ones((4, 3))) - 1) ** 2))(model)
        optimizer.update(model, grads)
    state = {
        # A state of NNX keeps nothing of what is empty, as plain SGD's is.
        "state": lambda: nnx.state(optimizer),
        "pure": lambda: nnx.to_pure_dict(nnx.state(optimizer)),
        "orbax": lambda: by_orbax(nnx.state(optimizer), tmp_path),
        "split": lambda: nnx.split(optimizer)[1],
        "optimizer": lambda: optimizer,
    }[form]()
    params = nnx.state(model, nnx.Param)
    assert_clean(ov.eval_params(state, params), start)
    pure = ov.eval_params(state, nnx.to_pure_dict(params))
    assert_clean(pure, nnx.to_pure_dict(start))


def test_all_variables_of_nnx_where_the_optimizer_has_a_part_of_them():
    model = nnx.LoRA(
        3, 2, 4, base_module=nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1)
    )
    optimizer = nnx.Optimizer(model, lagged(), wrt=nnx.LoRAParam)
    ov.eval_params(optimizer.opt_state, nnx.state(model, nnx.LoRAParam))
    with pytest.raises(ValueError, match="with NNX those of its wrt, as in nnx.state"):
        ov.eval_params(optimizer.opt_state, nnx.state(model, nnx.Param))


def test_replicas_are_evaluated_together():
    """A state and parameters with a leading axis of replicas, as vmap and pmap have."""
    optimizer = lagged()
    starts = jnp.stack([jnp.asarray([1.0, 2.0]), jnp.asarray([-3.0, 0.5])])
    states = jax.vmap(optimizer.init)(starts)
    points = starts
    for _ in range(2):
        updates, states = jax.vmap(optimizer.update)(3 * points, states, points)
        points = points + updates
    assert jnp.linalg.norm(points - starts, axis=1) == pytest.approx(RHO, rel=1e-5)
    assert_clean(ov.eval_params(states, points), starts)


STATES = {
    "sgd": optax.sgd(0.1),
    "adam": optax.adam(0.1),
    "stateless": optax.identity(),
    "schedule": optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(1, 0, 9)),
    "partition": optax.partition({"a": optax.adam(0.1)}, lambda params: "a"),
    "contrib": optax.contrib.prodigy(),
    "sam": ov.sam(optax.sgd(0.1)),
    "vasso": ov.vasso(optax.adam(0.1)),
}


@pytest.mark.parametrize("name", STATES)
def test_an_optimizer_that_is_not_lagged_is_evaluated_as_it_stands(name, tmp_path):
    params = {"w": jnp.ones(3), "direction": jnp.ones(2)}
    state = STATES[name].init(params)
    assert ov.eval_params(state, params) is params
    for kind, container in FOREIGN.items():
        # Spliced, what has neither fields nor a type of its own leaves no trace.
        if name != "stateless" or not kind.startswith("spliced"):
            assert ov.eval_params(container(state), params) is params
    has_names = name not in ("sgd", "stateless")
    for restore in RESTORED.values():
        raw = restore({"opt_state": state, "step": jnp.zeros(())}, tmp_path / name)
        assert ov.eval_params(raw, params) is params
        if has_names:
            assert ov.eval_params(raw["opt_state"], params) is params
        else:
            with pytest.raises(ValueError, match="which holds no optimizer state"):
                ov.eval_params(raw["opt_state"], params)


def as_list(tree):
    return list(jax.tree.leaves(tree))


UNTOLD = {
    "nothing": (lambda: None, "a NoneType"),
    "an empty tuple": (tuple, "a tuple"),
    "an empty dictionary": (dict, "a dict"),
    "the parameters": (lambda: PARAMS, "the parameters"),
    "parameters in a class of their own": (lambda: Layers(1.0, 2.0), "the parameters"),
    "leaves without names": (lambda: as_list(trained("sgd")[1]), "a list"),
    "one array": (lambda: jnp.ones(3), ""),
    "masked nodes": (lambda: {"a": optax.MaskedNode()}, "a dict"),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_a_tree_without_an_optimizer_state_is_refused(name):
    make_it, what = UNTOLD[name]
    state = make_it()
    params = state if isinstance(state, Layers) else PARAMS
    with pytest.raises(ValueError, match=f"^state is {what}.*which holds no optimizer"):
        ov.eval_params(state, params)


@pytest.mark.parametrize(
    "optimizer", [lagged(), optax.sgd(0.1), optax.MultiSteps(lagged(), 2)]
)
def test_the_optimizer_instead_of_its_state_is_refused(optimizer):
    with pytest.raises(ValueError, match="^state is an optimizer: pass the state that"):
        ov.eval_params(optimizer, PARAMS)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "not lagged"])
def test_state_and_parameters_swapped_are_refused(name):
    state = {**OPTIMIZERS, "not lagged": optax.adam(0.1)}[name].init(PARAMS)
    with pytest.raises(ValueError, match="^params contains the state of an optimizer"):
        ov.eval_params(PARAMS, state)


def test_several_states_of_one_loop_are_refused():
    params, state = trained("sgd")
    with pytest.raises(ValueError, match="^state has several perturbations for one"):
        ov.eval_params({"last": state, "best": state}, params)
