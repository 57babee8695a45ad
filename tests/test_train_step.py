"""The compiled train step against loops written out by hand."""

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

    def loss_fn(params, batch_stats, batch, key):
        logits, state = network.apply(
            {"params": params, "batch_stats": batch_stats},
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


@pytest.mark.parametrize("separate_keys", [False, True])
def test_the_step_is_the_loop_written_by_hand(problem, separate_keys):
    params, batch_stats, batch, loss_fn = problem
    optimizer = ov.vasso(BASE, rho=0.2, theta=0.4)
    step = ov.make_train_step(loss_fn, optimizer, separate_keys=separate_keys)
    state = initial_state(problem, optimizer)
    base_state, d = BASE.init(params), None
    for t in range(4):
        state, metrics = step(state, batch)
        key = perturbed_key = jax.random.fold_in(jax.random.PRNGKey(7), t)
        if separate_keys:
            key, perturbed_key = jax.random.split(key)
        (loss, (new_stats, aux)), g = jax.value_and_grad(loss_fn, has_aux=True)(
            params, batch_stats, batch, key
        )
        d = g if d is None else jax.tree.map(lambda d, g: 0.6 * d + 0.4 * g, d, g)
        epsilon = optax.tree.scale(0.2 / optax.tree.norm(d), d)
        (perturbed_loss, _), g_p = jax.value_and_grad(loss_fn, has_aux=True)(
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
            "grad_norm": optax.tree.norm(g),
            "perturbation_norm": 0.2,
            "cosine": optax.tree.vdot(d, g) / (optax.tree.norm(d) * optax.tree.norm(g)),
        }
        for name, value in expected.items():
            assert float(metrics[name]) == pytest.approx(float(value), abs=1e-5), name
    assert int(state.step) == 4


def test_batch_statistics_and_aux_are_those_of_plain_sgd(problem):
    """The perturbed evaluation leaves no trace in them."""
    results = []
    for optimizer in (BASE, ov.sam(BASE, 0.5), ov.friendly_sam(BASE), ov.gsam(BASE)):
        step = ov.make_train_step(problem[3], optimizer)
        state, metrics = step(initial_state(problem, optimizer), problem[2])
        results.append((state.model_state, metrics["aux"], metrics["loss"]))
    for result in results[1:]:
        chex.assert_trees_all_close(result, results[0], rtol=1e-6)


def test_both_evaluations_share_the_dropout_key_unless_told_otherwise(problem):
    """With ρ = 0 the two losses agree exactly if and only if the masks do."""
    optimizer = ov.sam(BASE, rho=0.0)
    gaps = []
    for separate_keys in (False, True):
        step = ov.make_train_step(problem[3], optimizer, separate_keys=separate_keys)
        _, metrics = step(initial_state(problem, optimizer), problem[2])
        gaps.append(abs(float(metrics["sharpness"])))
    assert gaps[0] < 1e-6 < 1e-3 < gaps[1]


def test_dropout_differs_from_step_to_step(problem):
    optimizer = optax.sgd(0.0)
    step = ov.make_train_step(problem[3], optimizer)
    state = initial_state(problem, optimizer)
    state, first = step(state, problem[2])
    state, second = step(state, problem[2])
    assert float(first["loss"]) != float(second["loss"])


def quadratic_loss(params, model_state, batch, key):
    assert key is None
    return 0.5 * jnp.sum((params["w"] - batch) ** 2), (model_state, {})


def test_a_plain_optimizer_has_one_evaluation_and_no_perturbed_loss():
    optimizer = optax.adam(0.1)
    state = ov.init_train_state({"w": jnp.ones(3)}, optimizer)
    state, metrics = ov.make_train_step(quadratic_loss, optimizer)(state, jnp.zeros(3))
    assert set(metrics) == {"loss", "grad_norm", "aux"}
    assert float(metrics["loss"]) == pytest.approx(1.5)


def test_a_step_that_did_not_ascend_reports_no_sharpness():
    optimizer = ov.sharpness_aware(
        optax.sgd(0.1), ov.sam_perturb(0.5), gate=gate.every(2)
    )
    step = ov.make_train_step(quadratic_loss, optimizer)
    state = ov.init_train_state({"w": jnp.ones(3)}, optimizer)
    state, first = step(state, jnp.zeros(3))
    state, second = step(state, jnp.zeros(3))
    assert bool(first["ascended"])
    assert float(first["sharpness"]) == pytest.approx(0.5 * 3**0.5 + 0.125, rel=1e-5)
    assert not bool(second["ascended"])
    assert float(second["sharpness"]) == float(second["perturbation_norm"]) == 0
    assert float(second["perturbed_loss"]) == float(second["loss"])


def test_stability_is_reported_when_it_is_tracked():
    ascent = optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(0.5))
    optimizer = ov.sharpness_aware(optax.sgd(0.1), ov.track_stability(ascent))
    step = ov.make_train_step(quadratic_loss, optimizer)
    state = ov.init_train_state({"w": jnp.ones(2)}, optimizer)
    for expected in (1.0, 0.0):
        state, metrics = step(state, jnp.zeros(2))
        assert float(metrics["stability"]) == pytest.approx(expected, abs=1e-5)


def test_a_lagged_optimizer_needs_nothing_and_eval_params_finds_the_clean_point():
    optimizer = ov.lagged_vasso(optax.sgd(0.1), rho=0.5)
    step = ov.make_train_step(quadratic_loss, optimizer)
    state = ov.init_train_state({"w": jnp.ones(1)}, optimizer)
    assert not ov.needs_grad_fn(state.opt_state)
    state, _ = step(state, jnp.zeros(1))
    clean = ov.eval_params(state.opt_state, state.params)
    np.testing.assert_allclose(clean["w"], [0.9], rtol=1e-6)
    np.testing.assert_allclose(state.params["w"], [1.4], rtol=1e-6)


def test_a_sharpness_aware_optimizer_may_be_inside_others(problem):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), ov.sam(BASE, 0.1))
    assert ov.needs_grad_fn(optimizer.init(problem[0]))
    step = ov.make_train_step(problem[3], optimizer)
    _, metrics = step(initial_state(problem, optimizer), problem[2])
    assert float(metrics["perturbation_norm"]) == pytest.approx(0.1, rel=1e-5)


def test_the_state_is_donated_and_the_callers_arrays_are_not(problem):
    params = jax.tree.map(jnp.copy, problem[0])
    optimizer = ov.vasso(BASE)
    step = ov.make_train_step(problem[3], optimizer)
    state = ov.init_train_state(
        params, optimizer, model_state=problem[1], key=jax.random.PRNGKey(0)
    )
    step(state, problem[2])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, problem[1])))


def test_the_state_keeps_its_types_and_the_step_compiles_once(problem):
    optimizer = ov.evasso(BASE)
    step = ov.make_train_step(problem[3], optimizer)
    state = initial_state(problem, optimizer)
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    for _ in range(3):
        state, _ = step(state, problem[2])
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == before
    assert step._cache_size() == 1


def test_it_trains(problem):
    optimizer = ov.vasso(BASE, rho=0.05)
    step = ov.make_train_step(problem[3], optimizer)
    state = initial_state(problem, optimizer)
    losses = []
    for _ in range(60):
        state, metrics = step(state, problem[2])
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


@pytest.mark.parametrize("params", [{}, {"ids": jnp.arange(3)}])
def test_unusable_parameters_are_refused(params):
    with pytest.raises(ValueError, match=r"^params"):
        ov.init_train_state(params, optax.sgd(0.1))
