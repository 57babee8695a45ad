"""Bad input is one clear sentence that names the argument, its value and the remedy."""

import functools

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

import optax_vasso as ov
from optax_vasso import gate
from optax_vasso.ascent.smoothing import carried_ema

PARAMS = {"w": jnp.ones(3), "b": jnp.ones(2)}
NAN = float("nan")
ASCENT = optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(0.1))
SKIPPED = ov.wrappers.skip_nonfinite(optax.sgd(0.1)).init(PARAMS)


def make(function, *args, **kwargs):
    return lambda: function(*args, **kwargs)


def assert_one_sentence(error):
    """The message: one line, one sentence, with a remedy behind a colon."""
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert ": " in message
    assert len(message) < 400
    return message


HYPERPARAMETERS = {
    "theta": [
        make(function, value)
        for value in (0, -0.1, 1.1, NAN, "0.4", None, np.float32(2), jnp.ones(2))
        for function in (ov.vasso_ema, carried_ema)
    ],
    "rho": [
        make(function, value)
        for value in (
            *(-0.1, NAN, float("inf"), None, jnp.asarray(-0.1), np.ones(2)),
            optax.sgd(0.1),
        )
        for function in (
            ov.sam_perturb,
            ov.asam_perturb,
            ov.fisher_perturb,
            lambda rho: ov.ascent.until(3, rho),
            lambda rho: ov.lagged_vasso(optax.sgd(0.1), rho),
            lambda rho: ov.momentum_sam(optax.sgd(0.1), rho),
            lambda rho: ov.single_step_sam(optax.sgd(0.1), rho),
        )
    ]
    # Where None means that the ascent has a length of its own.
    + [make(ov.lagged, optax.sgd(0.1), ASCENT, rho=value) for value in (-0.1, NAN)],
    "rise": [make(ov.ascent.hold_rise, ASCENT, value) for value in (-0.1, NAN)],
    "share": [make(ov.train.split_batch, value) for value in (0, 1, NAN, None)],
    "lmbda": [
        *(make(ov.friendly_noise, 1.0, value) for value in (1, -0.1, NAN)),
        *(
            make(ov.sampa, optax.sgd(0.1), learning_rate=0.1, lmbda=value)
            for value in (1.1, -0.1, NAN)
        ),
    ],
    "learning_rate": [
        make(function, optax.sgd(0.1), learning_rate=value, **others)
        for value in (-0.1, NAN, float("inf"))
        for function, others in (
            (ov.sampa, {}),
            (ov.descent.decoupled_descent, {"gamma": 0.5}),
        )
    ],
    "momentum": [
        make(ov.momentum_sam, optax.sgd(0.1), momentum=value)
        for value in (-0.1, 1, NAN)
    ],
    "sigma": [make(ov.friendly_noise, value, 0.5) for value in (-1, NAN)],
    "eta": [
        make(function, 0.1, value)
        for value in (-0.1, NAN)
        for function in (ov.asam_perturb, ov.fisher_perturb)
    ],
    "alpha": [
        make(function, value)
        for value in (-0.1, NAN)
        for function in (ov.descent.gsam_descent, ov.descent.looksam_descent)
    ],
    "gamma": [
        *(make(ov.descent.weighted_descent, value) for value in (-0.1, 1, NAN)),
        *(
            make(
                ov.descent.decoupled_descent,
                optax.sgd(0.1),
                learning_rate=0.1,
                gamma=value,
            )
            for value in (-0.1, 1, NAN)
        ),
    ],
    "probability": [
        make(function, probability=value)
        for value in (0, -0.1, 1.5, NAN)
        for function in (gate.bernoulli, functools.partial(ov.evasso, optax.sgd(0.1)))
    ],
    "p": [make(ov.sam_perturb, 0.1, p=value) for value in (1, 0, -2, NAN)],
    "k": [make(gate.every, value) for value in (0, -1, 1.5, lambda step: step)],
    "n": [make(gate.from_step, value) for value in (-1, 0.5)],
    "gates": [gate.all_of, gate.any_of],
    "gate": [
        make(ov.sharpness_aware, optax.sgd(0.1), ASCENT, gate=value)
        for value in (gate.every, gate.always, 0.3, True)
    ]
    + [make(gate.all_of, gate.every), make(gate.any_of, [gate.every(2)])],
    "threshold": [make(gate.adaptive, value) for value in (NAN, None, "0")],
    "decay": [
        *(make(gate.adaptive, 0.0, value) for value in (-0.1, 1, NAN)),
        make(ov.metrics.running_mean, ov.metrics.cosine, 1),
    ],
    "every": [make(ov.metrics.track, every=value) for value in (0, 2.0)],
    "max_consecutive": [
        make(ov.wrappers.check_finite, (), value) for value in (-1, 2.0)
    ],
    "count": [make(ov.train.microbatched, value) for value in (0, 2.0, NAN)],
    "fraction": [make(ov.train.part_of_batch, value) for value in (0, 1.5, NAN, None)],
    "ascent_steps": [
        make(ov.sharpness_aware, optax.sgd(0.1), ASCENT, ascent_steps=value)
        for value in (0, -1, 2.0, NAN, float("inf"))
    ],
    "steps": [make(ov.ascent.until, value, 0.1) for value in (0, 1.5)],
    "groups": [
        make(ov.train.init_local_state, PARAMS, optax.sgd(0.1), value)
        for value in (0, 1.5, float("inf"))
    ],
}


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_an_unusable_hyperparameter_names_itself_and_its_range(name):
    for build in HYPERPARAMETERS[name]:
        with pytest.raises(
            ValueError, match=rf"^{name} (must be .*, got|is empty)"
        ) as error:
            build()
        assert str(error.value).endswith(".")
        assert "\n" not in str(error.value)


