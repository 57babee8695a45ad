"""Norms and projections, against NumPy in float64 and at the ends of the range."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from problems import flat, random_tree

import optax_vasso as ov
from benchmarks.optimizers import BASE, RECIPES
from optax_vasso._internal import numerics

pytestmark = pytest.mark.usefixtures("strict")
# One program each: outside of jit every operation would be a program.
norm = jax.jit(numerics.norm, static_argnums=1)
normalize = jax.jit(numerics.normalize)
dual_direction = jax.jit(numerics.dual_direction, static_argnums=1)
cosine = jax.jit(numerics.cosine)
orthogonal_to = jax.jit(numerics.orthogonal_to)
COMPILED = (norm, normalize, dual_direction, cosine, orthogonal_to)
ORDERS = (1, 1.5, 2, 3, np.inf)
EXTREMES = {
    "large float16": (np.float16, [6e4, -300.0, 1e-7]),
    "small float16": (np.float16, [1e-7, -2e-7]),
    "large float32": (np.float32, [3.4e38, 1e30]),
    "many large float32": (np.float32, [3e38] * 1000),
    "small float32": (np.float32, [1e-30, -3e-30]),
    "smallest normal float32": (np.float32, [1.2e-38, 1.2e-38]),
    "large bfloat16": (jnp.bfloat16, [3e38, -1e38]),
    "wide range": (np.float32, [1e30, 1e-30, 1.0]),
}


@pytest.fixture(params=EXTREMES, ids=str)
def extreme(request):
    dtype, values = EXTREMES[request.param]
    return {"a": jnp.asarray(values[:1], dtype), "b": jnp.asarray(values[1:], dtype)}


@pytest.mark.parametrize("p", ORDERS)
@given(seed=st.integers(0, 1000), dtype=st.sampled_from(["f2", "f4", jnp.bfloat16]))
def test_norm_is_numpys(p, seed, dtype):
    tree = random_tree(seed, [dtype, "f4"])
    expected = np.linalg.norm(flat(tree), ord=p)
    np.testing.assert_allclose(norm(tree, p), expected, rtol=1e-5)


@pytest.mark.parametrize("jit", [False, True])
def test_normalized_extremes_have_length_one(extreme, jit):
    unit = flat((normalize if jit else numerics.normalize)(extreme))
    assert np.linalg.norm(unit) == pytest.approx(1, rel=1e-6)
    direction = flat(extreme) / np.abs(flat(extreme)).max()
    np.testing.assert_allclose(
        unit, direction / np.linalg.norm(direction), rtol=1e-3, atol=1e-12
    )


@pytest.mark.parametrize("norm", [1e-8, 1e-3, 1.0, 1e18])
def test_a_usual_norm_takes_one_pass(norm):
    _, factor = numerics._scaled_norm({"a": jnp.full(4, norm / 2)})
    assert factor == 1


def test_the_largest_entry_becomes_one_at_the_ends_of_the_range(extreme):
    largest = np.abs(flat(numerics.scale_to_one(extreme))).max()
    assert largest == pytest.approx(1, rel=1e-6)


def test_entries_whose_squares_vanish_are_counted():
    """A million of them, beside one whose square does not."""
    tree = [jnp.full(10**6, 1e-19), jnp.asarray([6e-16])]
    expected = np.sqrt(10**6 * 1e-38 + 3.6e-31)
    assert float(norm(tree)) == pytest.approx(expected, rel=1e-5)


def test_the_unit_tree_does_not_move_at_zero():
    zero, one = jnp.zeros(3), jnp.ones(3)
    _, slope = jax.jvp(normalize, (zero,), (one,))
    assert not np.asarray(slope).any()


def test_a_norm_that_is_out_of_range_is_the_largest_number_beside_a_tree():
    """It goes into a state, where an infinite one would stay."""
    tree = [jnp.full(1000, 3e38)]
    _, norm, _ = jax.jit(numerics.normalize_beside)(tree, ())
    assert float(norm) == np.finfo(np.float32).max


def test_a_cosine_is_at_most_one():
    for seed in range(20):
        tree = [jnp.asarray(np.random.RandomState(seed).standard_normal(7), "f4")]
        assert abs(float(cosine(tree, tree))) <= 1


def test_norm_is_finite_whenever_it_can_be():
    tree = [jnp.asarray([1.7e38, 1.7e38])]
    assert float(norm(tree)) == pytest.approx(1.7e38 * np.sqrt(2), rel=1e-6)
    assert not np.isfinite(float(optax.tree.norm(tree)))


@pytest.mark.parametrize("p", ORDERS)
def test_zero_has_norm_zero_and_stays_zero(p):
    zero = {"a": jnp.zeros(3), "b": jnp.zeros(())}
    assert float(norm(zero, p)) == 0
    assert not flat(normalize(zero)).any()
    if p > 1:
        assert not flat(dual_direction(zero, p)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_entry_is_not_hidden(bad):
    tree = [jnp.asarray([1.0, bad])]
    assert not np.isfinite(flat(normalize(tree))).all()


def test_none_and_masked_nodes_count_nothing():
    tree = {"a": jnp.asarray([3.0, 4.0]), "b": None, "c": optax.MaskedNode()}
    assert float(norm(tree)) == pytest.approx(5)
    assert jax.tree.structure(normalize(tree)) == jax.tree.structure(tree)
    assert float(norm({})) == 0


@pytest.mark.parametrize("p", [1.2, 2, 3, np.inf])
@given(seed=st.integers(0, 1000))
def test_dual_direction_attains_hoelders_bound(p, seed):
    """⟨d, u⟩ = ‖d‖_q with ‖u‖_p = 1."""
    d = random_tree(seed)
    u = flat(dual_direction(d, p))
    q = 1 if p == np.inf else p / (p - 1)
    assert np.linalg.norm(u, ord=p) == pytest.approx(1, rel=1e-5)
    assert flat(d) @ u == pytest.approx(np.linalg.norm(flat(d), ord=q), rel=1e-5)


@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-30, 1.0, 1e30]))
def test_cosine_ignores_scale(seed, scale):
    a, b = random_tree(seed), random_tree(seed + 1, scale=scale)
    x, y = flat(a), flat(b)
    expected = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    assert float(cosine(a, b)) == pytest.approx(expected, abs=1e-5)
    assert float(cosine(a, jax.tree.map(jnp.zeros_like, b))) == 0


@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-20, 1.0, 1e20]))
def test_orthogonal_component_is_orthogonal_and_the_rest_is_parallel(seed, scale):
    a, b = random_tree(seed, scale=scale), random_tree(seed + 1)
    rest = orthogonal_to(a, b)
    size = np.linalg.norm(flat(a))
    assert abs(flat(rest) @ flat(b)) <= 1e-5 * size * np.linalg.norm(flat(b))
    parallel = (flat(a) - flat(rest)) / size
    along = flat(b) / np.linalg.norm(flat(b))
    np.testing.assert_allclose(parallel, (parallel @ along) * along, atol=1e-5)


def test_outside_of_jit_nothing_is_compiled_twice():
    """A step in a notebook, without jit, must not compile its norm at every call."""
    events = []

    def listen(event, seconds, **kwargs):
        events.append(event)

    def compilations(value):
        tree = {"of a shape": jnp.full((3, 5), value), "of its own": jnp.ones(11)}
        events.clear()
        numerics.normalize(tree), numerics.norm(tree, 3)
        return sum(event.endswith("backend_compile_duration") for event in events)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert compilations(1.0) > 0
        assert compilations(2.0) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def on_gpus(monkeypatch):
    """What GPUs compute, computed here."""
    chosen = []

    def choose(on_gpu, elsewhere, *args):
        chosen.append(on_gpu)
        return on_gpu(*args)

    def forget():
        for function in (*COMPILED, numerics._scaled_norm_beside):
            function.clear_cache()

    monkeypatch.setattr(numerics, "_without_waiting", choose)
    forget()
    yield
    assert chosen
    forget()


def test_gpus_find_the_same_at_the_ends_of_the_range(extreme, on_gpus):
    test_normalized_extremes_have_length_one(extreme, jit=True)
    # Both are powers of two away from the range, and the sums are of the same numbers.
    unit, other = normalize(extreme), jax.tree.map(jnp.ones_like, extreme)
    cosine_there = cosine(extreme, other)
    rest_there = orthogonal_to(other, extreme)
    assert float(cosine(unit, other)) == pytest.approx(float(cosine_there), abs=1e-6)
    np.testing.assert_allclose(
        flat(rest_there), flat(orthogonal_to(other, unit)), rtol=1e-3, atol=1e-3
    )


def test_gpus_keep_zeros_and_bad_entries(on_gpus):
    assert float(norm([jnp.zeros(3)])) == 0
    for bad in (np.nan, np.inf):
        test_a_bad_entry_is_not_hidden(bad)
    test_norm_is_finite_whenever_it_can_be()


@pytest.mark.parametrize("name", RECIPES)
def test_no_host_of_a_gpu_waits_for_a_norm(name):
    """Before each round of a loop of unknown length it would."""
    params = jnp.ones((4, 4))
    optimizer = RECIPES[name](BASE)
    step = ov.make_train_step(lambda w, x: jnp.mean((x @ w) ** 2), optimizer)
    traced = step.trace(ov.init_train_state(params, optimizer), params)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" not in text
