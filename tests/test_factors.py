"""The two factors of an adapter: BAR, against its formula and its mathematics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, strategies as st

import optax_vasso as ov

pytestmark = pytest.mark.usefixtures("strict")
SEEDS = st.integers(0, 1000)
RATE, ALPHA = 0.1, 0.5


def pair(seed, rank=2, scales=(1.0, 1.0)):
    rng = np.random.default_rng(seed)
    return {
        "lora_a": jnp.asarray(scales[0] * rng.standard_normal((5, rank)), jnp.float32),
        "lora_b": jnp.asarray(scales[1] * rng.standard_normal((rank, 3)), jnp.float32),
    }


def balanced(optimizer=None, **options):
    optimizer = optax.sgd(RATE) if optimizer is None else optimizer
    return ov.factors.balanced(
        optimizer, **{"learning_rate": RATE, "alpha": ALPHA} | options
    )


def step(optimizer, params, grads, state=None):
    state = optimizer.init(params) if state is None else state
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def algorithm_2(x, y, g_x, g_y, weight):
    """Lines 4 to 10 of the paper, in NumPy's float64."""
    x, y, g_x, g_y = (np.asarray(a, np.float64) for a in (x, y, g_x, g_y))
    up = 1 if np.linalg.norm(g_x) >= np.linalg.norm(g_y) else -1
    return (1 + up * weight) * x, (1 - up * weight) * y


def assert_close(found, expected):
    # float32: a few roundings of numbers of order one.
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


@given(seed=SEEDS, alpha=st.floats(0, 2), rate=st.floats(0, 0.5))
def test_sgd_is_the_algorithm_of_the_paper(seed, alpha, rate):
    params, grads = pair(seed), pair(seed + 1)
    optimizer = balanced(optax.sgd(rate), learning_rate=rate, alpha=alpha)
    found, _ = step(optimizer, params, grads)
    both = (*params.values(), *grads.values())
    for name, start in zip(params, algorithm_2(*both, rate * alpha), strict=True):
        assert_close(found[name], start - rate * np.asarray(grads[name], np.float64))


def test_the_optimizer_sees_the_balanced_factors():
    """AdamW decays them, as in the paper, where the two lines stand one by one."""
    adamw = optax.adamw(RATE, weight_decay=0.3)
    optimizer = balanced(adamw)
    found = expected = pair(0)
    found_state, state = optimizer.init(found), adamw.init(expected)
    with jax.numpy_dtype_promotion("standard"):  # Adam's own
        for seed in range(1, 6):
            grads = pair(seed, scales=(1.0, seed / 2))
            found, found_state = step(optimizer, found, grads, found_state)
            x, y = algorithm_2(*expected.values(), *grads.values(), RATE * ALPHA)
            expected = {"lora_a": jnp.float32(x), "lora_b": jnp.float32(y)}
            expected, state = step(adamw, expected, grads, state)
    jax.tree.map(assert_close, found, expected)


@given(seed=SEEDS)
def test_the_adapter_changes_by_the_square_alone(seed):
    """(1 + αη)(1 − αη) = 1 − (αη)², whichever factor grows."""
    params, grads = pair(seed), pair(seed + 1)
    found, _ = step(balanced(optax.set_to_zero()), params, grads)
    change = 1 - (RATE * ALPHA) ** 2
    # Frozen factors are not balanced: here nothing is trained, which counts as all.
    assert_close(
        found["lora_a"] @ found["lora_b"],
        change * (params["lora_a"] @ params["lora_b"]),
    )


@given(seed=SEEDS, scale=st.sampled_from([1e-25, 1e-10, 1e10, 1e18]))
def test_the_length_of_the_gradient_does_not_matter(seed, scale):
    """Only which of the two is longer, also where their squares leave float32."""
    params, grads = pair(seed), pair(seed + 1)
    scaled = jax.tree.map(lambda g: g * jnp.float32(scale), grads)
    optimizer = balanced(optax.sgd(0.0))
    found, expected = (step(optimizer, params, g)[0] for g in (grads, scaled))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def differences(scale, noise):
    """‖X‖² − ‖Y‖² of eight adapters of norms scale and 1/scale: before and after.

    After 1000 steps without balancing, and with it: the problem of the paper's first
    figure, near the flow, along which gradient descent keeps the difference.
    """
    params = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *(pair(seed, scales=(scale, 1 / scale)) for seed in range(8)),
    )
    targets = jnp.stack([pair(s + 9)["lora_a"] @ pair(s)["lora_b"] for s in range(8)])
    keys = jax.random.split(jax.random.key(0), 1000)

    def loss(p, target, key):
        target = target + noise * jax.random.normal(key, target.shape)
        return jnp.mean((p["lora_a"] @ p["lora_b"] - target) ** 2)

    @jax.jit
    @jax.vmap
    def run(params, target, alpha):
        optimizer = balanced(optax.sgd(1e-3), learning_rate=1e-3, alpha=alpha)

        def advance(carry, key):
            params, state = carry
            grads = jax.grad(loss)(params, target, key)
            return step(optimizer, params, grads, state), None

        carry = params, optimizer.init(params)
        return jax.lax.scan(advance, carry, keys)[0][0]

    plain, found = (run(params, targets, jnp.full(8, alpha)) for alpha in (0.0, 1.0))
    for each in (params, plain, found):
        x, y = (np.sum(np.square(leaf), (1, 2)) for leaf in each.values())
        yield x - y


