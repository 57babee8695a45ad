"""What holds for every method: one list of recipes, one of wrappers, one of ascents.

A new method is one line in one of the lists.
"""

import contextlib
import functools
import math

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import optax_vasso as ov
from optax_vasso._internal.checks import is_left_out
from optax_vasso._internal.mapped import vary


def _not_of_one_entry(params):
    """A mask for any of the problems here."""
    return jax.tree.map(lambda leaf: np.size(leaf) > 1, params)


def _vasso_and(perturb, *descent, **options):
    """VaSSO's average before any perturbation, any descent after it."""

    def recipe(optimizer, rho=0.1, theta=0.4):
        return ov.sharpness_aware(
            optax.chain(*descent, optimizer),
            optax.chain(ov.vasso_ema(theta), perturb(rho)),
            **options,
        )

    return recipe


def _with_a_loss(optimizer, loss=0.5):
    """An optimizer that needs both losses, in a loop that does not pass them."""

    def update(updates, state, params=None, **extra_args):
        grad_fn = extra_args.get("grad_fn")
        if grad_fn is not None:
            extra_args["grad_fn"] = lambda x: _with_value(grad_fn(x), updates, loss)
        return optimizer.update(
            updates, state, params, **{"value": jnp.asarray(loss), **extra_args}
        )

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _with_value(result, like, loss):
    """What a ``grad_fn`` returns, with a loss if there is none."""
    alone = jax.tree.structure(result) == jax.tree.structure(like)
    return (jnp.asarray(loss), result) if alone else result


# Each maps an optimizer and a radius to a transformation.
RECIPES = {
    "sam": ov.sam,
    "vasso": ov.vasso,
    "evasso": ov.evasso,
    "friendly_sam": ov.friendly_sam,
    "asam": ov.asam,
    "fisher_sam": ov.fisher_sam,
    "gsam": ov.gsam,
    # Of the plane's two directions one is stored: with more of it, 0.7 as by default,
    # Rosenbrock's valley is left at every turn.
    "looksam": functools.partial(ov.looksam, alpha=0.3),
    "wsam": functools.partial(ov.wsam, learning_rate=1e-3),
    "ae_sam": ov.ae_sam,
    "lagged_vasso": ov.lagged_vasso,
    # Its radius is not the one asked for: none at the start, then 0.05.
    "held_rise": lambda optimizer, rho=0.1: _with_a_loss(
        ov.sharpness_aware(optimizer, ov.ascent.hold_rise(ov.sam_perturb(1.0)))
    ),
    "single_step_sam": ov.single_step_sam,
    "momentum_sam": functools.partial(ov.momentum_sam, rho=0.1),
    "sampa": lambda optimizer, rho=0.1: ov.sampa(optimizer, rho, learning_rate=1e-3),
    "async_vasso": lambda optimizer, rho=0.1: ov.lagged(
        optimizer,
        optax.chain(ov.clean_gradient(), ov.vasso_ema(0.4), ov.sam_perturb(rho)),
    ),
    "vasso_asam": _vasso_and(ov.asam_perturb),
    "vasso_fisher": _vasso_and(ov.fisher_perturb),
    "vasso_gsam": _vasso_and(ov.sam_perturb, ov.descent.gsam_descent(0.3)),
    "vasso_looksam": _vasso_and(
        ov.sam_perturb, ov.descent.looksam_descent(0.3), gate=ov.gate.every(5)
    ),
    "vasso_two_ascents": _vasso_and(ov.sam_perturb, ascent_steps=2),
    "vasso_weighted": _vasso_and(ov.sam_perturb, ov.descent.weighted_descent(0.7)),
    "lagged_buffered": lambda optimizer, rho=0.1, theta=0.4: ov.lagged(
        optimizer, optax.chain(ov.vasso_ema(theta), ov.asam_perturb(rho))
    ),
}

MEASURES = (
    ov.metrics.perturbation_norm,
    ov.metrics.cosine,
    ov.metrics.grad_norm,
    ov.metrics.arrival,
    ov.metrics.stability,
    ov.metrics.running_mean(ov.metrics.cosine),
)

