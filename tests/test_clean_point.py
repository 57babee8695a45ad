"""What moves the clean point x without a word, and the right form of each.

The table in docs/lagged.md, row by row: with y = x + ε, what is done to y is not done
to x. With a learning rate of zero x stays at the start unless something moves it.
"""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

import optax_vasso as ov
from optax_vasso.ascent import until

RHO = 0.5
START = {"w": jnp.asarray([1.0, -2.0, 0.5]), "b": jnp.asarray([[3.0, 1.0]])}


def loss(params):
    return sum(jnp.sum(jnp.sin(leaf) + leaf**2) for leaf in jax.tree.leaves(params))


def run(optimizer, steps, params=START, state=None):
    """Parameters and state of the loop after every step."""
    state = optimizer.init(params) if state is None else state

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    history = []
    for _ in range(steps):
        params, state = step(params, state)
        history.append((params, state))
    return history


def lagged(rate=0.0, rho=RHO):
    return ov.lagged_vasso(optax.sgd(rate), rho=rho)


def distance(a, b):
    return float(optax.tree.norm(optax.tree.sub(a, b)))


def add_change(params, before, after):
    """The form of the page: what is done to x, done to the parameters of the loop."""
    return jax.tree.map(lambda y, x, new: y + (new - x), params, before, after)


# Each addition of ε rounds once, and the entries are below 4.
ROUNDING = 4 * 10 * 2.0**-23


def test_init_in_mid_training():
    params, state = run(lagged(), 3)[-1]
    x = ov.eval_params(state, params)
    restarted = lagged()
    wrong = ov.eval_params(restarted.init(params), params)
    assert distance(wrong, START) == pytest.approx(RHO, rel=1e-5)
    params, state = run(restarted, 3, x, restarted.init(x))[-1]
    assert distance(ov.eval_params(state, params), START) < ROUNDING


def test_the_error_for_changed_shapes_says_how_to_begin_again():
    optimizer = lagged()
    params, state = run(optimizer, 1)[-1]
    larger = jax.tree.map(lambda x: jnp.concatenate([x, x]), params)
    with pytest.raises(ValueError, match=r"init\(eval_params\(state, params\)\)"):
        optimizer.update(larger, state, larger)
    fewer = {"w": params["w"]}
    with pytest.raises(ValueError, match=r"init\(eval_params\(state, params\)\)"):
        optimizer.update(fewer, state, fewer)


def test_an_average_of_the_parameters_over_steps():
    wrong = right = START
    for params, state in run(lagged(), 5):
        wrong = optax.incremental_update(params, wrong, step_size=0.5)
        clean = ov.eval_params(state, params)
        right = optax.incremental_update(clean, right, step_size=0.5)
    assert distance(wrong, START) > 0.4
    assert distance(right, START) < ROUNDING


def workers():
    """Two workers that train apart, with the leading axis of vmap."""
    optimizer = lagged(rate=0.05)
    params = jax.tree.map(lambda x: jnp.stack([x, 1.5 * x]), START)

    def train(params):
        return run(optimizer, 3, params)[-1]

    return jax.vmap(train)(params)


def test_an_average_over_workers():
    params, states = workers()
    x = jax.vmap(ov.eval_params)(states, params)
    mean = jax.tree.map(lambda leaf: jnp.mean(leaf, 0, keepdims=True), x)

    def average_wrong(params):
        return jax.lax.pmean(params, "workers")

    wrong = jax.vmap(average_wrong, axis_name="workers")(params)
    found = jax.vmap(ov.eval_params)(states, wrong)
    assert distance(jax.tree.map(lambda leaf: leaf[:1], found), mean) > 0.01

    def average(params, state):
        x = ov.eval_params(state, params)
        return add_change(params, x, jax.lax.pmean(x, "workers"))

    params = jax.vmap(average, axis_name="workers")(params, states)
    found = jax.vmap(ov.eval_params)(states, params)
    for worker in range(2):
        one = jax.tree.map(lambda leaf, i=worker: leaf[i : i + 1], found)
        assert distance(one, mean) < ROUNDING


@pytest.mark.parametrize("where", ["evaluation", "update"])
def test_an_average_over_workers_is_refused_where_jax_tells_of_it(where):
    """shard_map knows that the parameters vary no longer, and ε still does."""
    optimizer = ov.lagged(optax.sgd(0.1), optax.scale(0.1))
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("workers",))

    def train(scale):
        # Each worker has a batch, and so a gradient, of its own.
        start = jax.tree.map(lambda x: x * scale[0], START)
        state = optimizer.init(start)
        updates, state = optimizer.update(jax.grad(loss)(start), state, start)
        params = optax.apply_updates(start, updates)
        params = jax.lax.pmean(params, "workers")
        if where == "evaluation":
            return ov.eval_params(state, params)
        return optimizer.update(params, state, params)[0]

    mapped = jax.shard_map(
        train,
        mesh=mesh,
        in_specs=PartitionSpec("workers"),
        out_specs=PartitionSpec("workers"),
    )
    with pytest.raises(
        ValueError, match=r"do not vary over the mapped axes \['workers'"
    ):
        jax.eval_shape(mapped, jnp.ones(1))