@pytest.mark.parametrize("scale", [8.0, 1 / 8])
def test_noise_draws_the_norms_of_the_two_factors_together(scale):
    """(c X, Y/c) is the same adapter for every c; gradient descent remembers c.

    The noise of the batches has every direction, so that the larger factor has the
    smaller gradient.
    """
    before, plain, found = differences(scale, noise=1.0)
    np.testing.assert_allclose(plain, before, rtol=0.01)
    # (1 - 1e-3)^2000 = 0.14 if the larger one shrinks in every step.
    assert np.all(abs(found) < 0.2 * abs(before))


def test_without_noise_the_larger_factor_may_grow():
    """It fits what it can, and then has no gradient, but the smaller one still has."""
    before, _, found = differences(8.0, noise=0.0)
    assert np.any(found > 2 * before)
    assert np.any(found < 0.2 * before)


def test_schedules_are_read_at_the_step():
    params = pair(0)
    grads = {"lora_a": params["lora_a"], "lora_b": jnp.zeros((2, 3))}
    optimizer = balanced(
        optax.sgd(0.0),
        learning_rate=lambda step: 0.1 * (step + 1),
        alpha=optax.linear_schedule(1.0, 0.0, 2),
    )
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):  # Optax's schedule
        for weight in (0.1 * 1.0, 0.2 * 0.5, 0.3 * 0.0):
            found, state = step(optimizer, params, grads, state)
            assert_close(found["lora_a"], (1 + weight) * np.asarray(params["lora_a"]))
            assert_close(found["lora_b"], (1 - weight) * np.asarray(params["lora_b"]))
    assert state.step == 3


def test_each_pair_is_balanced_by_itself_and_other_leaves_are_not():
    params = {
        "in": pair(0),
        "out": {"kernel_lora_a": pair(1)["lora_a"], "kernel_lora_b": jnp.ones((2, 3))},
        "bias": jnp.ones(3),
    }
    grads = jax.tree.map(jnp.ones_like, params)  # of the larger factor in both pairs
    grads["out"]["kernel_lora_a"] *= 0.1  # and of the smaller one here
    found, _ = step(balanced(optax.sgd(0.0)), params, grads)
    signs = {"in": (1, -1), "out": (-1, 1)}
    for name, both in signs.items():
        for sign, before, after in zip(
            both, params[name].values(), found[name].values(), strict=True
        ):
            assert_close(after, (1 + sign * RATE * ALPHA) * np.asarray(before))
    np.testing.assert_array_equal(found["bias"], params["bias"])


def test_names_of_ones_own():
    params = {"down": pair(0)["lora_a"], "up": pair(0)["lora_b"]}
    grads = jax.tree.map(jnp.ones_like, params)
    found, _ = step(balanced(names=("down", "up")), params, grads)
    swapped, _ = step(balanced(names=("up", "down")), params, grads)
    jax.tree.map(np.testing.assert_array_equal, found, swapped)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.LoRALinear(3, 3, lora_rank=2, rngs=rngs)


def test_an_nnx_state_is_balanced_as_its_arrays_are():
    state = nnx.state(Layer(nnx.Rngs(0)), nnx.LoRAParam)
    arrays = nnx.to_pure_dict(state)
    found, expected = (
        step(balanced(), tree, jax.tree.map(jnp.ones_like, tree))[0]
        for tree in (state, arrays)
    )
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(found), expected)
    assert not np.array_equal(
        expected["linear"]["lora"]["lora_a"],
        arrays["linear"]["lora"]["lora_a"] - np.float32(RATE),
    )


def test_each_of_the_stacked_layers_is_a_pair():
    layers = [pair(seed) for seed in range(4)]
    grads = [pair(seed + 9) for seed in range(4)]
    ratios = [
        np.linalg.norm(g["lora_a"]) > np.linalg.norm(g["lora_b"]) * 1.3 for g in grads
    ]
    assert len({*ratios}) == 2  # else one verdict would do for all of them

    def stack(*leaves):
        return jnp.stack(leaves)

    found, _ = step(
        balanced(stacked=True),
        jax.tree.map(stack, *layers),
        jax.tree.map(stack, *grads),
    )
    expected = [step(balanced(), *each)[0] for each in zip(layers, grads, strict=True)]
    jax.tree.map(assert_close, found, jax.tree.map(stack, *expected))


