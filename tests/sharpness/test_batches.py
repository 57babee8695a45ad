"""The data of a measure: what is one batch, what are several, what is neither."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from optax_vasso import sharpness


def slope_of_first(params, batch):
    return 0.5 * params**2 * jnp.mean(batch[0])


def curvature_of(data, loss_fn=slope_of_first):
    one = jnp.ones(())
    return float(sharpness.hessian(loss_fn, one, data)(one))


X, Y = np.array([16.0, 18.0]), np.array([11.0, 13.0])


# --- one batch or several ---------------------------------------------------------


def test_a_tuple_is_one_batch_and_a_list_of_its_parts_is_refused():
    """As two batches, the list would mean 13.5."""
    assert curvature_of((X, Y)) == 17
    with pytest.raises(ValueError, match="data is a list, which may be one batch or"):
        curvature_of([X, Y])


def test_several_batches_are_the_mean_over_their_examples():
    batches = [(np.array([1.0, 2.0, 3.0]), np.zeros(3)), (np.array([10.0]), np.ones(1))]
    assert curvature_of(sharpness.stack_batches(batches)) == 4
    assert curvature_of(sharpness.stack_batches(iter(batches))) == 4


def test_batches_are_cut_in_order_and_given_back_one_by_one():
    data = {"x": np.arange(5), "y": np.arange(10).reshape(5, 2)}
    batches = sharpness.split_batches(data, 2)
    assert len(batches) == 3
    assert [batch["x"].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    np.testing.assert_array_equal(list(batches)[1]["y"], [[4, 5], [6, 7]])
    again = sharpness.stack_batches(list(batches))
    np.testing.assert_array_equal(again.groups[0]["y"], batches.groups[0]["y"])
    assert sharpness.stack_batches(again) is again
    assert len(sharpness.split_batches(data, 7)) == 1


def test_batches_pass_through_jit():
    batches = sharpness.split_batches(np.arange(5.0), 2)
    total = jax.jit(lambda batches: sum(jnp.sum(batch) for batch in batches))(batches)
    assert total == 10


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter("ab"), "data has type str_ascii_iterator and is no array: pass one"),
        ("ab", "data has type str and is no array"),
        ((X, 3.0), r"data\[1\] has type float and is no array"),
        ((X, np.float32(3)), r"data\[1\] has shape \(\), but data\[0\] has 2 rows"),
        ((X, np.ones(3)), r"data\[1\] has shape \(3,\), but data\[0\] has 2 rows"),
        (np.float32(3), r"data has shape \(\): every array of a batch has one row"),
        ({"x": np.ones((0, 4))}, r"data\['x'\] has shape \(0, 4\), no examples"),
        ((), "data holds no arrays: pass at least one, or None"),
    ],
)
def test_what_is_not_one_batch_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        curvature_of(data)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ((X, Y), "got a tuple, which is one batch: pass it to the measure itself"),
        ({"x": X}, "got a dict, which is one batch"),
        (X, "got a ndarray, which is one batch"),
        (3, "needs a list or an iterator of batches, got 3: put a single batch"),
        ([], "batches is empty, so there is nothing to measure on"),
        ([(X, Y), (X, 3.0)], r"batches\[1\]\[1\] has type float and is no array"),
        (
            [{"t": np.ones(7), "x": np.ones(3)}],
            r"batches\[0\]\['x'\] has shape \(3,\), but batches\[0\]\['t'\] has 7 rows",
        ),
    ],
)
def test_what_are_not_several_batches_is_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        sharpness.stack_batches(batches)


def test_an_iterator_that_was_used_up_is_refused():
    used_up = iter([X])
    next(used_up)
    with pytest.raises(ValueError, match="an exhausted iterator gives none"):
        sharpness.stack_batches(used_up)


@pytest.mark.parametrize("size", [0, 2.5, "2", None])
def test_a_batch_size_that_is_no_count_is_refused(size):
    with pytest.raises(ValueError, match=r"batch_size must be an integer >= 1"):
        sharpness.split_batches(X, size)
    with pytest.raises(ValueError, match=r"data\[1\] has shape \(3,\)"):
        sharpness.split_batches((X, np.ones(3)), 2)


# --- what is bound to the loss ----------------------------------------------------


def normalized_loss(params, batch, *, statistics):
    return jnp.mean((params[None] * (batch - statistics)) ** 2)


def test_other_statistics_that_a_partial_binds_do_not_recompile(compilations):
    data = np.array([[1.0, 1.0], [2.0, 2.0], [6.0, 6.0]])

    def measure(mean):
        loss_fn = Partial(normalized_loss, statistics=jnp.float32(mean))
        curvature = sharpness.hessian(loss_fn, jnp.ones(2), data)
        found.append(sharpness.eigenpairs(curvature, jnp.ones(2)).values[0])
        found.append(sharpness.ascent_sharpness(loss_fn, jnp.ones(2), data, 0.1).loss)

    found = []
    assert compilations(lambda: measure(0.0)) > 0
    assert compilations(lambda: measure(3.0)) == 0
    # (1 + 4 + 36)/3 and (4 + 1 + 9)/3: each parameter has half of the mean square.
    np.testing.assert_allclose(found, [41 / 3, 41 / 3, 14 / 3, 14 / 3], rtol=1e-6)


def test_the_model_of_a_gauss_newton_product_may_bind_statistics_too(compilations):
    def measure(mean):
        model_fn = Partial(shifted_model, statistics=jnp.float32(mean))
        matvec = sharpness.gauss_newton(model_fn, mean_square, jnp.ones(()), X)
        return matvec(jnp.ones(()))

    measure(0.0)
    assert compilations(lambda: measure(1.0)) == 0
    assert measure(1.0) == pytest.approx((15**2 + 17**2) / 2)


def shifted_model(params, batch, *, statistics):
    return params * (batch - statistics)


def mean_square(outputs, batch):
    del batch
    return jnp.mean(outputs**2) / 2


def test_a_partial_binds_arrays_alone():
    loss_fn = Partial(normalized_loss, statistics="mean")
    with pytest.raises(ValueError, match="loss_fn binds 'mean' at .*: bind arrays"):
        sharpness.hessian(loss_fn, jnp.ones(2), X)


# --- losses and parameters --------------------------------------------------------


def square(params, batch):
    del batch
    return jnp.sum(params**2)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda p, batch: p**2, r"must return a real scalar, .* shape \(3,\)"),
        (lambda p, batch: 1j * jnp.sum(p), "real scalar, .* dtype complex64"),
        (lambda p, batch: (jnp.sum(p), p), "the loss alone, .* returned a tuple"),
        (lambda p: jnp.sum(p), r"must be called as loss_fn\(params, batch\), but too"),
        (lambda p, b, key: jnp.sum(p), "missing a required argument: 'key'"),
        (np.ones(3), "loss_fn must be a function, got an array of shape"),
    ],
)
def test_a_loss_that_cannot_be_measured_is_refused(loss_fn, message):
    with pytest.raises(ValueError, match=message):
        sharpness.hessian(loss_fn, jnp.ones(3), None)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "params holds no arrays"),
        ({"w": np.array([1, np.nan, 1], np.float32)}, r"params\['w'\] has entries tha"),
        ({"w": np.array([1, np.inf, 1], np.float32)}, r"params\['w'\] has entries tha"),
        (np.arange(3, dtype=np.int32), "params has dtype int32: sharpness is measured"),
        (jnp.ones(3, jnp.bfloat16), "bfloat16: sharpness is measured in float32 or"),
        ([1.0, 2.0], r"params\[0\] has type float and is no array"),
    ],
)
def test_parameters_that_cannot_be_measured_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        sharpness.hessian(square, params, None)


PARAMS = {"w": np.ones(3, np.float32)}


def total(params, batch):
    del batch
    return jnp.sum(params["w"] ** 2)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (None, r"nothing at \['w'\]"),
        (np.ones(3), r"nothing at \['w'\]"),
        ({"w": np.ones(3), "b": np.ones(2)}, r"an unknown leaf at \['b'\]"),
        ({"w": np.ones(2)}, r"\['w'\] has the shape \(2,\), but params\['w'\] has"),
        ({"w": 1j * np.ones(3)}, r"\['w'\] has the complex shape"),
    ],
)
def test_a_tree_that_is_not_like_the_parameters_is_refused(tree, message):
    args = total, PARAMS, None
    calls = {
        "direction": lambda: sharpness.along(*args, tree, [0.0]),
        "x_direction": lambda: sharpness.on_plane(*args, tree, PARAMS, [0.0], [0.0]),
        "y_direction": lambda: sharpness.on_plane(*args, PARAMS, tree, [0.0], [0.0]),
        "perturbation": lambda: sharpness.friendliness(*args, tree),
        "scale": lambda: sharpness.worst_sharpness(*args, 0.1, scale=tree),
    }
    for name, call in calls.items():
        if name == "scale" and tree is None:
            continue  # no scale at all
        with pytest.raises(ValueError, match=name + r"\S* .*pass a tree like params"):
            call()
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="^direction"):
        sharpness.squared_error(*args, tree)


def test_other_containers_than_those_of_the_parameters_are_refused():
    params = (np.ones(3, np.float32),)
    with pytest.raises(ValueError, match="direction has .* .other containers"):
        sharpness.along(
            lambda p, batch: jnp.sum(p[0]), params, None, [np.ones(3)], [0.0]
        )


# --- keys -------------------------------------------------------------------------


def test_keys_of_both_kinds_are_taken_and_none_is_key_zero():
    def neighbours(vector):
        return jnp.roll(vector, 1) + jnp.roll(vector, -1)

    def found(key):
        return float(sharpness.trace(neighbours, jnp.ones(9), key=key).mean)

    assert found(None) == found(jax.random.key(0)) == found(jax.random.PRNGKey(0))
    assert found(None) != found(jax.random.key(1))


@pytest.mark.parametrize("key", [0, "0", np.ones(2), lambda: 0])
def test_what_is_no_key_is_refused(key):
    message = "key must be one random key, as jax.random.key"
    with pytest.raises(ValueError, match=message):
        sharpness.trace(square, jnp.ones(3), key=key)
    with pytest.raises(ValueError, match=message):
        sharpness.average_sharpness(square, jnp.ones(3), None, 0.1, key=key)
    with pytest.raises(ValueError, match=message):
        sharpness.worst_sharpness(square, jnp.ones(3), None, 0.1, key=key)
    with pytest.raises(ValueError, match=message):
        sharpness.keskar_sharpness(square, jnp.ones(3), None, key=key)
    with pytest.raises(ValueError, match=message):
        sharpness.filter_normalized(key, jnp.ones((3, 2)))


def test_several_keys_at_once_are_refused():
    with pytest.raises(ValueError, match=r"got an array of shape \(2,\) and dtype key"):
        sharpness.trace(square, jnp.ones(3), key=jax.random.split(jax.random.key(0)))
