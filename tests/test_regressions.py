"""What once went wrong, each as a statement about what is right.

The sections follow the steps of a training run: numbers, states, averages, gates,
wrappers, and the loops of other libraries.
"""

import functools
import re

import cases
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import optax_vasso as ov
from optax_vasso._internal import numerics

BASE = optax.sgd(0.1)
RECIPES = {
    "sam": ov.sam,
    "vasso": ov.vasso,
    "evasso": lambda base, **kw: ov.evasso(base, probability=1.0, **kw),
    "friendly_sam": ov.friendly_sam,
    "asam": ov.asam,
    "fisher_sam": ov.fisher_sam,
    "gsam": ov.gsam,
    "looksam": lambda base, **kw: ov.looksam(base, k=2, **kw),
    "wsam": functools.partial(ov.wsam, learning_rate=0.1),
    "ae_sam": ov.ae_sam,
    "lagged_vasso": ov.lagged_vasso,
}
ASCENTS = {
    **dict.fromkeys(RECIPES),
    "p = 3": ov.sam_perturb(0.1, p=3),
    "p = 1.5": ov.sam_perturb(0.1, p=1.5),
    "per_layer": ov.ascent.per_layer(ov.sam_perturb(0.1)),
}
CURVATURES = jnp.asarray([1.0, 3.0, 10.0])


def loss(params):
    return jnp.sum(CURVATURES * (1 - jnp.cos(params)))


def step_of(optimizer):
    optimizer = optax.with_extra_args_support(optimizer)

    def step(params, state):
        grad_fn = jax.value_and_grad(loss)
        value, grads = grad_fn(params)
        updates, state = optimizer.update(
            grads, state, params, value=value, grad_fn=grad_fn
        )
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0, 1e18])
def test_the_norm_of_a_constant_in_a_compiled_program(value):
    """XLA multiplies out what it knows: a scale squared must stay finite."""
    norm = jax.jit(lambda: numerics.norm({"a": jnp.full(4, value), "b": jnp.zeros(3)}))
    assert float(norm()) == pytest.approx(2 * value, rel=1e-6)


def test_a_run_that_is_one_program_starts_at_a_perturbation_of_zero():
    """Initial state, known while compiling, and steps in one program."""
    optimizer = ov.lagged_vasso(BASE)

    @jax.jit
    def run(params):
        return step_of(optimizer)(params, optimizer.init(params))[0]

    assert np.isfinite(run(jnp.ones(3))).all()


# The others have the derivatives of VaSSO, of a descent tested here, or of p = 3.
@pytest.mark.parametrize(
    "name", cases.every(ASCENTS, ASCENTS.keys() - {"sam", "evasso", "wsam", "p = 1.5"})
)
def test_reverse_mode_derivatives_through_two_steps(name, x64):
    """Finite at a zero gradient, and those of finite differences elsewhere."""
    recipe = RECIPES.get(name)
    optimizer = recipe(BASE) if recipe else ov.sharpness_aware(BASE, ASCENTS[name])

    @jax.jit
    def trained(params):
        state = optimizer.init(params)
        for _ in range(2):
            params, state = step_of(optimizer)(params, state)
        return loss(params)

    slope = jax.grad(trained)
    assert np.isfinite(slope(jnp.zeros(3))).all()
    assert np.isfinite(slope(jnp.asarray([0.0, 0.5, 0.0]))).all()
    start = jnp.asarray([0.7, -0.4, 0.5])
    check_grads(trained, (start,), order=1, modes=["rev"], rtol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_states_keep_their_dtypes_when_x64_is_switched_on_later(name):
    optimizer = RECIPES[name](optax.chain(ov.metrics.track(), BASE))
    params = jnp.ones(3)
    state = optimizer.init(params)
    step = step_of(optimizer)
    with jax.enable_x64(True):
        # A carry of another dtype is an error of scan.
        jax.eval_shape(
            lambda carry: jax.lax.scan(
                lambda carry, _: (step(*carry), None), carry, None, length=2
            ),
            (params, state),
        )


@pytest.mark.parametrize("name", ["vasso", "asam", "lagged_vasso", "ae_sam"])
@pytest.mark.parametrize("flag", [jax.debug_infs, jax.debug_nans])
def test_the_debugging_flags_of_jax_find_nothing(name, flag):
    """Step by step without jit, where every intermediate result is looked at."""
    optimizer = RECIPES[name](BASE)
    with flag(True):
        for params in (jnp.ones(3), jnp.zeros(3)):
            state = optimizer.init(params)
            for _ in range(2):
                params, state = step_of(optimizer)(params, state)


@pytest.mark.parametrize("rho", [np.float32(-0.1), jnp.asarray(-0.1), jnp.ones(3)])
@pytest.mark.parametrize("name", RECIPES)
def test_a_radius_in_an_array_is_checked(name, rho):
    with pytest.raises(ValueError, match="rho must be a finite number >= 0, got"):
        RECIPES[name](BASE, rho=rho)


def test_a_real_accumulator_keeps_the_imaginary_part_of_complex_gradients():
    smooth = ov.vasso_ema(0.5, accumulator_dtype=jnp.float32)
    noise = ov.friendly_noise(1.0, 0.5, accumulator_dtype=jnp.float32)
    first, second = jnp.asarray([1 + 2j, 3j]), jnp.asarray([3 + 4j, 1j])
    for transform, expected in (
        (smooth, (first + second) / 2),
        (noise, second - first),
    ):
        state = transform.init(first)
        assert state.ema.dtype == jnp.complex64
        for gradient in (first, second):
            output, state = transform.update(gradient, state)
        np.testing.assert_allclose(output, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int32, bool, jnp.complex64])