# Every range that has an end of its own, at that end.
ENDS = [
    make(ov.vasso_ema, 1),
    make(ov.vasso_ema, float(jnp.finfo(jnp.float32).tiny)),
    make(carried_ema, 1),
    make(ov.friendly_noise, 0, 0),
    make(ov.sam_perturb, 0, p=float("inf")),
    make(ov.asam_perturb, 0, 0),
    make(ov.fisher_perturb, 0, 0),
    make(ov.lagged, optax.sgd(0.1), ASCENT, rho=0),
    make(ov.sharpness_aware, optax.sgd(0.1), ASCENT, ascent_steps=1),
    make(ov.momentum_sam, optax.sgd(0.1), momentum=0),
    make(ov.sampa, optax.sgd(0.1), learning_rate=0, lmbda=0),
    make(ov.sampa, optax.sgd(0.1), learning_rate=0, lmbda=1),
    make(ov.descent.gsam_descent, 0),
    make(ov.descent.looksam_descent, 0),
    make(ov.descent.weighted_descent, 0),
    make(ov.descent.decoupled_descent, optax.sgd(0.1), learning_rate=0, gamma=0),
    make(gate.bernoulli, 1),
    make(gate.adaptive, 0, 0),
    make(gate.every, 1),
    make(gate.from_step, 0),
    make(ov.ascent.hold_rise, ASCENT, 0),
    make(ov.ascent.until, 1, 0),
    make(ov.metrics.running_mean, ov.metrics.cosine, 0),
    make(ov.metrics.track, every=1),
    make(ov.train.microbatched, 1),
    make(ov.train.part_of_batch, 1),
    make(ov.train.part_of_batch, 1e-6),
    make(ov.train.split_batch, 1e-6),
    make(ov.wrappers.check_finite, SKIPPED, 0),
]


def test_the_closed_ends_of_a_range_are_allowed():
    for build in ENDS:
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
        make(ov.wsam, optax.sgd(0.1), learning_rate=0.1, gamma=1),
        make(ov.ae_sam, optax.sgd(0.1), decay=1),
        make(ov.sam, 0.1, optax.sgd(0.1)),
    ],
)
def test_recipes_pass_the_error_on(build):
    with pytest.raises(ValueError, match="must be .*, got"):
        build()


