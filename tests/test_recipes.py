"""Every recipe is the formula of its paper, written out in NumPy."""

import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_vasso as ov
from optax_vasso import recipes

pytestmark = pytest.mark.usefixtures("x64")

RATE, STEPS = 0.05, 12
START = np.array([1.0, -0.6, 0.5, 1.5, -0.3])
CURVATURES = np.array([1.0, 2.0, 0.5, 1.2, 1.0])
BATCHES = 0.8 * np.random.default_rng(0).standard_normal((STEPS, 5))


def gradient(x, t):
    """Of Σ cosh(c x) + ⟨b_t, x⟩: other curvatures everywhere, other batches."""
    return CURVATURES * np.sinh(CURVATURES * x) + BATCHES[t]


def loss(params, batch):
    x = jnp.concatenate([params["a"], params["b"]])
    return jnp.sum(jnp.cosh(CURVATURES * x)) + batch @ x


def unit(d):
    return d / np.linalg.norm(d)


class Step(NamedTuple):
    """What a method knows at one step; ``memory`` it keeps from step to step."""

    t: int
    x: np.ndarray
    g: np.ndarray
    memory: dict

    def at(self, perturbation):
        """The gradient of this batch at the perturbed point."""
        return gradient(self.x + perturbation, self.t)


# Each gives the direction that SGD descends.


def sam(step, rho):
    return step.at(rho * unit(step.g))


def smoothed(step, theta):
    d = step.memory.get("d")
    step.memory["d"] = step.g if d is None else (1 - theta) * d + theta * step.g
    return step.memory["d"]


def vasso(step, rho, theta):
    return step.at(rho * unit(smoothed(step, theta)))


def evasso(step, rho, theta, probability, seed):
    d = smoothed(step, theta)  # whatever the gate says
    key = step.memory.get("key", jax.random.PRNGKey(seed))
    step.memory["key"], draw = jax.random.split(key)
    ascends = bool(jax.random.bernoulli(draw, probability))
    step.memory.setdefault("ascents", []).append(ascends)
    return step.at(rho * unit(d)) if ascends else step.g


def friendly_sam(step, rho, sigma, lmbda):
    m = step.memory.get("m")
    noise = step.g if m is None else step.g - sigma * m
    step.memory["m"] = step.g if m is None else lmbda * m + (1 - lmbda) * step.g
    return step.at(rho * unit(noise))


def asam(step, rho, eta):
    t = np.abs(step.x) + eta
    return step.at(rho * t**2 * step.g / np.linalg.norm(t * step.g))


def asam_of_a(step, rho, eta):
    t = np.where([True, True, False, False, False], np.abs(step.x) + eta, 1.0)
    return step.at(rho * t**2 * step.g / np.linalg.norm(t * step.g))


def fisher_sam(step, rho, eta):
    inverse = 1 / (1 + eta * step.g**2)
    return step.at(rho * inverse * step.g / np.sqrt(step.g @ (inverse * step.g)))


def gsam(step, rho, alpha):
    p = step.at(rho * unit(step.g))
    return p - alpha * (step.g - step.g @ unit(p) * unit(p))


def looksam(step, rho, alpha, k):
    if step.t % k == 0:
        p = step.at(rho * unit(step.g))
        step.memory["v"] = p - p @ unit(step.g) * unit(step.g)
        return p
    return step.g + alpha * np.linalg.norm(step.g) * unit(step.memory["v"])


def wsam(step, rho, gamma):
    return step.g + gamma / (1 - gamma) * (step.at(rho * unit(step.g)) - step.g)


def ae_sam(step, rho, threshold, decay):
    square = step.g @ step.g
    mean = decay * step.memory.get("mean", 0.0) + (1 - decay) * square
    variance = (
        decay * step.memory.get("variance", 0.0) + (1 - decay) * (square - mean) ** 2
    )
    step.memory.update(mean=mean, variance=variance)
    ascends = square >= mean + threshold * np.sqrt(variance)
    step.memory.setdefault("ascents", []).append(ascends)
    return step.at(rho * unit(step.g)) if ascends else step.g


