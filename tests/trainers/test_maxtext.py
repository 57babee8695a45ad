"""MaxText: its interface in `maxtext_like.py`, the functions of the page."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pages
import plain_loop
import pytest
from flax import nnx
from maxtext_like import (
    TrainStateNNX,
    eval_step,
    loss_fn,
    skip_step_on_spikes,
    train_step,
)

import optax_vasso as ov

# Tested every time in the environment of the trainers, by .ci/run.
pytestmark = pytest.mark.exhaustive

STEPS = 4
RNG = np.random.default_rng(0)
DATA = tuple(
    jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in ((8, 3), (8, 2))
)
BASE = optax.sgd(plain_loop.RATE)
LAGGED = ov.lagged_vasso(BASE, plain_loop.RHO, theta=plain_loop.THETA)
VASSO = ov.vasso(BASE, plain_loop.RHO, theta=plain_loop.THETA)


class Layer(nnx.Module):
    """A dense layer with dropout, so that the random state matters."""

    def __init__(self, rngs, rate=0.0):
        self.dense = nnx.Linear(3, 2, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.dense(x))


def initial(tx, **kwargs):
    model = Layer(nnx.Rngs(0), **kwargs)
    return nnx.split(TrainStateNNX(model, nnx.Optimizer(model, tx, wrt=nnx.Param)))


def train(tx, steps=STEPS, rate=0.0, losses=None, **kwargs):
    graph, state = initial(tx, rate=rate)
    step = jax.jit(
        lambda state, loss: train_step(graph, state, DATA, loss=loss, **kwargs)
    )
    for i in range(steps):
        state, _ = step(state, None if losses is None else losses[i])
    return graph, state


def weights(tree):
    return [tree["dense"]["bias"], tree["dense"]["kernel"]]


def parameters(graph, state):
    merged = nnx.merge(graph, state)
    return weights(nnx.to_pure_dict(nnx.state(merged.model, nnx.Param)))


def clean(graph, state):
    merged = nnx.merge(graph, state)
    params = nnx.state(merged.model, nnx.Param)
    found = ov.eval_params(merged.optimizer.opt_state, params)
    return weights(nnx.to_pure_dict(found))


def gradient(params, step):
    def loss(params):
        bias, kernel = params
        return jnp.mean((DATA[0] @ kernel + bias[None] - DATA[1]) ** 2)

    return jax.grad(loss)(params)


def start():
    return parameters(*initial(BASE))


@pytest.fixture
def page():
    return pages.names_of("docs/trainers/maxtext.md")


def test_one_gradient():
    trained = train(LAGGED)
    x, y = plain_loop.lagged(gradient, start(), STEPS)
    plain_loop.assert_close(parameters(*trained), y)
    plain_loop.assert_close(clean(*trained), x)


def test_eval_step_and_export_are_at_the_clean_point(page):
    graph, state = train(LAGGED)
    prepare = page["at_clean_parameters"]
    evaluate = jax.jit(
        lambda state, data: eval_step(graph, state, data, prepare=prepare)
    )
    x, _ = plain_loop.lagged(gradient, start(), STEPS)
    bias, kernel = x
    expected = jnp.mean((DATA[0] @ kernel + bias[None] - DATA[1]) ** 2)
    plain_loop.assert_close(evaluate(state, DATA), expected)
    plain_loop.assert_close(
        parameters(graph, nnx.state(prepare(nnx.merge(graph, state)))), x
    )
    # The state that training goes on with is untouched.
    assert eval_step(graph, state, DATA) != evaluate(state, DATA)


def test_the_export_of_a_state_that_is_a_tree():
    _, state = train(LAGGED)
    _, param_state, _ = nnx.split(state.model, nnx.Param, ...)
    exported = ov.eval_params(state.optimizer.opt_state, param_state)
    x, _ = plain_loop.lagged(gradient, start(), STEPS)
    plain_loop.assert_close(weights(nnx.to_pure_dict(exported)), x)


def test_two_gradients():
    trained = train(VASSO, two_gradients=True)
    plain_loop.assert_close(
        parameters(*trained), plain_loop.vasso(gradient, start(), STEPS)
    )


def test_both_gradients_have_the_same_dropout_mask():
    """A radius of zero is plain training only if the two masks agree."""
    plain = train(BASE, rate=0.5)
    sam = train(ov.sam(BASE, rho=0.0), rate=0.5, two_gradients=True)
    plain_loop.assert_close(parameters(*sam), parameters(*plain))


@pytest.mark.parametrize("two_gradients", [False, True])
def test_a_skipped_step_leaves_everything_where_it_is(two_gradients):
    tx = skip_step_on_spikes(VASSO if two_gradients else LAGGED, 4, 6.0)
    calm = [1.0, 1.1, 1.05]
    kwargs = {"skips": True, "two_gradients": two_gradients}
    before = train(tx, steps=3, losses=calm, **kwargs)
    after = train(tx, steps=4, losses=[*calm, 100.0], **kwargs)
    assert nnx.merge(*after).optimizer.opt_state["is_skipped"][...]
    plain_loop.assert_close(parameters(*after), parameters(*before), rtol=0, atol=0)
    plain_loop.assert_close(clean(*after), clean(*before), rtol=0, atol=0)
    x, y = plain_loop.lagged(gradient, start(), 3)
    if not two_gradients:
        plain_loop.assert_close(parameters(*after), y)
        plain_loop.assert_close(clean(*after), x)


def test_inside_a_spike_is_not_stepped_on_but_turns_the_perturbation():
    inside = ov.lagged_vasso(
        skip_step_on_spikes(BASE, 4, 6.0), plain_loop.RHO, theta=plain_loop.THETA
    )
    losses = [1.0, 1.1, 1.05, 100.0]
    before = train(inside, steps=3, losses=losses, skips=True)
    after = train(inside, steps=4, losses=losses, skips=True)
    plain_loop.assert_close(clean(*after), clean(*before))
    moved = optax.tree.sub(parameters(*after), parameters(*before))
    assert optax.tree.norm(moved) > 1e-3


def test_a_mask_of_trainable_parameters_around_one_gradient():
    tx = optax.partition(
        {"trainable": LAGGED, "frozen": optax.set_to_zero()},
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if "bias" in str(path) else "trainable", params
        ),
    )
    trained = train(tx)
    bias, kernel = start()

    def of_kernel(kernel, step):
        return gradient([bias, kernel], step)[1]

    x, y = plain_loop.lagged(of_kernel, kernel, STEPS)
    plain_loop.assert_close(parameters(*trained), [bias, y])
    plain_loop.assert_close(clean(*trained), [bias, x])


def test_the_perturbation_is_divided_as_the_parameters_are():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
        model = nnx.Linear(3, 2, kernel_init=init, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, LAGGED, wrt=nnx.Param)
        specs = nnx.get_partition_spec(nnx.state(optimizer))
    spec = specs["opt_state"]["direction"]["kernel"].get_value()
    assert spec == jax.sharding.PartitionSpec(None, "model")


def test_what_qk_clip_does_to_the_evaluated_point():
    """s·y − ε = s·x − (1 − s)·ε, where s·x is meant."""
    graph, state = train(LAGGED)
    x, y = clean(graph, state), parameters(graph, state)
    merged = nnx.merge(graph, state)
    scale = 0.9
    merged.model.dense.kernel[...] = scale * merged.model.dense.kernel[...]
    _, clipped_state = nnx.split(merged)
    kernel = clean(graph, clipped_state)[1]
    expected = scale * x[1] - (1 - scale) * (y[1] - x[1])
    plain_loop.assert_close(kernel, expected)
    assert np.linalg.norm(kernel - scale * x[1]) <= (1 - scale) * plain_loop.RHO


def test_apply_gradients_alone_says_what_two_gradients_need():
    graph, state = initial(VASSO)
    with pytest.raises(ValueError, match="needs grad_fn, got None.*or use lagged"):
        train_step(graph, state, DATA)


def test_the_stand_in_trains():
    graph, state = train(optax.adam(0.1), steps=20)
    assert loss_fn(nnx.merge(graph, state).model, DATA) < eval_step(
        *initial(BASE), DATA
    )
