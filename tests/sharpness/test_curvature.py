"""Curvature: what is measured without the matrix is what the matrix says."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from optax_vasso import sharpness
from optax_vasso.sharpness.spectrum import _smooth


def flatten(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def stacked_rows(vectors):
    return np.concatenate(
        [np.reshape(leaf, (len(leaf), -1)) for leaf in jax.tree.leaves(vectors)], axis=1
    )


def random_like(params, seed=1):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape)), params
    )


def multiply(diagonal, vector):
    return diagonal * vector


# --- products ---------------------------------------------------------------------


def test_the_hessian_product_is_that_of_the_dense_hessian(network):
    vector = random_like(network.params)
    np.testing.assert_allclose(
        flatten(network.hessian(vector)),
        network.dense_hessian @ flatten(vector),
        rtol=0,
        atol=1e-14,
    )


@pytest.mark.parametrize("batch_size", [10, 24, 1])
def test_batches_of_any_size_give_the_hessian_of_the_whole(network, batch_size):
    """10 leaves a last batch of 4: each batch counts by its examples."""
    batches = sharpness.split_batches(network.data, batch_size)
    vector = random_like(network.params)
    found = sharpness.hessian(network.loss_fn, network.params, batches)(vector)
    expected = network.dense_hessian @ flatten(vector)
    np.testing.assert_allclose(flatten(found), expected, rtol=0, atol=1e-14)


def test_gauss_newton_is_the_outer_product_of_jacobians_around_the_output_hessian(
    network,
):
    flat, unravel = ravel_pytree(network.params)

    @jax.jit
    def matrices(flat):
        def logits_fn(x):
            return network.model_fn(unravel(x), network.data)

        outer = jax.hessian(lambda z: network.output_loss_fn(z, network.data))
        return jax.jacobian(logits_fn)(flat), outer(logits_fn(flat))

    jacobian, outer = map(np.asarray, matrices(flat))
    jacobian = jacobian.reshape(-1, flat.size)
    outer = outer.reshape(len(jacobian), len(jacobian))
    vector = random_like(network.params)
    matvec = sharpness.gauss_newton(
        network.model_fn,
        network.output_loss_fn,
        network.params,
        sharpness.split_batches(network.data, 10),
    )
    expected = jacobian.T @ (outer @ (jacobian @ flatten(vector)))
    np.testing.assert_allclose(flatten(matvec(vector)), expected, rtol=0, atol=1e-13)


def test_gauss_newton_is_the_hessian_of_a_linear_model(network):
    def linear(params, batch):
        return batch[0] @ params

    params = random_like(jnp.zeros((5, 3)))
    vector = random_like(params, seed=2)
    gauss_newton = sharpness.gauss_newton(
        linear, network.output_loss_fn, params, network.data
    )
    hessian = sharpness.hessian(
        lambda p, batch: network.output_loss_fn(linear(p, batch), batch),
        params,
        network.data,
    )
    np.testing.assert_allclose(gauss_newton(vector), hessian(vector), atol=1e-14)


# --- eigenvalues ------------------------------------------------------------------


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_the_outer_eigenvalues_are_those_of_the_dense_hessian(network, which):
    found = sharpness.eigenpairs(network.hessian, network.params, k=5, which=which)
    expected = np.linalg.eigvalsh(network.dense_hessian)
    assert expected[0] < 0
    expected = expected[::-1][:5] if which == "largest" else expected[:5]
    np.testing.assert_allclose(found.values, expected, rtol=1e-6)


def test_eigenvectors_are_orthonormal_and_residuals_are_theirs(network):
    """With few products the pairs have not converged, and the residuals say so."""
    found = sharpness.eigenpairs(network.hessian, network.params, k=6, num_matvecs=6)
    vectors = stacked_rows(found.vectors)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(6), atol=1e-12)
    values = np.asarray(found.values)
    errors = vectors @ network.dense_hessian - values[:, None] * vectors
    assert found.residuals[-1] > 1e-3
    np.testing.assert_allclose(
        np.linalg.norm(errors, axis=1), found.residuals, rtol=1e-6, atol=1e-12
    )


def test_the_ritz_values_are_those_of_the_krylov_space(network):
    """Few steps, so that nothing has converged: span(v, Hv, ..., H⁵v), in NumPy."""
    key = jax.random.key(5)
    n = len(network.dense_hessian)
    start = jax.random.normal(jax.random.fold_in(key, 0), (n,), jnp.float64)
    columns = [np.asarray(start)]
    for _ in range(5):
        columns.append(network.dense_hessian @ columns[-1])
    basis, _ = np.linalg.qr(np.stack(columns, axis=1))
    expected = np.linalg.eigvalsh(basis.T @ network.dense_hessian @ basis)
    found = sharpness.eigenpairs(
        network.hessian, network.params, k=6, num_matvecs=6, key=key
    )
    # The columns are nearly parallel: powers lose some digits.
    np.testing.assert_allclose(found.values, expected[::-1], rtol=1e-7)


def test_float32_keeps_five_digits(network):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), network.params)
    images = network.data[0].astype(jnp.float32)
    matvec = sharpness.hessian(network.loss_fn, params, (images, network.data[1]))
    found = sharpness.eigenpairs(matvec, params, k=5)
    assert found.values.dtype == jnp.float32
    expected = np.linalg.eigvalsh(network.dense_hessian)[::-1][:5]
    np.testing.assert_allclose(found.values, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "diagonal",
    [
        np.full(9, 3.0),
        np.zeros(9),
        np.full(9, -2.0),
        [7.0, 0.0, 0.0, 0.0, -3.0, 0.0, 0.0, 0.0, 0.0],
        [4.0, 4.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0, 0.0],
    ],
    ids=["all 3", "all 0", "all −2", "rank 2", "in pairs"],
)
def test_every_eigenvalue_is_found_as_often_as_it_occurs(x64, diagonal):
    """Also where the Krylov space of one vector is complete after few steps."""
    matvec = Partial(multiply, jnp.asarray(diagonal))
    found = sharpness.eigenpairs(matvec, jnp.zeros(9), k=9)
    np.testing.assert_allclose(found.values, np.sort(diagonal)[::-1], atol=1e-13)
    vectors = np.asarray(found.vectors)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(9), atol=1e-13)


def test_any_symmetric_function_of_a_tree_has_eigenpairs():
    def matvec(tree):
        return {"a": 2 * tree["a"], "b": -tree["b"]}

    like = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    # The accuracy that is promised in float32, and some more.
    found = sharpness.eigenpairs(matvec, like, k=7)
    np.testing.assert_allclose(found.values, [2, 2, 2, -1, -1, -1, -1], atol=5e-6)


def test_a_measure_compiles_once_for_a_loss_and_serves_other_parameters(
    network, compilations
):
    halved = jax.tree.map(lambda leaf: 0.5 * leaf, network.params)

    def measure(params):
        matvec = sharpness.hessian(network.loss_fn, params, network.data)
        return sharpness.eigenpairs(matvec, params, k=5).values

    assert not np.allclose(measure(network.params), measure(halved))
    assert compilations(lambda: measure(halved)) == 0


def test_sharded_parameters_have_sharded_eigenvectors_and_a_distributed_basis():
    """In a process of its own, since the number of devices is fixed at the start."""
    result = subprocess.run(
        [sys.executable, Path(__file__).parent / "four_devices.py"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout == "sharded\n", result.stderr[-2000:]


# --- trace and density ------------------------------------------------------------


def test_traces_are_within_three_of_their_errors_which_are_their_scatter(network):
    """Over 100 estimates the ratio of error and scatter is known to 7%."""
    found = [
        sharpness.trace(network.hessian, network.params, key=jax.random.key(seed))
        for seed in range(100)
    ]
    means = np.array([estimate.mean for estimate in found])
    errors = np.array([estimate.standard_error for estimate in found])
    expected = np.trace(network.dense_hessian)
    assert errors.max() < 0.5 * abs(expected)
    assert np.mean(abs(means - expected) <= 3 * errors) >= 0.97
    assert means.std() / errors.mean() == pytest.approx(1, abs=0.2)
    assert means.mean() == pytest.approx(expected, abs=3 * errors.mean() / 10)


DENSITY = {"num_samples": 64, "num_matvecs": 100}


@pytest.mark.parametrize("bandwidth", [None, 1e-4, 0.1])
def test_the_density_integrates_to_one(network, bandwidth):
    """1e-4 is a tenth of a cell of the grid."""
    found = sharpness.spectral_density(
        network.hessian, network.params, bandwidth=bandwidth, **DENSITY
    )
    density, grid = np.asarray(found.density), np.asarray(found.grid)
    # 6 bandwidths leave 1e-9 outside of the grid on either side.
    assert density.sum() * (grid[1] - grid[0]) == pytest.approx(1, abs=3e-9)
    assert found.nodes.shape == (64, 63)  # as many products as parameters
    assert np.sum(found.weights) == pytest.approx(1, abs=1e-12)
    assert (density >= 0).all()


def test_the_density_has_the_moments_of_the_spectrum(network):
    """Gauss quadrature: trace/n and ‖H‖²/n, within three errors of 64 samples."""
    found = sharpness.spectral_density(network.hessian, network.params, **DENSITY)
    eigenvalues = np.linalg.eigvalsh(network.dense_hessian)
    weights, nodes = 64 * np.asarray(found.weights), np.asarray(found.nodes)
    for power in (1, 2):
        moments = (weights * nodes**power).sum(axis=1)
        error = moments.std(ddof=1) / 8
        expected = (eigenvalues**power).mean()
        assert error < 0.15 * expected
        assert moments.mean() == pytest.approx(expected, abs=3 * error)


def test_the_density_of_one_eigenvalue_is_a_peak_there(x64):
    nodes = np.full((2, 5), 3.0)
    found = _smooth(nodes, np.full((2, 5), 0.1), None, 1024)
    assert found.grid[found.density.argmax()] == pytest.approx(3, rel=1e-3)


# --- bad input --------------------------------------------------------------------


ONES = np.ones(5, np.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be an integer >= 1, got 0"),
        ({"k": -1}, "k must be an integer >= 1, got -1"),
        ({"k": 2.5}, "k must be an integer >= 1, got 2.5"),
        ({"k": "5"}, "k must be an integer >= 1, got '5'"),
        ({"k": jnp.arange(2)}, "k must be an integer >= 1, got an array of shape"),
        (
            {"k": 6},
            "at most 5, .*, got k = 6 and num_matvecs = 5",
        ),
        (
            {"k": 3, "num_matvecs": 2},
            "k must be at most num_matvecs, .* got k = 3 and",
        ),
        ({"num_matvecs": 6}, "at most 5, the number of parameters, .* num_matvecs = 6"),
        ({"which": "top"}, 'which must be "largest" or "smallest", got \'top\''),
    ],
)
def test_bad_options_of_eigenpairs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sharpness.eigenpairs(Partial(multiply, 2.0), ONES, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be an integer >= 1, got 0"),
        ({"num_matvecs": 0}, "num_matvecs must be an integer >= 1, got 0"),
        ({"num_points": 1}, "num_points must be an integer >= 2, got 1"),
        ({"bandwidth": 0}, "bandwidth must be a positive finite number, got 0"),
        ({"bandwidth": "1"}, "bandwidth must be a positive finite number, got '1'"),
    ],
)
def test_bad_options_of_the_density_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sharpness.spectral_density(Partial(multiply, 2.0), ONES, **options)


def test_the_smallest_counts_are_allowed():
    matvec = Partial(multiply, 2.0)
    pair = sharpness.eigenpairs(matvec, ONES[:1])
    np.testing.assert_allclose(pair.values, [2], rtol=1e-6)
    assert sharpness.trace(matvec, ONES, num_samples=2).mean == pytest.approx(10)
    density = sharpness.spectral_density(
        matvec, ONES, num_samples=1, num_matvecs=1, num_points=2
    )
    np.testing.assert_allclose(density.nodes, [[2]], rtol=1e-6)
    assert density.grid.shape == (2,)


def test_eigenpairs_takes_forty_products_and_two_more_for_each_pair():
    matvec, params = Partial(multiply, jnp.arange(100.0)), jnp.ones(100)
    found = sharpness.eigenpairs(matvec, params, k=3)
    expected = sharpness.eigenpairs(matvec, params, k=3, num_matvecs=46)
    np.testing.assert_array_equal(found.values, expected.values)


def test_bad_input_of_the_trace_is_refused():
    with pytest.raises(ValueError, match="num_samples must be an integer >= 2, got 1"):
        sharpness.trace(Partial(multiply, 2.0), ONES, num_samples=1)
    with pytest.raises(ValueError, match=r"result of matvec has the shape \(2,\), but"):
        sharpness.trace(lambda v: v[:2], ONES)
    with pytest.raises(ValueError, match="matvec must be a function, got an array"):
        sharpness.trace(ONES, {"w": ONES})


@jax.custom_vjp
def opaque_square(x):
    return callback_square(x)


def callback_square(x):
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda v: np.asarray(v) ** 2, like, x)


def opaque_backward(x, cotangent):
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return (jax.pure_callback(lambda v, c: 2 * v * c, like, x, cotangent),)


opaque_square.defvjp(lambda x: (callback_square(x), x), opaque_backward)


def test_a_loss_without_second_derivatives_names_the_alternative():
    with pytest.raises(TypeError, match="use differences of gradients"):
        sharpness.hessian(lambda p, batch: jnp.sum(opaque_square(p)), ONES, None)


@jax.custom_vjp
def scaled_tanh(x):
    return jnp.tanh(x)


scaled_tanh.defvjp(
    lambda x: (jnp.tanh(x), x), lambda x, c: (c * (1 - jnp.tanh(x) ** 2),)
)


def test_a_custom_vjp_in_jax_has_a_hessian_but_no_gauss_newton(x64):
    """Forward over reverse differentiates the rule of the custom_vjp."""
    params = np.array([0.3, -0.8])

    def model_fn(params, batch):
        del batch
        return scaled_tanh(params)

    def loss_fn(outputs, batch):
        del batch
        return jnp.sum(outputs**2)

    matvec = sharpness.hessian(
        lambda p, batch: loss_fn(model_fn(p, batch), batch), params, None
    )
    tanh = np.tanh(params)
    second = 2 * (1 - tanh**2) ** 2 - 4 * tanh**2 * (1 - tanh**2)
    np.testing.assert_allclose(matvec(params), second * params, rtol=1e-12)
    with pytest.raises(TypeError, match=r"use sharpness\.hessian"):
        sharpness.gauss_newton(model_fn, loss_fn, params, None)
