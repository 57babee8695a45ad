"""Bad input is one clear sentence that names the argument, its value and the remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_vasso as ov
from optax_vasso import gate

PARAMS = {"w": jnp.ones(3), "b": jnp.ones(2)}
NAN = float("nan")
ASCENT = optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(0.1))


def make(function, *args, **kwargs):
    return lambda: function(*args, **kwargs)


HYPERPARAMETERS = {
    "theta": [
        make(function, value)
        for value in (0, -0.1, 1.1, NAN, "0.4", None, np.float32(2))
        for function in (ov.vasso_ema, ov.unbuffered_vasso_ema)
    ],
    "rho": [
        make(function, value)
        for value in (-0.1, NAN, float("inf"), None)
        for function in (ov.sam_perturb, ov.asam_perturb, ov.fisher_perturb)
    ],
    "lmbda": [make(ov.friendly_noise, 1.0, value) for value in (1, -0.1, NAN)],
    "sigma": [make(ov.friendly_noise, value, 0.5) for value in (-1, NAN)],
    "eta": [
        make(function, 0.1, value)
        for value in (-0.1, NAN)
        for function in (ov.asam_perturb, ov.fisher_perturb)
    ],
    "alpha": [
        make(function, value)
        for value in (-0.1, NAN)
        for function in (ov.gsam_descent, ov.looksam_descent)
    ],
    "gamma": [make(ov.weighted_descent, value) for value in (-0.1, 1, NAN)],
    "p": [
        *(make(gate.bernoulli, value) for value in (0, -0.1, 1.5, NAN)),
        *(make(ov.sam_perturb, 0.1, p=value) for value in (1, 0, -2, NAN)),
    ],
    "k": [make(gate.every, value) for value in (0, -1, 1.5)],
    "n": [make(gate.from_step, value) for value in (-1, 0.5)],
    "gates": [gate.all_of, gate.any_of],
    "ascent_steps": [
        make(ov.sharpness_aware, optax.sgd(0.1), ASCENT, ascent_steps=value)
        for value in (0, -1, 1.5, NAN, float("inf"))
    ],
    "groups": [
        make(ov.init_local_state, PARAMS, optax.sgd(0.1), value)
        for value in (0, 1.5, float("inf"))
    ],
}


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_an_unusable_hyperparameter_names_itself_and_its_range(name):
    for build in HYPERPARAMETERS[name]:
        with pytest.raises(ValueError, match=rf"^{name} (must be .*, got|is empty)"):
            build()


@pytest.mark.parametrize(
    "build",
    [
        make(ov.sam, optax.sgd(0.1), -1),
        make(ov.vasso, optax.sgd(0.1), theta=0),
        make(ov.evasso, optax.sgd(0.1), probability=0),
        make(ov.friendly_sam, optax.sgd(0.1), lmbda=1),
        make(ov.looksam, optax.sgd(0.1), k=0),
        make(ov.lagged_vasso, optax.sgd(0.1), theta=2),
    ],
)
def test_recipes_pass_the_error_on(build):
    with pytest.raises(ValueError, match="must be .*, got"):
        build()


def test_traced_arrays_and_schedules_are_not_checked():
    ov.vasso_ema(jnp.asarray(7.0))
    ov.sam_perturb(lambda step: -1.0)
    jax.jit(lambda rho: ov.sam_perturb(rho).init(PARAMS))(-1.0)


TRANSFORMS = {
    "vasso_ema": ov.vasso_ema(0.4),
    "unbuffered_vasso_ema": ov.unbuffered_vasso_ema(0.4),
    "friendly_noise": ov.friendly_noise(1.0, 0.6),
    "sam_perturb": ov.sam_perturb(0.1),
    "asam_perturb": ov.asam_perturb(0.1),
    "fisher_perturb": ov.fisher_perturb(0.1),
    "per_layer": ov.per_layer(ov.sam_perturb(0.1)),
    "gsam_descent": ov.gsam_descent(0.1),
    "looksam_descent": ov.looksam_descent(0.1),
    "sharpness_aware": ov.sam(optax.sgd(0.1)),
    "lagged": ov.lagged_vasso(optax.sgd(0.1)),
}
each_transform = pytest.mark.parametrize("name", TRANSFORMS)


@each_transform
@pytest.mark.parametrize("empty", [{}, [], (), {"a": {}}], ids=str)
def test_an_empty_tree(name, empty):
    with pytest.raises(ValueError, match="^params has no leaves"):
        TRANSFORMS[name].init(empty)


@each_transform
def test_integer_leaves(name):
    tree = {"w": jnp.ones(2), "ids": [jnp.arange(3)]}
    with pytest.raises(ValueError, match=r"^params\['ids'\]\[0\] has dtype int32"):
        TRANSFORMS[name].init(tree)


@each_transform
def test_what_is_left_out_on_purpose_is_no_error(name):
    tree = {"w": jnp.ones(2), "frozen": None, "masked": optax.MaskedNode()}
    TRANSFORMS[name].init(tree)
    TRANSFORMS[name].init({"masked": optax.MaskedNode()})


@pytest.mark.parametrize(
    "changed",
    [{"w": jnp.ones(3)}, {"w": jnp.ones(4), "b": jnp.ones(2)}, [jnp.ones(3)]],
    ids=["a leaf is gone", "a shape is new", "another container"],
)
@pytest.mark.parametrize("name", ["vasso_ema", "friendly_noise", "lagged"])
def test_a_tree_that_changed_since_init(name, changed):
    state = TRANSFORMS[name].init(PARAMS)
    with pytest.raises(ValueError, match=rf"^updates.*{name} was initialized.*init"):
        TRANSFORMS[name].update(changed, state, PARAMS)


def test_looksam_refuses_a_changed_tree_too():
    state = TRANSFORMS["looksam_descent"].init(PARAMS)
    changed = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"^updates.*initialized"):
        TRANSFORMS["looksam_descent"].update(
            changed, state, clean_grads=changed, ascended=True
        )


@pytest.mark.parametrize("name", ["sharpness_aware", "lagged", "asam_perturb"])
def test_missing_params(name):
    state = TRANSFORMS[name].init(PARAMS)
    with pytest.raises(ValueError, match=r"needs params, got None: call update\(grads"):
        TRANSFORMS[name].update(PARAMS, state)


def test_sharpness_aware_without_a_grad_fn_says_which_of_the_two_is_wanted():
    optimizer = TRANSFORMS["sharpness_aware"]
    with pytest.raises(ValueError, match="needs grad_fn, got None.*or use lagged"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)


def test_lagged_with_a_grad_fn_says_which_of_the_two_is_wanted():
    optimizer = TRANSFORMS["lagged"]
    with pytest.raises(ValueError, match="got a grad_fn: leave it out, or use sharp"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, grad_fn=jax.grad(sum))


@pytest.mark.parametrize(
    "result",
    [jnp.ones(()), {"w": jnp.ones(3)}, (jnp.ones(2), PARAMS), (1.0, PARAMS, 1.0)],
    ids=["a value", "another tree", "a vector and gradients", "three things"],
)
def test_a_grad_fn_that_returns_something_else(result):
    optimizer = TRANSFORMS["sharpness_aware"]
    with pytest.raises(
        ValueError, match="^grad_fn must return gradients with the tree"
    ):
        optimizer.update(
            PARAMS, optimizer.init(PARAMS), PARAMS, grad_fn=lambda params: result
        )


@pytest.mark.parametrize("name", ["gsam_descent", "looksam_descent"])
def test_a_descent_outside_sharpness_aware(name):
    transform = TRANSFORMS[name]
    with pytest.raises(
        ValueError, match="needs the extra argument clean_grads: put it"
    ):
        transform.update(PARAMS, transform.init(PARAMS), PARAMS)


def test_the_unbuffered_average_outside_lagged():
    transform = TRANSFORMS["unbuffered_vasso_ema"]
    with pytest.raises(ValueError, match="needs the extra argument perturbation"):
        transform.update(PARAMS, transform.init(PARAMS), PARAMS)


@pytest.mark.parametrize("mask", [{"w": True}, {"w": True, "c": False}, [True, True]])
def test_a_mask_of_another_structure(mask):
    with pytest.raises(ValueError, match="^mask has another tree structure"):
        ov.asam_perturb(0.1, mask=mask).init(PARAMS)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), ov.sam(optax.sgd(0.1))])
def test_eval_params_of_a_state_that_is_not_lagged(optimizer):
    with pytest.raises(ValueError, match="state holds 0 states of lagged"):
        ov.lagged_eval_params(optimizer.init(PARAMS), PARAMS)
