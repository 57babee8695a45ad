"""LoRA, and a warm start from plain training."""

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pages
import plain_loop
import pytest
from flax import nnx

import optax_vasso as ov

# Tested every time in the environment of the trainers, by .ci/run.
pytestmark = pytest.mark.exhaustive


@pytest.fixture
def page():
    return pages.names_of("docs/trainers/fine-tuning.md")


def frozen(model):
    return nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))


def initial(page, tx):
    model = page["Network"](nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)


@pytest.mark.parametrize("gradients", [1, 2])
def test_the_frozen_weights_stay_and_the_radius_is_that_of_the_adapters(
    page, gradients
):
    recipe = ov.lagged_vasso if gradients == 1 else ov.vasso
    model, optimizer = initial(page, recipe(optax.adamw(1e-2), rho=0.05))
    before = jax.tree.map(jnp.array, frozen(model))
    x, y = page["x"], page["y"]
    for _ in range(3):
        page["train_step" if gradients == 1 else "two_gradients"](
            model, optimizer, x, y
        )
    plain_loop.assert_close(frozen(model), before, rtol=0, atol=0)
    adapters = nnx.state(model, nnx.LoRAParam)
    clean = ov.eval_params(optimizer.opt_state, adapters)
    distance = optax.tree.norm(optax.tree.sub(adapters, clean))
    assert distance == pytest.approx(0.05 if gradients == 1 else 0.0, rel=1e-3)


def test_all_parameters_are_not_those_of_the_state(page):
    model, optimizer = initial(page, ov.lagged_vasso(optax.adamw(1e-2)))
    with pytest.raises(ValueError, match="params"):
        ov.eval_params(optimizer.opt_state, nnx.state(model, nnx.Param))


def memory(page, tx):
    model, optimizer = initial(page, tx)
    graph, state = nnx.split((model, optimizer))

    @jax.jit
    def step(state, x, y):
        model, optimizer = nnx.merge(graph, state)
        page["train_step"].__wrapped__(model, optimizer, x, y)
        return nnx.state((model, optimizer))

    found = step.lower(state, page["x"], page["y"]).compile().memory_analysis()
    return found.argument_size_in_bytes, found.temp_size_in_bytes


def test_frozen_weights_cost_nothing(page):
    """Beside Adam: ε in the state, and less than three copies of the adapters."""
    model, _ = initial(page, optax.adamw(1e-2))
    adapters = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    base = sum(x.nbytes for x in jax.tree.leaves(frozen(model)))
    assert base > 8 * adapters
    plain = memory(page, optax.adamw(1e-2))
    lagged = memory(page, ov.lagged_vasso(optax.adamw(1e-2)))
    assert lagged[0] - plain[0] <= adapters + 100
    assert lagged[1] - plain[1] <= 3 * adapters


@pytest.mark.parametrize("recipe", [ov.lagged_vasso, ov.vasso])
def test_a_warm_start_through_a_checkpoint(page, recipe, tmp_path):
    adamw = optax.adamw(1e-2)
    params, state = {"w": jnp.ones(3)}, adamw.init({"w": jnp.ones(3)})

    def grad_fn(params):
        return jax.grad(lambda p: jnp.sum((p["w"] - jnp.arange(3.0)) ** 2))(params)

    for _ in range(3):
        updates, state = adamw.update(grad_fn(params), state, params)
        params = optax.apply_updates(params, updates)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "old",
            {"params": params, "state": adamw.init(params)},
        )
    optimizer = recipe(adamw, rho=0.05)
    warm = page["warm_start"](optimizer, restored["params"], restored["state"])
    grads = grad_fn(restored["params"])
    new_updates, warm = optimizer.update(grads, warm, params, grad_fn=grad_fn)
    trained = ov.eval_params(warm, optax.apply_updates(restored["params"], new_updates))
    # With one gradient the first step is AdamW's own; with two it is perturbed.
    e = optax.tree.scale(0.05 / optax.tree.norm(grads), grads)
    where = params if recipe is ov.lagged_vasso else optax.tree.add(params, e)
    updates, state = adamw.update(grad_fn(where), state, params)
    plain_loop.assert_close(trained, optax.apply_updates(params, updates))
    plain_loop.assert_close(warm.optimizer_state, state)