# The recipe, its hyperparameters, and the direction with those that NumPy needs.
FORMULAS = {
    "sam": (ov.sam, {"rho": 0.3}, sam),
    "vasso": (ov.vasso, {"rho": 0.3, "theta": 0.2}, vasso),
    "evasso": (
        ov.evasso,
        {"rho": 0.3, "theta": 0.2, "probability": 0.5, "seed": 3},
        evasso,
    ),
    "friendly_sam": (
        ov.friendly_sam,
        {"rho": 0.3, "sigma": 0.8, "lmbda": 0.7},
        friendly_sam,
    ),
    "asam": (ov.asam, {"rho": 0.3, "eta": 0.02}, asam),
    "asam, a part rescaled": (
        functools.partial(ov.asam, rescaled={"a": True, "b": False}),
        {"rho": 0.3, "eta": 0.02},
        asam_of_a,
    ),
    "fisher_sam": (ov.fisher_sam, {"rho": 0.3, "eta": 0.5}, fisher_sam),
    "gsam": (ov.gsam, {"rho": 0.3, "alpha": 0.4}, gsam),
    "looksam": (ov.looksam, {"rho": 0.3, "alpha": 0.5, "k": 3}, looksam),
    "wsam": (
        functools.partial(ov.wsam, learning_rate=RATE),
        {"rho": 0.3, "gamma": 0.8},
        wsam,
    ),
    "ae_sam": (ov.ae_sam, {"rho": 0.3, "threshold": 0.2, "decay": 0.8}, ae_sam),
}


def by_hand(direction, hyperparameters):
    """The points x_t after each step, and what the method remembers."""
    x, memory, points = START, {}, []
    for t in range(STEPS):
        step = Step(t, x, gradient(x, t), memory)
        x = x - RATE * direction(step, **hyperparameters)
        points.append(x)
    return np.stack(points), memory


def trained(optimizer, is_lagged=False):
    """The points x_t after each step, as one compiled scan."""

    def one_step(carry, batch):
        params, state = carry
        grad_fn = functools.partial(jax.grad(loss), batch=batch)
        updates, state = optimizer.update(
            grad_fn(params), state, params, grad_fn=grad_fn
        )
        params = optax.apply_updates(params, updates)
        point = ov.eval_params(state, params) if is_lagged else params
        return (params, state), jnp.concatenate([point["a"], point["b"]])

    params = {"a": jnp.asarray(START[:2]), "b": jnp.asarray(START[2:])}
    carry = params, optimizer.init(params)
    return jax.jit(lambda: jax.lax.scan(one_step, carry, jnp.asarray(BATCHES)))()[1]


@functools.cache
def trajectory(name):
    recipe, hyperparameters, _ = FORMULAS[name]
    return trained(recipe(optax.sgd(RATE), **hyperparameters))


@pytest.mark.parametrize("name", FORMULAS)
def test_a_recipe_is_its_formula(name):
    _, hyperparameters, direction = FORMULAS[name]
    expected, memory = by_hand(direction, hyperparameters)
    np.testing.assert_allclose(trajectory(name), expected, rtol=1e-10, atol=1e-12)
    # A gate that never or always opens would leave half of the formula unseen.
    assert set(memory.get("ascents", [True, False])) == {True, False}


# The average that a lagged perturbation follows, from the one before and the gradient,
# and the sign of the perturbation.
LAGGED = {
    "lagged_vasso": (
        lambda o: ov.lagged_vasso(o, 0.3, theta=0.2),
        lambda d, g: g if d is None else 0.8 * d + 0.2 * g,
        1,
    ),
    "single_step_sam": (lambda o: ov.single_step_sam(o, 0.3), lambda d, g: g, 1),
    "momentum_sam": (
        lambda o: ov.momentum_sam(o, 0.3, momentum=0.7),
        lambda d, g: g if d is None else 0.7 * d + g,
        -1,
    ),
}