def test_what_has_no_value_yet_is_taken_as_it_is():
    """A schedule and a traced number: a radius of −1 turns the perturbation round."""
    updates = {"w": jnp.asarray([3.0, 4.0])}

    def perturb(rho):
        ascent = ov.sam_perturb(rho)
        return ascent.update(updates, ascent.init(updates))[0]["w"]

    for result in (jax.jit(perturb)(-1.0), perturb(lambda step: -1.0)):
        np.testing.assert_allclose(result, [-0.6, -0.8], rtol=1e-6)
    for concrete in (-1.0, jnp.asarray(-1.0)):
        with pytest.raises(ValueError, match="^rho must be a finite number >= 0, got"):
            perturb(concrete)


TRANSFORMS = {
    "vasso_ema": ov.vasso_ema(0.4),
    "carried_ema": carried_ema(0.4),
    "friendly_noise": ov.friendly_noise(1.0, 0.6),
    "sam_perturb": ov.sam_perturb(0.1),
    "asam_perturb": ov.asam_perturb(0.1),
    "fisher_perturb": ov.fisher_perturb(0.1),
    "per_layer": ov.ascent.per_layer(ov.sam_perturb(0.1)),
    "gsam_descent": ov.descent.gsam_descent(0.1),
    "looksam_descent": ov.descent.looksam_descent(0.1),
    "sharpness_aware": ov.sam(optax.sgd(0.1)),
    "lagged": ov.lagged_vasso(optax.sgd(0.1)),
}
each_transform = pytest.mark.parametrize("name", TRANSFORMS)


@each_transform
@pytest.mark.parametrize("empty", [{}, [], (), {"a": {}}], ids=str)
def test_an_empty_tree(name, empty):
    with pytest.raises(ValueError, match="^params has no leaves"):
        TRANSFORMS[name].init(empty)


@pytest.mark.parametrize("name", [n for n in TRANSFORMS if "descent" not in n])
def test_integer_leaves(name):
    """A descent perturbs nothing, so that a frozen base may be of integers there."""
    tree = {"w": jnp.ones(2), "ids": [jnp.arange(3)]}
    with pytest.raises(ValueError, match=r"^params\['ids'\]\[0\] has dtype int32"):
        TRANSFORMS[name].init(tree)


@each_transform
def test_what_is_left_out_on_purpose_is_no_error(name):
    """None and masked nodes are no leaves: the state holds nothing for them."""

    def described(params):
        return [
            (leaf.shape, leaf.dtype)
            for leaf in jax.tree.leaves(TRANSFORMS[name].init(params))
        ]

    tree = {"w": jnp.ones(2), "frozen": None, "masked": optax.MaskedNode()}
    assert described(tree) == described({"w": jnp.ones(2)})
    for shape, _ in described({"masked": optax.MaskedNode()}):
        assert shape == ()  # counters alone


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


BASE_SGD = optax.sgd(0.1)
# Whose update reads a state of its own, by the name that an error has for them.
WITH_STATE = {
    "vasso_ema": ov.vasso_ema(0.4),
    "carried_ema": carried_ema(0.4),
    "friendly_noise": ov.friendly_noise(1.0, 0.6),
    "the perturbation": ov.sam_perturb(0.1),
    "hold_rise": ov.ascent.hold_rise(ASCENT),
    "gsam_descent": ov.descent.gsam_descent(0.1),
    "weighted_descent": ov.descent.weighted_descent(0.1),
    "looksam_descent": ov.descent.looksam_descent(0.1),
    "decoupled_descent": ov.descent.decoupled_descent(
        BASE_SGD, learning_rate=0.1, gamma=0.5
    ),
    "sharpness_aware": ov.sam(BASE_SGD),
    "lagged": ov.lagged_vasso(BASE_SGD),
    "sampa": ov.sampa(BASE_SGD, learning_rate=0.1),
    "track": ov.metrics.track(),
    "track_arrival": ov.metrics.track_arrival(ov.lagged_vasso(BASE_SGD)),
    "skip_nonfinite": ov.wrappers.skip_nonfinite(BASE_SGD),
    "average_over": ov.train.average_over(BASE_SGD, "data"),
    "balanced": ov.factors.balanced(
        BASE_SGD, learning_rate=0.1, alpha=0.1, names=("w", "b")
    ),
}
NEED_PARAMS = {
    "asam_perturb": ov.asam_perturb(0.1),
    "masked_ascent": ov.ascent.masked_ascent(ASCENT, True),
    "per_layer": ov.ascent.per_layer(ov.sam_perturb(0.1)),
    "clean_gradient": ov.clean_gradient(),
    "in_float32": ov.wrappers.in_float32(BASE_SGD),
    **{
        name: WITH_STATE[name]
        for name in (
            *("decoupled_descent", "sharpness_aware", "lagged", "sampa", "track"),
            *("track_arrival", "skip_nonfinite", "balanced"),
        )
    },
}
GIVEN = {
    "grad_fn": lambda params: params,
    "clean_grads": PARAMS,
    "ascended": True,
    "perturbation": PARAMS,
    "direction": PARAMS,
    "value": jnp.ones(()),
}


