"""What belongs to a parameter is divided as the parameter is, and nothing else is.

No device is needed: shardings are of an abstract mesh.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec as P

import optax_vasso as ov

MESH = AbstractMesh((2,), ("data",))
PARAMS = {
    "dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(2)},
    "head": jnp.ones((8, 4)),
}
SPECS = {
    "dense": {"kernel": P(None, "data"), "bias": P("data")},
    "head": P("data"),
}
MASK = {"dense": {"kernel": True, "bias": True}, "head": False}
LABELS = {"dense": "a", "head": "b"}
BASE = optax.adam(0.1)


def optimizers():
    return {
        "adam": BASE,
        "vasso": ov.vasso(BASE),
        "lagged_vasso": ov.lagged_vasso(BASE),
        "lagged buffered": ov.lagged(
            BASE, optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(0.1))
        ),
        "partition": ov.vasso(
            optax.partition({"a": BASE, "b": optax.sgd(0.1)}, LABELS)
        ),
        "partition outside": optax.partition(
            {"a": ov.lagged_vasso(BASE), "b": BASE}, LABELS
        ),
        "masked": ov.vasso(optax.masked(BASE, MASK)),
        "masked outside": optax.masked(ov.lagged_vasso(BASE), MASK),
        "vasso mask": ov.vasso(BASE, mask=MASK),
        "lagged_vasso mask": ov.lagged_vasso(BASE, mask=MASK),
        "evasso": ov.evasso(BASE),
        "skip_nonfinite": ov.wrappers.skip_nonfinite(ov.looksam(BASE)),
        "tracked": ov.vasso(optax.chain(ov.metrics.track(ov.metrics.stability), BASE)),
        "inject_hyperparams": optax.inject_hyperparams(
            lambda rate: ov.vasso(optax.adam(rate))
        )(rate=0.1),
    }


NAMES = list(optimizers())


def spec_of_path(path):
    """The spec of the parameter whose own path ends this one; P() if none does."""
    for own, spec in jax.tree.leaves_with_path(
        SPECS, is_leaf=lambda s: isinstance(s, P)
    ):
        if path[-len(own) :] == own:
            return spec
    return P()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_moments_and_averages_are_divided_like_their_parameters(name, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    optimizer = optimizers()[name]
    assert ov.train.fsdp_specs(params, MESH) == SPECS
    # As large as the kernel, and no parameter: batch statistics stay whole.
    state = ov.init_train_state(
        params, optimizer, model_state={"mean": jnp.ones((4, 8))}, key=jax.random.key(0)
    )
    shardings = ov.train.state_shardings(state, optimizer, MESH, SPECS)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    divided = 0
    for (path, sharding), leaf in zip(
        jax.tree.leaves_with_path(shardings), jax.tree.leaves(state), strict=True
    ):
        is_like_a_parameter = path[0].name in ("params", "opt_state") and leaf.ndim > 0
        expected = spec_of_path(path) if is_like_a_parameter else P()
        assert sharding.spec == expected, jax.tree_util.keystr(path)
        divided += sharding.spec != P()
    assert divided >= 3 + 2  # the parameters, and two moments of some of them


def test_a_key_that_has_the_shape_of_a_parameter_is_replicated():
    """The raw words of a gate's key, beside a parameter that is a vector of two."""
    params = jnp.ones(2)
    optimizer = ov.evasso(optax.adam(0.1))
    state = ov.init_train_state(params, optimizer, key=jax.random.PRNGKey(0))
    shardings = ov.train.state_shardings(state, optimizer, MESH, P("data"))
    assert shardings.key.spec == P()
    assert shardings.opt_state.gate_state.key.spec == P()
    assert shardings.opt_state.optimizer_state[0].mu.spec == P("data")
    assert shardings.opt_state.ascent_state[0].ema.spec == P("data")