@pytest.mark.parametrize("name", LAGGED)
def test_a_lagged_recipe_is_its_formula(name):
    """One gradient per step, at the point that the last step has perturbed."""
    recipe, follow, sign = LAGGED[name]
    x, epsilon, d, points = START, 0.0, None, []
    for t in range(STEPS):
        g = gradient(x + epsilon, t)
        d = follow(d, g)
        x, epsilon = x - RATE * g, sign * 0.3 * unit(d)
        points.append(x)
    actual = trained(recipe(optax.sgd(RATE)), is_lagged=True)
    np.testing.assert_allclose(actual, np.stack(points), rtol=1e-10, atol=1e-12)


WEIGHT = 0.8 / (1 - 0.8)  # γ/(1 − γ)
MOMENTUM = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(RATE, momentum=0.9))


def test_wsam_takes_the_sharpness_beside_the_momentum():
    """v ← μ v + g + decay, x ← x − η v − η γ/(1 − γ) (g(x + ε) − g)."""
    x, v, points = START, 0.0, []
    for t in range(STEPS):
        g = gradient(x, t)
        sharpness = gradient(x + 0.3 * unit(g), t) - g
        v = 0.9 * v + g + 0.1 * x
        x = x - RATE * v - RATE * WEIGHT * sharpness
        points.append(x)
    optimizer = ov.wsam(MOMENTUM, 0.3, learning_rate=lambda step: RATE, gamma=0.8)
    np.testing.assert_allclose(trained(optimizer), np.stack(points), rtol=1e-10)


def test_weighted_descent_takes_the_sharpness_into_the_momentum():
    """The coupled form: v ← μ v + g + γ/(1 − γ) (g(x + ε) − g) + decay."""
    x, v, points = START, 0.0, []
    for t in range(STEPS):
        g = gradient(x, t)
        sharpness = gradient(x + 0.3 * unit(g), t) - g
        v = 0.9 * v + g + WEIGHT * sharpness + 0.1 * x
        x = x - RATE * v
        points.append(x)
    coupled = optax.chain(ov.descent.weighted_descent(0.8), MOMENTUM)
    optimizer = ov.sharpness_aware(coupled, ov.sam_perturb(0.3))
    np.testing.assert_allclose(trained(optimizer), np.stack(points), rtol=1e-10)


def test_async_sam_is_its_formula():
    """Two gradients, at points that are both known when the step begins."""
    x, epsilon, points = START, 0.0, []
    for t in range(STEPS):
        g, clean = gradient(x + epsilon, t), gradient(x, t)
        x, epsilon = x - RATE * g, 0.3 * unit(clean)
        points.append(x)
    ascent = optax.chain(ov.clean_gradient(), ov.sam_perturb(0.3))
    actual = trained(ov.lagged(optax.sgd(RATE), ascent), is_lagged=True)
    np.testing.assert_allclose(actual, np.stack(points), rtol=1e-10, atol=1e-12)


def test_sampa_between_float16_gradients_far_apart():
    """Their difference is out of range, their mean is not."""
    optimizer = ov.sampa(optax.sgd(1.0), learning_rate=0.0, lmbda=0.5)
    params, grads = jnp.zeros(1, jnp.float16), jnp.asarray([4e4], jnp.float16)
    updates, state = optimizer.update(
        grads, optimizer.init(params), params, grad_fn=lambda x: -grads
    )
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(ov.eval_params(state, params), [0.0], atol=1e-3)


def test_sampa_is_its_formula():
    """With hyperparameters that are schedules; the optimizer has a rate of its own."""

    def rho(t):
        return 0.4 / (1 + t)

    def learning_rate(t):
        return RATE / (1 + 0.2 * t)

    def lmbda(t):
        return 0.3 - 0.02 * t

    x, epsilon, last, points = START, 0.0, 0.0, []
    for t in range(STEPS):
        g, last = gradient(x + epsilon, t), gradient(x - learning_rate(t) * last, t)
        x = x - RATE * ((1 - lmbda(t)) * g + lmbda(t) * last)
        epsilon = rho(t) * unit(last)
        points.append(x)
    optimizer = ov.sampa(optax.sgd(RATE), rho, learning_rate=learning_rate, lmbda=lmbda)
    actual = trained(optimizer, is_lagged=True)
    np.testing.assert_allclose(actual, np.stack(points), rtol=1e-10, atol=1e-12)