def test_layers_that_nnx_has_stacked():
    make = nnx.vmap(Layer, in_axes=0, out_axes=0)
    state = nnx.state(make(nnx.Rngs(0).split(3)), nnx.LoRAParam)
    grads = jax.tree.map(jnp.ones_like, state)
    found, _ = step(balanced(stacked=True), state, grads)
    for i in range(3):
        own, g = (jax.tree.map(lambda leaf, i=i: leaf[i], t) for t in (state, grads))
        expected, _ = step(balanced(), own, g)
        jax.tree.map(
            lambda a, b, i=i: assert_close(a[i], b),
            *map(nnx.to_pure_dict, (found, expected)),
        )


@pytest.mark.parametrize("frozen", ["lora_a", "lora_b"])
def test_a_pair_with_a_frozen_factor_stays(frozen):
    """Scaling the other alone would change the adapter in the first order."""
    params = pair(0)
    base = optax.chain(
        optax.sgd(RATE), optax.freeze({name: name == frozen for name in params})
    )
    grads = pair(1)
    found, _ = step(balanced(base), params, grads)
    expected, _ = step(base, params, grads)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_factor_without_a_gradient_stays():
    params, grads = pair(0), pair(1) | {"lora_a": None}
    updates, _ = balanced().update(grads, balanced().init(params), params)
    assert updates["lora_a"] is None
    np.testing.assert_array_equal(
        updates["lora_b"], -np.float32(RATE) * pair(1)["lora_b"]
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_says_nothing_of_the_norms(bad):
    params = pair(0)
    grads = pair(1)
    grads["lora_b"] = grads["lora_b"].at[0, 0].set(bad)
    found, _ = step(balanced(optax.apply_if_finite(optax.sgd(RATE), 5)), params, grads)
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_updates_keep_the_dtype_of_the_factors(dtype):
    params, grads = (
        jax.tree.map(lambda leaf: leaf.astype(dtype), pair(seed)) for seed in (0, 1)
    )
    grads = jax.tree.map(lambda g: g * dtype(300), grads)  # squares above float16's
    optimizer = balanced(optax.sgd(0.0))
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    x, y = (np.asarray(leaf, np.float64) for leaf in params.values())
    new = algorithm_2(x, y, *grads.values(), RATE * ALPHA)
    for update, before, after in zip(updates.values(), (x, y), new, strict=True):
        assert update.dtype == dtype
        error = np.asarray(update, np.float64) - (after - before)
        assert np.all(abs(error) <= float(jnp.finfo(dtype).eps) * abs(after - before))


@pytest.mark.parametrize("recipe", [ov.sam, ov.lagged_vasso])
def test_what_perturbs_goes_around_it(recipe):
    params = pair(0)

    def grad_fn(p):
        return jax.grad(lambda p: jnp.sum((p["lora_a"] @ p["lora_b"]) ** 2))(p)

    optimizer = recipe(balanced(), 0.05)
    state = optimizer.init(params)
    updates, state = optimizer.update(grad_fn(params), state, params, grad_fn=grad_fn)
    found = ov.eval_params(state, optax.apply_updates(params, updates))
    ascent = ov.sam_perturb(0.05)
    grads = grad_fn(params)
    if recipe is ov.sam:
        e, _ = ascent.update(grads, ascent.init(params), params)
        grads = grad_fn(optax.tree.add(params, e))
    expected, _ = step(balanced(), params, grads)
    jax.tree.map(assert_close, found, expected)
    with pytest.raises(ValueError, match="inside"):
        balanced(recipe(optax.sgd(RATE), 0.05)).init(params)


def test_the_moments_are_found_in_its_state():
    """As placeholders for shardings, too."""
    params = pair(0)
    optimizer = balanced(optax.adam(RATE))
    state = optimizer.init(params)
    doubled = optax.tree.map_params(optimizer, lambda leaf: leaf + 1, state)
    moments = optax.tree.get(doubled, "mu")
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 1.0), moments)


@pytest.mark.parametrize(
    ("params", "options", "match"),
    [
        ({"w": jnp.ones(2)}, {}, r"lora_a and lora_b .*'w'"),
        ({"q": {"lora_a": jnp.ones(2)}}, {}, "q/lora_a without lora_b"),
        (pair(0), {"stacked": {"lora_a": True, "lora_b": False}}, "stacked"),
        (pair(0), {"stacked": True}, "stacked"),  # five layers and two
        (pair(0), {"names": ("lora_a", "lora_a")}, "two different names"),
        (pair(0), {"names": "ab"}, "two different names"),
        (pair(0), {"alpha": -1.0}, "alpha must be"),
        (pair(0), {"learning_rate": np.inf}, "learning_rate must be"),
    ],
)
def test_what_cannot_be_balanced_is_refused(params, options, match):
    with pytest.raises(ValueError, match=match):
        balanced(**options).init(params)


def test_update_needs_the_parameters():
    with pytest.raises(ValueError, match="balanced needs params"):
        balanced().update(pair(0), balanced().init(pair(0)))
