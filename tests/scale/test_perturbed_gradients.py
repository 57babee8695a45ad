"""Functional SAM, and a perturbation of its own for each microbatch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_vasso as ov
from optax_vasso.train import functional, microbatched, part_of_batch, perturbed

BASE = optax.sgd(0.1, momentum=0.9)
RHO = 0.2


def problem(batch=32, width=16):
    rng = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(rng.normal(size=(8, width)) * 0.3),
        "out": jnp.asarray(rng.normal(size=(width, 8)) * 0.3),
    }
    return params, tuple(jnp.asarray(rng.normal(size=(batch, 8))) for _ in range(2))


def network(params, batch):
    return jnp.tanh(batch[0] @ params["in"]) @ params["out"]


def head(outputs, batch):
    return jnp.mean(jax.nn.softplus(outputs) * batch[1] ** 2)


def loss_fn(params, batch):
    return head(network(params, batch), batch)


def train(loss, optimizer, batch, params, steps=3, **kwargs):
    step = ov.make_train_step(loss, optimizer, **kwargs)
    state = ov.init_train_state(params, optimizer)
    for _ in range(steps):
        state, metrics = step(state, batch)
    return state, metrics


def ascend(grads):
    return optax.tree.scale(RHO / optax.tree.norm(grads), grads)


def functional_gradient(params, batch):
    """J(x + ε)ᵀ ∇_F L(F(x)), with the Jacobian written out."""
    e = ascend(jax.grad(loss_fn)(params, batch))
    jacobian = jax.jacobian(network)(optax.tree.add(params, e), batch)
    cotangent = jax.grad(head)(network(params, batch), batch)
    return jax.tree.map(lambda j: jnp.tensordot(cotangent, j, axes=2), jacobian)


def by_loop(gradient, batch, params, steps=3):
    momentum = optax.tree.zeros_like(params)
    for _ in range(steps):
        momentum = optax.tree.add_scale(gradient(params, batch), 0.9, momentum)
        params = optax.tree.add_scale(params, -0.1, momentum)
    return params


def assert_close(a, b, atol=1e-13):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def test_functional_sam_is_its_formula(x64):
    params, batch = problem()
    state, metrics = train(
        head, ov.sam(BASE, RHO), batch, params, gradient=functional(network)
    )
    expected = by_loop(functional_gradient, batch, params)
    assert_close(state.params, expected)
    before = by_loop(functional_gradient, batch, params, steps=2)
    e = ascend(jax.grad(loss_fn)(before, batch))
    assert metrics["loss"] == pytest.approx(float(loss_fn(before, batch)), abs=1e-13)
    there = loss_fn(optax.tree.add(before, e), batch)
    assert metrics["perturbed_loss"] == pytest.approx(
        float(there), rel=1e-6
    )  # in float32


def test_functional_sam_in_optax_s_own_form(x64):
    params, batch = problem()
    optimizer = ov.sam(BASE, RHO)
    state = optimizer.init(params)
    for _ in range(3):

        def run(params):
            return network(params, batch)

        outputs, pullback = jax.vjp(run, params)
        cotangent = jax.grad(head)(outputs, batch)
        updates, state = optimizer.update(
            pullback(cotangent)[0],
            state,
            params,
            grad_fn=lambda params: jax.vjp(run, params)[1](cotangent)[0],  # noqa: B023
        )
        params = optax.apply_updates(params, updates)
    params_by_loop = by_loop(functional_gradient, batch, problem()[0])
    assert_close(params, params_by_loop)


def test_functional_sam_is_not_sam_unless_the_radius_is_zero(x64):
    params, batch = problem()
    for rho, same in ((0.0, True), (RHO, False)):
        sam, _ = train(loss_fn, ov.sam(BASE, rho), batch, params)
        functional_sam, _ = train(
            head, ov.sam(BASE, rho), batch, params, gradient=functional(network)
        )
        gap = optax.tree.norm(optax.tree.sub(sam.params, functional_sam.params))
        assert (gap < 1e-13) == same


def test_microbatches_of_functional_sam_are_the_whole_batch(x64):
    params, batch = problem()
    whole, parts = (
        train(head, ov.sam(BASE, RHO), batch, params, gradient=gradient)
        for gradient in (
            functional(network),
            microbatched(4, functional(network)),
        )
    )
    assert_close(parts[0], whole[0])
    assert_close(parts[1], whole[1])


def test_one_gradient_per_step_is_that_of_the_loss(x64):
    params, batch = problem()
    for optimizer in (BASE, ov.lagged_vasso(BASE)):
        plain, _ = train(loss_fn, optimizer, batch, params)
        split, _ = train(head, optimizer, batch, params, gradient=functional(network))
        assert_close(split.params, plain.params)


def test_the_network_may_have_a_state_and_a_key_and_the_loss_aux(x64):
    params, batch = problem()

    def noisy(params, batch, model_state, key):
        keep = jax.random.bernoulli(key, 0.5, (16,))
        hidden = jnp.tanh(batch[0] @ params["in"]) * keep[None]
        return hidden @ params["out"], model_state + 1

    def with_aux(outputs, batch):
        return head(outputs, batch), jnp.mean(outputs)

    def whole(params, batch, model_state, key):
        outputs, model_state = noisy(params, batch, model_state, key)
        return head(outputs, batch), (model_state, jnp.mean(outputs))

    optimizer = ov.sam(BASE, 0.0)
    results = []
    for loss, gradient in (
        (with_aux, functional(noisy)),
        (whole, ov.train.whole_batch),
    ):
        step = ov.make_train_step(loss, optimizer, has_aux=True, gradient=gradient)
        state = ov.init_train_state(
            params, optimizer, model_state=jnp.zeros(()), key=jax.random.key(0)
        )
        for _ in range(2):
            state, metrics = step(state, batch)
        results.append((state._replace(key=None), metrics))
    assert results[0][0].model_state == 2
    assert_close(results[0], results[1])


def test_functional_sam_in_each_group_by_itself(x64):
    params, batch = problem()
    optimizer = ov.sam(ov.train.average_over(BASE, "data"), RHO)
    step = ov.train.make_local_train_step(head, optimizer, gradient=functional(network))
    state = ov.train.init_local_state(params, optimizer, groups=4)
    for _ in range(3):
        state, _ = step(state, batch)

    def mean(params, batch):
        parts = [tuple(leaf[8 * i : 8 * i + 8] for leaf in batch) for i in range(4)]
        gradients = [functional_gradient(params, part) for part in parts]
        return optax.tree.scale(0.25, jax.tree.map(lambda *g: sum(g), *gradients))

    assert_close(state.params, by_loop(mean, batch, params))


def test_a_loss_scale_scales_the_cotangent():
    params, batch = problem()
    jmp = pytest.importorskip("jmp")
    scaled = ov.wrappers.skip_nonfinite(
        ov.sam(BASE, RHO), loss_scale=jmp.StaticLossScale(jnp.float32(1024.0))
    )
    plain, _ = train(
        head, ov.sam(BASE, RHO), batch, params, gradient=functional(network)
    )
    state, _ = train(head, scaled, batch, params, gradient=functional(network))
    assert_close(state.params, plain.params, atol=1e-6)  # in float32


def test_a_network_is_asked_for():
    with pytest.raises(ValueError, match="network must take .*got a int"):
        functional(3)
    with pytest.raises(ValueError, match="network must take .*but takes"):
        functional(lambda params: params)
    gradient = functional(lambda params, batch, model_state: params)
    step = ov.make_train_step(head, BASE, gradient=gradient)
    params, batch = problem()
    with pytest.raises(ValueError, match=r"network must return \(outputs"):
        step(ov.init_train_state(params, BASE), batch)


def operations(loss, optimizer, gradient, params, batch, **kwargs):
    step = ov.make_train_step(loss, optimizer, gradient=gradient, **kwargs)
    state = ov.init_train_state(params, optimizer)
    return step.lower(state, batch).compile().cost_analysis()["flops"]


def test_functional_sam_costs_two_gradients_and_a_third_more_in_microbatches():
    # Of a deep network the forward evaluation is a third of the gradient. The batch is
    # so large that the passes over the parameters do not count.
    params, batch = problem(batch=16384, width=128)
    params["hidden"] = jnp.zeros((10, 128, 128))

    def deep(params, batch):
        x = batch[0] @ params["in"]
        for layer in params["hidden"]:
            x = jnp.tanh(x @ layer)
        return x @ params["out"]

    def deep_loss(params, batch):
        return head(deep(params, batch), batch)

    for wrap, most in ((lambda gradient: gradient, 2.005), (parts_of_four, 2.35)):
        # XLA counts the body of a loop once: both sides have the same loop.
        one = operations(deep_loss, BASE, wrap(ov.train.whole_batch), params, batch)
        two = operations(head, ov.sam(BASE, RHO), wrap(functional(deep)), params, batch)
        assert two / one <= most


def parts_of_four(gradient):
    return microbatched(4, gradient)


def mean_over_parts(gradient, count):
    """The mean of a gradient over the parts of a batch, one after another."""

    def mean(params, batch):
        total = optax.tree.zeros_like(params)
        for i in range(count):
            part = tuple(leaf[i::count] for leaf in batch)
            total = optax.tree.add_scale(total, 1 / count, gradient(params, part))
        return total

    return mean


def m_sharpness(count):
    """With an ε of its own for each part."""

    def gradient(params, part):
        e = ascend(jax.grad(loss_fn)(params, part))
        return jax.grad(loss_fn)(optax.tree.add(params, e), part)

    return mean_over_parts(gradient, count)


@pytest.mark.parametrize("count", [1, 4])
def test_each_microbatch_has_a_perturbation_of_its_own(x64, count):
    params, batch = problem()
    gradient = microbatched(count, perturbed(ov.sam_perturb(RHO)))
    state, metrics = train(loss_fn, BASE, batch, params, gradient=gradient)
    assert_close(state.params, by_loop(m_sharpness(count), batch, params))
    before = by_loop(m_sharpness(count), batch, params, steps=2)
    assert metrics["loss"] == pytest.approx(float(loss_fn(before, batch)), abs=1e-13)


def test_one_perturbation_of_the_whole_batch_is_sam(x64):
    params, batch = problem()
    inside, _ = train(
        loss_fn, BASE, batch, params, gradient=perturbed(ov.sam_perturb(RHO))
    )
    outside, _ = train(loss_fn, ov.sam(BASE, RHO), batch, params)
    assert_close(inside.params, outside.params)


def test_functional_sam_with_a_perturbation_for_each_microbatch(x64):
    params, batch = problem()

    mean = mean_over_parts(functional_gradient, 4)
    gradient = microbatched(4, perturbed(ov.sam_perturb(RHO), functional(network)))
    state, _ = train(head, BASE, batch, params, gradient=gradient)
    assert_close(state.params, by_loop(mean, batch, params))


def test_a_perturbation_for_each_microbatch_costs_two_gradients():
    params, batch = problem(batch=1024, width=256)
    plain, own = (
        operations(loss_fn, BASE, microbatched(4, gradient), params, batch)
        for gradient in (ov.train.whole_batch, perturbed(ov.sam_perturb(RHO)))
    )
    assert own / plain <= 2.01


@pytest.mark.parametrize(
    "ascent",
    [
        optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(RHO)),
        optax.chain(optax.trace(0.9), ov.sam_perturb(RHO)),
        ov.sam_perturb(optax.linear_schedule(0.0, RHO, 10)),
    ],
)
def test_a_perturbation_with_a_memory_has_no_place_in_a_gradient(ascent):
    params, batch = problem()
    with pytest.raises(ValueError, match="ascent has an average over steps"):
        train(loss_fn, BASE, batch, params, gradient=perturbed(ascent))


@pytest.mark.parametrize(
    "ascent",
    [
        ov.sam_perturb(RHO, p=float("inf")),
        ov.asam_perturb(RHO),
        ov.fisher_perturb(RHO, 0.1),
        ov.ascent.per_layer(ov.sam_perturb(RHO)),
        ov.ascent.masked_ascent(ov.sam_perturb(RHO), {"in": True, "out": False}),
        optax.chain(optax.centralize(), ov.sam_perturb(RHO)),
    ],
)
def test_every_perturbation_without_a_memory_has(ascent):
    params, batch = problem()
    gradient = part_of_batch(0.5, perturbed(ascent))
    state, _ = train(loss_fn, BASE, batch, params, gradient=gradient)
    assert np.isfinite(optax.tree.norm(state.params))


def test_complex_parameters_go_downhill(x64):
    """|z² − 1|² from the point of view of its real and imaginary parts."""

    def square(params, batch):
        z = params["z"] if isinstance(params, dict) else params[0] + 1j * params[1]
        return {"re": jnp.real(z**2), "im": jnp.imag(z**2)}

    def error(outputs, batch):
        return jnp.sum((outputs["re"] - 1) ** 2 + outputs["im"] ** 2)

    z = jnp.array([0.5 + 0.25j, -0.5 - 1.0j])
    for optimizer, gradient in (
        (ov.sam(optax.sgd(0.05), 0.1), functional(square)),
        (optax.sgd(0.05), perturbed(ov.sam_perturb(0.1), functional(square))),
    ):
        ends = [
            train(error, optimizer, (), params, gradient=gradient)[0].params
            for params in ({"z": z}, (jnp.real(z), jnp.imag(z)))
        ]
        assert_close(ends[0]["z"], ends[1][0] + 1j * ends[1][1])
        before, after = (error(square({"z": x}, ()), ()) for x in (z, ends[0]["z"]))
        assert after < before
