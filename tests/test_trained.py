"""What the optimizer freezes is not perturbed, in whatever way it freezes it."""

import functools

import cases
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_vasso as ov
from optax_vasso.ascent import trained_by

RHO = 0.5
PARAMS = {"adapter": jnp.asarray([1.0, -2.0]), "frozen": jnp.ones((3, 2))}
LABELS = {"adapter": "train", "frozen": "freeze"}
FROZEN = {"adapter": False, "frozen": True}
TRAINED = {"adapter": True, "frozen": False}


def partition(base):
    return optax.partition({"train": base, "freeze": optax.set_to_zero()}, LABELS)


ADAM = optax.adam(0.1)
FREEZING = {
    "partition": partition(ADAM),
    "partition by a function": optax.partition(
        {"train": ADAM, "freeze": optax.set_to_zero()}, lambda params: LABELS
    ),
    "selective_transform": optax.transforms.selective_transform(
        ADAM, freeze_mask=FROZEN
    ),
    "freeze last": optax.chain(ADAM, optax.freeze(FROZEN)),
    "freeze first": optax.chain(optax.freeze(FROZEN), ADAM),
    "clipped before": optax.chain(optax.clip_by_global_norm(1.0), partition(ADAM)),
    "momentum": optax.chain(optax.freeze(FROZEN), optax.sgd(0.1, momentum=0.9)),
    "a partition in a partition": optax.partition(
        {"all": partition(ADAM)}, lambda params: "all"
    ),
}
MOVING = {
    "sgd": optax.sgd(0.1),
    "a learning rate of zero": optax.sgd(0.0),
    "decayed though frozen": optax.chain(optax.freeze(FROZEN), optax.adamw(0.1)),
    "a mask of the decay": optax.adamw(0.1, mask=TRAINED),
    "two optimizers": optax.partition(
        {"train": optax.adam(0.1), "freeze": optax.sgd(0.1)}, LABELS
    ),
    "nothing moves": optax.set_to_zero(),
    "everything is frozen": optax.freeze(True),
    "a loss is needed": optax.chain(partition(optax.identity()), optax.polyak_sgd()),
}
RECIPES = {
    "sam": ov.sam,
    "vasso": ov.vasso,
    "evasso": lambda base, rho, **kw: ov.evasso(base, rho, probability=1.0, **kw),
    "friendly_sam": ov.friendly_sam,
    "asam": ov.asam,
    "fisher_sam": ov.fisher_sam,
    "gsam": ov.gsam,
    "looksam": ov.looksam,
    "wsam": functools.partial(ov.wsam, learning_rate=0.1),
    "ae_sam": ov.ae_sam,
    "lagged_vasso": ov.lagged_vasso,
    "momentum_sam": ov.momentum_sam,
    "single_step_sam": ov.single_step_sam,
}


def loss(params):
    hidden = jnp.asarray(params["frozen"], jnp.float32) @ params["adapter"]
    return jnp.sum(jnp.sin(hidden) + hidden**2)


def run(optimizer, steps=2, params=PARAMS, grad_fn=None, apply=optax.apply_updates):
    """Parameters, state, and the points at which gradients were taken."""
    seen = []

    def observed(params):
        seen.append(params)
        return (grad_fn or jax.grad(loss))(params)

    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(
            observed(params), state, params, grad_fn=observed, value=jnp.ones(())
        )
        params = apply(params, updates)
    return params, state, [*seen, params]


@pytest.mark.parametrize("name", FREEZING)
def test_what_is_frozen_is_told(name):
    assert trained_by(FREEZING[name])(PARAMS) == TRAINED


@pytest.mark.parametrize("name", MOVING)
def test_what_moves_or_cannot_be_told_counts_as_trained(name):
    assert trained_by(MOVING[name])(PARAMS) == {"adapter": True, "frozen": True}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_perturbs_what_is_trained(name):
    """As if the mask had been given; the frozen weights are never anywhere else."""
    recipe = RECIPES[name]
    found, state, points = run(recipe(partition(optax.sgd(0.1)), RHO))
    masked, expected, _ = run(recipe(partition(optax.sgd(0.1)), RHO, mask=TRAINED))
    jax.tree.map(np.testing.assert_array_equal, found, masked)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for point in points:
        np.testing.assert_array_equal(point["frozen"], PARAMS["frozen"])


