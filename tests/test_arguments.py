"""Every argument of a kind, in every public function, found by the signatures."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_vasso as ov

PARAMS = {"w": jnp.ones(3), "b": jnp.ones(2)}
NAN = float("nan")
ASCENT = optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(0.1))
ROOMS = (
    *(ov, ov.ascent, ov.descent, ov.factors, ov.gate, ov.metrics, ov.train),
    ov.wrappers,
)
# A value for every argument that a public function cannot do without.
REQUIRED = {
    **dict.fromkeys(
        ("rho", "sigma", "lmbda", "theta", "alpha", "gamma", "probability"), 0.5
    ),
    "learning_rate": 0.1,
    "optimizer": optax.sgd(0.1),
    "ascent": ASCENT,
    "mask": True,
    "steps": 1,
    "params": PARAMS,
    "loss_fn": lambda params, batch: 0.0,
    "axis_name": "data",
    "groups": 2,
    "state": ov.init_train_state(PARAMS, optax.sgd(0.1)),
    "mesh": jax.make_mesh((1,), ("data",)),
}


def arguments_of_type(*kinds):
    """Every public function beside every argument of its own of such a type."""
    functions = {
        vars(room)[name]
        for room in ROOMS
        for name in getattr(room, "__all__", vars(room))
        if inspect.isfunction(vars(room)[name]) and name[0] != "_"
    }
    return [
        pytest.param(function, name, id=f"{function.__name__}-{name}")
        for function in sorted(functions, key=lambda f: (f.__module__, f.__name__))
        for name, parameter in inspect.signature(function).parameters.items()
        if str(parameter.annotation).split(" | ")[0] in kinds
    ]


def call_with(function, **given):
    """A call of a function with one argument of interest."""
    parameters = inspect.signature(function).parameters
    needed = {
        name: REQUIRED[name]
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    return function(**needed | given)


@pytest.mark.parametrize(("function", "name"), arguments_of_type("Hyperparameter"))
def test_every_hyperparameter_is_looked_at_where_it_is_given(function, name):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got nan"):
        call_with(function, **{name: NAN})


@pytest.mark.parametrize(
    ("function", "name"), arguments_of_type("optax.GradientTransformation")
)
def test_every_transformation_is_looked_at_where_it_is_given(function, name):
    with pytest.raises(
        ValueError, match=f"^{name} must be an optax.GradientTransformation, got the fu"
    ):
        call_with(function, **{name: optax.sgd})


SCHEDULED = {}
for function, name in (case.values for case in arguments_of_type("Hyperparameter")):
    SCHEDULED.setdefault(function, []).append(name)
del SCHEDULED[ov.ascent.until]  # which makes a schedule
GIVEN = {
    "grad_fn": lambda params: (jnp.ones(()), params),
    "clean_grads": PARAMS,
    "ascended": True,
    "direction": PARAMS,
    "value": jnp.ones(()),
}


def types(tree):
    return jax.tree.map(lambda leaf: str(jax.typeof(leaf)), tree)


@pytest.mark.parametrize("function", SCHEDULED, ids=lambda f: f.__name__)
def test_every_schedule_is_read_at_every_step_from_zero_on(function, strict):
    """And may return a number of fewer bits than it is computed with."""
    seen = {name: set() for name in SCHEDULED[function]}
    steps = []

    def schedule_of(name):
        def schedule(step):
            if not isinstance(step, jax.core.Tracer):  # as init looks at a chain
                seen[name].add((len(steps), int(step)))
            return jnp.asarray(0.5, jnp.bfloat16)

        return schedule

    names = {"names": tuple(PARAMS)} if function is ov.factors.balanced else {}
    made = call_with(function, **names, **{name: schedule_of(name) for name in seen})
    if isinstance(made, ov.gate.Gate):
        made = ov.sharpness_aware(optax.sgd(0.1), ov.sam_perturb(0.1), gate=made)
    if function is ov.ascent.hold_rise:  # told of the loss, it goes on
        made = ov.sharpness_aware(optax.sgd(0.1), made)
    accepted = inspect.signature(made.update).parameters
    given = GIVEN if "extra_args" in accepted else {}
    state = made.init(PARAMS)
    expected = types((PARAMS, state))
    for i in range(2):
        result = made.update(PARAMS, state, PARAMS, **given)
        assert types(result) == expected
        _, state = result
        steps.append(i)
    assert seen == {name: {(0, 0), (1, 1)} for name in seen}


RECIPES = [
    function
    for function in vars(ov).values()
    if inspect.isfunction(function)
    and [*inspect.signature(function).parameters][:1] == ["optimizer"]
]


@pytest.mark.parametrize("function", RECIPES, ids=lambda function: function.__name__)
def test_gradients_may_be_wider_than_the_parameters(function):
    """As some mixed-precision trainers have them: a state keeps its types."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    optimizer = call_with(function)

    def update(params):
        state = optimizer.init(params)
        return state, optimizer.update(PARAMS, state, params, **GIVEN)[1]

    before, after = jax.eval_shape(update, params)
    assert types(before) == types(after)