# The same, of VaSSO and its lagged twin inside or around what changes no number of
# theirs; beside each the recipe whose trajectory it has.
WRAPPERS = {
    "skip_nonfinite": (
        lambda optimizer, rho=0.1: ov.wrappers.skip_nonfinite(ov.vasso(optimizer, rho)),
        "vasso",
    ),
    "skip_nonfinite_lagged": (
        lambda optimizer, rho=0.1: ov.wrappers.skip_nonfinite(
            ov.lagged_vasso(optimizer, rho)
        ),
        "lagged_vasso",
    ),
    "in_float32": (
        lambda optimizer, rho=0.1: ov.wrappers.in_float32(ov.vasso(optimizer, rho)),
        "vasso",
    ),
    "in_float32_lagged": (
        lambda optimizer, rho=0.1: ov.lagged_vasso(
            ov.wrappers.in_float32(optimizer), rho
        ),
        "lagged_vasso",
    ),
    "track": (
        lambda optimizer, rho=0.1: ov.vasso(
            optax.chain(ov.metrics.track(*MEASURES), optimizer), rho
        ),
        "vasso",
    ),
    "track_lagged": (
        lambda optimizer, rho=0.1: ov.metrics.track_arrival(
            ov.lagged_vasso(optax.chain(ov.metrics.track(*MEASURES), optimizer), rho)
        ),
        "lagged_vasso",
    ),
    "masked": (
        lambda optimizer, rho=0.1: ov.vasso(optimizer, rho, mask=_not_of_one_entry),
        None,
    ),
    "masked_lagged": (
        lambda optimizer, rho=0.1: ov.lagged_vasso(
            optimizer, rho, mask=_not_of_one_entry
        ),
        None,
    ),
    "per_layer": (
        lambda optimizer, rho=0.1: ov.sharpness_aware(
            optimizer, ASCENTS["per_layer"](rho)
        ),
        None,
    ),
    "per_layer_lagged": (
        lambda optimizer, rho=0.1: ov.lagged(optimizer, ASCENTS["per_layer"](rho)),
        None,
    ),
}
EVERY = RECIPES | {name: make for name, (make, _) in WRAPPERS.items()}

# Each maps a radius to a chain whose output is added to the parameters.
ASCENTS = {
    "sam": ov.sam_perturb,
    "sam_p3": functools.partial(ov.sam_perturb, p=3),
    "sam_inf": functools.partial(ov.sam_perturb, p=math.inf),
    "asam": ov.asam_perturb,
    "fisher": ov.fisher_perturb,
    "vasso": lambda rho: optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(rho)),
    "friendly": lambda rho: optax.chain(
        ov.friendly_noise(1.0, 0.6), ov.sam_perturb(rho)
    ),
    "per_layer": lambda rho: ov.ascent.per_layer(
        optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(rho))
    ),
    "masked": lambda rho: ov.ascent.masked_ascent(
        optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(rho)), _not_of_one_entry
    ),
}

# Of parts that stand in other recipes too, each by itself: tests that take several
# programs per recipe leave them to --all.
COMPOSED = {
    *("vasso_asam", "vasso_fisher", "vasso_gsam", "vasso_looksam", "vasso_weighted"),
    *("auto_lagged_buffered", "skip_nonfinite_lagged", "in_float32_lagged"),
    *("track_lagged", "masked_lagged", "per_layer_lagged", "single_step_sam"),
}

recipes = pytest.mark.parametrize("name", EVERY)
most_recipes = pytest.mark.parametrize(
    "name", cases.every(EVERY, EVERY.keys() - COMPOSED)
)
ascents = pytest.mark.parametrize("name", ASCENTS)
# Types do not depend on the range of a float of 16 bits.
DTYPES = ("bfloat16", "float32", "float64")
NIGHTLY_DTYPES = ("float16",)
NOTHING = (None, optax.MaskedNode())


def with_dtypes(names):
    """Each name with one dtype, in turn; with all of them by --all."""
    rest = [cases.exhaustive(name, dtype) for name in names for dtype in NIGHTLY_DTYPES]
    return pytest.mark.parametrize(
        ("name", "dtype"), cases.in_turn(names, DTYPES) + rest
    )


def with_nothing(names):
    """Each name with one thing that is not there, in turn; by --all with both."""
    return pytest.mark.parametrize(("name", "nothing"), cases.in_turn(names, NOTHING))