def test_sampa_keeps_its_state_where_nobody_trains_a_parameter():
    """Their update is None; the gradient kept for the next step is zero there."""
    optimizer = ov.sampa(optax.sgd(RATE), 0.4, learning_rate=RATE, lmbda=0.3)
    params = {"w": jnp.asarray(START), "frozen": jnp.ones(2)}

    def grad_fn(params):
        return {"w": params["w"], "frozen": None}

    state = optimizer.init(params)
    for _ in range(2):
        updates, after = optimizer.update(
            grad_fn(params), state, params, grad_fn=grad_fn
        )
        assert updates["frozen"] is None
        assert jax.tree.structure(after) == jax.tree.structure(state)
        params = {**params, "w": params["w"] + updates["w"]}
        state = after
    np.testing.assert_array_equal(state.gradient["frozen"], np.zeros(2))


@pytest.mark.parametrize(
    "optimizer",
    [
        ov.sampa(optax.sgd(RATE), learning_rate=RATE),
        ov.lagged(optax.sgd(RATE), optax.chain(ov.clean_gradient())),
    ],
    ids=["sampa", "clean_gradient"],
)
def test_a_second_gradient_needs_grad_fn(optimizer):
    params = jnp.asarray(START)
    with pytest.raises(ValueError, match="needs grad_fn, got None: call update"):
        optimizer.update(params, optimizer.init(params), params)