def test_the_best_parameters_with_the_last_state():
    history = run(lagged(rate=0.1), 5)
    best, best_state = history[1]
    x = ov.eval_params(best_state, best)
    _, last_state = history[-1]
    assert distance(ov.eval_params(last_state, best), x) > 0.01
    # The right form: what was evaluated is what is kept.
    kept = [ov.eval_params(state, params) for params, state in history][1]
    assert distance(kept, x) == 0


def test_a_change_by_hand():
    """A projection, a reset layer, an outer optimizer: any function of x."""

    def project(x):
        return jax.tree.map(lambda leaf: jnp.clip(leaf, -1.0, 1.0), x)

    params, state = run(lagged(), 3)[-1]
    x = ov.eval_params(state, params)
    assert distance(ov.eval_params(state, project(params)), project(x)) > 0.05
    moved = add_change(params, x, project(x))
    assert distance(ov.eval_params(state, moved), project(x)) < ROUNDING


def test_an_evaluation_in_place():
    """A loop that overwrites the model by x to evaluate it goes on from y."""
    optimizer = lagged(rate=0.1)
    expected = ov.eval_params(*reversed(run(optimizer, 4)[-1]))
    params, state = run(optimizer, 2)[-1]
    x = ov.eval_params(state, params)
    wrong = ov.eval_params(*reversed(run(optimizer, 2, x, state)[-1]))
    assert distance(wrong, expected) > 0.05
    right = ov.eval_params(*reversed(run(optimizer, 2, params, state)[-1]))
    assert distance(right, expected) == 0


RECIPES = {
    "lagged": lambda base, rho: ov.lagged(
        base, optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(rho))
    ),
    "lagged_vasso": lambda base, rho: ov.lagged_vasso(base, rho=rho),
    "momentum_sam": lambda base, rho: ov.momentum_sam(base, rho=rho),
    "single_step_sam": lambda base, rho: ov.single_step_sam(base, rho=rho),
}


@pytest.mark.parametrize(
    ("name", "rho"), cases.in_turn(RECIPES, [RHO, lambda step: 0.1 * (step + 1)])
)
def test_a_loop_that_returns_the_model_alone_returns_the_clean_point(name, rho):
    """All its gradients are those of the same radius without an end."""
    base, steps = optax.adam(0.1), 4
    returned, state = run(RECIPES[name](base, until(steps, rho)), steps)[-1]
    for a, b in zip(
        *map(jax.tree.leaves, (returned, ov.eval_params(state, returned))), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    params, state = run(RECIPES[name](base, rho), steps)[-1]
    assert distance(params, returned) > 0.1
    assert distance(ov.eval_params(state, params), returned) < ROUNDING


def test_until_of_updates_that_are_accumulated():
    """Two minibatches a step: the schedule counts the steps that are taken."""
    optimizer = optax.MultiSteps(lagged(0.1, until(2, RHO)), 2)
    params, state = run(optimizer, 4)[-1]
    assert distance(params, ov.eval_params(state, params)) == 0
    assert distance(params, START) > 0.1


def test_a_loop_that_goes_on_trains_with_the_base_optimizer():
    optimizer = lagged(0.1, until(2, RHO))
    history = run(optimizer, 5)
    assert distance(history[0][0], ov.eval_params(*reversed(history[0]))) > 0.4
    plain = run(optax.sgd(0.1), 3, history[1][0])
    assert distance(history[-1][0], plain[-1][0]) < ROUNDING


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_until_in_low_precision(dtype):
    """The loop adds a rounded update, so what is returned is x to one rounding."""
    start = jax.tree.map(lambda x: x.astype(dtype), START)
    optimizer = ov.lagged_vasso(optax.sgd(0.1), rho=until(3, RHO))
    params, state = run(optimizer, 3, start)[-1]
    clean = ov.eval_params(state, params)
    # The update is rounded at its own size; it and all entries are below 4.
    for a, b in zip(*map(jax.tree.leaves, (params, clean)), strict=True):
        np.testing.assert_allclose(
            np.float32(a), np.float32(b), rtol=0, atol=4 * float(jnp.finfo(dtype).eps)
        )


@pytest.mark.parametrize("steps", [0, -1, 2.5, "10", None])
def test_a_number_of_steps_that_is_none(steps):
    with pytest.raises(ValueError, match="^steps must be an integer >= 1, got"):
        until(steps, 0.1)


def test_a_radius_of_one_is_a_float_as_well():
    assert jnp.issubdtype(until(10, 1)(0).dtype, jnp.floating)


def test_a_radius_that_is_none():
    with pytest.raises(ValueError, match="^rho must be a finite number >= 0"):
        until(10, -0.1)