# Compilers fuse and reorder: a few roundings of float64, amplified by differences of
# gradients in the descent. A wrong formula is off by far more.
RTOL = 1e-9

MATRIX = np.linspace(-1.0, 1.0, 6).reshape(2, 3)
VECTOR = np.array([0.5, -2.0, 1.0])


def start(dtype=float):
    return {
        "kernel": jnp.asarray(MATRIX, dtype),
        "bias": [jnp.asarray(VECTOR, dtype), jnp.full((1,), 0.25, dtype)],
    }


def loss(params):
    """A bowl of different curvatures, centered off the origin."""
    kernel, (bias, shift) = params["kernel"], params["bias"]
    return (
        jnp.sum((kernel - 0.5) ** 2)
        + jnp.sum(jnp.cosh(bias))
        + jnp.sum(bias) * jnp.sum(shift)
        + 3 * jnp.sum(shift**2)
    )


def make(name):
    return EVERY[name](optax.sgd(0.05, momentum=0.9))


def make_step(optimizer, loss=loss, **extra):
    grad_fn = jax.grad(loss)

    def step(params, state):
        updates, state = optimizer.update(
            grad_fn(params), state, params, grad_fn=grad_fn, **extra
        )
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def compiled(name):
    """The recipe and its compiled step, shared by the tests."""
    optimizer = make(name)
    return optimizer, jax.jit(make_step(optimizer))


def iterate(step, params, state, count=3):
    for _ in range(count):
        params, state = step(params, state)
    return params, state


def program(step, carry):
    """What the step computes, for comparisons without compiling it."""
    return str(jax.make_jaxpr(step)(*carry))


def context(dtype):
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def assert_step_keeps_types(optimizer, params, loss=loss):
    """Structure, shapes, dtypes, weakness and shardings: what a scan has to keep."""
    assert_keeps_types(make_step(optimizer, loss), params, optimizer.init(params))


def assert_keeps_types(step, *carry):
    """Tracing is enough, since the type of a result does not depend on the numbers."""
    traced, after = jax.make_jaxpr(step, return_shape=True)(*carry)
    assert jax.tree.structure(after) == jax.tree.structure(carry)
    results = traced.out_avals
    expected = [jax.typeof(leaf) for leaf in jax.tree.leaves(carry)]
    # As strings, since constants are on no mesh, which agrees with every mesh.
    assert [str(aval) for aval in results] == [str(aval) for aval in expected]
    assert [aval.weak_type for aval in results] == [aval.weak_type for aval in expected]


@with_dtypes(EVERY)
def test_a_step_changes_no_type(name, dtype, strict):
    with context(dtype):
        params = start(dtype)
        assert_step_keeps_types(make(name), params)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}


@recipes
def test_parameters_of_mixed_dtypes_keep_them(name, strict):
    def mixed(params):
        return loss(params | {"kernel": params["kernel"].astype(jnp.float32)})

    params = start() | {"kernel": jnp.asarray(MATRIX, jnp.bfloat16)}
    assert_step_keeps_types(make(name), params, mixed)


@recipes
def test_parameters_may_be_numbers_of_python(name):
    """As in Optax; the types alone are looked at, for which nothing is compiled."""
    params = {"scale": 2.0, "shift": -1.0, "vector": jnp.ones(2)}

    def after():
        optimizer = make(name)
        return make_step(optimizer, optax.tree.sum)(params, optimizer.init(params))

    found, _ = jax.eval_shape(after)
    expected = jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == expected


