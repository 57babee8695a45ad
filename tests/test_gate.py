"""Gates say when to ascend; a closed one really skips the second gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import flat, random_tree
from scipy import stats

import optax_vasso as ov
from optax_vasso import gate
from optax_vasso._internal import mapped


def answers(a_gate, steps):
    def step(state, _):
        ascend, state = a_gate.update(state)
        return state, jnp.asarray(ascend)

    return np.asarray(jax.lax.scan(step, a_gate.init(), length=steps)[1])


def test_every_k_from_step_n_and_always():
    t = np.arange(20)
    assert answers(gate.always(), 20).all()
    np.testing.assert_array_equal(answers(gate.every(3), 20), t % 3 == 0)
    np.testing.assert_array_equal(answers(gate.from_step(7), 20), t >= 7)
    assert answers(gate.every(1), 20).all()


def test_gates_combine():
    both = gate.all_of(gate.every(3), gate.from_step(7))
    either = gate.any_of(gate.every(5), gate.every(3))
    t = np.arange(20)
    np.testing.assert_array_equal(answers(both, 20), (t % 3 == 0) & (t >= 7))
    np.testing.assert_array_equal(answers(either, 20), (t % 5 == 0) | (t % 3 == 0))
    np.testing.assert_array_equal(
        answers(gate.all_of(gate.always(), gate.every(2)), 4), [1, 0, 1, 0]
    )
    nested = gate.any_of(gate.all_of(gate.every(2), gate.every(3)), gate.every(5))
    np.testing.assert_array_equal(answers(nested, 20), (t % 6 == 0) | (t % 5 == 0))


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_bernoulli_opens_on_its_share_of_the_steps_independently(p):
    """Both counts lie in the central 99.9 % of their binomial distributions."""
    drawn = answers(gate.bernoulli(p, seed=1), 4000)
    assert stats.binomtest(int(drawn.sum()), 4000, p).pvalue > 1e-3
    pairs = drawn[:-1] & drawn[1:]
    assert stats.binomtest(int(pairs[::2].sum()), len(pairs[::2]), p**2).pvalue > 1e-3


def test_a_probability_of_one_may_be_an_integer():
    assert answers(gate.bernoulli(1), 10).all()


@pytest.mark.parametrize("seed", [np.arange(2), jnp.ones(2), True, 0.5, None])
def test_what_is_neither_an_integer_nor_a_key_is_no_seed(seed):
    with pytest.raises(ValueError, match="^seed must be an integer or a random key"):
        gate.bernoulli(0.5, seed)


def test_bernoulli_is_reproducible_and_its_seeds_differ():
    first = answers(gate.bernoulli(0.5, seed=3), 100)
    np.testing.assert_array_equal(first, answers(gate.bernoulli(0.5, seed=3), 100))
    assert (first != answers(gate.bernoulli(0.5, seed=4), 100)).any()
    key = jax.random.PRNGKey(3)
    np.testing.assert_array_equal(first, answers(gate.bernoulli(0.5, seed=key), 100))
    assert answers(gate.bernoulli(1.0), 50).all()


def test_bernoullis_probability_may_be_a_schedule():
    drawn = answers(gate.bernoulli(lambda step: jnp.where(step < 10, 0.0, 1.0)), 20)
    np.testing.assert_array_equal(drawn, np.arange(20) >= 10)


def test_adaptive_is_the_recursion_written_out(x64):
    """With a threshold and a decay that are schedules, as the authors let them be.

    The state has √μ_t and σ²_t/μ²_t.
    """
    squares = np.random.default_rng(0).gamma(2.0, size=30)
    grads = {"w": jnp.sqrt(squares / 2)[:, None] * jnp.ones(2)[None]}
    threshold = optax.linear_schedule(1.0, -1.0, 29)
    adaptive = gate.adaptive(threshold, lambda step: jnp.where(step < 5, 0.5, 0.9))

    def step(state, grads):
        is_open, state = adaptive.update(state, grads=grads, unknown="ignored")
        mean = state.length**2
        return state, (is_open, mean, state.variance * mean**2)

    _, found = jax.jit(lambda grads: jax.lax.scan(step, adaptive.init(), grads))(grads)
    mean = variance = 0.0
    expected = []
    for t, square in enumerate(squares):
        decay = 0.5 if t < 5 else 0.9
        mean = decay * mean + (1 - decay) * square
        variance = decay * variance + (1 - decay) * (square - mean) ** 2
        bound = mean + float(threshold(t)) * np.sqrt(variance)
        expected.append((square >= bound, mean, variance))
    for actual, value in zip(found, zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(actual, value, rtol=1e-6)
    assert 3 < sum(found[0]) < 27


def test_a_gate_sees_the_gradient_the_parameters_and_every_extra_argument():
    seen = []

    def update(state, **extra_args):
        seen.append(extra_args)
        return True, state

    a_gate = gate.all_of(gate.always(), gate.Gate(lambda: (), update))
    optimizer = ov.sharpness_aware(optax.sgd(0.1), ov.sam_perturb(0.1), gate=a_gate)
    params, grads = random_tree(0), random_tree(1)
    optimizer.update(
        grads,
        optimizer.init(params),
        params,
        grad_fn=lambda params: params,
        value=1.5,
        temperature=300,
    )
    (given,) = seen
    assert given["grads"] is grads
    assert given["params"] is params
    assert (given["value"], given["temperature"]) == (1.5, 300)


def counting_loss(calls):
    """A loss that counts, on the host, how often it is evaluated."""

    def loss(params):
        jax.debug.callback(lambda: calls.append(1))
        return 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    return loss


def test_a_closed_gate_takes_no_second_gradient_and_the_average_still_moves():
    calls = []
    grad_fn = jax.grad(counting_loss(calls))
    optimizer = ov.sharpness_aware(
        optax.sgd(0.1),
        optax.chain(ov.vasso_ema(0.5), ov.sam_perturb(0.1)),
        gate=gate.every(4),
    )
    params = random_tree(0)

    @jax.jit
    def step(params, state):
        grads = grad_fn(params)
        updates, state = optimizer.update(grads, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    average = None
    for t in range(8):
        gradient = flat(params)
        average = gradient if average is None else (average + gradient) / 2
        before = params
        params, state = step(params, state)
        jax.effects_barrier()
        np.testing.assert_allclose(
            flat(optax.tree.get(state, "ema")), average, rtol=1e-5, atol=1e-7
        )
        assert bool(state.report.metrics["ascended"]) == (t % 4 == 0)
        if t % 4:
            np.testing.assert_allclose(flat(params), 0.9 * flat(before), rtol=1e-6)
            assert float(state.report.metrics["perturbed_loss"]) == 0
        else:
            assert np.abs(flat(params) - 0.9 * flat(before)).max() > 1e-4
    assert len(calls) == 8 + 2


def test_under_vmap_a_closed_gate_changes_the_result_but_not_the_cost():
    """A vmapped cond computes both sides; each row still follows its own gate."""
    calls = []
    grad_fn = jax.grad(counting_loss(calls))
    params = jnp.asarray([[1.0, 2.0], [1.0, 2.0]])

    def first_update(params, is_open):
        optimizer = ov.sharpness_aware(
            optax.sgd(1.0),
            ov.sam_perturb(0.1),
            gate=gate.Gate(
                lambda: is_open, lambda is_open, **extra: (is_open, is_open)
            ),
        )
        state = optimizer.init(params)
        return optimizer.update(grad_fn(params), state, params, grad_fn=grad_fn)[0]

    updates = jax.vmap(first_update)(params, jnp.asarray([True, False]))
    np.testing.assert_allclose(updates[1], -params[1], rtol=1e-6)
    assert float(jnp.linalg.norm(updates[0] + params[0])) == pytest.approx(0.1, 1e-4)
    jax.effects_barrier()
    calls.clear()
    jax.vmap(first_update)(params, jnp.asarray([False, False]))
    jax.effects_barrier()
    assert len(calls) == 2


SPIKES = {
    "1e30": [1e30],
    "infinite": [jnp.inf],
    "NaN": [jnp.nan],
    "all three": [1e30, jnp.inf, jnp.nan],
}


@functools.cache
def answers_to_lengths(threshold):
    adaptive = gate.adaptive(threshold)

    def step(state, length):
        is_open, state = adaptive.update(state, grads=length)
        return state, is_open

    return jax.jit(lambda lengths: jax.lax.scan(step, adaptive.init(), lengths)[1])


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.5])
@pytest.mark.parametrize("name", SPIKES)
def test_adaptive_survives_an_extreme_gradient(name, threshold):
    """After two horizons 1/(1 − δ) it answers as if there had been no bad step."""
    lengths = np.random.default_rng(0).gamma(4.0, size=400)
    spiked = lengths.copy()
    spiked[200 : 200 + len(SPIKES[name])] = SPIKES[name]
    usual, found = (
        np.asarray(answers_to_lengths(threshold)(x.astype(np.float32)))
        for x in (lengths, spiked)
    )
    np.testing.assert_array_equal(found[:200], usual[:200])
    assert np.mean(found[220:] == usual[220:]) > 0.95
    np.testing.assert_array_equal(found[300:], usual[300:])
    np.testing.assert_array_equal(
        found[200 : 200 + len(SPIKES[name])], np.isfinite(SPIKES[name])
    )


@pytest.mark.parametrize("scale", [1e-30, 1e12, 1e30])
def test_adaptive_does_not_depend_on_the_scale_of_gradients(scale):
    """Whose square, or whose variance of it, is no float32."""
    lengths = jnp.asarray(np.random.default_rng(0).gamma(4.0, size=50), jnp.float32)
    found = []
    for factor in (1.0, scale):
        adaptive, opened = gate.adaptive(0.3), []
        state = adaptive.init()
        for length in factor * lengths:
            is_open, state = adaptive.update(state, grads=length)
            opened.append(bool(is_open))
        found.append(opened)
    assert found[0] == found[1]
    assert 5 < sum(found[0]) < 45


def test_adaptive_follows_gradients_that_stay_large_or_vanish():
    """It is not open for ever above what it took for extreme, nor shut after zeros."""
    rng = np.random.default_rng(0)
    parts = [rng.gamma(4.0, size=200) * factor for factor in (1.0, 1e4, 0.0, 1.0)]
    adaptive = gate.adaptive()

    def step(state, length):
        return adaptive.update(state, grads=length)[::-1]

    state, opened = jax.jit(lambda x: jax.lax.scan(step, adaptive.init(), x))(
        jnp.asarray(np.concatenate(parts), jnp.float32)
    )
    assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(state))
    share = np.asarray(opened).reshape(4, 200)[:, 100:].mean(axis=1)
    assert 0.2 < share[0] < 0.6
    assert share[2] == 0
    np.testing.assert_allclose(share[[1, 3]], share[0], atol=0.2)


def test_adaptive_measures_the_root_mean_square_of_groups_that_decide_alike():
    adaptive = gate.adaptive()

    def update(length):
        grads = params = jnp.full(1, length)
        return adaptive.update(
            adaptive.init(), grads=grads, params=params, axis_name="data"
        )[1]

    state = jax.vmap(update, axis_name="data")(jnp.array([3.0, 4.0]))
    # The first of the squares counts a tenth.
    np.testing.assert_allclose(state.length, np.sqrt([1.25, 1.25]), rtol=1e-6)


def test_only_of_parameters_that_are_shared_a_decision_is_agreed_upon():
    found = []

    def on_device(x):
        found.append(mapped.disagreement(x[0], None))
        found.append(mapped.disagreement(x[0], x))
        found.append(mapped.disagreement(x[0], jnp.zeros(())))
        return x

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    jax.eval_shape(
        jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec), jnp.ones(1)
    )
    assert found == [(), (), ("data",)]


def test_adaptive_without_memory_finds_every_gradient_as_large_as_the_mean():
    """The bound is reached, and that is enough."""
    adaptive = gate.adaptive(0.5, decay=0.0)
    state = adaptive.init()
    for length in (3.0, 1.0, 1.0, 0.1):
        is_open, state = adaptive.update(state, grads=jnp.asarray(length))
        assert is_open


@pytest.mark.parametrize(("length", "counted"), [(10.0, 10.0), (10.5, 2.0)])
def test_a_gradient_above_ten_times_the_usual_counts_as_twice_that(length, counted):
    adaptive = gate.adaptive(0.0, decay=0.0)
    state = adaptive.update(adaptive.init(), grads=jnp.asarray(1.0))[1]
    is_open, state = adaptive.update(state, grads=jnp.asarray(length))
    assert is_open
    np.testing.assert_allclose(state.length, counted, rtol=1e-6)


def test_adaptive_opens_again_after_a_thousand_gradients_of_zero():
    """In units of the vanishing mean, the variance would leave the range of float32."""
    lengths = np.random.default_rng(0).gamma(4.0, size=700)
    adaptive = gate.adaptive(0.5)

    def step(state, length):
        return adaptive.update(state, grads=length)[::-1]

    given = jnp.asarray([*lengths[:200], *np.zeros(1000), *lengths[200:]], jnp.float32)
    _, opened = jax.jit(lambda x: jax.lax.scan(step, adaptive.init(), x))(given)
    assert 0.05 < np.mean(opened[-200:]) < 0.6


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("typed", [True, False])
def test_bernoulli_takes_a_key_of_any_implementation(impl, typed):
    if impl == "unsafe_rbg" and not typed:
        pytest.skip("its raw words are those of rbg")
    make = jax.random.key if typed else jax.random.PRNGKey
    key = make(3, impl=impl)
    drawn = answers(gate.bernoulli(0.5, seed=key), 200)
    assert stats.binomtest(int(drawn.sum()), 200, 0.5).pvalue > 1e-3
    np.testing.assert_array_equal(
        drawn, answers(gate.bernoulli(0.5, seed=jax.random.key(3, impl=impl)), 200)
    )
    state = gate.bernoulli(0.5, seed=key).init()
    assert state.key.dtype == jnp.uint32  # for checkpoints, pmap and NumPy