# Pairs of lagged optimizers that are one, as the docstrings say.
SAME = {
    "lagged_vasso, theta = 1, is single_step_sam": (
        lambda o: ov.lagged_vasso(o, 0.3, theta=1.0),
        lambda o: ov.single_step_sam(o, 0.3),
    ),
    "momentum_sam follows the average of adam as well": (
        lambda o: ov.momentum_sam(o, 0.3, momentum=0.7),
        lambda o: ov.lagged(
            o,
            optax.chain(
                optax.ema(0.7, debias=False), ov.sam_perturb(0.3), optax.scale(-1.0)
            ),
        ),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_lagged_recipes_that_are_one(name):
    one, other = SAME[name]
    base = optax.sgd(RATE, momentum=0.9)
    np.testing.assert_allclose(
        trained(one(base), is_lagged=True),
        trained(other(base), is_lagged=True),
        rtol=1e-10,
        atol=1e-12,
    )


# Limits in which one recipe is another.
LIMITS = {
    "vasso, theta = 1, is sam": (lambda o: ov.vasso(o, 0.3, theta=1.0), "sam"),
    "evasso, probability = 1, is vasso": (
        lambda o: ov.evasso(o, 0.3, theta=0.2, probability=1.0),
        "vasso",
    ),
    "friendly_sam, sigma = 0, is sam": (
        lambda o: ov.friendly_sam(o, 0.3, sigma=0.0),
        "sam",
    ),
    "asam, nothing rescaled, is sam": (
        lambda o: ov.asam(o, 0.3, rescaled=False),
        "sam",
    ),
    "fisher_sam, eta = 0, is sam": (lambda o: ov.fisher_sam(o, 0.3, eta=0.0), "sam"),
    "gsam, alpha = 0, is sam": (lambda o: ov.gsam(o, 0.3, alpha=0.0), "sam"),
    "looksam, k = 1, is sam": (lambda o: ov.looksam(o, 0.3, k=1), "sam"),
    "wsam, gamma = 1/2, is sam without momentum": (
        lambda o: ov.wsam(o, 0.3, learning_rate=RATE, gamma=0.5),
        "sam",
    ),
    "ae_sam, no threshold, is sam": (
        lambda o: ov.ae_sam(o, 0.3, threshold=-1e9),
        "sam",
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name):
    recipe, same = LIMITS[name]
    np.testing.assert_allclose(
        trained(recipe(optax.sgd(RATE))), trajectory(same), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize(
    "recipe",
    [lambda o: ov.wsam(o, learning_rate=RATE, gamma=0.0), lambda o: ov.sam(o, 0.0)],
)
def test_limits_that_are_plain_training(recipe):
    np.testing.assert_allclose(
        trained(recipe(optax.sgd(RATE))), trained(optax.sgd(RATE)), rtol=1e-12
    )


OPTIONS = {"mask": None}
DEFAULTS = {
    ov.sam: {"rho": 0.05},
    ov.vasso: {"rho": 0.1, "theta": 0.4, "accumulator_dtype": None},
    ov.evasso: {"rho": 0.1, "theta": 0.4, "probability": 0.3, "seed": 0},
    ov.lagged_vasso: {"rho": 0.1, "theta": 0.4},
    ov.single_step_sam: {"rho": 0.05},
    ov.momentum_sam: {"rho": 3.0, "momentum": 0.9},
    ov.friendly_sam: {
        "rho": 0.2,
        "sigma": 1.0,
        "lmbda": 0.6,
        "accumulator_dtype": None,
    },
    ov.asam: {"rho": 0.5, "eta": 0.01, "rescaled": None},
    ov.fisher_sam: {"rho": 0.1, "eta": 1.0},
    ov.gsam: {"rho": 0.1, "alpha": 0.3},
    ov.looksam: {"rho": 0.1, "alpha": 0.7, "k": 5},
    ov.wsam: {"rho": 0.05, "learning_rate": inspect.Parameter.empty, "gamma": 0.9},
    ov.ae_sam: {"rho": 0.05, "threshold": 0.0, "decay": 0.9},
}


def test_defaults():
    """The optimizer first, then the radius; everything behind them by its name."""
    for recipe, defaults in DEFAULTS.items():
        optimizer, rho, *others = inspect.signature(recipe).parameters.values()
        assert (optimizer.name, optimizer.default) == ("optimizer", optimizer.empty)
        assert rho.name == "rho"
        assert {p.kind for p in others} == {inspect.Parameter.KEYWORD_ONLY}
        assert {p.name: p.default for p in (rho, *others)} == defaults | OPTIONS
    parameters = inspect.signature(ov.sampa).parameters  # it takes no mask
    assert (parameters["rho"].default, parameters["lmbda"].default) == (0.1, 0.2)


def test_every_recipe_is_in_the_table():
    named = {recipe.__name__ for recipe in DEFAULTS}
    defined = {
        name
        for name, value in vars(recipes).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "") == recipes.__name__
    }
    assert named == defined
    assert defined <= set(ov.__all__)


@pytest.mark.parametrize("recipe", DEFAULTS)
def test_a_mask_chooses_the_leaves_that_are_perturbed(recipe):
    """The others are seen where they are, and trained all the same."""
    mask = {"a": True, "b": False}
    params = {"a": jnp.asarray(START[:2]), "b": jnp.asarray(START[2:])}
    needed = {ov.evasso: {"probability": 1.0}, ov.wsam: {"learning_rate": RATE}}
    optimizer = recipe(optax.sgd(RATE), mask=mask, **needed.get(recipe, {}))
    seen = []

    def grad_fn(params):
        seen.append(params)
        return jax.grad(loss)(params, BATCHES[0])

    grads = grad_fn(params)
    with jax.disable_jit():  # so that a gate's branch hands out arrays
        updates, state = optimizer.update(
            grads, optimizer.init(params), params, grad_fn=grad_fn
        )
    if recipe.__name__ in LAGGED:
        params = optax.apply_updates(params, updates)
        clean, perturbed = ov.eval_params(state, params), params
    else:
        clean, perturbed = seen
    np.testing.assert_array_equal(perturbed["b"], clean["b"])
    assert np.all(perturbed["a"] != clean["a"])
    assert np.all(np.asarray(updates["b"]) != 0)
    # The ball is that of the chosen leaves: with the others gone it is the same.
    if recipe not in (ov.asam, ov.fisher_sam):
        radius = inspect.signature(recipe).parameters["rho"].default
        assert np.linalg.norm(perturbed["a"] - clean["a"]) == pytest.approx(radius)