@recipes
def test_a_step_changes_no_sharding(name, strict):
    """With explicit axes the sharding is part of the type, as the shape is."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = start()
        params["kernel"] = jax.device_put(params["kernel"], PartitionSpec("x", None))
        assert str(jax.typeof(params["kernel"])) == "float32[2@x,3]"
        assert_step_keeps_types(make(name), params)


@pytest.mark.parametrize(
    ("name", "case"),
    cases.in_turn(EVERY, ["invariant", "varying", "varying with its state"]),
)
def test_a_step_changes_no_type_on_a_mapped_axis(name, case):
    """Over which devices it varies is part of the type, as JAX checks by default."""
    optimizer = make(name)
    is_shared = case == "invariant"

    def on_device(params, pull):
        def local_loss(params):
            local = loss(params) + jnp.sum(pull * params["bias"][0])
            return jax.lax.pmean(local, "data") if is_shared else local

        def step(params, state):
            value_and_grad = jax.value_and_grad(local_loss)
            value, grads = value_and_grad(params)
            updates, state = optimizer.update(
                grads, state, params, grad_fn=value_and_grad, value=value
            )
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        if case == "varying with its state":
            state = vary(state, frozenset({"data"}))
        assert_keeps_types(step, params, state)
        return step(params, state)[0]

    spec = PartitionSpec() if is_shared else PartitionSpec("data")
    mapped = jax.shard_map(
        on_device,
        mesh=jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(spec, PartitionSpec("data")),
        out_specs=spec,
    )
    jax.eval_shape(mapped, start(), jnp.ones(3))


@recipes
def test_a_new_state_holds_no_buffer_twice(name):
    """A loop that donates its state would fail at the first step."""
    state = jax.tree.leaves((start(), make(name).init(start())))
    assert len({leaf.unsafe_buffer_pointer() for leaf in state}) == len(state)


@most_recipes
def test_compiled_once_and_equal_to_no_jit(name, x64):
    optimizer, step = compiled(name)
    before = iterate(step, start(), optimizer.init(start()), 2)
    after = step(*before)
    assert step._cache_size() == 1
    chex.assert_trees_all_close(after, make_step(optimizer)(*before), rtol=RTOL)


@most_recipes
def test_a_parameter_without_an_update_stays_where_it_is(name, x64):
    """As in Optax, None is the update of a parameter that nobody trains."""
    optimizer, step = compiled(name)

    def grad_fn(params):
        return jax.grad(loss)(params) | {"frozen": None}

    # Without jit: a program for each recipe costs more than operations that they share,
    # also with the test before.
    params = start() | {"frozen": jnp.ones_like(VECTOR)}
    updates, _ = optimizer.update(
        grad_fn(params), optimizer.init(params), params, grad_fn=grad_fn
    )
    assert updates.pop("frozen") is None
    expected, _ = step(start(), optimizer.init(start()))
    chex.assert_trees_all_close(
        optax.apply_updates(start(), updates), expected, rtol=RTOL
    )


@most_recipes
def test_unknown_extra_arguments_are_passed_on_and_change_nothing(name):
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(extra.get("temperature"))
        return jax.tree.map(lambda g: -0.05 * g, updates), state

    spy = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    optimizer = EVERY[name](spy)
    carry = start(), optimizer.init(start())
    assert program(make_step(optimizer), carry) == program(
        make_step(optimizer, temperature=300), carry
    )
    assert seen == [None, 300]


@pytest.mark.parametrize(
    "transform",
    [
        ov.descent.gsam_descent(0.3),
        ov.descent.looksam_descent(0.3),
        ov.descent.weighted_descent(0.7),
        ov.metrics.track(*MEASURES),
    ],
    ids=["gsam", "looksam", "weighted", "track"],
)
def test_what_stands_in_a_base_optimizer_ignores_what_it_does_not_need(transform):
    def traced(**extra_args):
        def update(perturbed, clean, ascended, state):
            return transform.update(
                perturbed,
                state,
                clean,
                clean_grads=clean,
                perturbation=perturbed,
                ascended=ascended,
                **extra_args,
            )

        return program(update, (start(), start(), True, transform.init(start())))

    assert traced(temperature=300, grad_fn=None) == traced()


@most_recipes
def test_injected_hyperparameters_change_nothing(name, x64):
    optimizer, step = compiled(name)
    injected = optax.inject_hyperparams(EVERY[name])(optax.sgd(0.05, momentum=0.9))
    params = start()
    expected, state = iterate(step, params, optimizer.init(params))
    actual, injected_state = iterate(
        jax.jit(make_step(injected)), params, injected.init(params)
    )
    chex.assert_trees_all_close(
        (actual, injected_state.inner_state), (expected, state), rtol=RTOL
    )
    assert "rho" in injected_state.hyperparams


@most_recipes
def test_accumulated_gradients_are_the_gradient_of_the_whole_batch(name, x64):
    """Two minibatches to a step and grad_fn of both: the step of their mean."""
    optimizer, step = compiled(name)
    accumulating = optax.MultiSteps(optimizer, 2, accumulator_dtype=jnp.float64)

    def tilted(params, tilt):
        return loss(params) + tilt * jnp.sum(params["bias"][0] ** 2)

    @jax.jit
    def mini_step(params, state, tilt):
        updates, state = accumulating.update(
            jax.grad(tilted)(params, tilt),
            state,
            params,
            grad_fn=jax.grad(loss),
        )
        return optax.apply_updates(params, updates), state

    expected = iterate(step, start(), optimizer.init(start()))
    params, state = start(), accumulating.init(start())
    for _ in range(3):
        halfway, state = mini_step(params, state, 1.0)
        chex.assert_trees_all_equal(halfway, params)
        params, state = mini_step(halfway, state, -1.0)
    chex.assert_trees_all_close((params, state.inner_opt_state), expected, rtol=RTOL)


def _assert_map_params_finds_the_buffers(transformation):
    """Leaves shaped like a parameter are found with it, scalars and keys are not."""
    params = start()
    state = transformation.init(params)
    shaped = {leaf.shape for leaf in jax.tree.leaves(params)}
    verdicts = optax.tree.map_params(
        transformation,
        lambda leaf, param: is_left_out(leaf) or leaf.shape == param.shape,
        state,
        params,
        is_leaf=is_left_out,
        transform_non_params=lambda tree: jax.tree.map(
            lambda leaf: leaf.shape not in shaped, tree
        ),
    )
    assert len(jax.tree.leaves(verdicts)) >= len(jax.tree.leaves(state))
    assert all(jax.tree.leaves(verdicts))


@recipes
def test_map_params_finds_the_buffers(name):
    _assert_map_params_finds_the_buffers(make(name))


@ascents
def test_map_params_finds_the_buffers_of_ascents(name):
    _assert_map_params_finds_the_buffers(ASCENTS[name](0.1))


@pytest.mark.parametrize("name", [n for n, (_, same) in WRAPPERS.items() if same])
def test_a_wrapper_changes_no_number(name, x64):
    """In float64 even in_float32 has nothing to do."""
    (wrapped, step), (plain, plain_step) = compiled(name), compiled(WRAPPERS[name][1])
    actual, _ = iterate(step, start(), wrapped.init(start()))
    expected, _ = iterate(plain_step, start(), plain.init(start()))
    chex.assert_trees_all_close(actual, expected, rtol=RTOL)


# Of the wrappers those alone that have a trajectory of their own.
@pytest.mark.parametrize(
    "name", [*RECIPES, *(n for n, (_, same) in WRAPPERS.items() if same is None)]
)
def test_converges_as_the_radius_decays(name):
    """With a constant radius the iterates stay a distance of that order away."""
    count = 20_000
    radius = optax.exponential_decay(0.1, count // 100, 0.9)

    @jax.jit
    def train(rate, stiffness, bend):
        optimizer = EVERY[name](optax.sgd(rate), rho=radius)

        def valley(params):
            x, y = params
            return (1 - x) ** 2 + stiffness * (y - bend * x**2) ** 2

        step = make_step(optimizer, valley)
        params = jnp.array([-1.0, 0.5])
        carry = params, optimizer.init(params)
        carry, _ = jax.lax.scan(lambda c, _: (step(*c), None), carry, length=count)
        return ov.eval_params(carry[1], carry[0])

    parabola, rosenbrock = train(0.02, 1.0, 0.0), train(1e-3, 100.0, 1.0)
    # The tolerance of Optax's own list: the curvature along the valley is only 0.4.
    np.testing.assert_allclose(parabola, [1.0, 0.0], atol=3e-2)
    np.testing.assert_allclose(rosenbrock, [1.0, 1.0], atol=3e-2)


@most_recipes
def test_a_rotated_complex_landscape_has_the_rotated_trajectory(name, x64):
    optimizer = make(name)
    weights = jnp.array([1.0, 2.0, 0.5])

    @jax.jit
    def step(params, state, phase):
        def bowl(params):
            z, c = (leaf * phase.conj() for leaf in (params["z"], params["c"]))
            return (
                jnp.sum(weights * jnp.abs(z - (0.3 + 0.2j)) ** 2)
                + jnp.abs(c[0]) ** 2 * jnp.abs(z[0]) ** 2
            )

        def grad_fn(params):
            # JAX's gradient of a complex parameter is conjugated; Optax wants ascent.
            return jax.tree.map(jnp.conj, jax.grad(bowl)(params))

        updates, state = optimizer.update(
            grad_fn(params), state, params, grad_fn=grad_fn
        )
        return optax.apply_updates(params, updates), state

    def train(phase):
        origin = {"z": jnp.array([1 + 0.5j, -2j, 0.3 - 1j]), "c": jnp.array([0.7j])}
        params = jax.tree.map(lambda leaf: phase * leaf, origin)
        state = optimizer.init(params)
        for _ in range(3):
            params, state = step(params, state, phase)
        return params

    phase = jnp.exp(0.7j)
    upright = train(jnp.ones_like(phase))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(upright)} == {"complex128"}
    chex.assert_trees_all_close(
        train(phase), jax.tree.map(lambda leaf: phase * leaf, upright), rtol=RTOL
    )


@with_nothing(EVERY)
def test_what_is_not_there_changes_nothing(name, nothing):
    """None and masked nodes have no leaves: the program is the same without them."""
    step = make_step(make(name))
    params = start()
    padded = params | {"frozen": nothing}
    assert program(step, (params, make(name).init(params))) == program(
        step, (padded, make(name).init(padded))
    )


@most_recipes
def test_an_empty_group_of_a_partition_changes_nothing(name):
    """In the base optimizer: the program is the same."""
    base = optax.sgd(0.05, momentum=0.9)
    groups = {"all": base, "nobody": optax.sgd(0.1, momentum=0.5)}
    partition = optax.partition(groups, lambda p: jax.tree.map(lambda _: "all", p))
    partitioned = EVERY[name](partition)
    assert program(
        make_step(make(name)), (start(), make(name).init(start()))
    ) == program(make_step(partitioned), (start(), partitioned.init(start())))


@most_recipes
def test_the_derivative_of_a_step_at_a_zero_gradient_is_finite(name):
    """As meta-learning and unrolled training take it, from a stationary point."""
    optimizer = make(name)

    def bowl(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    def after(params):
        params, _ = make_step(optimizer, bowl)(params, optimizer.init(params))
        return bowl(jax.tree.map(lambda leaf: leaf - 1, params))

    stationary = optax.tree.zeros_like(start())
    slopes = jax.tree.leaves(jax.jit(jax.grad(after))(stationary))
    assert all(np.isfinite(slope).all() for slope in slopes)
    assert any(slope.any() for slope in slopes)


@with_dtypes(ASCENTS)
def test_an_ascent_changes_no_type(name, dtype, strict):
    with context(dtype):
        params = start(dtype)
        ascent = ASCENTS[name](0.1)
        state = ascent.init(params)
        perturbation, new_state = jax.eval_shape(ascent.update, params, state, params)
        assert shapes(new_state) == shapes(state)
        for e, x in zip(updates_of(perturbation), updates_of(params), strict=True):
            assert e is None or shapes(e) == shapes(x)


def shapes(tree):
    return [(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(tree)]


def updates_of(tree):
    return jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)


def ascent_program(ascent, params=None, grads=None, **extra_args):
    """What an ascent computes, for comparisons without compiling it."""
    params = start() if params is None else params
    grads = params if grads is None else grads
    update = functools.partial(ascent.update, **extra_args)
    return str(jax.make_jaxpr(update)(grads, ascent.init(params), params))


@ascents
def test_an_ascent_of_an_empty_group_perturbs_nothing(name):
    """With a label that no parameter has, only its counters go on."""
    chain = ASCENTS[name](0.1)
    partition = optax.partition(
        {"all": chain, "nobody": ASCENTS[name](0.2)},
        lambda p: jax.tree.map(lambda _: "all", p),
    )
    params = start()
    grads = jax.grad(loss)(params)
    expected, _ = compiled_ascent(name)(grads, chain.init(params), params)
    actual, state = jax.jit(partition.update)(grads, partition.init(params), params)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)
    assert all(
        leaf.shape == () for leaf in jax.tree.leaves(state.inner_states["nobody"])
    )


@functools.cache
def compiled_ascent(name):
    return jax.jit(ASCENTS[name](0.1).update)


@ascents
def test_the_derivative_of_an_ascent_at_zero_is_finite(name):
    params = start()
    ascent = ASCENTS[name](0.1)

    def total(grads):
        perturbation, _ = ascent.update(grads, ascent.init(params), params)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(perturbation))

    slopes = jax.jit(jax.grad(total))(optax.tree.zeros_like(params))
    assert all(np.isfinite(slope).all() for slope in jax.tree.leaves(slopes))


def chosen_of(tree, perturbation):
    """The leaves that a mask has chosen; None is the perturbation of the others."""
    return jax.tree.map(
        lambda e, leaf: None if e is None else leaf,
        perturbation,
        tree,
        is_leaf=lambda e: e is None,
    )


@ascents
def test_an_ascent_is_linear_in_its_radius_and_climbs(name):
    params = start()
    grads = jax.grad(loss)(params)
    small, large = (
        jax.jit(ASCENTS[name](rho).update)(
            grads, ASCENTS[name](rho).init(params), params
        )
        for rho in (0.25, 0.5)
    )
    # Twice is exact in floating point; both programs are the same but for rho.
    chex.assert_trees_all_close(
        jax.tree.map(lambda e: 2 * e, small[0]), large[0], rtol=1e-6
    )
    slopes = jax.tree.map(jnp.vdot, small[0], chosen_of(grads, small[0]))
    assert sum(jax.tree.leaves(slopes)) > 0


# But for Fisher's, whose information has the gradient's own scale.
@pytest.mark.parametrize("name", [name for name in ASCENTS if name != "fisher"])
def test_an_ascent_is_blind_to_the_length_of_a_gradient(name):
    params = start()
    ascent = ASCENTS[name](0.1)
    grads = jax.grad(loss)(params)
    update = compiled_ascent(name)
    plain, _ = update(grads, ascent.init(params), params)
    scaled, _ = update(
        jax.tree.map(lambda g: 1024 * g, grads), ascent.init(params), params
    )
    # The accuracy of a float32 power, where p is not 2.
    chex.assert_trees_all_close(plain, scaled, rtol=1e-5)


@ascents
def test_a_zero_gradient_gives_a_zero_perturbation(name):
    params = start()
    zero = optax.tree.zeros_like(params)
    ascent = ASCENTS[name](0.1)
    perturbation, _ = compiled_ascent(name)(zero, ascent.init(params), params)
    chex.assert_trees_all_equal(perturbation, chosen_of(zero, perturbation))


@ascents
def test_an_ascent_can_be_injected(name):
    params = start()
    grads = jax.grad(loss)(params)
    injected = optax.inject_hyperparams(ASCENTS[name])(0.1)
    expected, _ = compiled_ascent(name)(grads, ASCENTS[name](0.1).init(params), params)
    actual, state = jax.jit(injected.update)(grads, injected.init(params), params)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)
    assert state.hyperparams["rho"] == np.float32(0.1)


@ascents
def test_an_ascent_ignores_extra_arguments_that_it_does_not_need(name):
    ascent = optax.with_extra_args_support(ASCENTS[name](0.1))
    assert ascent_program(ascent, temperature=300) == ascent_program(ascent)


@with_nothing(ASCENTS)
def test_an_ascent_skips_what_is_not_there(name, nothing):
    ascent = ASCENTS[name](0.1)
    padded = start() | {"frozen": nothing}
    assert ascent_program(ascent, padded) == ascent_program(ascent)
    perturbation, _ = jax.eval_shape(ascent.update, padded, ascent.init(padded), padded)
    assert perturbation["frozen"] == nothing


@ascents
def test_an_ascent_leaves_a_parameter_without_an_update_alone(name):
    params = start()
    grads = jax.grad(loss)(params)
    ascent = ASCENTS[name](0.1)
    expected, _ = compiled_ascent(name)(grads, ascent.init(params), params)
    params, grads = params | {"frozen": jnp.ones((2,))}, grads | {"frozen": None}
    old = ascent.init(params)
    actual, state = compiled_ascent(name)(grads, old, params)
    assert actual.pop("frozen") is None
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(old)