def given_to(transform):
    """Of the arguments those that it takes."""
    is_plain = not isinstance(transform, optax.GradientTransformationExtraArgs)
    return {} if is_plain else GIVEN


@pytest.mark.parametrize("name", WITH_STATE)
def test_the_state_of_something_else(name):
    transform = WITH_STATE[name]
    with pytest.raises(
        ValueError, match=rf"^state is a TraceState, but {name} needs the \w+State"
    ) as error:
        transform.update(
            PARAMS, optax.TraceState(PARAMS), PARAMS, **given_to(transform)
        )
    assert_one_sentence(error)


@pytest.mark.parametrize("name", NEED_PARAMS)
def test_missing_params(name):
    transform = NEED_PARAMS[name]
    with pytest.raises(
        ValueError, match=rf"^{name} needs params, got None: call update\(grads"
    ):
        transform.update(PARAMS, transform.init(PARAMS), **given_to(transform))


def test_sharpness_aware_without_a_grad_fn_says_which_of_the_two_is_wanted():
    optimizer = TRANSFORMS["sharpness_aware"]
    with pytest.raises(ValueError, match="needs grad_fn, got None.*or use lagged"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)


LARGE = {f"layer {i}": {"kernel": jnp.ones((9, 9))} for i in range(9)}
FOR_ANOTHER = {
    "an optimizer": lambda: ov.init_train_state(optax.sgd(0.1), LARGE),
    "a radius": lambda: ov.sam(optax.sgd(0.1), LARGE),
    "a period": lambda: gate.every(LARGE),
    "a seed": lambda: gate.bernoulli(0.5, LARGE),
    "a dtype": lambda: ov.vasso_ema(0.4, accumulator_dtype=LARGE),
    "a key": lambda: ov.init_train_state(LARGE, optax.sgd(0.1), key=LARGE),
    "a measure": lambda: ov.metrics.track(LARGE),
    "a loss scale": lambda: ov.wrappers.skip_nonfinite(BASE_SGD, loss_scale=LARGE),
    "a gradient": lambda: ov.make_train_step(
        lambda params, batch: 0.0, optax.sgd(0.1), gradient=LARGE
    ),
    "a mask": lambda: ov.sam(optax.sgd(0.1), mask=LARGE).init(LARGE),
}


@pytest.mark.parametrize("name", FOR_ANOTHER)
def test_parameters_for_something_else_are_not_written_out(name):
    with pytest.raises(ValueError, match="got an? (dict|array)") as error:
        FOR_ANOTHER[name]()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


WRONG_GRAD_FNS = {
    "a value": (jnp.ones(()), "got an array of shape ()"),
    "nothing": ({}, "got a dict of 0 arrays (nothing at"),
    "another tree": ({"w": jnp.ones(3)}, "nothing at ['b']"),
    "a vector and gradients": (
        (jnp.ones(2), PARAMS),
        "got (an array of shape (2,), a dict of 2 arrays)",
    ),
    "three things": ((1.0, PARAMS, 1.0), "a dict of 2 arrays, an array of shape ())"),
    "jax.value_and_grad with has_aux": (
        ((jnp.ones(()), {"acc": 1.0}), PARAMS),
        "got ((an array of shape (), a dict of 1 arrays), a dict of 2 arrays)",
    ),
    "jax.grad with has_aux": (
        (PARAMS, {"acc": 1.0}),
        "got (a dict of 2 arrays, a dict of 1 arrays)",
    ),
    "other shapes": (
        {"w": jnp.ones(4), "b": jnp.ones(2)},
        "got a dict of 2 arrays (other shapes)",
    ),
}


