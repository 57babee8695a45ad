"""Groups that ascend for themselves: what each has alone, and what they share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_vasso as ov

PARAMS = jnp.asarray([1.0, -0.5])
BATCH = jnp.asarray([[1.0, 2.0], [-1.0, -2.0], [2.0, -1.0], [-2.0, 1.0]])
OPTIMIZER = ov.sam(ov.train.average_over(optax.sgd(0.1), "data"))


def noisy(params, batch, model_state, key):
    noise = jax.random.uniform(key)
    return noise + jnp.mean(batch @ params), (model_state + noise, noise)


def steps(count, **kwargs):
    """The metrics of a few steps with four groups, and the last state."""
    step = ov.train.make_local_train_step(noisy, OPTIMIZER, has_aux=True, **kwargs)
    state = ov.train.init_local_state(
        PARAMS, OPTIMIZER, 4, model_state=jnp.zeros(()), key=jax.random.key(0)
    )
    found = []
    for _ in range(count):
        state, metrics = step(state, BATCH)
        found.append(jax.tree.map(np.asarray, metrics))
    return found, state


@pytest.mark.parametrize("part", [None, ov.train.part_of_batch(1.0)])
def test_each_group_has_noise_of_its_own_and_all_share_its_mean(part):
    (first, second), state = steps(2, ascent_gradient=part)
    drawn = np.stack([first["aux"], second["aux"]])
    assert len(np.unique(drawn)) == 8
    # The mean of the batch is zero.
    np.testing.assert_allclose(first["loss"], drawn[0].mean(), rtol=1e-6)
    np.testing.assert_allclose(state.model_state, drawn.sum() / 4, rtol=1e-6)


@pytest.mark.parametrize("separate", [False, True])
def test_the_perturbed_noise_of_a_group_is_that_of_its_clean_loss_or_not(separate):
    """The two losses differ by what ε adds, which is 0.05 ‖g‖, or by the noise too."""
    ((metrics,), _) = steps(1, separate_keys=separate)
    slope = 0.05 * np.mean(np.linalg.norm(BATCH, axis=1))
    same = np.isclose(metrics["sharpness"], slope, rtol=1e-4)
    assert same != separate


def plain(params, batch):
    return jnp.mean(batch @ params)


def test_auxiliary_output_is_there_only_if_it_was_asked_for():
    step = ov.train.make_local_train_step(plain, OPTIMIZER)
    state = ov.train.init_local_state(PARAMS, OPTIMIZER, 2)
    _, metrics = step(state, BATCH)
    assert metrics.keys() == {"loss", "ascended", "perturbed_loss", "sharpness"}
    assert state.params.is_deleted()  # donated


def test_a_mesh_with_more_devices_than_groups_is_refused():
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    with pytest.raises(ValueError, match="groups is 2, but mesh axis 'data' has 4"):
        ov.train.init_local_state(PARAMS, OPTIMIZER, 2, mesh=mesh)


def test_all_that_an_optimizer_reads_is_a_mean_over_the_devices():
    def update(updates, state, params=None, *, grad, clean_grads, value, value_fn, **_):
        at, slope = jax.value_and_grad(value_fn)(params)
        return jnp.stack([updates, clean_grads, grad, value, at, slope]), state

    spy = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    averaged = ov.train.average_over(spy, "data")

    def on_device(own):
        return averaged.update(
            own,
            averaged.init(own),
            jnp.asarray(5.0),
            clean_grads=2 * own,
            grad=3 * own,
            value=4 * own,
            value_fn=lambda x: own * x**2,
        )[0]

    found = jax.vmap(on_device, axis_name="data")(jnp.asarray([1.0, 3.0]))
    expected = [2.0, 4.0, 6.0, 8.0, 50.0, 20.0]
    np.testing.assert_allclose(found, [expected, expected], rtol=1e-6)
