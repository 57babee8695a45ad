"""Complex leaves count by their modulus, as in the rest of Optax.

So a method on a complex tree is the method on its real and imaginary parts.
"""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import flat, random_tree, run_chain

import optax_vasso as ov
from optax_vasso.metrics import track

ASCENTS = {
    "sam": ov.sam_perturb(0.1),
    "vasso": optax.chain(ov.vasso_ema(0.3), ov.sam_perturb(0.1)),
    "friendly": optax.chain(ov.friendly_noise(1.0, 0.6), ov.sam_perturb(0.1)),
}


@pytest.mark.parametrize("ascent", ASCENTS.values(), ids=ASCENTS)
def test_a_complex_tree_is_its_real_and_imaginary_parts(ascent):
    gradients = [random_tree(t, ["c8"]) for t in range(3)]
    outputs, _ = run_chain(ascent, gradients)
    split, _ = run_chain(optax.contrib.split_real_and_imaginary(ascent), gradients)
    for output, expected in zip(outputs, split, strict=True):
        np.testing.assert_allclose(flat(output), flat(expected), rtol=1e-5, atol=1e-8)
        assert np.linalg.norm(flat(output)) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize(
    "descent",
    [
        ov.descent.gsam_descent(0.3),
        ov.descent.weighted_descent(0.7),
        ov.descent.looksam_descent(0.7),
    ],
)
def test_descent_of_a_complex_tree_is_that_of_its_parts(descent):
    def parts(tree):
        return jax.tree.map(lambda z: (z.real, z.imag), tree)

    perturbed, clean = random_tree(0, ["c8"]), random_tree(1, ["c8"])
    for ascended in (True, False):
        whole, _ = descent.update(
            perturbed, descent.init(clean), clean_grads=clean, ascended=ascended
        )
        split, _ = descent.update(
            parts(perturbed),
            descent.init(parts(clean)),
            clean_grads=parts(clean),
            ascended=ascended,
        )
        np.testing.assert_allclose(
            flat(parts(whole)), flat(split), rtol=1e-4, atol=1e-6
        )


def test_the_metric_balls_use_the_modulus():
    """ASAM's T = abs(x) + η and Fisher's 1/(1 + η abs(g)²)."""
    g, x = random_tree(0, ["c8"]), random_tree(1, ["c8"])
    t = np.abs(flat(x)) + 0.01
    (asam,), _ = run_chain(ov.asam_perturb(0.5), [g], x)
    expected = 0.5 * t**2 * flat(g) / np.linalg.norm(t * flat(g))
    np.testing.assert_allclose(flat(asam), expected, rtol=1e-4, atol=1e-7)
    inverse = 1 / (1 + 2 * np.abs(flat(g)) ** 2)
    (fisher,), _ = run_chain(ov.fisher_perturb(0.5, 2.0), [g])
    expected = 0.5 * inverse * flat(g) / np.sqrt(np.sum(inverse * np.abs(flat(g)) ** 2))
    np.testing.assert_allclose(flat(fisher), expected, rtol=1e-4, atol=1e-7)


TARGET = jnp.asarray([1.0 + 2.0j, -0.5j, 0.3 - 1.0j], jnp.complex64)


def loss(z, batch):
    """Smooth, and neither even nor holomorphic."""
    away = abs(z[None] - TARGET[None] * batch[:, None]) ** 2
    return jnp.mean(jnp.log1p(away)) + jnp.mean(z.real**3 * z.imag) / 10


def loss_of_parts(parts, batch):
    return loss(parts[0] + 1j * parts[1], batch)


BASE = optax.chain(track(), optax.sgd(0.1, momentum=0.9))
ADAPTIVE = ov.gate.adaptive()
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "vasso": ov.vasso(BASE, 0.2),
    "evasso": ov.evasso(BASE, 0.2, probability=0.5),
    "ae_sam": ov.sharpness_aware(BASE, ov.sam_perturb(0.2), gate=ADAPTIVE),
    "two ascent steps": ov.sharpness_aware(BASE, ov.sam_perturb(0.2), ascent_steps=2),
    "gsam": ov.gsam(optax.sgd(0.1), 0.2),
    "looksam": ov.looksam(optax.sgd(0.1), 0.2),
    "lagged_vasso": ov.lagged_vasso(BASE, 0.2),
    "momentum_sam": ov.momentum_sam(BASE, 0.2),
    "sampa": ov.sampa(optax.sgd(0.1), 0.2, learning_rate=0.1),
    "clean_gradient": ov.lagged(
        optax.sgd(0.1), optax.chain(ov.clean_gradient(), ov.sam_perturb(0.2))
    ),
    "skip_nonfinite": ov.wrappers.skip_nonfinite(ov.vasso(BASE, 0.2)),
}
MAKERS = {
    "whole": ov.train.whole_batch,
    "microbatched": ov.train.microbatched(2),
}


