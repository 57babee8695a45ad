"""Levanter: the config class of the page, on its train state."""

import jax
import jax.numpy as jnp
import optax
import pages
import plain_loop
import pytest

import optax_vasso as ov

hax, _ = pages.require("haliax", "levanter")
import equinox as eqx  # noqa: E402
from levanter.optim.skipstep import SkipStepConfig  # noqa: E402
from levanter.trainer_state import TrainerState  # noqa: E402

pytestmark = pytest.mark.usefixtures("foreign")
STEPS = 4
In, Out, Batch = hax.Axis("in", 3), hax.Axis("out", 2), hax.Axis("batch", 8)
X = hax.random.normal(jax.random.key(0), (Batch, In))
Y = hax.random.normal(jax.random.key(1), (Batch, Out))
BASE = optax.sgd(plain_loop.RATE)
HYPERPARAMETERS = {"rho": plain_loop.RHO, "theta": plain_loop.THETA}


@pytest.fixture
def page(foreign):
    return pages.names_of("docs/trainers/levanter.md")


def loss(model):
    return hax.mean(hax.square(model(X) - Y)).scalar()


def initial(optimizer):
    model = hax.nn.Linear.init(In, Out, key=jax.random.key(2))
    return TrainerState.init(optimizer, model, key=jax.random.key(3))


@eqx.filter_jit
def take_step(state, told=None):
    """As the trainer's ``_train_step``; ``told`` replaces the loss that is passed."""
    value, grads = eqx.filter_value_and_grad(loss)(state.model)

    def obj_fun(trainable_model):
        return loss(eqx.combine(trainable_model, state.model))

    told = value if told is None else told
    return state.take_step(grads, obj_fun=obj_fun, loss=told, key=state.training_key)[0]


def train(optimizer, steps=STEPS):
    state = initial(optimizer)
    for _ in range(steps):
        state = take_step(state)
    return state


def gradient(params, step):
    return eqx.filter_grad(loss)(params)


def start():
    return initial(BASE).trainable_model


@pytest.mark.parametrize("skips", [False, True])
def test_one_gradient(page, skips):
    optimizer = ov.lagged_vasso(BASE, **HYPERPARAMETERS)
    state = train(SkipStepConfig().wrap(optimizer) if skips else optimizer)
    x, y = plain_loop.lagged(gradient, start(), STEPS)
    plain_loop.assert_close(state.model, y)
    plain_loop.assert_close(page["clean_model"](state), x)


@pytest.mark.parametrize("skips", [False, True])
def test_two_gradients_of_the_loss_that_it_passes(skips):
    optimizer = ov.vasso(BASE, **HYPERPARAMETERS)
    state = train(SkipStepConfig().wrap(optimizer) if skips else optimizer)
    plain_loop.assert_close(state.model, plain_loop.vasso(gradient, start(), STEPS))


def test_a_skipped_step_leaves_everything_where_it_is(page):
    optimizer = ov.lagged_vasso(BASE, **HYPERPARAMETERS)
    state = train(SkipStepConfig(rolling_interval_length=4).wrap(optimizer))
    skipped = take_step(state, jnp.float32(1e6))
    plain_loop.assert_close(skipped.model, state.model, rtol=0, atol=0)
    clean = page["clean_model"]
    plain_loop.assert_close(clean(skipped), clean(state), rtol=0, atol=0)


@pytest.mark.parametrize("gradients", [1, 2])
def test_the_config_trains(page, gradients):
    config = page["SharpnessAwareAdamConfig"](
        learning_rate=0.1, warmup=0, gradients=gradients
    )
    state = train(config.build(20), steps=20)
    assert loss(page["clean_model"](state)) < loss(start())
    distance = optax.tree.norm(optax.tree.sub(state.model, page["clean_model"](state)))
    assert distance == pytest.approx(config.rho if gradients == 1 else 0.0, rel=1e-4)