@pytest.mark.parametrize("name", WRONG_GRAD_FNS)
def test_a_grad_fn_that_returns_something_else(name):
    result, words = WRONG_GRAD_FNS[name]
    optimizer = TRANSFORMS["sharpness_aware"]
    with pytest.raises(ValueError, match="^grad_fn must return gradients") as error:
        optimizer.update(
            PARAMS, optimizer.init(PARAMS), PARAMS, grad_fn=lambda params: result
        )
    assert words in assert_one_sentence(error)


@pytest.mark.parametrize("name", ["gsam_descent", "looksam_descent"])
def test_a_descent_outside_sharpness_aware(name):
    transform = TRANSFORMS[name]
    with pytest.raises(
        ValueError, match="needs the extra argument clean_grads: put it"
    ):
        transform.update(PARAMS, transform.init(PARAMS), PARAMS)


def test_the_carried_average_outside_lagged():
    transform = TRANSFORMS["carried_ema"]
    with pytest.raises(TypeError, match="direction"):
        transform.update(PARAMS, transform.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "mask",
    [{"w": True}, {"w": True, "c": False}, [True, True], lambda params: [True]],
    ids=["too few", "another key", "another container", "a function"],
)
@pytest.mark.parametrize("where", ["rescaled", "mask"])
def test_a_mask_of_another_structure(where, mask):
    with pytest.raises(ValueError, match=f"^{where} has another tree struct") as error:
        ov.asam(optax.sgd(0.1), **{where: mask}).init(PARAMS)
    assert_one_sentence(error)


def noop(params):
    return jax.tree.map(jnp.zeros_like, params)


def update(optimizer, state, **extra_args):
    return optimizer.update(PARAMS, state, PARAMS, **extra_args)


def flax_state(optimizer):
    return train_state.TrainState.create(
        apply_fn=linen.Dense(1).apply, params=PARAMS, tx=optimizer
    )


def train(loss_fn, **options):
    """One step with a loss, traced only."""
    optimizer = ov.sam(optax.sgd(0.1))
    step = ov.make_train_step(loss_fn, optimizer, **options)
    return step.lower(ov.init_train_state(PARAMS, optimizer), jnp.ones(3))


def square(params, batch):
    return jnp.sum((params["w"] - batch) ** 2)


SGD, ADAM = optax.sgd(0.1, momentum=0.9), optax.adam(0.1)
SAM, LAGGED = ov.sam(SGD), ov.lagged_vasso(SGD)
SKIPPING = ov.wrappers.skip_nonfinite(SAM)