@pytest.mark.parametrize(("name", "maker"), cases.in_turn(OPTIMIZERS, MAKERS))
def test_a_train_step_of_complex_parameters_is_that_of_their_parts(name, maker):
    batch = jnp.asarray([1.0, 0.5, 2.0, 1.5])
    ends = []
    for function, params in (
        (loss, jnp.zeros(3, jnp.complex64)),
        (loss_of_parts, [jnp.zeros(3), jnp.zeros(3)]),
    ):
        optimizer = OPTIMIZERS[name]
        step = ov.make_train_step(function, optimizer, gradient=MAKERS[maker])
        state = ov.init_train_state(params, optimizer)
        history = []
        for _ in range(4):
            state, metrics = step(state, batch)
            history.append(metrics)
        clean = ov.eval_params(state.opt_state, state.params)
        ends.append((clean, history))
    (whole, metrics), (parts, expected) = ends
    np.testing.assert_allclose(whole, parts[0] + 1j * parts[1], rtol=1e-4, atol=1e-6)
    for found, wanted in zip(metrics, expected, strict=True):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-3, atol=1e-5)
    assert loss(whole, batch) < loss(jnp.zeros(3, jnp.complex64), batch)


def test_a_train_step_of_complex_parameters_goes_downhill():
    """From 1 along abs(z)²: 1, 0.8², 0.64²."""
    optimizer = optax.sgd(0.1)
    step = ov.make_train_step(lambda z, batch: abs(z) ** 2, optimizer)
    state = ov.init_train_state(jnp.asarray(1j, jnp.complex64), optimizer)
    losses = []
    for _ in range(3):
        state, metrics = step(state, jnp.zeros(1))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, [1, 0.64, 0.4096], rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [optax.lbfgs(), ov.sam(optax.lbfgs(), 0.01), optax.contrib.momo(0.1)],
    ids=["lbfgs", "sam of lbfgs", "momo"],
)
def test_optimizers_that_want_the_gradient_or_the_loss_train_complex_parameters(
    optimizer,
):
    step = ov.make_train_step(loss, optimizer)
    state = ov.init_train_state(jnp.zeros(3, jnp.complex64), optimizer)
    losses = []
    for _ in range(8):
        state, metrics = step(state, jnp.ones(4))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]


def test_an_optimizer_is_given_the_gradient_as_jax_differentiates_as_well():
    """A line search compares it with its own; the update is its conjugate."""

    def difference(updates, state, params=None, *, grad, **extra_args):
        return jax.tree.map(lambda u, g: u - jnp.conj(g), updates, grad), state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: (), difference)
    step = ov.make_train_step(lambda z, batch: abs(z - (1 + 2j)) ** 2, optimizer)
    state = ov.init_train_state(jnp.asarray(1j, jnp.complex64), optimizer)
    state, _ = step(state, jnp.zeros(1))
    assert state.params == 1j


def test_a_local_step_of_complex_parameters_is_that_of_their_parts():
    batch = jnp.asarray([1.0, 0.5, 2.0, 1.5])
    optimizer = ov.vasso(
        optax.chain(track(), ov.train.average_over(optax.sgd(0.1), "data")), 0.2
    )
    ends = []
    for function, params in (
        (loss, jnp.zeros(3, jnp.complex64)),
        (loss_of_parts, [jnp.zeros(3), jnp.zeros(3)]),
    ):
        state = ov.train.init_local_state(params, optimizer, 2)
        step = ov.train.make_local_train_step(function, optimizer)
        for _ in range(3):
            state, metrics = step(state, batch)
        ends.append((state.params, metrics))
    (whole, metrics), (parts, expected) = ends
    np.testing.assert_allclose(whole, parts[0] + 1j * parts[1], rtol=1e-4, atol=1e-6)
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-3, atol=1e-5)
