"""The library follows the authors' own PyTorch code, step by step, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import ONE_GRADIENT, as_arrays, authors_problem, authors_runs

import optax_vasso as ov
from optax_vasso._internal import numerics


def kernels_only(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


RECIPES = {
    "sam": ov.sam,
    "sam_adaptive": functools.partial(ov.asam, eta=0.0),
    "vasso": ov.vasso,
    "vasso_adamw": ov.vasso,
    "friendly_sam": ov.friendly_sam,
    "asam": functools.partial(ov.asam, rescaled=kernels_only),
    "gsam": ov.gsam,
    "msam": ov.momentum_sam,
    "msam_adamw": ov.momentum_sam,
    "single_step_sam": ov.single_step_sam,
}

# What the authors add to the norms in their denominators, and the largest deviation
# that leaves from the formula itself, which has no such constant.
SHIFTS = {"vasso": 1e-7, "vasso_adamw": 1e-7, "asam": 1e-16}
TOLERANCES = {"vasso": 2e-7, "vasso_adamw": 2e-7, "sam_adaptive": 2e-12, "gsam": 2e-12}


def base_optimizer(run):
    hyperparameters = dict(run["hyperparameters"])
    rate = hyperparameters.pop("learning_rate")
    momentum = hyperparameters.pop("momentum", None)
    decay = hyperparameters.pop("weight_decay")
    if run["method"].endswith("adamw"):
        return optax.adamw(rate, weight_decay=decay), hyperparameters
    base = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum))
    return base, hyperparameters


def largest_error(optimizer, run):
    """Over the losses of 20 steps and the parameters after 1, 2, 5 and 20.

    The losses are those of the loop's parameters, which a lagged optimizer perturbs.
    """
    losses = run.get("clean_losses") or run["perturbed_losses"]
    params, batches, loss = authors_problem()
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, indices):
        grad_fn = jax.grad(lambda params: loss(params, indices))
        updates, state = optimizer.update(
            grad_fn(params), state, params, grad_fn=grad_fn
        )
        return optax.apply_updates(params, updates), state, loss(params, indices)

    error = 0.0
    for t, indices in enumerate(batches):
        params, state, value = step(params, state, indices)
        error = max(error, abs(value - losses[t]))
        if str(t + 1) in run["params_after"]:
            expected = as_arrays(run["params_after"][str(t + 1)])
            clean = ov.eval_params(state, params)
            gap = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), clean, expected)
            error = max(error, *jax.tree.leaves(gap))
    return error


def name(run):
    numbers = run["hyperparameters"]
    return "-".join([run["method"], *(f"{k}={numbers[k]}" for k in list(numbers)[3:])])


@pytest.mark.parametrize("run", authors_runs(), ids=name)
def test_recipe_follows_the_authors(run, x64):
    base, hyperparameters = base_optimizer(run)
    optimizer = RECIPES[run["method"]](base, **hyperparameters)
    assert largest_error(optimizer, run) <= TOLERANCES.get(run["method"], 1e-12)


@pytest.mark.parametrize("run", authors_runs(ONE_GRADIENT), ids=name)
def test_one_gradient_follows_the_authors(run, x64):
    base, hyperparameters = base_optimizer(run)
    optimizer = RECIPES[run["method"]](base, **hyperparameters)
    assert largest_error(optimizer, run) <= 1e-12


@pytest.mark.parametrize("run", authors_runs(), ids=name)
def test_with_the_authors_constants_only_rounding_is_left(run, x64):
    """The same composition with ‖·‖ + constant in place of ‖·‖: no gap remains."""
    base, hyperparameters = base_optimizer(run)
    rho = hyperparameters["rho"]
    shift = SHIFTS.get(run["method"], 1e-12)

    def scales(params):
        if run["method"] == "sam_adaptive":
            return jax.tree.map(jnp.abs, params)
        if run["method"] == "asam":
            eta = hyperparameters["eta"]
            return jax.tree.map(
                lambda x: jnp.abs(x) + eta if x.ndim > 1 else jnp.ones_like(x), params
            )
        return jax.tree.map(jnp.ones_like, params)

    def perturb(updates, state, params):
        t = scales(params)
        length = optax.tree.norm(optax.tree.mul(t, updates)) + shift
        return jax.tree.map(lambda t, g: rho * t**2 * g / length, t, updates), state

    chain = [optax.GradientTransformation(lambda params: optax.EmptyState(), perturb)]
    if "theta" in hyperparameters:
        chain.insert(0, ov.vasso_ema(hyperparameters["theta"]))
    if "sigma" in hyperparameters:
        noise = ov.friendly_noise(hyperparameters["sigma"], hyperparameters["lmbda"])
        chain.insert(0, noise)
    if run["method"] == "gsam":
        base = optax.chain(authors_gsam(hyperparameters["alpha"], shift), base)
    optimizer = ov.sharpness_aware(base, optax.chain(*chain))
    assert largest_error(optimizer, run) <= 1e-14


def authors_gsam(alpha, shift):
    def update(updates, state, params=None, *, clean_grads, **extra_args):
        new, old = optax.tree.norm(updates), optax.tree.norm(clean_grads)
        cosine = optax.tree.vdot(clean_grads, updates) / (new * old + shift)
        gap = jax.tree.map(
            lambda c, g: c - cosine * old * g / (new + shift), clean_grads, updates
        )
        return jax.tree.map(lambda g, v: g - alpha * v, updates, gap), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


def test_the_problem_is_the_authors(x64):
    """A guard for the other tests: the first clean loss, to the last digit."""
    params, batches, loss = authors_problem()
    for run in authors_runs():
        np.testing.assert_allclose(
            loss(params, batches[0]), run["clean_losses"][0], rtol=1e-15
        )
    assert numerics.accumulation_dtype(params) == jnp.float64