def test_sampa_is_that_of_the_trained_leaves_alone():
    """It takes no mask; of its two points neither moves what is frozen."""
    sampa = functools.partial(ov.sampa, rho=RHO, learning_rate=0.1)
    *_, points = run(sampa(partition(optax.sgd(0.1))), steps=3)
    *_, alone = run(
        sampa(optax.sgd(0.1)),
        steps=3,
        params=PARAMS["adapter"],
        grad_fn=jax.grad(lambda adapter: loss(PARAMS | {"adapter": adapter})),
    )
    for point, adapter in zip(points, alone, strict=True):
        np.testing.assert_array_equal(point["frozen"], PARAMS["frozen"])
        np.testing.assert_allclose(point["adapter"], adapter, rtol=1e-6)


@pytest.mark.parametrize("name", FREEZING)
def test_all_of_the_radius_goes_to_the_trained_leaves(name):
    optimizer = ov.lagged_vasso(FREEZING[name], RHO)
    params, state, _ = run(optimizer)
    clean = ov.eval_params(state, params)
    perturbation = params["adapter"] - clean["adapter"]
    assert jnp.linalg.norm(perturbation) == pytest.approx(RHO, rel=1e-5)


@pytest.mark.parametrize("name", ["vasso", "lagged_vasso"])
def test_frozen_leaves_are_perturbed_if_the_mask_says_so(name):
    *_, points = run(RECIPES[name](partition(ADAM), RHO, mask=True))
    assert max(jnp.max(abs(p["frozen"] - 1)) for p in points) > 0.01


def test_inside_jit_and_from_shapes_alone():
    mask = trained_by(partition(ADAM))
    assert mask(jax.eval_shape(lambda: PARAMS)) == TRAINED
    found = []
    jax.jit(lambda params: found.append(mask(params)))(PARAMS)
    assert found == [TRAINED]


QUANTIZED = {"adapter": jnp.asarray([1.0, -2.0]), "frozen": jnp.ones((3, 2), jnp.int8)}


def without_the_base(params):
    """The gradient as Equinox has it: none for what is no float."""
    adapter = jax.grad(lambda a: loss({**params, "adapter": a}))(params["adapter"])
    return {"adapter": adapter, "frozen": None}


def zero_for_the_base(params):
    """As a loop may have it that sums and applies updates by Optax."""
    zeros = jnp.zeros_like(params["frozen"])
    return {**without_the_base(params), "frozen": zeros}


@pytest.mark.parametrize(("name", "mask"), cases.in_turn(RECIPES, [None, TRAINED]))
def test_a_quantized_base_stays_where_it_is(name, mask):
    base = partition(optax.sgd(0.1))
    expected, _, _ = run(RECIPES[name](base, RHO, mask=mask))
    for grad_fn, apply in (
        (without_the_base, eqx.apply_updates),
        (zero_for_the_base, optax.apply_updates),
    ):
        optimizer = RECIPES[name](base, RHO, mask=mask)
        found, state, points = run(optimizer, 2, QUANTIZED, grad_fn, apply)
        for point in points:
            np.testing.assert_array_equal(point["frozen"], QUANTIZED["frozen"])
        assert found["frozen"].dtype == jnp.int8
        if name not in ("gsam", "looksam", "wsam", "ae_sam"):
            # Those compare whole gradients, to which the base belongs where it has one.
            np.testing.assert_allclose(found["adapter"], expected["adapter"], rtol=1e-5)
        clean = ov.eval_params(state, found)
        assert clean["frozen"].dtype == jnp.int8


@pytest.mark.parametrize("recipe", [ov.sam, ov.vasso, ov.lagged_vasso])
def test_an_integer_that_would_be_perturbed_is_refused(recipe):
    message = r"^params\['frozen'\] has dtype int8, which has no gradient: leave it out"
    for optimizer in (recipe(optax.sgd(0.1), RHO), recipe(partition(ADAM), mask=True)):
        with pytest.raises(ValueError, match=message):
            optimizer.init(QUANTIZED)
    with pytest.raises(ValueError, match=message):
        ov.lagged(optax.sgd(0.1), optax.scale(0.1)).init(QUANTIZED)
    # A foreign chain cannot be asked before it has perturbed.
    foreign = ov.sharpness_aware(optax.sgd(0.1), optax.scale(0.1))
    with pytest.raises(ValueError, match=message):
        run(foreign, 1, QUANTIZED, zero_for_the_base)