def test_an_accumulator_that_is_not_of_floats_is_refused(dtype):
    for make in (
        lambda: ov.vasso_ema(0.5, accumulator_dtype=dtype),
        lambda: ov.friendly_noise(1.0, 0.5, accumulator_dtype=dtype),
    ):
        with pytest.raises(ValueError, match="accumulator_dtype must be a float dtype"):
            make()


def test_a_bernoulli_gate_takes_both_kinds_of_keys():
    def draws(seed):
        gate = ov.gate.bernoulli(0.5, seed)
        state, opened = gate.init(), []
        for _ in range(16):
            is_open, state = gate.update(state)
            opened.append(bool(is_open))
        return opened

    assert draws(jax.random.key(3)) == draws(jax.random.PRNGKey(3)) == draws(3)
    assert draws(3) != draws(4)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_donating_a_state_leaves_the_key_of_the_caller_alive(make):
    key = make(3)
    optimizer = ov.evasso(BASE, seed=key)
    params = jnp.ones(3)
    step = jax.jit(step_of(optimizer), donate_argnums=1)
    step(params, optimizer.init(params))
    assert not key.is_deleted()
    jax.random.split(key)


def test_a_gate_takes_gradients_of_two_dtypes():
    """A clean gradient of few bits, as from a mixed-precision loop."""
    optimizer = ov.sharpness_aware(BASE, ov.sam_perturb(0.1), gate=ov.gate.every(2))
    params = jnp.ones(3)
    state = optimizer.init(params)
    for expected in (True, False):
        updates, state = optimizer.update(
            jax.grad(loss)(params).astype(jnp.bfloat16),
            state,
            params,
            grad_fn=jax.grad(loss),
        )
        assert bool(state.report.metrics["ascended"]) == expected
        assert updates.dtype == jnp.bfloat16


def test_tracking_sees_the_perturbation_of_all_ascent_steps():
    """‖ε‖ and its move ‖ε_t − ε_{t−1}‖/‖ε_t‖, where each step climbs in two parts."""
    rho, curvatures = 0.5, np.asarray([1.0, 3.0, 10.0])
    measures = ov.metrics.track(ov.metrics.perturbation_norm, ov.metrics.stability)
    optimizer = ov.sharpness_aware(
        optax.chain(measures, BASE), ov.sam_perturb(rho), ascent_steps=2
    )
    params = jnp.asarray([1.0, -0.2, 0.05])
    state = optimizer.init(params)
    previous, lengths = np.zeros(3), []

    def slope(x):
        return curvatures * np.sin(x)

    for _ in range(3):
        x = np.asarray(params, np.float64)
        part = rho / 2 * slope(x) / np.linalg.norm(slope(x))
        there = slope(x + part)
        epsilon = part + rho / 2 * there / np.linalg.norm(there)
        params, state = step_of(optimizer)(params, state)
        length = optax.tree.get(state, "perturbation_norm")
        assert float(length) == pytest.approx(np.linalg.norm(epsilon), rel=1e-5)
        move = np.linalg.norm(epsilon - previous) / np.linalg.norm(epsilon)
        assert float(optax.tree.get(state, "stability")) == pytest.approx(
            move, rel=1e-4
        )
        previous = epsilon
        lengths.append(np.linalg.norm(epsilon))
    assert min(lengths) < 0.98 * rho  # the two parts are not parallel


