"""A radius that holds the rise of the loss on examples that the ascent did not see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_vasso as ov
from optax_vasso._internal.trees import tell_loss
from optax_vasso.ascent import hold_rise, masked_ascent, per_layer
from optax_vasso.train import split_batch

GRADS = jnp.array([3.0, 4.0])


@functools.cache
def follower(rise, curvature):
    """Radii and rises of a loss that rises by curvature · ρ²/2 beyond a clean one."""
    ascent = hold_rise(ov.sam_perturb(1.0), rise)

    def step(state, clean):
        epsilon, state = ascent.update(GRADS, state, value=clean)
        rho = jnp.linalg.norm(epsilon)
        state = state.after(clean + curvature * rho**2 / 2)
        return state, (state.report.metrics["rho"], state.report.metrics["rise"])

    @jax.jit
    def run(losses):
        return jax.lax.scan(step, ascent.init(GRADS), losses)

    return run


def losses(start, end, steps=4000):
    """A loss that stays, falls and then stays again."""
    return np.interp(np.arange(steps), [40, 400], [start, end]).astype(np.float32)


@pytest.mark.parametrize("curvature", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("rise", [0.1, 0.3])
def test_the_rise_is_held_at_its_share_of_what_has_been_learned(rise, curvature):
    _, (rho, found) = follower(rise, curvature)(losses(2.0, 1.5))
    np.testing.assert_allclose(found[-1], rise * 0.5, rtol=0.01)
    np.testing.assert_allclose(rho[-1], np.sqrt(2 * rise * 0.5 / curvature), rtol=0.01)


@pytest.mark.parametrize(("scale", "constant"), [(1e-3, 0.0), (1e3, 0.0), (1.0, 5.0)])
def test_neither_scale_nor_a_constant_of_the_loss_matters(scale, constant):
    _, (rho, _) = follower(0.3, 1.0)(losses(2.0, 1.5))
    other = scale * losses(2.0, 1.5) + np.float32(constant)
    _, (scaled, _) = follower(0.3, scale)(other)
    # Sums of float32 numbers of other sizes, over a thousand steps.
    np.testing.assert_allclose(scaled, rho, rtol=1e-2)


def test_nothing_learned_is_nothing_perturbed():
    _, (rho, _) = follower(0.3, 1.0)(losses(2.0, 2.2))
    assert rho[-1] == np.float32(1e-3)


def test_what_is_forgotten_shortens_the_radius():
    falls_and_rises = np.concatenate([losses(2.0, 1.0), losses(1.0, 1.9)])
    _, (rho, _) = follower(0.3, 1.0)(falls_and_rises)
    np.testing.assert_allclose(rho[3999] / rho[-1], np.sqrt(10), rtol=0.02)


def test_an_initialization_that_is_soon_forgotten_does_not_count():
    usual = losses(2.0, 1.5)
    high = usual + np.where(np.arange(len(usual)) < 10, 10, 0).astype(np.float32)
    radii = [follower(0.3, 1.0)(series)[1][0][-1] for series in (usual, high)]
    np.testing.assert_allclose(radii[1], radii[0], rtol=0.1)


@pytest.mark.parametrize("spike", [np.nan, np.inf, -np.inf, 1e30, -1e30])
@pytest.mark.parametrize("when", [0, 1, 20, 2000])
def test_one_extreme_loss_is_soon_forgotten(spike, when):
    series = losses(2.0, 1.5)
    _, (rho, _) = follower(0.3, 1.0)(series)
    series[when] = spike
    _, (spiked, found) = follower(0.3, 1.0)(series)
    assert np.isfinite(spiked).all()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(spiked[-1], rho[-1], rtol=0.05)


@pytest.mark.parametrize("spike", [np.nan, np.inf, 1e30])
def test_one_extreme_perturbed_loss_is_soon_forgotten(spike):
    ascent = hold_rise(ov.sam_perturb(1.0))

    def step(state, at):
        clean, is_spike = at
        _, state = ascent.update(GRADS, state, value=clean)
        before = state.radius
        state = state.after(jnp.where(is_spike, spike, clean + before**2 / 2))
        return state, state.radius / before

    series = losses(2.0, 1.5, 800)[::2], np.arange(400) == 200
    state, moves = jax.jit(lambda: jax.lax.scan(step, ascent.init(GRADS), series))()
    # A step that cannot be trusted moves the radius as little as any other.
    assert 0.96 <= moves[200] <= 1.0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def regression(batch=64):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, 4)), jnp.float32)
    return jnp.zeros(4), {"x": x, "y": x @ jnp.array([1.0, -2.0, 3.0, 0.5])}


def squares(params, batch):
    return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)


def trained(optimizer, steps=60, **makers):
    params, batch = regression()
    step = ov.make_train_step(squares, optimizer, **(makers or split_batch()))
    state = ov.init_train_state(params, optimizer)
    rows = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        rows.append(metrics)
    return state, rows


def held(base=None, **options):
    return ov.sharpness_aware(
        optax.sgd(0.01) if base is None else base,
        hold_rise(ov.sam_perturb(1.0)),
        **options,
    )


def test_the_train_step_reports_radius_and_rise():
    _, rows = trained(held())
    assert [row["rho"] for row in rows[:31]] == [0] * 30 + [np.float32(0.05)]
    # From the 31st step on, moving averages.
    start = np.median(
        [np.mean([r["perturbed_loss"] for r in rows[i : i + 10]]) for i in (0, 10, 20)]
    )
    clean = perturbed = start
    for row in rows[30:]:
        clean += 0.03 * (row["loss"] - clean)
        perturbed += 0.03 * (row["perturbed_loss"] - perturbed)
    np.testing.assert_allclose(rows[-1]["rise"], perturbed - clean, rtol=1e-3)
    assert rows[-1]["rho"] != rows[0]["rho"]


def test_steps_without_an_ascent_say_nothing():
    every_third = held(gate=ov.gate.every(3))
    state, _ = trained(every_third, steps=60)
    assert state.opt_state.ascent_state.step == 20
    assert np.isfinite(optax.tree.get(state.opt_state, "rise")).all()


def after_the_start(ascent, params):
    """The state after thirty steps on an unchanging gradient and loss."""
    state = ascent.init(params)
    for _ in range(30):
        _, state = ascent.update(params, state, params, value=1.0)
        state = tell_loss(state, jnp.ones(()))
    return state


def test_the_radius_multiplies_any_chain_of_a_part_of_the_parameters():
    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.ones(2)}
    only_a = masked_ascent(hold_rise(ov.sam_perturb(1.0)), {"a": True, "b": False})
    epsilon, _ = only_a.update(
        params, after_the_start(only_a, params), params, value=1.0
    )
    np.testing.assert_allclose(epsilon["a"], [0.03, 0.04], rtol=1e-6)
    assert epsilon["b"] is None
    layers = hold_rise(per_layer(ov.sam_perturb(1.0)))
    epsilon, _ = layers.update(
        params, after_the_start(layers, params), params, value=1.0
    )
    np.testing.assert_allclose(epsilon["b"], 0.05 / np.sqrt(2) * np.ones(2), rtol=1e-6)


@pytest.mark.parametrize("wrap", ["masked", "chain"])
def test_the_perturbed_loss_reaches_the_state_wherever_it_is(wrap):
    chain = hold_rise(ov.sam_perturb(1.0))
    ascent = {
        "masked": masked_ascent(chain, True),
        "chain": optax.chain(optax.identity(), chain),
    }[wrap]
    state, _ = trained(ov.sharpness_aware(optax.sgd(0.01), ascent), steps=3)
    (first,) = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(state.opt_state)
        if "blocks[0]" in jax.tree_util.keystr(path)
    ]
    assert first > 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scalars_are_float32_whatever_the_parameters_are(dtype):
    params = jnp.ones(3, dtype)
    ascent = hold_rise(ov.sam_perturb(1.0))
    state = ascent.init(params)
    epsilon, after = ascent.update(params, state, value=jnp.ones((), dtype))
    after = after.after(jnp.ones((), dtype))
    assert epsilon.dtype == dtype
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(
        lambda x: x.dtype, state
    )
    assert after.radius.dtype == jnp.float32


def test_a_rise_of_zero_ends_all_perturbation():
    _, (rho, _) = follower(0.0, 1.0)(losses(2.0, 1.0))
    assert rho[-1] == np.float32(1e-3)


def test_the_rise_may_be_scheduled():
    ascent = hold_rise(ov.sam_perturb(1.0), optax.linear_schedule(0.0, 0.4, 4))
    state = ascent.init(GRADS)
    wanted = []
    for _ in range(4):
        _, state = ascent.update(GRADS, state, value=1.0)
        state = state.after(1.0)
        wanted.append(float(state.share))
    np.testing.assert_allclose(wanted, [0, 0.1, 0.2, 0.3], rtol=1e-6)


def test_the_chain_is_given_the_loss_too():
    seen = []

    def update(updates, state, params=None, *, value, **extra_args):
        seen.append((float(value), extra_args))
        return updates, state

    chain = optax.GradientTransformationExtraArgs(lambda params: (), update)
    ascent = hold_rise(chain)
    ascent.update(GRADS, ascent.init(GRADS), value=1.5, temperature=300)
    assert seen == [(1.5, {"temperature": 300})]


def test_a_whole_batch_for_both_is_refused():
    with pytest.raises(ValueError, match=r"add \*\*split_batch\(\)"):
        trained(held(), gradient=ov.train.whole_batch)


def test_a_missing_loss_is_named():
    optimizer = held()
    state = optimizer.init(GRADS)
    with pytest.raises(ValueError, match="needs the loss as value"):
        optimizer.update(GRADS, state, GRADS, grad_fn=lambda x: (1.0, x))
    with pytest.raises(ValueError, match="value_and_grad"):
        optimizer.update(GRADS, state, GRADS, grad_fn=lambda x: x, value=1.0)


def test_a_lagged_step_has_no_loss_to_compare_with():
    with pytest.raises(ValueError, match="at unperturbed parameters"):
        ov.lagged(optax.sgd(0.1), hold_rise(ov.sam_perturb(1.0))).init(GRADS)


@pytest.mark.parametrize("rise", [-0.1, float("nan"), "0.3"])
def test_a_rise_is_not_negative(rise):
    with pytest.raises(ValueError, match="rise must be"):
        hold_rise(ov.sam_perturb(1.0), rise)


def test_each_group_of_a_local_step_splits_its_own_examples(x64):
    params, batch = regression()
    optimizer = ov.sam(ov.train.average_over(optax.sgd(0.1), "data"), 0.1)
    step = ov.train.make_local_train_step(squares, optimizer, **split_batch())
    state, _ = step(ov.train.init_local_state(params, optimizer, 2), batch)
    gradients = []
    for rows in (slice(0, 32), slice(32, 64)):
        part = jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch)
        g = jax.grad(squares)(params, jax.tree.map(lambda leaf: leaf[::8], part))
        rest = jax.tree.map(lambda leaf: np.delete(leaf, np.s_[::8], 0), part)
        gradients.append(jax.grad(squares)(params + 0.1 * g / jnp.linalg.norm(g), rest))
    expected = params - 0.1 * (gradients[0] + gradients[1]) / 2
    np.testing.assert_allclose(state.params, expected, rtol=1e-6)