# What people do by mistake, and words of the sentence that they get.
MISTAKES = {
    "a recipe in a recipe": (
        lambda: ov.vasso(ov.vasso(SGD)).init(PARAMS),
        "optimizer contains a sharpness-aware optimizer already (SharpnessAware)",
    ),
    "a recipe for an ascent": (
        lambda: ov.lagged(SGD, SAM).init(PARAMS),
        "ascent contains a sharpness-aware optimizer already (SharpnessAware)",
    ),
    "lagged in a recipe": (
        lambda: ov.sam(optax.chain(optax.identity(), LAGGED)).init(PARAMS),
        "optimizer contains a sharpness-aware optimizer already (Lagged)",
    ),
    "a recipe in lagged": (
        lambda: ov.lagged_vasso(SAM).init(PARAMS),
        "optimizer contains a sharpness-aware optimizer already (SharpnessAware)",
    ),
    "Flax drops grad_fn": (
        lambda: flax_state(SAM).apply_gradients(grads=PARAMS),
        "needs grad_fn, got None: call update(grads, state, params, grad_fn=grad_fn)",
    ),
    "a rate for an optimizer": (
        lambda: ov.vasso(0.1),
        "optimizer must be an optax.GradientTransformation, got 0.1: make one, as in",
    ),
    "an optimizer not called": (
        lambda: ov.vasso(optax.sgd),
        "got the function sgd: call it, as in optax.sgd(0.1)",
    ),
    "a descent and no optimizer": (
        lambda: ov.gsam(None),
        "optimizer must be an optax.GradientTransformation",
    ),
    "an ascent not called": (
        lambda: ov.lagged(SGD, ov.sam_perturb),
        "ascent must be an optax.GradientTransformation, got the function sam_perturb",
    ),
    "radius and optimizer swapped": (
        lambda: ov.sam(0.1, SGD),
        "rho must be a finite number >= 0, got an optimizer: the optimizer is the",
    ),
    "a vector of radii": (
        lambda: ov.sam(SGD, jnp.ones(3)),
        "rho must be a finite number >= 0, got an array of shape (3,): pass one",
    ),
    "a mask of numbers": (
        lambda: ov.vasso(SGD, mask={"w": 1, "b": 0}).init(PARAMS),
        "mask['b'] must be True or False, got 0: pass a tree of booleans",
    ),
    "a mask of arrays": (
        lambda: ov.asam_perturb(0.1, rescaled={"w": PARAMS["w"] > 0}).init(PARAMS),
        "rescaled['w'] must be True or False, got",
    ),
    "a gradient of other shapes": (
        lambda: SAM.update(
            {"w": jnp.ones(4), "b": jnp.ones(2)}, SAM.init(PARAMS), PARAMS, grad_fn=noop
        ),
        "updates['w'] has shape (4,), but sharpness_aware was initialized with shape",
    ),
    "a gradient that is not the parameters'": (
        lambda: SAM.update({"w": jnp.ones(3)}, SAM.init(PARAMS), PARAMS, grad_fn=noop),
        "updates has another tree structure than the parameters sharpness_aware was",
    ),
    "state and gradient swapped": (
        lambda: SAM.update(SAM.init(PARAMS), PARAMS, PARAMS, grad_fn=noop),
        "state is a dict, but sharpness_aware needs the SharpnessAwareState",
    ),
    "state and parameters swapped": (
        lambda: ov.eval_params(PARAMS, LAGGED.init(PARAMS)),
        "params contains the state of an optimizer: pass the state first",
    ),
    "parameters of another loop": (
        lambda: ov.eval_params(LAGGED.init(PARAMS), {"w": jnp.ones(4)}),
        "params has another tree structure or other shapes than the parameters of",
    ),
    "a model with functions": (
        lambda: SAM.init({"w": jnp.ones(3), "activation": jnp.tanh}),
        "params['activation'] is a function: pass init the parameters alone",
    ),
    "another optimizer's state for sharpness_aware": (
        lambda: update(SAM, SGD.init(PARAMS), grad_fn=noop),
        "state is a tuple, but sharpness_aware needs the SharpnessAwareState",
    ),
    "another optimizer's state for lagged": (
        lambda: update(LAGGED, SAM.init(PARAMS)),
        "state is a SharpnessAwareState, but lagged needs the LaggedState",
    ),
    "another optimizer's state for skip_nonfinite": (
        lambda: update(SKIPPING, SAM.init(PARAMS), grad_fn=noop),
        "state is a SharpnessAwareState, but skip_nonfinite needs the SkipState",
    ),
    "another recipe's state": (
        lambda: update(SAM, ov.vasso(SGD).init(PARAMS), grad_fn=noop),
        "state is a tuple, but the perturbation needs the PerturbState",
    ),
    "another average's state": (
        lambda: update(ov.friendly_noise(1.0, 0.6), ov.vasso_ema(0.4).init(PARAMS)),
        "state is a VassoEmaState, but friendly_noise needs the FriendlyNoiseState",
    ),
    "another descent's state": (
        lambda: update(
            ov.descent.looksam_descent(0.3), ov.descent.gsam_descent(0.3).init(PARAMS)
        ),
        "state is a DescentState, but looksam_descent needs the LookSamState",
    ),
    "track outside": (
        lambda: update(ov.metrics.track(), ov.metrics.track().init(PARAMS)),
        "track needs the extra argument perturbation: put it inside a sharpness-aware",
    ),
    "track without a measure": (
        lambda: ov.metrics.track(0.1),
        "a measure must be a function of a Seen, or a Measure, got 0.1",
    ),
    "two measures of one name": (
        lambda: ov.metrics.track(ov.metrics.cosine, ov.metrics.cosine),
        "measures must have different names, got ['cosine', 'cosine']",
    ),
    "track_arrival around what is not lagged": (
        lambda: ov.metrics.track_arrival(SAM).init(PARAMS),
        "optimizer is not lagged, so there is no perturbation to arrive: wrap lagged",
    ),
    "in_float32 around lagged": (
        lambda: ov.wrappers.in_float32(LAGGED).init(PARAMS),
        "in_float32 cannot wrap a lagged optimizer, because its float32 copies are",
    ),
    "a number for a loss scale": (
        lambda: ov.wrappers.skip_nonfinite(SAM, loss_scale=1024.0),
        "loss_scale must have scale, unscale and adjust, got 1024.0: pass a loss scale",
    ),
    "nothing that skips": (
        lambda: ov.wrappers.check_finite(SAM.init(PARAMS)),
        "state has no state of skip_nonfinite in it, so no step is ever skipped: wrap",
    ),
    "check_finite inside jit": (
        lambda: jax.jit(ov.wrappers.check_finite)(SKIPPING.init(PARAMS)),
        "state is being traced and has no values yet: call check_finite outside of",
    ),
    "an adaptive gate without a gradient": (
        lambda: gate.adaptive().update(gate.adaptive().init()),
        "gate.adaptive needs the clean gradient: call update(state, grads=grads)",
    ),
    "loss and optimizer swapped": (
        lambda: ov.make_train_step(SGD, square),
        "arguments named model_state and key, got a GradientTransformationExtraArgs: "
        "pass the loss first, then the optimizer",
    ),
    "a rate for the step's optimizer": (
        lambda: ov.make_train_step(square, 0.1),
        "optimizer must be an optax.GradientTransformation, got 0.1: make one, as in",
    ),
    "a loss of the parameters alone": (
        lambda: train(lambda params: 0.0),
        "loss_fn must take (params, batch) and, if it needs them, arguments named "
        "model_state and key, but takes (params): bind other arguments",
    ),
    "a loss of two batches": (
        lambda: train(lambda params, x, y: 0.0),
        "but takes (params, x, y): bind other arguments with functools.partial",
    ),
    "a loss that needs a key": (
        lambda: train(lambda params, batch, key: 0.0),
        "loss_fn takes a key, but the state has none: pass key=jax.random.key(0)",
    ),
    "a loss with aux unannounced": (
        lambda: train(lambda params, batch: (square(params, batch), {})),
        "loss_fn must return the loss alone, got a tuple of 2: pass has_aux=True",
    ),
    "a loss without its aux": (
        lambda: train(square, has_aux=True),
        "loss_fn must return (loss, aux), since has_aux is True, got one array: return",
    ),
    "a loss without its model state": (
        lambda: train(lambda params, batch, model_state: square(params, batch)),
        "loss_fn must return (loss, new_model_state), since it takes model_state, got "
        "one array: return both",
    ),
    "a loss per example": (
        lambda: train(lambda params, batch: params["w"] - batch),
        "loss_fn must return the loss alone, with a scalar loss, got (3,): average",
    ),
    "an ascent gradient without an ascent": (
        lambda: ov.make_train_step(
            square, SGD, ascent_gradient=ov.train.whole_batch
        ).lower(ov.init_train_state(PARAMS, SGD), jnp.ones(3)),
        "ascent_gradient is given, but the optimizer takes no second gradient: leave",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name):
    make_it, words = MISTAKES[name]
    with pytest.raises(ValueError) as error:
        make_it()
    assert words in assert_one_sentence(error)


def test_eval_params_of_an_optimizer_that_is_not_lagged_are_the_parameters():
    for optimizer in (SGD, SAM):
        assert ov.eval_params(optimizer.init(PARAMS), PARAMS) is PARAMS
