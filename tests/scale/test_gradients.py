"""Microbatches are the whole batch; an ascent may see part of it, or another one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P, reshard

import optax_vasso as ov

BASE = optax.sgd(0.1, momentum=0.9)


def problem(batch=32, width=16):
    rng = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(rng.normal(size=(8, width)) * 0.3),
        "out": jnp.asarray(rng.normal(size=(width, 8)) * 0.3),
    }
    return params, tuple(jnp.asarray(rng.normal(size=(batch, 8))) for _ in range(2))


def loss_fn(params, model_state, batch, key=None):
    x, y = batch
    residual = jnp.tanh(x @ params["in"]) @ params["out"] - y
    mean = 0.9 * model_state + 0.1 * jnp.mean(x)
    return jnp.mean(residual**2), (mean, jnp.mean(residual))


def train(optimizer, batch, params, steps=5, **kwargs):
    step = ov.make_train_step(loss_fn, optimizer, has_aux=True, **kwargs)
    state = ov.init_train_state(params, optimizer, model_state=jnp.zeros(()))
    for _ in range(steps):
        state, metrics = step(state, batch)
    return state, metrics


def assert_close(a, b, atol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


@pytest.mark.parametrize("count", [1, 2, 8, 32])
@pytest.mark.parametrize("recipe", [ov.vasso, ov.lagged_vasso])
def test_microbatches_are_the_whole_batch(x64, recipe, count):
    params, batch = problem()
    whole, whole_metrics = train(recipe(BASE), batch, params)
    parts, metrics = train(
        recipe(BASE), batch, params, gradient=ov.train.microbatched(count)
    )
    assert_close(parts, whole, 1e-12)
    assert_close(metrics["loss"], whole_metrics["loss"], 1e-12)
    assert metrics["aux"].shape == (count,)


def test_temporary_memory_falls_with_the_number_of_microbatches():
    params, batch = problem(batch=4096, width=64)
    optimizer = ov.vasso(BASE)
    state = ov.init_train_state(params, optimizer, model_state=jnp.zeros(()))
    sizes = []
    for count in (1, 4, 16):
        step = ov.make_train_step(
            loss_fn, optimizer, has_aux=True, gradient=ov.train.microbatched(count)
        )
        compiled = step.lower(state, batch).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 0.6 * sizes[0]
    assert sizes[2] < 0.6 * sizes[1]


def test_bfloat16_gradients_are_summed_in_float32():
    # 1 + 256 · 2⁻⁹ in bfloat16 sums of one part at a time would stay at one.
    def linear(params, model_state, batch, key):
        return jnp.mean(params["w"] * batch), (model_state, ())

    examples = jnp.full(257, 2.0**-9, jnp.bfloat16).at[0].set(1)
    params = {"w": jnp.ones((), jnp.bfloat16)}
    grad_fn = ov.train.microbatched(257)(linear)
    _, grads = grad_fn(ov.train.Inputs(params, (), examples))
    exact = np.mean(np.asarray(examples, np.float64))
    np.testing.assert_allclose(np.float64(grads["w"]), exact, rtol=2**-8)


@pytest.mark.parametrize("new_style", [True, False])
def test_the_model_state_after_microbatches_is_that_after_the_whole_batch(new_style):
    make_key = jax.random.key if new_style else jax.random.PRNGKey
    model_state = {
        "mean": jnp.float32(2),
        "half": jnp.bfloat16(2),
        "steps": jnp.int32(5),
        "initialized": jnp.bool_(False),
        "key": make_key(0),
        "keys": jax.random.split(make_key(1), 2),
        "nothing": jnp.zeros((0, 3)),
        "constant": 3,
    }

    def loss_fn(params, model_state, batch, key):
        new = {
            **model_state,
            "mean": 0.5 * model_state["mean"] + 0.5 * jnp.mean(batch),
            "half": model_state["half"] / 2,
            "steps": model_state["steps"] + 1,
            "initialized": jnp.bool_(True),
            "key": jax.random.split(model_state["key"])[0],
            "constant": 4,
        }
        return params * jnp.mean(batch), (new, ())

    batch = jnp.arange(8.0)
    outcomes = []
    for gradient in (ov.train.whole_batch, ov.train.microbatched(4)):
        (_, (new, _)), _ = jax.jit(gradient(loss_fn))(
            ov.train.Inputs(jnp.ones(()), model_state, batch)
        )
        assert new["mean"] == 2.75
        assert new["half"] == 1
        assert new["steps"] == 6
        assert new["initialized"]
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, model_state)
        outcomes.append(new)
    whole, parts = outcomes
    for name, leaf in whole.items():
        assert parts[name].dtype == leaf.dtype
        assert jnp.array_equal(parts[name], leaf)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_microbatches_are_those_of_optax(dtype):
    params, batch = problem()
    params, batch = jax.tree.map(lambda x: x.astype(dtype), (params, batch))
    model_state, count = jnp.zeros((), dtype), 4
    (loss, (state, aux)), grads = ov.train.microbatched(count)(loss_fn)(
        ov.train.Inputs(params, model_state, batch)
    )

    def in_float32(params, batch):
        (loss, (state, aux)), grads = ov.train.whole_batch(loss_fn)(
            ov.train.Inputs(params, model_state, batch)
        )
        means = jax.tree.map(lambda x: x.astype(jnp.float32), (loss, state, grads))
        return means, aux

    kinds = optax.microbatching.AccumulationType
    means, expected_aux = optax.microbatching.microbatch(
        in_float32, 1, 32 // count, accumulator=(kinds.MEAN, kinds.CONCAT)
    )(params, batch)
    expected = jax.tree.map(
        lambda mean, got: mean.astype(got.dtype), means, (loss, state, grads)
    )
    # The same parts, the same sums in the same order.
    for x, y in zip(
        jax.tree.leaves(((loss, state, grads), aux)),
        jax.tree.leaves((expected, expected_aux)),
        strict=True,
    ):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_microbatches_keep_the_explicit_sharding_of_parameters():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    params, batch = problem()

    def gathered(params, *rest):
        return loss_fn(jax.tree.map(lambda w: reshard(w, P()), params), *rest)

    with jax.set_mesh(mesh):
        params, batch = jax.device_put(
            (params, batch), jax.NamedSharding(mesh, P("data"))
        )
        _, grads = jax.jit(ov.train.microbatched(4)(gathered))(
            ov.train.Inputs(params, jnp.zeros(()), batch)
        )
        assert jax.typeof(grads["in"]).sharding.spec == P("data", None)


def test_synchronized_gradients_are_the_mean_over_the_axis():
    def linear(params, model_state, batch, key):
        return params * jnp.mean(batch), (model_state, ())

    grad_fn = ov.train.synchronized("devices")(linear)
    (loss, _), grads = jax.vmap(
        lambda part: grad_fn(ov.train.Inputs(jnp.ones(()), (), part)),
        axis_name="devices",
    )(jnp.array([[1.0, 2.0], [3.0, 6.0]]))
    np.testing.assert_array_equal(grads, [3, 3])
    np.testing.assert_array_equal(loss, [3, 3])


def test_each_microbatch_has_its_own_key():
    def noisy(params, model_state, batch, key):
        return params["w"] * jnp.mean(batch), (model_state, jax.random.normal(key))

    grad_fn = ov.train.microbatched(4)(noisy)
    (_, (_, draws)), _ = grad_fn(
        ov.train.Inputs({"w": jnp.ones(())}, (), jnp.ones(8), jax.random.PRNGKey(0))
    )
    assert len(set(np.asarray(draws).tolist())) == 4


def test_ascent_on_part_of_the_batch_is_written_out(x64):
    params, batch = problem()
    optimizer = ov.sam(optax.sgd(0.1), rho=0.2)
    state, metrics = train(
        optimizer, batch, params, steps=1, ascent_gradient=ov.train.part_of_batch(0.25)
    )
    part = jax.tree.map(lambda leaf: leaf[::4], batch)
    gradient = jax.grad(lambda p, b: loss_fn(p, 0.0, b, None)[0])
    g = gradient(params, part)
    e = optax.tree.scale(0.2 / optax.tree.norm(g), g)
    descent = gradient(optax.tree.add(params, e), batch)
    expected = optax.tree.add_scale(params, -0.1, descent)
    assert_close(state.params, expected, 1e-14)
    assert "sharpness" not in metrics


def test_ascent_on_a_fraction_f_costs_one_plus_f_gradients():
    params, batch = problem(batch=1024, width=64)
    optimizer = ov.vasso(optax.sgd(0.1))
    state = ov.init_train_state(params, optimizer, model_state=jnp.zeros(()))

    def flops(**kwargs):
        step = ov.make_train_step(loss_fn, optimizer, has_aux=True, **kwargs)
        return step.lower(state, batch).compile().cost_analysis()["flops"]

    two = flops()
    for fraction in (0.25, 0.5):
        cost = flops(ascent_gradient=ov.train.part_of_batch(fraction)) / two * 2
        # The parameters are touched as often as before: 1% on this network.
        assert cost == pytest.approx(1 + fraction, abs=0.02)


def test_ascent_on_another_batch_is_written_out(x64):
    params, batch = problem(batch=64)
    both = {
        "ascent": jax.tree.map(lambda x: x[:32], batch),
        "descent": jax.tree.map(lambda x: x[32:], batch),
    }
    state, _ = train(
        ov.sam(optax.sgd(0.1), rho=0.2),
        both,
        params,
        steps=1,
        gradient=ov.train.on_batch("descent"),
        ascent_gradient=ov.train.on_batch("ascent"),
    )
    gradient = jax.grad(lambda p, b: loss_fn(p, 0.0, b, None)[0])
    g = gradient(params, both["ascent"])
    e = optax.tree.scale(0.2 / optax.tree.norm(g), g)
    descent = gradient(optax.tree.add(params, e), both["descent"])
    assert_close(state.params, optax.tree.add_scale(params, -0.1, descent), 1e-14)


@pytest.mark.parametrize("count", [0, -1, 1.5, 2.0, "2", None])
def test_microbatches_are_counted_in_whole_numbers(count):
    with pytest.raises(ValueError, match="count must be an integer >= 1"):
        ov.train.microbatched(count)


@pytest.mark.parametrize("fraction", [0, 1.5, float("nan"), 1e-7, -0.5])
def test_a_fraction_is_in_0_1(fraction):
    with pytest.raises(ValueError, match="fraction must be"):
        ov.train.part_of_batch(fraction)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gradient": ov.train.microbatched(5)}, r"32 examples.*a multiple of 5"),
        (
            {"ascent_gradient": ov.train.part_of_batch(0.3)},
            r"32 examples.*multiple of 10",
        ),
        ({"gradient": ov.train.on_batch("descent")}, "an entry .*: pass both batches"),
        ({"gradient": ov.train.synchronized("data")}, "'data' is not an axis"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_before_the_state_changes(kwargs, message):
    params, batch = problem()
    optimizer = ov.vasso(BASE)
    step = ov.make_train_step(loss_fn, optimizer, has_aux=True, **kwargs)
    state = ov.init_train_state(params, optimizer, model_state=jnp.zeros(()))
    with pytest.raises(ValueError, match=message):
        step(state, batch)
    # Nothing was donated: the state can still be used.
    assert np.isfinite(np.asarray(state.params["in"])).all()


def test_another_ascent_gradient_needs_an_ascent():
    params, batch = problem()
    with pytest.raises(ValueError, match="takes no second gradient"):
        train(BASE, batch, params, ascent_gradient=ov.train.part_of_batch(0.5))


def test_local_ascent_says_what_is_missing():
    params, _ = problem()
    mesh = jax.make_mesh((1,), ("model",))
    local = ov.vasso(ov.train.average_over(BASE, "data"))
    with pytest.raises(ValueError, match="axis 'data' is not in the mesh"):
        ov.train.make_local_train_step(loss_fn, local, has_aux=True, mesh=mesh)
    with pytest.raises(ValueError, match="axis 'data' is not in the mesh"):
        ov.train.init_local_state(params, local, 1, mesh=mesh)
    with pytest.raises(ValueError, match="axis 'data' is not in the mesh"):
        ov.train.shard_batch(jnp.ones(4), mesh)
    with pytest.raises(ValueError, match="axis 'data' is not in the mesh"):
        ov.train.fsdp_specs(params, mesh)
    with pytest.raises(ValueError, match="never averages"):
        ov.train.init_local_state(params, ov.vasso(BASE), 4)
    with pytest.raises(ValueError, match="has no ascent"):
        ov.train.init_local_state(params, BASE, 4)
    with pytest.raises(ValueError, match="groups is 2"):
        ov.train.init_local_state(params, local, 2, mesh=jax.make_mesh((1,), ("data",)))


def test_local_groups_have_to_divide_the_batch():
    params, batch = problem()
    optimizer = ov.vasso(ov.train.average_over(BASE, "data"))
    step = ov.train.make_local_train_step(loss_fn, optimizer, has_aux=True)
    state = ov.train.init_local_state(params, optimizer, 5, model_state=jnp.zeros(()))
    with pytest.raises(
        ValueError, match=r"32 examples.*the groups of a local.*a multiple of 5"
    ):
        step(state, batch)
    plain = ov.init_train_state(params, optimizer, model_state=jnp.zeros(()))
    with pytest.raises(ValueError, match="init_local_state"):
        step(plain, batch)


def test_one_group_is_the_synchronized_step(x64):
    params, batch = problem()
    optimizer = ov.vasso(ov.train.average_over(BASE, "data"))
    step = ov.train.make_local_train_step(loss_fn, optimizer, has_aux=True)
    state = ov.train.init_local_state(params, optimizer, 1, model_state=jnp.zeros(()))
    for _ in range(5):
        state, _ = step(state, batch)
    expected, _ = train(ov.vasso(BASE), batch, params)
    assert_close(state.params, expected.params, 1e-14)


def scanned_loss(params, batch):
    def layer(x, weights):
        return jnp.tanh(x @ weights), None

    x, y = batch
    return jnp.mean((jax.lax.scan(layer, x, params)[0] - y) ** 2)


@pytest.mark.parametrize("recipe", [ov.vasso, ov.gsam, ov.evasso, ov.lagged_vasso])
def test_gradients_apart_are_the_same(x64, recipe):
    params, batch = problem()
    whole, whole_metrics = train(recipe(BASE), batch, params)
    apart, metrics = train(recipe(BASE), batch, params, gradient=ov.train.apart())
    assert_close((apart, metrics), (whole, whole_metrics), 1e-12)


def test_gradients_apart_in_microbatches_and_of_many_seeds(x64):
    params, batch = problem()
    whole, _ = train(ov.vasso(BASE), batch, params)
    gradient = ov.train.microbatched(4, ov.train.apart())
    parts, _ = train(ov.vasso(BASE), batch, params, gradient=gradient)
    assert_close(parts, whole, 1e-12)
    gradient = ov.train.apart()(ov.train.losses.as_canonical(scanned_loss, False))
    stacks = jnp.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)

    def grads(params):
        return gradient(ov.train.Inputs(params, (), batch))[1]

    mapped = jax.vmap(grads)(stacks)
    for i in range(2):
        expected = jax.grad(scanned_loss)(stacks[i], batch)
        np.testing.assert_allclose(mapped[i], expected, rtol=1e-10, atol=1e-14)
    tangent = jax.jvp(grads, (stacks[0],), (stacks[1],))[1]
    expected = jax.jvp(
        lambda p: jax.grad(scanned_loss)(p, batch), (stacks[0],), (stacks[1],)
    )[1]
    np.testing.assert_allclose(tangent, expected, rtol=1e-10, atol=1e-14)


def test_gradients_apart_inside_a_mapped_axis():
    """With the default checks, of parameters that vary over devices or do not."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    gradient = ov.train.apart()(ov.train.losses.as_canonical(scanned_loss, False))
    params = jnp.linspace(-1, 1, 3 * 64).reshape(3, 8, 8)
    batch = (jnp.ones((4, 8)), jnp.zeros((4, 8)))

    def grads(params, batch):
        (loss, _), grads = gradient(ov.train.Inputs(params, (), batch))
        return loss[None], grads

    for params_spec in (P(), P("data")):
        _, found = jax.shard_map(
            grads,
            mesh=mesh,
            in_specs=(params_spec, P("data")),
            out_specs=(P("data"), params_spec),
        )(params, batch)
        np.testing.assert_allclose(
            found, jax.grad(scanned_loss)(params, batch), rtol=1e-6
        )
