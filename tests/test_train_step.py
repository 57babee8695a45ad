"""The compiled train step against loops written out by hand."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import flat

import optax_vasso as ov
from optax_vasso import gate
from optax_vasso.metrics import cosine, grad_norm, perturbation_norm, track

BASE = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.1, momentum=0.9))


class Network(nn.Module):
    """A dense network with batch normalization and dropout."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        x = nn.Dropout(0.5, deterministic=False)(x)
        return nn.Dense(3)(x)


@pytest.fixture(scope="module")
def problem():
    """(parameters, batch statistics, batch, loss_fn)."""
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    inputs = jax.random.normal(keys[0], (32, 5))
    labels = jax.random.randint(keys[1], (32,), 0, 3)
    network = Network()
    variables = network.init({"params": keys[2], "dropout": keys[2]}, inputs)

    def loss_fn(params, model_state, batch, key):
        logits, state = network.apply(
            {"params": params, "batch_stats": model_state},
            batch[0],
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return jnp.mean(losses), (state["batch_stats"], {"logits": logits})

    return (
        variables["params"],
        variables["batch_stats"],
        (inputs, labels),
        loss_fn,
    )


def initial_state(problem, optimizer):
    params, batch_stats, _, _ = problem
    return ov.init_train_state(
        params, optimizer, model_state=batch_stats, key=jax.random.PRNGKey(7)
    )


@pytest.fixture(scope="module")
def vasso_steps(problem):
    """VaSSO that tracks what it does, and its steps by ``separate_keys``."""
    tracked = track(perturbation_norm, cosine, grad_norm)
    optimizer = ov.vasso(optax.chain(tracked, BASE), rho=0.2, theta=0.4)
    steps = {
        separate: ov.make_train_step(
            problem[3], optimizer, has_aux=True, separate_keys=separate
        )
        for separate in (False, True)
    }
    return optimizer, steps


@pytest.fixture(scope="module")
def value_and_grad(problem):
    return jax.jit(jax.value_and_grad(problem[3], has_aux=True))


@pytest.mark.parametrize("separate_keys", [False, True])
def test_the_step_is_the_loop_written_by_hand(
    problem, vasso_steps, value_and_grad, separate_keys
):
    params, batch_stats, batch, _ = problem
    optimizer, steps = vasso_steps
    state = initial_state(problem, optimizer)
    base_state, d = BASE.init(params), None
    for t in range(4):
        state, metrics = steps[separate_keys](state, batch)
        key = perturbed_key = jax.random.fold_in(jax.random.PRNGKey(7), t)
        if separate_keys:
            key, perturbed_key = jax.random.split(key)
        (loss, (new_stats, aux)), g = value_and_grad(params, batch_stats, batch, key)
        d = g if d is None else jax.tree.map(lambda d, g: 0.6 * d + 0.4 * g, d, g)
        epsilon = optax.tree.scale(0.2 / optax.tree.norm(d), d)
        (perturbed_loss, _), g_p = value_and_grad(
            optax.tree.add(params, epsilon), batch_stats, batch, perturbed_key
        )
        updates, base_state = BASE.update(g_p, base_state, params)
        params, batch_stats = optax.apply_updates(params, updates), new_stats

        np.testing.assert_allclose(flat(state.params), flat(params), atol=2e-6)
        np.testing.assert_allclose(flat(state.model_state), flat(new_stats), atol=1e-6)
        np.testing.assert_allclose(metrics["aux"]["logits"], aux["logits"], atol=1e-5)
        expected = {
            "loss": loss,
            "perturbed_loss": perturbed_loss,
            "sharpness": perturbed_loss - loss,
            "ascended": True,
            "grad_norm": optax.tree.norm(g),
            "perturbation_norm": 0.2,
            "cosine": optax.tree.vdot(d, g) / (optax.tree.norm(d) * optax.tree.norm(g)),
        }
        assert set(metrics) == {*expected, "aux"}
        for name, value in expected.items():
            assert float(metrics[name]) == pytest.approx(float(value), abs=1e-5), name
    assert int(state.step) == 4
    assert steps[separate_keys]._cache_size() == 1


def test_batch_statistics_and_aux_are_those_of_plain_sgd(problem):
    """The perturbed evaluation leaves no trace in them."""
    results = []
    for optimizer in (BASE, ov.friendly_sam(BASE), ov.gsam(BASE)):
        step = ov.make_train_step(problem[3], optimizer, has_aux=True)
        state, metrics = step(initial_state(problem, optimizer), problem[2])
        results.append((state.model_state, metrics["aux"], metrics["loss"]))
    for result in results[1:]:
        chex.assert_trees_all_close(result, results[0], rtol=1e-6)


def noisy_loss(params, batch, key):
    """Half of the inputs dropped at random, as dropout does."""
    kept = jax.random.bernoulli(key, 0.5, batch.shape)
    return 0.5 * jnp.sum((params["w"] - 3 * kept * batch) ** 2)


def test_both_evaluations_share_the_dropout_key_unless_told_otherwise():
    """With ρ = 0 the two losses agree exactly if and only if the masks do."""
    optimizer = ov.sam(optax.sgd(0.1), rho=0.0)
    gaps = []
    for separate_keys in (False, True):
        step = ov.make_train_step(noisy_loss, optimizer, separate_keys=separate_keys)
        state = ov.init_train_state(
            {"w": jnp.ones(16)}, optimizer, key=jax.random.key(7)
        )
        _, metrics = step(state, jnp.ones(16))
        gaps.append(abs(float(metrics["sharpness"])))
    assert gaps[0] < 1e-6 < 1e-3 < gaps[1]


def test_dropout_differs_from_step_to_step():
    optimizer = optax.sgd(0.0)
    step = ov.make_train_step(noisy_loss, optimizer)
    state = ov.init_train_state({"w": jnp.ones(16)}, optimizer, key=jax.random.key(7))
    batch = jnp.arange(16.0)
    state, first = step(state, batch)
    state, second = step(state, batch)
    assert float(first["loss"]) != float(second["loss"])


def quadratic_loss(params, batch):
    return 0.5 * jnp.sum((params["w"] - batch) ** 2)


def counting_loss(params, batch, model_state):
    return quadratic_loss(params, batch), model_state + 1


# What a loss may look like; (loss, whether it takes a model state).
LOSSES = {
    "any names": (lambda w, target: quadratic_loss(w, target), False),
    "positions": (lambda w, target, /: quadratic_loss(w, target), False),
    "any number of arguments": (lambda *args: quadratic_loss(*args), False),
    "a default": (lambda w, b, scale=1.0: scale * quadratic_loss(w, b), False),
    "partial": (
        functools.partial(lambda scale, w, b: scale * quadratic_loss(w, b), 1.0),
        False,
    ),
    "key": (lambda w, b, key: quadratic_loss(w, b) + 0.0 * key[0], False),
    "optional key": (lambda w, b, key=None: quadratic_loss(w, b), False),
    "model state": (counting_loss, True),
    "state first": (lambda w, model_state, b: counting_loss(w, b, model_state), True),
    "keyword": (lambda w, b, *, model_state: counting_loss(w, b, model_state), True),
    "both": (
        lambda w, model_state, b, key: counting_loss(w, b, model_state + 0 * key[0]),
        True,
    ),
}


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_takes_what_it_needs_by_name(name, has_aux):
    plain, has_state = LOSSES[name]

    @functools.wraps(plain)
    def with_aux(*args, **kwargs):
        result = plain(*args, **kwargs)
        return (result[0], (result[1], 7)) if has_state else (result, 7)

    optimizer = ov.sam(optax.sgd(0.1), rho=0.3)
    step = ov.make_train_step(
        with_aux if has_aux else plain, optimizer, has_aux=has_aux
    )
    state = ov.init_train_state(
        {"w": jnp.ones(3)},
        optimizer,
        model_state=jnp.zeros((), jnp.uint32),
        key=jax.random.PRNGKey(0) if name in ("key", "both") else None,
    )
    with jax.disable_jit():  # the rules are Python's: nothing to compile for them
        state, metrics = step(state, jnp.zeros(3))
    assert float(metrics["loss"]) == pytest.approx(1.5)
    np.testing.assert_allclose(state.params["w"], 0.9 - 0.03 / 3**0.5, rtol=1e-6)
    assert int(state.model_state) == has_state
    assert metrics.get("aux") == (7 if has_aux else None)


def test_a_plain_optimizer_has_one_evaluation_and_no_perturbed_loss():
    optimizer = optax.adam(0.1)
    state = ov.init_train_state({"w": jnp.ones(3)}, optimizer)
    state, metrics = ov.make_train_step(quadratic_loss, optimizer)(state, jnp.zeros(3))
    assert set(metrics) == {"loss"}
    assert float(metrics["loss"]) == pytest.approx(1.5)


def test_a_step_that_did_not_ascend_reports_no_sharpness():
    optimizer = ov.sharpness_aware(
        optax.chain(track(perturbation_norm), optax.sgd(0.1)),
        ov.sam_perturb(0.5),
        gate=gate.every(2),
    )
    step = ov.make_train_step(quadratic_loss, optimizer)
    state = ov.init_train_state({"w": jnp.ones(3)}, optimizer)
    state, first = step(state, jnp.zeros(3))
    state, second = step(state, jnp.zeros(3))
    assert bool(first["ascended"])
    assert float(first["sharpness"]) == pytest.approx(0.5 * 3**0.5 + 0.125, rel=1e-5)
    assert float(first["perturbation_norm"]) == pytest.approx(0.5, rel=1e-6)
    assert not bool(second["ascended"])
    assert float(second["sharpness"]) == float(second["perturbation_norm"]) == 0
    assert float(second["perturbed_loss"]) == float(second["loss"])


def test_a_lagged_optimizer_needs_nothing_and_eval_params_finds_the_clean_point():
    optimizer = ov.lagged_vasso(optax.sgd(0.1), rho=0.5)
    step = ov.make_train_step(quadratic_loss, optimizer)
    state = ov.init_train_state({"w": jnp.ones(1)}, optimizer)
    state, metrics = step(state, jnp.zeros(1))
    assert set(metrics) == {"loss"}
    clean = ov.eval_params(state.opt_state, state.params)
    np.testing.assert_allclose(clean["w"], [0.9], rtol=1e-6)
    np.testing.assert_allclose(state.params["w"], [1.4], rtol=1e-6)


def test_a_sharpness_aware_optimizer_may_be_inside_others():
    optimizer = optax.chain(
        optax.clip_by_global_norm(1e-3), ov.sam(optax.sgd(0.1), rho=0.5)
    )
    state = ov.init_train_state({"w": jnp.ones(1)}, optimizer)
    step = ov.make_train_step(quadratic_loss, optimizer)
    state, metrics = step(state, jnp.zeros(1))
    assert float(metrics["perturbed_loss"]) == pytest.approx(1.5**2 / 2)
    np.testing.assert_allclose(state.params["w"], [1 - 0.15], rtol=1e-6)


def test_the_state_is_donated_and_the_callers_arrays_are_not(problem, vasso_steps):
    params = jax.tree.map(jnp.copy, problem[0])
    optimizer, steps = vasso_steps
    state = ov.init_train_state(
        params, optimizer, model_state=problem[1], key=jax.random.PRNGKey(0)
    )
    steps[False](state, problem[2])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, problem[1])))