def test_a_new_measure_is_a_function_and_nothing_else():
    def largest_entry(seen):
        return jnp.max(jnp.abs(seen.perturbation))

    optimizer = ov.sam(optax.chain(ov.metrics.track(largest_entry), BASE), rho=0.5)
    state = ov.init_train_state(jnp.asarray([0.3, 0.0, 0.0]), optimizer)
    step = ov.make_train_step(lambda params, batch: loss(params), optimizer)
    _, metrics = step(state, ())
    assert float(metrics["largest_entry"]) == pytest.approx(0.5)


def test_multi_steps_around_an_optimizer_of_two_gradients():
    """Two mini-steps: the mean clean gradient, and the last batch perturbed."""

    def batch_loss(params, batch):
        return loss(params) + jnp.sum(batch * params)

    params = jnp.asarray([0.7, -0.4, 0.5])
    batches = jnp.asarray([[1.0, 0.0, 0.0], [0.0, 0.0, -2.0]])
    inner = ov.vasso(BASE, rho=0.1)
    optimizer = optax.MultiSteps(inner, 2)
    state = ov.init_train_state(params, optimizer)
    step = ov.make_train_step(batch_loss, optimizer)
    mean = sum(jax.grad(batch_loss)(params, batch) for batch in batches) / 2
    updates, _ = inner.update(
        mean,
        inner.init(params),
        params,
        grad_fn=lambda x: jax.grad(batch_loss)(x, batches[1]),
    )
    expected = params + updates
    for turn in range(4):
        state, metrics = step(state, batches[turn % 2])
        if turn == 0:
            np.testing.assert_array_equal(state.params, params)
        if turn == 1:
            np.testing.assert_allclose(state.params, expected, rtol=1e-6)
        # A mini-step takes no second gradient, and reports none of an earlier step.
        assert bool(metrics["ascended"]) == (turn % 2 == 1)
        assert (float(metrics["sharpness"]) != 0) == (turn % 2 == 1)


def test_multi_steps_as_a_transformation_drops_what_is_needed_and_that_is_said():
    optimizer = optax.MultiSteps(ov.sam(BASE), 2).gradient_transformation()
    state = ov.init_train_state(jnp.ones(3), optimizer)
    step = ov.make_train_step(lambda params, batch: loss(params), optimizer)
    with pytest.raises(ValueError, match=r"needs grad_fn, got None.*MultiSteps"):
        step(state, ())


class Network(eqx.Module):
    """With functions and integers among its leaves, as models of Equinox have them."""

    layers: list
    activation: object
    size: int

    def __init__(self, key):
        first, last = jax.random.split(key)
        self.layers = [
            eqx.nn.Linear(3, 4, key=first),
            jax.nn.relu,
            eqx.nn.Linear(4, 1, key=last),
        ]
        self.activation = jnp.tanh
        self.size = 4

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.activation(x)


@pytest.mark.parametrize("name", ["adamw", "vasso", "asam", "lagged_vasso"])
def test_equinox_models_go_into_update_unfiltered(name):
    base = optax.adamw(0.02)
    optimizer = RECIPES[name](base) if name in RECIPES else base
    optimizer = optax.with_extra_args_support(optimizer)
    model = Network(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (8, 3))

    def model_loss(model):
        return jnp.mean((jax.vmap(model)(x) - 0.5) ** 2)

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(model_loss)(model)
        updates, state = optimizer.update(
            grads, state, model, grad_fn=eqx.filter_grad(model_loss)
        )
        return eqx.apply_updates(model, updates), state

    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    before = model_loss(model)
    for _ in range(30):
        model, state = step(model, state)
    assert model_loss(ov.eval_params(state, model)) < 0.6 * before


def drift(optimizer, params, gradient, steps=3000):
    """The clean parameters after many steps in one program, and the loop's."""

    @jax.jit
    def run(params):
        def step(carry, index):
            params, state = carry
            grads = gradient(index, params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry, _ = jax.lax.scan(
            step, (params, optimizer.init(params)), jnp.arange(steps)
        )
        return ov.eval_params(carry[1], carry[0]), carry[0]

    return run(params)


LAGGED = {
    "lagged": lambda base: ov.lagged(
        base, optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(0.05))
    ),
    "lagged_vasso": lambda base: ov.lagged_vasso(base, rho=0.05),
}


