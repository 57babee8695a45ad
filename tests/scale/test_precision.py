"""Parameters in bfloat16 lose the perturbation, unless it is formed in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_vasso as ov

SIZE = 100_000
RHO = 0.05 * (SIZE / 11_000_000) ** 0.5  # per weight as 0.05 in a ResNet-18


def setting(size=SIZE):
    """Weights of scale 0.03 and a log-normal gradient, in bfloat16."""
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    weights = 0.03 * jax.random.normal(keys[0], (size,), jnp.float32)
    signs = jax.random.rademacher(keys[1], (size,), jnp.float32)
    grads = signs * jnp.exp(jax.random.normal(keys[2], (size,), jnp.float32))
    return {"w": weights.astype(jnp.bfloat16)}, {"w": grads.astype(jnp.bfloat16)}


def cosine(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a @ b / np.sqrt((a @ a) * (b @ b))


def perturbation_that_arrives(optimizer, params, grads):
    """(point the loss sees) − x, in float64."""
    seen = []

    def grad_fn(point):
        seen.append(point)
        return jax.tree.map(jnp.zeros_like, point)

    optimizer.update(grads, optimizer.init(params), params, grad_fn=grad_fn)
    return np.asarray(seen[0]["w"], np.float64) - np.asarray(params["w"], np.float64)


def test_bfloat16_parameters_take_in_the_perturbation_formed_in_float32():
    params, grads = setting()
    sam = ov.sam(optax.sgd(0.1), RHO)
    plain = perturbation_that_arrives(sam, params, grads)
    wide = perturbation_that_arrives(ov.wrappers.in_float32(sam), params, grads)
    assert cosine(plain, grads["w"]) < 0.8
    assert cosine(wide, grads["w"]) >= 0.99


def test_the_metric_says_how_much_arrived():
    params, grads = setting()

    def step(wrap):
        base = optax.chain(ov.metrics.track(ov.metrics.arrival), optax.sgd(0.1))
        optimizer = wrap(ov.sam(base, RHO))

        def loss_fn(params, batch):
            return jnp.sum(
                params["w"].astype(jnp.float32) * batch["w"].astype(jnp.float32)
            )

        state = ov.init_train_state(params, optimizer)
        _, metrics = ov.make_train_step(loss_fn, optimizer)(state, grads)
        return float(metrics["arrival"])

    arrives = perturbation_that_arrives(ov.sam(optax.sgd(0.1), RHO), params, grads)
    # In one matrix-free sum in float32 against float64.
    assert step(lambda o: o) == pytest.approx(cosine(arrives, grads["w"]), abs=1e-3)
    assert step(ov.wrappers.in_float32) >= 0.99


def test_updates_keep_the_dtypes_of_the_parameters():
    params, grads = setting(1000)
    optimizer = ov.wrappers.in_float32(ov.vasso(optax.adam(0.1)))
    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params, grad_fn=lambda p: p)
    assert updates["w"].dtype == jnp.bfloat16
    assert optax.tree.get(state, "ema")["w"].dtype == jnp.float32


def test_in_float32_is_nothing_for_float32():
    params = {"w": jnp.asarray([1.0, 2.0])}
    results = []
    for wrap in (lambda o: o, ov.wrappers.in_float32):
        optimizer = wrap(ov.vasso(optax.sgd(0.1)))
        updates, _ = optimizer.update(
            params, optimizer.init(params), params, grad_fn=jnp_cubes
        )
        results.append(np.asarray(updates["w"]))
    np.testing.assert_array_equal(*results)


def jnp_cubes(params):
    return jax.tree.map(lambda x: x**3, params)


def test_float32_parameters_train_with_bfloat16_compute():
    def loss_fn(params, batch):
        x, y = batch
        w = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        out = jnp.tanh(x.astype(jnp.bfloat16) @ w["in"]) @ w["out"]
        return jnp.mean((out.astype(jnp.float32) - y) ** 2)

    rng = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(rng.normal(size=(8, 16)) * 0.3, jnp.float32),
        "out": jnp.asarray(rng.normal(size=(16, 2)) * 0.3, jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    optimizer = ov.vasso(optax.sgd(0.2, momentum=0.9))
    state = ov.init_train_state(params, optimizer)
    step = ov.make_train_step(loss_fn, optimizer)
    losses = []
    for _ in range(40):
        state, metrics = step(state, (x, x[:, :2]))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.2 * losses[0]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))


def test_all_that_an_optimizer_is_given_in_float32_has_32_bits():
    seen = []

    def init(params):
        seen.append(params)
        return ()

    def update(updates, state, params=None):
        seen.extend((updates, params))
        return updates, state

    optimizer = ov.wrappers.in_float32(optax.GradientTransformation(init, update))
    params = jnp.ones(2, jnp.bfloat16)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert [x.dtype.name for x in seen] == ["float32"] * 3
    assert updates.dtype == jnp.bfloat16