def test_the_state_keeps_its_types_and_the_step_compiles_once():
    optimizer = ov.evasso(BASE)
    step = ov.make_train_step(noisy_loss, optimizer)
    state = ov.init_train_state({"w": jnp.ones(16)}, optimizer, key=jax.random.key(7))
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    for _ in range(3):
        state, _ = step(state, jnp.ones(16))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == before
    assert step._cache_size() == 1


def test_the_step_may_be_called_inside_scan_and_vmap():
    """Many steps in one program, and many seeds: the steps one by one."""
    optimizer = ov.vasso(optax.sgd(0.1, momentum=0.9))
    step = ov.make_train_step(quadratic_loss, optimizer)
    starts = jnp.asarray([[1.0, 2.0], [-1.0, 0.5]])
    batches = jnp.asarray([[0.0, 0.0], [0.3, -0.1], [0.1, 0.2]])

    def train(start):
        state = ov.init_train_state({"w": start}, optimizer)
        state, metrics = jax.lax.scan(step, state, batches)
        return state.params["w"], metrics["loss"]

    params, losses = jax.vmap(train)(starts)
    for start, expected, history in zip(starts, params, losses, strict=True):
        state = ov.init_train_state({"w": start}, optimizer)
        for batch, loss in zip(batches, history, strict=True):
            state, metrics = step(state, batch)
            np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(state.params["w"], expected, rtol=1e-5)


def test_it_trains(problem, vasso_steps):
    optimizer, steps = vasso_steps
    state = initial_state(problem, optimizer)
    losses = []
    for _ in range(60):
        state, metrics = steps[False](state, problem[2])
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


@pytest.mark.parametrize("params", [{}, {"ids": jnp.arange(3)}])
def test_unusable_parameters_are_refused(params):
    with pytest.raises(ValueError, match=r"^params"):
        ov.init_train_state(params, optax.sgd(0.1))


def test_an_error_of_the_loss_is_not_taken_for_a_state_that_was_donated():
    def refuses(params, batch):
        raise ValueError("this batch was deleted")

    step = ov.make_train_step(refuses, optax.sgd(0.1))
    with pytest.raises(ValueError, match="this batch was deleted"):
        step(ov.init_train_state(jnp.ones(2), optax.sgd(0.1)), jnp.ones(2))