def noise(index, params):
    key = jax.random.fold_in(jax.random.key(1), index)
    return jax.random.normal(key, params.shape, params.dtype)


@pytest.mark.parametrize("name", LAGGED)
def test_a_lagged_model_of_few_bits_does_not_drift(name):
    """At a learning rate of zero, 3,000 roundings leave one."""
    start = (0.14 * jax.random.normal(jax.random.key(0), (512,))).astype(jnp.bfloat16)
    clean, perturbed = drift(LAGGED[name](optax.sgd(0.0)), start, noise)
    before, after = (np.asarray(x, np.float32) for x in (start, clean))
    one_rounding = float(jnp.finfo(jnp.bfloat16).eps) * np.abs(before)
    assert (np.abs(after - before) <= one_rounding).all()
    moved = np.linalg.norm(np.asarray(perturbed, np.float32) - before)
    assert moved == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("name", LAGGED)
def test_a_lagged_model_of_few_bits_adds_up_small_steps(name):
    """Steps of 1e-5 at weights between 1 and 2, whose neighbours are at 1/128."""
    start = jnp.linspace(1.0, 1.9, 64).astype(jnp.bfloat16)
    clean, _ = drift(
        LAGGED[name](optax.sgd(1e-5)), start, lambda _, params: -jnp.ones_like(params)
    )
    before, after = (np.asarray(x, np.float32) for x in (start, clean))
    # Half of the distance to a neighbour, which doubles at 2.
    np.testing.assert_allclose(after - before, 0.03, rtol=0, atol=2.0**-8 + 1e-5)
    assert np.mean(after - before) == pytest.approx(0.03, rel=0.05)


def test_float32_belongs_inside_of_a_lagged_optimizer():
    params = jnp.asarray([1.0, -1.0, 0.5], jnp.bfloat16)
    with pytest.raises(ValueError, match=r"as in lagged_vasso\(in_float32\(optimizer"):
        ov.wrappers.in_float32(ov.lagged_vasso(BASE)).init(params)
    optimizer = LAGGED["lagged_vasso"](ov.wrappers.in_float32(optax.adamw(0.001)))
    target = jnp.asarray([0.6, -1.3, 0.9], jnp.bfloat16)
    clean, _ = drift(optimizer, params, lambda _, x: x - target, steps=800)
    assert jnp.max(jnp.abs(clean - target)) < 0.1


def skipping(loss_fn, base, params, **kwargs):
    optimizer = ov.wrappers.skip_nonfinite(base, **kwargs)
    state = ov.init_train_state(params, optimizer)
    return ov.make_train_step(loss_fn, optimizer), state


def scaled_loss(params, batch):
    return batch * loss(params)


