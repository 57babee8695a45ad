"""Everything in its place: what stands in another's role is one sentence, and early.

At construction, ``init`` or trace time, so that a step pays nothing for it. Each call
here is one that somebody tired has made; in most of them training would have gone on,
as plain SGD, uphill, on one row of the batch or on all devices alike.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from test_bad_input import assert_one_sentence

import optax_vasso as ov
from optax_vasso import gate, metrics, train
from optax_vasso.train.step import build_train_step

PARAMS = {"w": jnp.ones(3), "b": jnp.ones(2)}
SGD = optax.sgd(0.1)
CHAIN = optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(0.1))
SAM, LAGGED = ov.sam(SGD), ov.lagged_vasso(SGD)
HELD = ov.ascent.hold_rise(CHAIN)
LOCAL = ov.sam(train.average_over(SGD, "data"))
TRACKED = ov.vasso(
    optax.chain(metrics.track(metrics.running_mean(metrics.cosine)), SGD)
)


def loss(params, batch):
    return jnp.sum((params["w"] - batch) ** 2)


def grad_fn(params):
    return jax.grad(loss)(params, 0.0)


def update(optimizer, grads=PARAMS, params=PARAMS, **extra_args):
    return optimizer.update(grads, optimizer.init(params), params, **extra_args)


def state_of(optimizer=SAM):
    return ov.init_train_state(PARAMS, optimizer)


def lower(batch, optimizer=SAM, **options):
    step = ov.make_train_step(loss, optimizer, **options)
    return step.lower(state_of(optimizer), batch)


def per_example(params, batch):
    return jnp.mean((batch @ params["w"] - 1) ** 2)


def step_twice(step, state, size=4):
    """Two steps from one state, the second with so many examples."""
    step(state, jnp.zeros((4, 3)))
    step(state, jnp.zeros((size, 3)))


def step_on_a_mesh(kind):
    """A traced step whose state and batch are whole on four devices."""
    step = build_train_step(
        lambda params, model_state, batch, key: (
            per_example(params, batch),
            (model_state, ()),
        ),
        SAM,
    )
    mesh = AbstractMesh((4,), ("data",), (kind,))
    whole = NamedSharding(mesh, PartitionSpec())
    state, batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        (state_of(), jnp.ones((8, 3))),
    )
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.eval_shape(step, state, batch)


def scheduled(schedule):
    return lambda: update(ov.sam(SGD, schedule), grad_fn=grad_fn)


def nothing(params):
    return jax.tree.map(lambda _: False, params)


# What is called, and words of the sentence.
def placed(specs):
    mesh = jax.make_mesh((1,), ("data",))
    return train.state_shardings(state_of(), SAM, mesh, specs)


CALLS = {
    # optimizer and ascent
    "ascent and optimizer swapped": (
        lambda: ov.sharpness_aware(CHAIN, SGD).init(PARAMS),
        "optimizer contains a perturbation and ascent none, so that training would",
    ),
    "swapped in lagged": (
        lambda: ov.lagged(CHAIN, SGD).init(PARAMS),
        "optimizer contains a perturbation and ascent none, so that training would",
    ),
    "swapped, with parts of their own": (
        lambda: ov.sharpness_aware(
            ov.ascent.masked_ascent(HELD, lambda p: True),
            optax.chain(optax.clip(1.0), SGD),
        ).init(PARAMS),
        "pass the optimizer first, as in sharpness_aware(optax.sgd(0.1), sam_perturb",
    ),
    "a radius for an ascent": (
        lambda: ov.ascent.per_layer(0.1),
        "ascent must be an optax.GradientTransformation, got 0.1",
    ),
    "axis and optimizer swapped": (
        lambda: train.average_over("data", SGD),
        "optimizer must be an optax.GradientTransformation, got 'data'",
    ),
    # masks
    "a mask that matches nothing": (
        lambda: ov.sam(SGD, mask=nothing).init(PARAMS),
        "mask is False for every one of the 2 parameters: look at their paths",
    ),
    "a mask that is False": (
        lambda: ov.lagged_vasso(SGD, mask=False).init(PARAMS),
        "mask is False for every one of the 2 parameters: look at their paths",
    ),
    "nothing rescaled": (
        lambda: ov.asam(SGD, rescaled=nothing).init(PARAMS),
        "rescaled is False for every one of the 2 parameters: look at their paths",
    ),
    # numbers
    "a theta that is zero in float32": (
        lambda: ov.vasso_ema(1e-40),
        "theta must be in (0, 1] in float32, got 1e-40, which is 0.0 there: pass a",
    ),
    "a radius that is infinite in float32": (
        lambda: ov.sam_perturb(1e39),
        "rho must be a finite number >= 0 in float32, got 1e+39, which is inf there",
    ),
    "a decay that is one in float32": (
        lambda: ov.friendly_noise(1.0, 1 - 1e-12),
        "lmbda must be in [0, 1) in float32, got 0.999999999999, which is 1.0 there",
    ),
    "an infinite weight of sharpness": (
        lambda: ov.descent.weighted_descent(1 - 1e-12),
        "gamma must be in [0, 1) in float32, got 0.999999999999, which is 1.0 there",
    ),
    "a flag for a radius": (
        lambda: ov.sam_perturb(True),
        "rho must be a finite number >= 0, got True.",
    ),
    "a flag for a period": (
        lambda: gate.every(True),
        "k must be an integer >= 1, got True.",
    ),
    "a period of more steps than can be counted": (
        lambda: gate.every(2**40),
        "k must be an integer < 2**31, as steps are, got 1099511627776.",
    ),
    "a dtype of no such name": (
        lambda: ov.vasso_ema(0.4, accumulator_dtype="flaot32"),
        "accumulator_dtype must be a float dtype such as jnp.float32, got 'flaot32'",
    ),
    # schedules
    "a schedule for an order": (
        lambda: ov.sam_perturb(0.1, p=lambda step: 2.0),
        "p must be in (1, inf], got the function <lambda>: it takes no schedule",
    ),
    "a schedule for a momentum": (
        lambda: ov.momentum_sam(SGD, momentum=lambda step: 0.9),
        "momentum must be in [0, 1), got the function <lambda>: it takes no schedule",
    ),
    "a schedule for the decay of a mean": (
        lambda: metrics.running_mean(metrics.cosine, lambda step: 0.9),
        "decay must be in [0, 1), got the function <lambda>: it takes no schedule",
    ),
    "a schedule for a fraction": (
        lambda: train.part_of_batch(lambda step: 0.5),
        "fraction must be in [1e-6, 1], got the function <lambda>: it takes no",
    ),
    "a schedule for a share": (
        lambda: train.split_batch(lambda step: 0.5),
        "share must be in [1e-6, 1 - 1e-6], got the function <lambda>: it takes no",
    ),
    "a traced share": (
        lambda: jax.jit(lambda share: train.split_batch(share) and 0)(0.5),
        "share is being traced, but it decides how many examples are taken: pass a",
    ),
    "a traced fraction": (
        lambda: jax.jit(lambda share: train.part_of_batch(share) and 0)(0.5),
        "fraction is being traced, but it decides how many examples are taken: pass a",
    ),
    "a schedule of vectors": (
        scheduled(lambda step: jnp.ones(3)),
        "a schedule must return one number for a step, but <lambda> returns an array "
        "of shape (3,): pass a function of the step",
    ),
    "a schedule not made yet": (
        scheduled(optax.constant_schedule),
        "but constant_schedule returns function: pass a function of the step",
    ),
    "a schedule that returns nothing": (
        scheduled(lambda step: None),
        "but <lambda> returns NoneType: pass a function of the step",
    ),
    "an optimizer not made yet for a schedule": (
        scheduled(optax.sgd),
        "but sgd returns GradientTransformationExtraArgs: pass a function of the step",
    ),
    # gradients and losses
    "gradients for their function": (
        lambda: update(SAM, grad_fn=PARAMS),
        "grad_fn must be a function of the parameters, got a dict: pass the function",
    ),
    "a loss for its function": (
        lambda: update(SAM, value_fn=1.0),
        "value_fn must be a function of the parameters, got a float: pass the function",
    ),
    "a loss for gradients": (
        lambda: update(SAM, jnp.ones(()), grad_fn=grad_fn),
        "updates is an array, and no gradient for the parameters sharpness_aware was",
    ),
    "a loss for gradients of lagged": (
        lambda: update(LAGGED, jnp.ones(())),
        "updates is an array, and no gradient for the parameters lagged was",
    ),
    "a loss for gradients of an average": (
        lambda: update(ov.vasso_ema(0.4), jnp.ones(())),
        "updates is an array, and no gradient for the parameters vasso_ema was",
    ),
    "a function for gradients": (
        lambda: update(SAM, loss, grad_fn=grad_fn),
        "updates is the function loss, and no gradient for the parameters sharpness_",
    ),
    "a function for the gradient of one array": (
        lambda: update(LAGGED, loss, jnp.ones(3)),
        "updates is the function loss, and no gradient for the parameters lagged was",
    ),
    "value and gradients for gradients": (
        lambda: update(ov.asam_perturb(0.1), (jnp.ones(()), PARAMS)),
        "updates has another tree structure than the parameters asam_perturb was",
    ),
    "a loss per example": (
        lambda: update(
            ov.sharpness_aware(SGD, HELD), value=jnp.ones(3), grad_fn=grad_fn
        ),
        "value must be the scalar loss, got an array of shape (3,): average it over",
    ),
    "a loss per example for a held rise": (
        lambda: update(HELD, value=jnp.ones(3)),
        "value must be the scalar loss, got an array of shape (3,): average it over",
    ),
    "text among the parameters": (
        lambda: SAM.init({"w": jnp.ones(3), "name": "dense"}),
        "params['name'] is text, 'dense': pass init the parameters alone",
    ),
    # the train step
    "batch and state swapped": (
        lambda: ov.make_train_step(loss, SAM)(jnp.ones(3), state_of()),
        "state must be a TrainState, got an array of shape (3,): make it with",
    ),
    "parameters for a state": (
        lambda: ov.make_train_step(loss, SAM)(PARAMS, jnp.ones(3)),
        "state must be a TrainState, got a dict: make it with init_train_state",
    ),
    "the optimizer's state for the train state": (
        lambda: ov.make_train_step(loss, SAM)(SAM.init(PARAMS), jnp.ones(3)),
        "state must be a TrainState, got a SharpnessAwareState: make it with",
    ),
    "batch and state swapped in a local step": (
        lambda: train.make_local_train_step(loss, LOCAL)(jnp.ones(4), state_of()),
        "state must be a TrainState, got an array of shape (4,): make it with",
    ),
    "an optimizer's state for the optimizer": (
        lambda: ov.init_train_state(PARAMS, SAM.init(PARAMS)),
        "optimizer must be an optax.GradientTransformation, got a SharpnessAwareState",
    ),
    "a seed for a key": (
        lambda: ov.init_train_state(PARAMS, SAM, key=0),
        "key must be a random key, got 0: pass jax.random.key(0).",
    ),
    "a number for a gate's seed": (
        lambda: gate.bernoulli(0.5, seed=0.5),
        "seed must be an integer or a random key, got 0.5: pass 0, or",
    ),
    "no seed for a gate": (
        lambda: ov.evasso(SGD, seed=None),
        "seed must be an integer or a random key, got None: pass 0, or",
    ),
    "a number of microbatches for a gradient": (
        lambda: ov.make_train_step(loss, SAM, gradient=4),
        "gradient must be a gradient maker, got 4: pass one of optax_vasso.train",
    ),
    "a maker of gradient makers": (
        lambda: lower(jnp.ones(3), gradient=train.microbatched),
        "count must be an integer >= 1, got",
    ),
    "one batch for several": (
        lambda: lower(jnp.ones(3), gradient=train.on_batch(0)),
        "on_batch(0) needs several batches, got one array of shape (3,): pass them in",
    ),
    # meshes
    "mesh and parameters swapped": (
        lambda: train.fsdp_specs(jax.make_mesh((1,), ("data",)), PARAMS),
        "mesh must be a jax.sharding.Mesh, got a dict: make one with jax.make_mesh",
    ),
    "mesh and batch swapped": (
        lambda: train.shard_batch(jax.make_mesh((1,), ("data",)), PARAMS),
        "mesh must be a jax.sharding.Mesh, got a dict: make one with jax.make_mesh",
    ),
    "mesh and optimizer swapped": (
        lambda: train.shard_state(state_of(), jax.make_mesh((1,), ("data",)), SAM),
        "mesh must be a jax.sharding.Mesh, got a GradientTransformationExtraArgs: make",
    ),
    "a scalar in a batch on a mesh": (
        lambda: train.shard_batch({"x": 1.0}, jax.make_mesh((1,), ("data",))),
        "batch['x'] is a scalar, but the devices of mesh axis 'data' need",
    ),
    "specs of other parameters": (
        lambda: placed({"w": jax.P()}),
        "specs has another tree structure than the parameters (nothing at ['b'])",
    ),
    "a spec of another mesh": (
        lambda: placed({"w": jax.P("model"), "b": jax.P()}),
        "specs['w'] is P('model',), which does not fit a parameter of shape (3,) on a",
    ),
    "a number for a spec": (
        lambda: placed({"w": jax.P(), "b": 0}),
        "specs['b'] is 0, which does not fit a parameter of shape (2,)",
    ),
    "the name of an axis for a mesh": (
        lambda: train.make_local_train_step(loss, LOCAL, mesh="data"),
        "mesh must be a jax.sharding.Mesh, got a str: make one with jax.make_mesh",
    ),
    "a state that was donated": (
        lambda: step_twice(train.make_train_step(per_example, SGD), state_of(SGD)),
        "state was given to a step before, which reused its buffers: go on with the",
    ),
    "a state that was donated, with another batch": (
        lambda: step_twice(
            train.make_train_step(per_example, SGD), state_of(SGD), size=2
        ),
        "state was given to a step before, which reused its buffers: go on with the",
    ),
    "a local state that was donated": (
        lambda: step_twice(
            train.make_local_train_step(per_example, LOCAL),
            train.init_local_state(PARAMS, LOCAL, 4),
        ),
        "state was given to a step before, which reused its buffers: go on with the",
    ),
    "a whole batch on an explicit mesh": (
        lambda: step_on_a_mesh(AxisType.Explicit),
        "batch is whole on all devices of the explicit mesh axis 'data', and so are",
    ),
    # metrics
    "a mean of what has a state": (
        lambda: metrics.running_mean(metrics.stability),
        "measure must be a function of a Seen, got a Measure: a Measure has its",
    ),
    "a mean of a number": (
        lambda: metrics.running_mean(0.9),
        "measure must be a function of a Seen, got a float",
    ),
    "check_uphill under jit": (
        lambda: jax.jit(metrics.check_uphill)(TRACKED.init(PARAMS)),
        "state is being traced and has no values yet: call check_uphill outside of",
    ),
    "a cosine that is none": (
        lambda: metrics.check_uphill(TRACKED.init(PARAMS), least=2.0),
        "least must be in [-1, 1], got 2.0.",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_role_is_one_sentence(name):
    call, words = CALLS[name]
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    if ": " in message:
        assert_one_sentence(error)
    assert words in message


def test_a_whole_batch_on_a_mesh_that_the_compiler_divides_is_no_mistake():
    step_on_a_mesh(AxisType.Auto)


def test_a_base_optimizer_may_normalize_its_gradient_by_a_perturbation():
    base = optax.chain(ov.sam_perturb(1.0), optax.scale(-0.1))
    updates, _ = update(ov.sharpness_aware(base, CHAIN), grad_fn=grad_fn)
    assert optax.tree.norm(updates) == pytest.approx(0.1)


def test_a_key_that_is_bound_to_the_loss_stays_that_key():
    """The train step's own key goes to a loss that asks for one."""

    def noisy(params, batch, key):
        return loss(params, batch) * jax.random.uniform(key)

    bound = functools.partial(noisy, key=jax.random.key(3))
    step = ov.make_train_step(bound, SGD)
    state = ov.init_train_state(PARAMS, SGD, key=jax.random.key(0))
    _, found = step(state, jnp.zeros(3))
    assert found["loss"] == pytest.approx(bound(PARAMS, jnp.zeros(3)))


@pytest.mark.parametrize("wrap", [ov.sharpness_aware, ov.lagged])
def test_an_ascent_may_need_an_argument_of_its_own(wrap):
    def scaled(updates, state, params=None, *, temperature, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda e: temperature * e, updates), state

    ascent = optax.chain(
        ov.sam_perturb(0.1),
        optax.GradientTransformationExtraArgs(optax.init_empty_state, scaled),
    )
    optimizer = wrap(optax.set_to_zero(), ascent)
    updates, _ = update(optimizer, grad_fn=grad_fn, temperature=2.0)
    length = 0.2 if wrap is ov.lagged else 0.0
    assert optax.tree.norm(updates) == pytest.approx(length)


def test_a_measure_may_be_a_partial():
    def power(seen, exponent):
        return metrics.grad_norm(seen) ** exponent

    measure = functools.partial(functools.partial(power), exponent=2)
    optimizer = ov.sam(
        optax.chain(metrics.track(measure, metrics.running_mean(measure)), SGD)
    )
    _, state = update(optimizer, grad_fn=grad_fn)
    for name in ("power", "mean_power"):
        assert optax.tree.get(state, name) == pytest.approx(5)
