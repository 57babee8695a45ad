"""Perturbations: their length, their direction, and who chooses the leaves."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from problems import flat, random_tree, run_chain

import optax_vasso as ov

pytestmark = pytest.mark.usefixtures("strict")
SCALES = st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30])
RADII = st.floats(1e-3, 10)


def perturb(transform, direction, params=None):
    """The first perturbation, compiled: a program costs less than its operations."""
    return jax.jit(
        lambda direction, params: run_chain(transform, [direction], params)[0][0]
    )(direction, params)


@functools.cache
def compiled(make, *options):
    """The first perturbation of ``make(*numbers, *options)`` for traced numbers."""

    def first(direction, params, *numbers):
        return run_chain(make(*numbers, *options), [direction], params)[0][0]

    return jax.jit(first)


def sam_of_order(rho, p):
    return ov.sam_perturb(rho, p=p)


@pytest.mark.parametrize("p", [1.5, 2, 3, np.inf])
@given(seed=st.integers(0, 1000), rho=RADII, scale=SCALES)
def test_the_perturbation_has_length_rho(p, seed, rho, scale):
    d = random_tree(seed, scale=scale)
    epsilon = flat(compiled(sam_of_order, p)(d, None, rho))
    assert np.linalg.norm(epsilon, ord=p) == pytest.approx(rho, rel=1e-5)


@given(seed=st.integers(0, 1000))
def test_sam_perturb_is_rho_d_over_the_norm(seed):
    d = random_tree(seed)
    expected = 0.3 * flat(d) / np.linalg.norm(flat(d))
    epsilon = compiled(ov.sam_perturb)(d, None, 0.3)
    np.testing.assert_allclose(flat(epsilon), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "entries"),
    [
        ("f2", [6e4, -6e4, 1e-7]),
        ("f2", [1e-7, 2e-7]),
        ("f2", [300.0, 300.0, 300.0]),
        ("f4", [1e30, -1e30]),
        ("f4", [1e-30, 1e-30]),
        (jnp.bfloat16, [1e38, 1e38]),
    ],
)
def test_length_holds_at_the_ends_of_every_dtypes_range(dtype, entries):
    """Within 1 %; the roundings of float16 and bfloat16 entries are smaller."""
    d = [jnp.asarray(entries, dtype)]
    epsilon = perturb(ov.sam_perturb(0.05), d)
    assert epsilon[0].dtype == jnp.dtype(dtype)
    assert np.linalg.norm(flat(epsilon)) / 0.05 == pytest.approx(1, abs=0.01)


@given(seed=st.integers(0, 1000), power=st.integers(-60, 60))
def test_scaling_the_gradient_by_a_power_of_two_changes_nothing(seed, power):
    d = random_tree(seed)
    scaled = jax.tree.map(lambda leaf: leaf * jnp.float32(2.0**power), d)
    perturb = compiled(ov.sam_perturb)
    chex.assert_trees_all_equal(perturb(d, None, 0.1), perturb(scaled, None, 0.1))


@pytest.mark.parametrize(
    "transform",
    [
        ov.sam_perturb(0.1),
        ov.sam_perturb(0.1, p=np.inf),
        ov.sam_perturb(0.1, p=3),
        ov.asam_perturb(0.1),
        ov.fisher_perturb(0.1),
        ov.ascent.per_layer(ov.sam_perturb(0.1)),
        optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(0.1)),
        optax.chain(ov.friendly_noise(1.0, 0.6), ov.sam_perturb(0.1)),
    ],
)
def test_a_zero_direction_gives_a_zero_perturbation(transform):
    params = random_tree(0)
    zero = jax.tree.map(jnp.zeros_like, params)
    assert not flat(perturb(transform, zero, params)).any()


@given(seed=st.integers(0, 1000))
def test_rho_zero_perturbs_nothing(seed):
    assert not flat(compiled(ov.sam_perturb)(random_tree(seed), None, 0.0)).any()


def test_rho_may_be_a_schedule_of_the_step_or_traced():
    d = random_tree(0)
    schedule = optax.linear_schedule(0.1, 0.3, 2)
    outputs = jax.jit(lambda d: run_chain(ov.sam_perturb(schedule), [d, d, d])[0])(d)
    lengths = [np.linalg.norm(flat(output)) for output in outputs]
    np.testing.assert_allclose(lengths, [0.1, 0.2, 0.3], rtol=1e-5)
    traced = compiled(ov.sam_perturb)(d, None, 0.7)
    assert np.linalg.norm(flat(traced)) == pytest.approx(0.7, rel=1e-5)


@given(seed=st.integers(0, 1000), eta=st.floats(0, 1))
def test_asam_perturb_is_the_formula_and_has_length_rho_in_its_own_metric(seed, eta):
    d, x = random_tree(seed), random_tree(seed + 1)
    epsilon = flat(compiled(ov.asam_perturb)(d, x, 0.5, eta))
    t = np.abs(flat(x)) + eta
    expected = 0.5 * t**2 * flat(d) / np.linalg.norm(t * flat(d))
    np.testing.assert_allclose(epsilon, expected, rtol=1e-4, atol=1e-7)
    assert np.linalg.norm(epsilon / t) == pytest.approx(0.5, rel=1e-4)


def test_asam_does_not_see_a_rescaling_of_the_weights():
    """With η = 0: weights times c and gradient over c, perturbation times c."""
    d, x = random_tree(0), random_tree(1)
    rescaled = {"a": 4.0, "b": [0.5, (8.0, 1.0)]}
    c = jax.tree.map(lambda leaf, v: jnp.full_like(leaf, v), x, rescaled)
    before = perturb(ov.asam_perturb(0.5, 0.0), d, x)
    after = perturb(
        ov.asam_perturb(0.5, 0.0),
        jax.tree.map(jnp.divide, d, c),
        jax.tree.map(jnp.multiply, x, c),
    )
    expected = jax.tree.map(jnp.multiply, before, c)
    np.testing.assert_allclose(flat(after), flat(expected), rtol=1e-5)


@pytest.mark.parametrize(
    "rescaled",
    [
        {"a": True, "b": [False, (True, False)]},
        {"a": True, "b": [False, (True, True)]},
        lambda params: jax.tree.map(lambda leaf: leaf.ndim != 1, params),
    ],
    ids=["tree", "other tree", "function"],
)
def test_asam_rescales_the_chosen_leaves(rescaled):
    d, x = random_tree(0), random_tree(1)
    t = jax.tree.map(lambda leaf: jnp.abs(leaf) + 0.01, x)
    t["b"][0] = jnp.ones_like(t["b"][0])
    expected = flat(t) ** 2 * flat(d) / np.linalg.norm(flat(t) * flat(d))
    epsilon = perturb(ov.asam_perturb(1.0, 0.01, rescaled), d, x)
    np.testing.assert_allclose(flat(epsilon), expected, rtol=1e-5)


def test_a_choice_of_leaves_may_be_a_prefix_and_none_of_them_leaves_sam():
    d, x = random_tree(0), random_tree(1)
    whole = perturb(ov.asam_perturb(0.1, rescaled={"a": True, "b": True}), d, x)
    chex.assert_trees_all_equal(whole, perturb(ov.asam_perturb(0.1), d, x))
    none = perturb(ov.asam_perturb(0.1, rescaled=False), d, x)
    sam = perturb(ov.sam_perturb(0.1), d)
    chex.assert_trees_all_close(none, sam, rtol=1e-6)


@given(
    seed=st.integers(0, 1000),
    eta=st.floats(0, 100),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_fisher_perturb_is_the_formula(seed, eta, scale):
    d = random_tree(seed, scale=scale)
    inverse = 1 / (1 + eta * flat(d) ** 2)
    expected = 0.5 * inverse * flat(d) / np.sqrt(np.sum(inverse * flat(d) ** 2))
    epsilon = flat(compiled(ov.fisher_perturb)(d, None, 0.5, eta))
    np.testing.assert_allclose(epsilon, expected, rtol=1e-3, atol=1e-9)


def test_fisher_perturb_survives_a_huge_gradient():
    """√F⁻¹ d tends to sign(d)/√η: every entry has the same length in the metric."""
    d = [jnp.asarray([1e30, -1e30])]
    epsilon = flat(perturb(ov.fisher_perturb(0.1), d))
    assert np.isfinite(epsilon).all()
    chex.assert_trees_all_equal(
        perturb(ov.fisher_perturb(0.1, 0.0), random_tree(0)),
        perturb(ov.sam_perturb(0.1), random_tree(0)),
    )


def test_per_layer_gives_every_leaf_its_own_ball():
    d = random_tree(0)
    epsilon = perturb(ov.ascent.per_layer(ov.sam_perturb(0.1)), d, d)
    for leaf in jax.tree.leaves(epsilon):
        if leaf.size:
            assert np.linalg.norm(leaf) == pytest.approx(0.1, rel=1e-5)


def test_per_layer_keeps_a_state_for_every_leaf():
    steps = [random_tree(t) for t in range(3)]
    chain = optax.chain(ov.vasso_ema(0.5), ov.sam_perturb(0.1))
    per_layer = ov.ascent.per_layer(chain)
    outputs, _ = jax.jit(lambda steps: run_chain(per_layer, steps, steps[0]))(steps)
    alone, _ = jax.jit(lambda steps: run_chain(chain, steps))(
        [step["b"][0] for step in steps]
    )
    np.testing.assert_allclose(outputs[-1]["b"][0], alone[-1], rtol=1e-5)


def unstack(stacked):
    """The tree with a list of layers in place of leaves stacked for a scan."""
    layers = [
        jax.tree.map(lambda leaf, i=i: leaf[i], stacked["layers"]) for i in range(3)
    ]
    return stacked | {"layers": layers}


@pytest.mark.parametrize(
    "chain",
    [
        optax.chain(ov.vasso_ema(0.5), ov.sam_perturb(0.1)),
        optax.chain(ov.vasso_ema(0.5), ov.asam_perturb(0.1)),
    ],
    ids=["vasso", "asam"],
)
def test_per_layer_takes_leaves_stacked_for_a_scan_layer_by_layer(chain):
    random = np.random.default_rng(0)

    def tree():
        return {
            "head": jnp.asarray(random.normal(size=4), jnp.float32),
            "layers": {
                "kernel": jnp.asarray(random.normal(size=(3, 4, 4)), jnp.float32),
                "bias": jnp.asarray(random.normal(size=(3, 4)), jnp.float32),
            },
        }

    params, steps = tree(), [tree() for _ in range(3)]
    scanned = ov.ascent.per_layer(chain, stacked={"head": False, "layers": True})
    found, state = jax.jit(lambda s: run_chain(scanned, s, params))(steps)
    listed = ov.ascent.per_layer(chain)
    expected, _ = jax.jit(lambda s: run_chain(listed, s, unstack(params)))(
        [unstack(step) for step in steps]
    )
    chex.assert_trees_all_close(unstack(found[-1]), expected[-1], rtol=1e-5)
    assert optax.tree.get(state, "ema")["layers"]["bias"].shape == (3, 4)


def test_per_layer_refuses_what_has_no_layers():
    params = {"kernel": jnp.ones((3, 2)), "scale": jnp.ones(())}
    ascent = ov.ascent.per_layer(ov.sam_perturb(0.1), stacked=True)
    with pytest.raises(ValueError, match=r"^stacked\['scale'\] is True, but .* scalar"):
        ascent.init(params)
    held = ov.ascent.hold_rise(ov.sam_perturb(1.0))
    with pytest.raises(ValueError, match="put hold_rise around per_layer"):
        ov.ascent.per_layer(held).init(params)
    ov.ascent.hold_rise(ov.ascent.per_layer(ov.sam_perturb(1.0))).init(params)


def test_a_mask_by_name_does_not_change_when_layers_are_stacked():
    def kernels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path[-1].key == "kernel", params
        )

    layers = {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}
    grads = {"layers": layers}
    ascent = ov.ascent.masked_ascent(ov.sam_perturb(0.1), kernels)
    found, _ = ascent.update(grads, ascent.init(grads), grads)
    listed, _ = ascent.update(
        unstack(grads), ascent.init(unstack(grads)), unstack(grads)
    )
    assert found["layers"]["bias"] is listed["layers"][0]["bias"] is None
    for i in range(3):
        np.testing.assert_allclose(
            found["layers"]["kernel"][i], listed["layers"][i]["kernel"], rtol=1e-6
        )


MASKS = {
    "a tree": {"a": True, "b": [False, (True, False)]},
    "a prefix": {"a": True, "b": [False, True]},
    "a function": lambda params: jax.tree.map(lambda leaf: leaf.ndim != 1, params),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_masked_ascent_is_the_ascent_of_the_chosen_leaves(name):
    """Their norm, their averages; None is the perturbation of the others."""
    steps = [random_tree(t) for t in range(3)]
    for step in steps:
        step["b"][1] = (step["b"][1][0], jnp.ones(2))
    mask = {"a": True, "b": [False, (True, name != "a tree")]}
    if name == "a function":
        mask["b"][1] = (True, False)
    chain = optax.chain(ov.vasso_ema(0.5), ov.sam_perturb(0.1))
    masked = ov.ascent.masked_ascent(chain, MASKS[name])
    outputs, state = jax.jit(lambda steps: run_chain(masked, steps, steps[0]))(steps)

    def chosen(tree):
        return [
            leaf
            for leaf, take in zip(
                jax.tree.leaves(tree), jax.tree.leaves(mask), strict=True
            )
            if take
        ]

    alone, alone_state = jax.jit(lambda steps: run_chain(chain, steps))(
        [chosen(step) for step in steps]
    )
    for output, expected in zip(outputs, alone, strict=True):
        chex.assert_trees_all_close(jax.tree.leaves(output), expected, rtol=1e-6)
        structure = jax.tree.structure(steps[0])
        verdicts = [part is not None for part in structure.flatten_up_to(output)]
        assert verdicts == jax.tree.leaves(mask)
    chex.assert_trees_all_close(
        jax.tree.leaves(state), jax.tree.leaves(alone_state), rtol=1e-6
    )


def test_no_mask_is_the_ascent_itself():
    d = random_tree(0)
    for mask in (None, True):
        whole = perturb(ov.ascent.masked_ascent(ov.sam_perturb(0.1), mask), d, d)
        chex.assert_trees_all_equal(whole, perturb(ov.sam_perturb(0.1), d))


def spy(seen):
    """An ascent that keeps the extra arguments of each call."""

    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def test_per_layer_and_masked_ascent_pass_extra_arguments_on():
    """Whole, but for the direction, of which each leaf gets its own part."""
    tree = {"a": jnp.ones(2), "b": jnp.zeros(3)}
    extra = {"direction": {"a": jnp.full(2, 5.0), "b": jnp.full(3, 6.0)}, "value": 7}
    seen = []
    per_layer = ov.ascent.per_layer(spy(seen))
    per_layer.update(tree, per_layer.init(tree), tree, **extra)
    assert [call["value"] for call in seen] == [7, 7]
    assert [float(call["direction"][0]) for call in seen] == [5.0, 6.0]
    seen.clear()
    masked = ov.ascent.masked_ascent(spy(seen), {"a": False, "b": True})
    masked.update(tree, masked.init(tree), tree, **extra)
    (call,) = seen
    assert call["value"] == 7
    assert call["direction"]["a"] == optax.MaskedNode()
    assert float(call["direction"]["b"][0]) == 6.0


def test_without_a_mask_an_ascent_stays_as_it_is():
    """It needs no parameters, which only a mask reads."""
    grads = {"w": jnp.array([3.0, 4.0])}
    ascent = ov.ascent.masked_ascent(ov.sam_perturb(0.5), None)
    perturbation, _ = ascent.update(grads, ascent.init(grads))
    np.testing.assert_allclose(perturbation["w"], [0.3, 0.4], rtol=1e-6)


def test_weights_and_gradients_may_be_as_large_as_their_products_may_not():
    x, g = jnp.array([1e25, 2e25]), jnp.array([4e25, 3e25])
    ascent = ov.asam_perturb(0.1, eta=0.0)
    epsilon, _ = ascent.update(g, ascent.init(x), x)
    assert np.linalg.norm(np.float64(epsilon) / np.float64(x)) == pytest.approx(0.1)
