"""A lagged model is evaluated wherever it is trained, and its radius goes where asked.

With a learning rate of zero the clean point never moves, whatever the perturbation
does: the state and the parameters of the loop must give the start back.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optax_vasso as ov
from optax_vasso.steps.one_gradient import perturbation_of

RHO = 0.5
PARAMS = {
    "adapter": jnp.asarray([1.0, -2.0, 0.5]),
    "frozen": jnp.asarray([[3.0, 1.0], [-1.0, 2.0]]),
}
MASK = {"adapter": True, "frozen": False}
LABELS = {"adapter": "a", "frozen": "b"}
RECIPES = {
    "sam": ov.sam,
    "vasso": ov.vasso,
    "evasso": lambda base, **kw: ov.evasso(base, probability=1.0, **kw),
    "friendly_sam": ov.friendly_sam,
    "asam": ov.asam,
    "fisher_sam": ov.fisher_sam,
    "gsam": ov.gsam,
    "looksam": lambda base, **kw: ov.looksam(base, k=1, **kw),
    "wsam": functools.partial(ov.wsam, learning_rate=0.1),
    "ae_sam": ov.ae_sam,
    "lagged_vasso": ov.lagged_vasso,
}


def lagged(rate=0.0, **kwargs):
    return ov.lagged_vasso(optax.sgd(rate), rho=RHO, **kwargs)


class ForeignState(NamedTuple):
    history: list[Any]


def foreign(optimizer):
    """A wrapper of somebody else, which holds the state in containers of its own."""

    def update(updates, state, params=None):
        (inner,) = state.history[0]["inner"]
        updates, inner = optimizer.update(updates, inner, params)
        return updates, ForeignState([{"inner": (inner,)}])

    return optax.GradientTransformation(
        lambda params: ForeignState([{"inner": (optimizer.init(params),)}]), update
    )


# What trains, and the length of the perturbation that each group of leaves has then.
WRAPPED = {
    "alone": (lagged(), {("adapter", "frozen"): RHO}),
    "chain": (
        optax.chain(optax.identity(), lagged()),
        {("adapter", "frozen"): RHO},
    ),
    "partition": (
        optax.partition({"a": lagged(), "b": optax.sgd(0.0)}, LABELS),
        {("adapter",): RHO, ("frozen",): 0},
    ),
    "two groups": (
        optax.partition(
            {"a": lagged(), "b": ov.lagged_vasso(optax.sgd(0.0), rho=0.1)}, LABELS
        ),
        {("adapter",): RHO, ("frozen",): 0.1},
    ),
    "masked": (
        optax.chain(
            optax.masked(lagged(), MASK),
            optax.masked(optax.set_to_zero(), {"adapter": False, "frozen": True}),
        ),
        {("adapter",): RHO, ("frozen",): 0},
    ),
    "selective_transform": (
        optax.transforms.selective_transform(
            lagged(), freeze_mask={"adapter": False, "frozen": True}
        ),
        {("adapter",): RHO, ("frozen",): 0},
    ),
    "flatten": (optax.flatten(lagged()), {("adapter", "frozen"): RHO}),
    "foreign": (foreign(lagged()), {("adapter", "frozen"): RHO}),
    "MultiSteps": (
        optax.MultiSteps(lagged(), 2),
        {("adapter", "frozen"): RHO},
    ),
    "skip_nonfinite": (
        ov.wrappers.skip_nonfinite(lagged()),
        {("adapter", "frozen"): RHO},
    ),
    "track_arrival": (ov.metrics.track_arrival(lagged()), {("adapter", "frozen"): RHO}),
    "inject_hyperparams": (
        optax.inject_hyperparams(lambda rate: lagged(rate))(rate=0.0),
        {("adapter", "frozen"): RHO},
    ),
    "masked ascent": (lagged(mask=MASK), {("adapter",): RHO, ("frozen",): 0}),
}


def loss(params):
    return sum(jnp.sum(jnp.sin(leaf) + leaf**2) for leaf in jax.tree.leaves(params))


def distance(a, b, names):
    return float(optax.tree.norm([a[name] - b[name] for name in names]))


@pytest.mark.parametrize("name", WRAPPED)
def test_the_clean_point_is_found_wherever_lagged_stands(name):
    optimizer, lengths = WRAPPED[name]

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return params, state, ov.eval_params(state, params)

    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(4):
        params, state, inside = step(params, state)
    outside = ov.eval_params(state, params)
    for names, length in lengths.items():
        assert distance(params, PARAMS, names) == pytest.approx(length, rel=1e-5)
        for clean in (inside, outside):
            # Each addition of ε rounds once: the entries are below 4.
            assert distance(clean, PARAMS, names) < 4 * 8 * 2.0**-23
    assert jax.tree.structure(outside) == jax.tree.structure(PARAMS)


def test_an_optimizer_that_is_not_lagged_is_evaluated_as_it_stands():
    state = optax.adam(0.1).init(PARAMS)
    assert ov.eval_params(state, PARAMS) is PARAMS


def test_parameters_of_another_model_are_refused():
    state = lagged().init(PARAMS)
    with pytest.raises(ValueError, match="params has another tree structure or other"):
        ov.eval_params(state, {"adapter": jnp.zeros(3)})
    with pytest.raises(ValueError, match="params has another tree structure or other"):
        ov.eval_params(state, jax.tree.map(lambda x: x[:1], PARAMS))


def test_the_train_state_of_flax():
    state = TrainState.create(apply_fn=nn.Dense(1).apply, params=PARAMS, tx=lagged())

    @jax.jit
    def step(state):
        state = state.apply_gradients(grads=jax.grad(loss)(state.params))
        return state, ov.eval_params(state.opt_state, state.params)

    for _ in range(3):
        state, inside = step(state)
    for clean in (inside, ov.eval_params(state.opt_state, state.params)):
        assert distance(clean, PARAMS, PARAMS) < 1e-5
    assert distance(state.params, PARAMS, PARAMS) == pytest.approx(RHO, rel=1e-5)


@pytest.mark.parametrize("kind", ["lagged", "partition", "flatten"])
def test_the_optimizer_of_nnx(kind):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    transform = {
        "lagged": lagged(),
        "partition": optax.partition(
            {"a": lagged(), "b": optax.sgd(0.0)},
            lambda params: jax.tree.map(lambda x: "a" if x.ndim > 1 else "b", params),
        ),
        "flatten": optax.flatten(lagged()),
    }[kind]
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    start = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum((m(jnp.ones((4, 3))) - 1) ** 2))(model)
        optimizer.update(model, grads)
        params = nnx.state(model, nnx.Param)
        return ov.eval_params(optimizer.opt_state, params)

    for _ in range(3):
        inside = step(model, optimizer)
    params = nnx.state(model, nnx.Param)
    outside = ov.eval_params(optimizer.opt_state, params)
    for clean in (inside, outside):
        assert jax.tree.structure(clean) == jax.tree.structure(start)
        assert optax.tree.norm(optax.tree.sub(clean, start)) < 1e-5
    moved = optax.tree.norm(optax.tree.sub(params, start))
    assert moved == pytest.approx(RHO, rel=1e-5)
    nnx.update(model, outside)  # the model to export
    kernel = model.kernel[...]
    np.testing.assert_allclose(kernel, start["kernel"][...], rtol=0, atol=1e-6)


def leaf_sizes(tree):
    return sorted(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", RECIPES)
def test_a_mask_gives_all_of_the_radius_to_the_chosen_leaves(name):
    """As if the recipe knew of no other leaves; nothing is kept for those."""
    recipe = RECIPES[name]

    def adapter(seen):
        return seen.perturbation["adapter"]

    def frozen(seen):
        other = seen.perturbation.get("frozen")
        return jnp.zeros(()) if other is None else jnp.sum(jnp.abs(other))

    def run(params, **kwargs):
        base = optax.chain(ov.metrics.track(adapter, frozen), optax.sgd(0.1))
        optimizer = recipe(base, rho=RHO, **kwargs)

        @jax.jit
        def step(params, state):
            updates, state = optimizer.update(
                jax.grad(loss)(params), state, params, grad_fn=jax.grad(loss)
            )
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        # A lagged optimizer perturbs by what the step before has left.
        for _ in range(2 if name == "lagged_vasso" else 1):
            params, state = step(params, state)
        metrics = optax.tree.get_all_with_path(state, "metrics")
        tracked = next(m for _, m in metrics if "adapter" in m)
        return tracked, state

    tracked, state = run(PARAMS, mask=MASK)
    expected, alone = run({"adapter": PARAMS["adapter"]})
    assert np.linalg.norm(expected["adapter"]) > 0.01
    np.testing.assert_allclose(tracked["adapter"], expected["adapter"], rtol=1e-5)
    assert float(tracked["frozen"]) == 0
    assert leaf_sizes(state.ascent_state) == leaf_sizes(alone.ascent_state)
    if name == "lagged_vasso":
        assert leaf_sizes(state.direction) == [3]


@pytest.mark.parametrize(
    ("harm", "arrived"),
    [
        (lambda updates: updates, 1.0),
        (lambda updates: jax.tree.map(jnp.zeros_like, updates), 0.0),
        (lambda updates: {**updates, "frozen": 0 * updates["frozen"]}, None),
        (lambda updates: optax.tree.scale(0.25, updates), 0.25),
        (lambda updates: jax.tree.map(lambda u: jnp.clip(u, -0.01, 0.01), updates), 0),
    ],
    ids=["none", "all frozen", "some frozen", "scaled", "clipped"],
)
def test_a_perturbation_that_does_not_arrive_is_reported(harm, arrived):
    optimizer = ov.metrics.track_arrival(lagged())
    state, params = optimizer.init(PARAMS), PARAMS
    assert float(state.report.metrics["arrived"]) == 1
    # The first step perturbs, the second finds what has become of it.
    update = jax.jit(optimizer.update)
    updates, state = update(jax.grad(loss)(params), state, params)
    expected = perturbation_of(state.optimizer_state)
    harmed = harm(updates)
    if arrived is None:
        squares = {k: float(jnp.sum(e**2)) for k, e in expected.items()}
        arrived = squares["adapter"] / sum(squares.values())
        assert 0.01 < arrived < 0.99
    if arrived == 0 and float(optax.tree.norm(harmed)) > 0:
        arrived = float(optax.tree.vdot(harmed, expected)) / RHO**2
        assert arrived < 0.2
    params = optax.apply_updates(params, harmed)
    _, state = update(jax.grad(loss)(params), state, params)
    assert float(state.report.metrics["arrived"]) == pytest.approx(arrived, abs=1e-5)


def test_parameters_that_were_overwritten_are_reported():
    """As by a checkpoint of parameters alone, or an average put into the model."""
    optimizer = ov.metrics.track_arrival(lagged())
    _, state = optimizer.update(jax.grad(loss)(PARAMS), optimizer.init(PARAMS), PARAMS)
    other = jax.tree.map(lambda x: 0.9 * x, PARAMS)
    _, state = optimizer.update(jax.grad(loss)(other), state, other)
    assert abs(float(state.report.metrics["arrived"]) - 1) > 0.1


def test_the_state_of_one_array_is_not_that_of_several():
    optimizer = ov.lagged_vasso(optax.sgd(0.1), rho=0.5)
    state = optimizer.init(jnp.ones(3))
    with pytest.raises(ValueError, match="^params has another tree structure or"):
        ov.eval_params(state, {"a": jnp.ones(3), "b": jnp.ones(2)})