def test_a_scheduler_inside_of_skip_nonfinite_sees_the_loss():
    """Its best loss starts at infinity, which is no overflow."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    step, state = skipping(
        scaled_loss, ov.vasso(optax.chain(optax.sgd(0.0), plateau)), jnp.ones(3)
    )
    for _ in range(4):
        state, metrics = step(state, jnp.asarray(1.0))
        assert bool(metrics["finite"])
    best = optax.tree.get(state.opt_state, "best_value")
    assert float(best) == pytest.approx(float(metrics["loss"]))
    assert float(optax.tree.get(state.opt_state, "scale")) == 0.5


def test_a_skipped_step_reports_nothing_of_the_step_before():
    base = ov.vasso(optax.chain(ov.metrics.track(), BASE))
    step, state = skipping(scaled_loss, base, jnp.ones(3))
    state, metrics = step(state, jnp.asarray(1.0))
    assert bool(metrics["ascended"])
    assert float(metrics["perturbation_norm"]) > 0
    state, metrics = step(state, jnp.asarray(jnp.nan))
    assert not bool(metrics["finite"])
    assert not bool(metrics["ascended"])
    assert float(metrics["perturbation_norm"]) == 0
    _, metrics = step(state, jnp.asarray(1.0))
    assert float(metrics["perturbation_norm"]) > 0


def test_a_number_is_no_loss_scale():
    with pytest.raises(ValueError, match=r"loss_scale must have scale.*got 1024\.0"):
        ov.wrappers.skip_nonfinite(BASE, loss_scale=1024.0)


def instructions(function, *args):
    """Of the compiled program, after all optimizations."""
    return len(re.findall(r" = ", jax.jit(function).lower(*args).compile().as_text()))


def per_leaf(make, sizes=(10, 20, 40)):
    """Instructions that another leaf adds, from each size to the next."""
    counts = [instructions(*make(size)) for size in sizes]
    return [
        (counts[i + 1] - counts[i]) / (sizes[i + 1] - sizes[i])
        for i in range(len(sizes) - 1)
    ]


def leaves(count):
    return [jnp.ones((8, 8)) for _ in range(count)]


def of_chain(transform):
    def make(count):
        params = leaves(count)
        return transform.update, params, transform.init(params), params

    return make


def plain_vasso(theta=0.4, rho=0.1):
    def init(params):
        return optax.tree.zeros_like(params), jnp.zeros((), jnp.int32)

    def update(grads, state, params=None):
        del params
        average, step = state
        weight = jnp.where(step == 0, 1.0, theta)
        average = jax.tree.map(
            lambda d, g: (1 - weight) * d + weight * g, average, grads
        )
        return optax.tree.scale(rho / optax.tree.norm(average), average), (
            average,
            step + 1,
        )

    return optax.GradientTransformation(init, update)


# Instructions per leaf: those of JAX 0.10.2, 69, 58, 71 and 53, of which JAX 0.12 takes
# 73 for the second, and a margin.
CHAINS = {
    "asam": (ov.asam_perturb(0.1), 80),
    "fisher": (ov.fisher_perturb(0.1), 80),
    "p = 3": (ov.sam_perturb(0.1, p=3), 85),
    "friendly": (optax.chain(ov.friendly_noise(1.0, 0.6), ov.sam_perturb(0.1)), 60),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_program_of_an_ascent_chain_grows_linearly(name):
    """A scalar computation that is fused into every leaf would show here."""
    chain, bound = CHAINS[name]
    first, second = per_leaf(of_chain(chain))
    assert second == pytest.approx(first, rel=0.1)
    assert second <= bound


def test_the_program_of_per_layer_grows_linearly():
    chain = ov.ascent.per_layer(ov.sam_perturb(0.1))
    first, second = per_leaf(of_chain(chain), sizes=(5, 10, 20))
    assert second == pytest.approx(first, rel=0.1)
    assert second <= 90


def test_the_program_of_the_vasso_chain_is_hardly_larger_than_its_mathematics():
    chain = optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(0.1))
    first, second = per_leaf(of_chain(chain))
    assert second == pytest.approx(first, rel=0.1)
    plain, _ = per_leaf(of_chain(plain_vasso()), sizes=(10, 20, 21))
    assert second <= 1.5 * plain


def of_step(optimizer, **extra):
    def network_loss(params, x):
        for weights in params:
            x = jnp.tanh(x @ weights)
        return jnp.mean(x**2)

    optimizer = optax.with_extra_args_support(optimizer)

    def step(params, state, x):
        def grad_fn(params, *_):
            return jax.grad(network_loss)(params, x)

        updates, state = optimizer.update(
            grad_fn(params), state, params, grad_fn=grad_fn
        )
        return optax.apply_updates(params, updates), state

    def make(count):
        params = leaves(count)
        return step, params, optimizer.init(params), jnp.ones((4, 8))

    return make


def test_the_program_of_a_whole_step_is_hardly_larger_than_that_of_optax():
    """Against Optax's own SAM around the same base optimizer; VaSSO averages more."""
    base, sizes = optax.adamw(0.01), (4, 8)
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    (theirs,) = per_leaf(
        of_step(
            optax.contrib.sam(base, adversary, opaque_mode=True, reset_state=False)
        ),
        sizes,
    )
    (sam,) = per_leaf(of_step(ov.sam(base)), sizes)
    (vasso,) = per_leaf(of_step(ov.vasso(base)), sizes)
    assert sam <= 1.2 * theirs
    assert vasso <= 1.3 * theirs


def test_the_program_of_a_lagged_step_is_the_base_and_the_chain():
    """No more than the base optimizer, VaSSO's chain, and half of it to move ε."""
    base, sizes = optax.adamw(0.01), (4, 8)
    (alone,) = per_leaf(of_step(base), sizes)
    (chain,) = per_leaf(of_chain(plain_vasso()), sizes)
    lagged = ov.lagged(base, optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(0.1)))
    (whole,) = per_leaf(of_step(lagged), sizes)
    assert whole <= 1.2 * (alone + 1.5 * chain)
