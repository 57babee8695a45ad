"""A schedule is read at the number of steps so far, whatever it is a schedule of."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest
from test_bad_input import PARAMS, arguments_of_type, call_with

import optax_vasso as ov

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


@pytest.mark.parametrize("function", SCHEDULED, ids=lambda f: f.__name__)
def test_every_schedule_is_read_at_every_step_from_zero_on(function):
    seen = {name: set() for name in SCHEDULED[function]}
    steps = []

    def schedule_of(name):
        def schedule(step):
            if not isinstance(step, jax.core.Tracer):  # as init looks at a chain
                seen[name].add((len(steps), int(step)))
            return 0.5

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
    for i in range(2):
        _, state = made.update(PARAMS, state, PARAMS, **given)
        steps.append(i)
    assert seen == {name: {(0, 0), (1, 1)} for name in seen}
