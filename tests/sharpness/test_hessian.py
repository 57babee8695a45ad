"""Curvature: what is measured without the matrix is what the matrix says."""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from matfree import decomp

from optax_vasso import sharpness
from optax_vasso.sharpness.spectrum import _ritz_pairs


def flatten(tree):
    return ravel_pytree(tree)[0]


def stacked_rows(vectors):
    return np.stack(
        [
            flatten(jax.tree.map(lambda leaf, i=i: leaf[i], vectors))
            for i in range(jax.tree.leaves(vectors)[0].shape[0])
        ]
    )


def random_like(params, seed=1):
    flat, unravel = ravel_pytree(params)
    return unravel(jax.random.normal(jax.random.key(seed), flat.shape, flat.dtype))


def multiply(diagonal, vector):
    return diagonal * vector


# --- products ---------------------------------------------------------------------


def test_the_hessian_product_is_that_of_the_dense_hessian(network):
    matvec = sharpness.hessian(network.loss_fn, network.params, network.data)
    vector = random_like(network.params)
    expected = network.dense_hessian @ flatten(vector)
    np.testing.assert_allclose(flatten(matvec(vector)), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("batch_size", [20, 16, 60, 1])
def test_batches_of_any_size_give_the_hessian_of_the_whole(network, batch_size):
    """16 leaves a last batch of 12: each batch counts by its examples."""
    batches = sharpness.split_batches(network.data, batch_size)
    vector = random_like(network.params)
    in_batches = sharpness.hessian(network.loss_fn, network.params, iter(batches))
    at_once = sharpness.hessian(network.loss_fn, network.params, network.data)
    chex.assert_trees_all_close(in_batches(vector), at_once(vector), atol=1e-14)


def test_the_difference_product_agrees_to_the_root_of_the_precision(network):
    """√eps is 1.5e-8; the vector has norm 12."""
    vector = random_like(network.params)
    args = network.loss_fn, network.params, network.data
    exact = sharpness.hessian(*args)(vector)
    chex.assert_trees_all_close(
        sharpness.hessian_by_differences(*args)(vector), exact, atol=1e-7
    )


def test_the_difference_product_of_zero_is_zero(network):
    zero = jax.tree.map(jnp.zeros_like, network.params)
    args = network.loss_fn, network.params, network.data
    chex.assert_trees_all_equal(sharpness.hessian_by_differences(*args)(zero), zero)


def test_gauss_newton_is_the_outer_product_of_jacobians_around_the_output_hessian(
    network,
):
    flat, unravel = ravel_pytree(network.params)
    logits = network.model_fn(network.params, network.data)
    jacobian = jax.jacobian(lambda x: network.model_fn(unravel(x), network.data))(flat)
    jacobian = jacobian.reshape(-1, flat.size)
    outer = jax.hessian(lambda z: network.output_loss_fn(z, network.data))(logits)
    outer = outer.reshape(logits.size, logits.size)
    vector = random_like(network.params)
    matvec = sharpness.gauss_newton(
        network.model_fn,
        network.output_loss_fn,
        network.params,
        sharpness.split_batches(network.data, 16),
    )
    expected = jacobian.T @ (outer @ (jacobian @ flatten(vector)))
    np.testing.assert_allclose(flatten(matvec(vector)), expected, rtol=0, atol=1e-13)


def test_gauss_newton_is_the_hessian_of_a_linear_model(network):
    def linear(params, batch):
        return batch[0] @ params

    params = random_like(jnp.zeros((8, 3)))
    vector = random_like(params, seed=2)
    gauss_newton = sharpness.gauss_newton(
        linear, network.output_loss_fn, params, network.data
    )
    hessian = sharpness.hessian(
        lambda p, batch: network.output_loss_fn(linear(p, batch), batch),
        params,
        network.data,
    )
    chex.assert_trees_all_close(gauss_newton(vector), hessian(vector), atol=1e-14)


# --- eigenvalues ------------------------------------------------------------------


def test_the_top_five_eigenvalues_are_those_of_the_dense_hessian(network):
    matvec = sharpness.hessian(network.loss_fn, network.params, network.data)
    found = sharpness.largest_eigenpairs(matvec, network.params, k=5)
    expected = np.linalg.eigvalsh(network.dense_hessian)[::-1][:5]
    np.testing.assert_allclose(found.values, expected, rtol=1e-6)


def test_the_smallest_eigenvalues_are_those_of_the_dense_hessian(network):
    matvec = sharpness.hessian(network.loss_fn, network.params, network.data)
    found = sharpness.smallest_eigenpairs(matvec, network.params, k=2)
    expected = np.linalg.eigvalsh(network.dense_hessian)[:2]
    assert expected[0] < 0
    np.testing.assert_allclose(found.values, expected, rtol=1e-6)


def test_eigenvectors_are_orthonormal_and_residuals_are_theirs(network):
    """With few products the pairs have not converged, and the residuals say so."""
    matvec = sharpness.hessian(network.loss_fn, network.params, network.data)
    found = sharpness.largest_eigenpairs(matvec, network.params, k=5, num_matvecs=12)
    vectors = stacked_rows(found.vectors)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(5), atol=1e-12)
    errors = vectors @ network.dense_hessian - found.values[:, None] * vectors
    assert found.residuals[-1] > 1e-3
    np.testing.assert_allclose(
        np.linalg.norm(errors, axis=1), found.residuals, rtol=1e-6, atol=1e-12
    )


def test_float32_keeps_five_digits(network):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), network.params)
    images = network.data[0].astype(jnp.float32)
    matvec = sharpness.hessian(network.loss_fn, params, (images, network.data[1]))
    found = sharpness.largest_eigenpairs(matvec, params, k=5)
    assert found.values.dtype == jnp.float32
    expected = np.linalg.eigvalsh(network.dense_hessian)[::-1][:5]
    np.testing.assert_allclose(found.values, expected, rtol=1e-5)


@pytest.mark.parametrize("value", [3.0, 0.0, -2.0])
def test_an_eigenvalue_of_full_multiplicity_is_found_every_time(float64, value):
    """The Krylov space of one vector is a line here: the iteration must go on."""
    params = {"x": jnp.zeros(9)}

    def loss_fn(params, batch):
        del batch
        return 0.5 * value * jnp.sum(params["x"] ** 2)

    matvec = sharpness.hessian(loss_fn, params, None)
    found = sharpness.largest_eigenpairs(matvec, params, k=9)
    np.testing.assert_allclose(found.values, np.full(9, value), atol=1e-14)
    vectors = stacked_rows(found.vectors)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(9), atol=1e-14)


def test_eigenvalues_that_occur_twice_are_found_twice(float64):
    diagonal = jnp.repeat(jnp.arange(10.0), 2)
    matvec = jax.tree_util.Partial(multiply, diagonal)
    found = sharpness.largest_eigenpairs(matvec, jnp.zeros(20), k=4)
    np.testing.assert_allclose(found.values, [9, 9, 8, 8], rtol=1e-13)


def test_the_ritz_values_are_those_of_matfree(network):
    """Few steps, so that nothing has converged, from the same starting vector."""
    matvec = sharpness.hessian(network.loss_fn, network.params, network.data)
    key = jax.random.key(5)
    flat, unravel = ravel_pytree(network.params)
    start = jax.random.normal(jax.random.split(key)[1], flat.shape, flat.dtype)
    decomposition = decomp.tridiag_sym(6, custom_vjp=False)(
        lambda v: flatten(matvec(unravel(v))), start
    )
    found = sharpness.largest_eigenpairs(
        matvec, network.params, k=6, num_matvecs=6, key=key
    )
    expected = np.linalg.eigvalsh(decomposition.J_small)[::-1]
    np.testing.assert_allclose(found.values, expected, rtol=1e-10)


def test_an_invariant_subspace_is_left_for_the_rest_of_the_spectrum(float64):
    """Of rank 2 in 30 dimensions: after three steps the Krylov space is complete."""
    diagonal = jnp.zeros(30).at[4].set(7.0).at[9].set(-3.0)
    matvec = jax.tree_util.Partial(multiply, diagonal)
    largest = sharpness.largest_eigenpairs(matvec, jnp.zeros(30), k=3)
    smallest = sharpness.smallest_eigenpairs(matvec, jnp.zeros(30), k=2)
    np.testing.assert_allclose(largest.values, [7, 0, 0], atol=1e-13)
    np.testing.assert_allclose(smallest.values, [-3, 0], atol=1e-13)


def test_any_symmetric_function_of_a_tree_has_eigenpairs():
    def matvec(tree):
        return {"a": 2 * tree["a"], "b": -tree["b"]}

    like = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    # The accuracy that is promised in float32, and some more.
    largest = sharpness.largest_eigenpairs(matvec, like)
    smallest = sharpness.smallest_eigenpairs(matvec, like)
    np.testing.assert_allclose(largest.values, [2], atol=5e-6)
    np.testing.assert_allclose(smallest.values, [-1], atol=5e-6)


def test_a_measure_compiles_once_for_a_loss_and_serves_other_parameters(network):
    sizes = []
    for scale in (1.0, 0.5):
        params = jax.tree.map(lambda leaf, s=scale: s * leaf, network.params)
        matvec = sharpness.hessian(network.loss_fn, params, network.data)
        sharpness.largest_eigenpairs(matvec, params, k=3)
        sizes.append(_ritz_pairs._cache_size())
    assert sizes[0] == sizes[1]


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from optax_vasso import sharpness

def loss_fn(params, batch):
    return jnp.mean(jnp.tanh(batch @ params["w"]) ** 2) + jnp.sum(params["b"] ** 4)

whole = {"w": jnp.linspace(-1, 1, 128).reshape(8, 16), "b": jnp.arange(3.0)}
batch = jnp.cos(jnp.arange(80.0)).reshape(10, 8)
specs = {"w": P(None, "x"), "b": P()}
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
shards = jax.tree.map(
    lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), whole, specs
)
found, expected = (
    sharpness.largest_eigenpairs(sharpness.hessian(loss_fn, p, batch), p, k=3)
    for p in (shards, whole)
)
np.testing.assert_allclose(found.values, expected.values, rtol=1e-5)
assert found.vectors["w"].sharding.spec == P(None, None, "x")
assert found.vectors["w"].addressable_shards[0].data.shape == (3, 8, 4)
traces = [
    sharpness.trace(sharpness.hessian(loss_fn, p, batch), p).mean
    for p in (shards, whole)
]
np.testing.assert_allclose(*traces, rtol=1e-5)

# The Krylov basis, the largest array by far, is spread over the devices: a quarter
# each, of which XLA keeps two.
from optax_vasso.sharpness.spectrum import _mesh, _ritz_pairs
big = {"w": jnp.ones((8, 4096)), "b": jnp.arange(3.0)}
big_shards = jax.tree.map(
    lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), big, specs
)
def temporary(params):
    matvec = sharpness.hessian(loss_fn, params, batch)
    args = matvec, params, jax.random.key(0), 160, 1, True, _mesh(params)
    return _ritz_pairs.lower(*args).compile().memory_analysis().temp_size_in_bytes
assert temporary(big_shards) < 0.6 * temporary(big)

explicit = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
vector = jax.device_put(jnp.ones(8), NamedSharding(explicit, P("x")))
try:
    sharpness.largest_eigenpairs(lambda v: v, vector)
except ValueError as error:
    assert "mesh of Auto axes" in str(error)
    print("sharded")
"""


def test_sharded_parameters_have_sharded_eigenvectors_and_a_distributed_basis():
    """In a process of its own, since the number of devices is fixed at the start."""
    flags = "--xla_force_host_platform_device_count=4"
    result = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env={
            "XLA_FLAGS": flags,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": ":".join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout == "sharded\n", result.stderr[-2000:]


# --- trace and density ------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_trace_is_within_three_of_its_own_standard_errors(network, seed):
    matvec = sharpness.hessian(network.loss_fn, network.params, network.data)
    found = sharpness.trace(matvec, network.params, key=jax.random.key(seed))
    assert found.standard_error < 0.2 * abs(found.mean)
    error = abs(found.mean - jnp.trace(network.dense_hessian))
    assert error <= 3 * found.standard_error


def test_the_standard_error_is_the_scatter_of_the_trace(network):
    """Over 100 estimates the ratio of the two is known to 7%."""
    matvec = sharpness.hessian(network.loss_fn, network.params, network.data)
    keys = jax.random.split(jax.random.key(0), 100)
    found = jax.lax.map(
        lambda key: sharpness.trace(matvec, network.params, key=key), keys
    )
    ratio = found.mean.std() / found.standard_error.mean()
    assert ratio == pytest.approx(1, abs=0.2)


def test_the_density_integrates_to_one(network):
    matvec = sharpness.hessian(network.loss_fn, network.params, network.data)
    for bandwidth in (None, 1e-4, 0.1):  # 1e-4 is a tenth of a cell of the grid.
        found = sharpness.spectral_density(matvec, network.params, bandwidth=bandwidth)
        mass = found.density.sum() * (found.grid[1] - found.grid[0])
        # 6 bandwidths leave 1e-9 outside of the grid on either side.
        assert mass == pytest.approx(1, abs=3e-9)
        assert found.weights.sum() == pytest.approx(1, abs=1e-12)
        assert (found.density >= 0).all()


def test_the_density_has_the_moments_of_the_spectrum(network):
    """Gauss quadrature: trace/n and ‖H‖²/n, up to the noise of 64 samples."""
    matvec = sharpness.hessian(network.loss_fn, network.params, network.data)
    found = sharpness.spectral_density(
        matvec, network.params, num_samples=64, num_matvecs=20
    )
    eigenvalues = np.linalg.eigvalsh(network.dense_hessian)
    for power in (1, 2):
        moment = (found.weights * found.nodes**power).sum()
        assert moment == pytest.approx((eigenvalues**power).mean(), rel=0.1)


def test_the_density_of_one_eigenvalue_is_a_peak_there(float64):
    matvec = jax.tree_util.Partial(multiply, 3.0)
    found = sharpness.spectral_density(matvec, jnp.zeros(5))
    assert found.grid[found.density.argmax()] == pytest.approx(3, rel=1e-3)


# --- bad input --------------------------------------------------------------------


def square(params, batch):
    del batch
    return jnp.sum(params**2)


@pytest.mark.parametrize("k", [0, 4, -1])
def test_k_outside_of_the_dimension_is_refused(k):
    matvec = sharpness.hessian(square, jnp.ones(3), None)
    with pytest.raises(ValueError, match=f"number of parameters, 3; got {k}"):
        sharpness.largest_eigenpairs(matvec, jnp.ones(3), k=k)


def test_fewer_products_than_eigenvalues_are_refused():
    matvec = sharpness.hessian(square, jnp.ones(5), None)
    with pytest.raises(ValueError, match="num_matvecs must be between k = 3"):
        sharpness.largest_eigenpairs(matvec, jnp.ones(5), k=3, num_matvecs=2)


def test_a_loss_that_is_no_scalar_is_refused():
    with pytest.raises(ValueError, match=r"array of shape \(3,\)"):
        sharpness.hessian(lambda p, batch: p**2, jnp.ones(3), None)


def test_a_loss_with_auxiliary_output_is_refused():
    with pytest.raises(ValueError, match="returned a tuple"):
        sharpness.hessian(lambda p, batch: (jnp.sum(p), p), jnp.ones(3), None)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_parameters_that_are_not_finite_are_refused(value):
    params = {"w": jnp.ones(3).at[1].set(value)}
    with pytest.raises(ValueError, match=r"params\['w'\] has entries that are NaN"):
        sharpness.hessian(lambda p, batch: jnp.sum(p["w"] ** 2), params, None)


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match="bfloat16: sharpness is measured in"):
        sharpness.hessian(square, jnp.ones(3, jnp.bfloat16), None)


def test_parameters_without_arrays_are_refused():
    with pytest.raises(ValueError, match="params holds no arrays"):
        sharpness.hessian(square, {}, None)


def test_no_batches_are_refused():
    used_up = iter([jnp.ones(2)])
    next(used_up)
    for batches in ([], used_up):
        with pytest.raises(ValueError, match="no batches to measure on"):
            sharpness.hessian(square, jnp.ones(3), batches)


def test_a_batch_without_examples_is_refused():
    with pytest.raises(ValueError, match="no examples"):
        sharpness.hessian(square, jnp.ones(3), jnp.ones((0, 4)))


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


def test_a_loss_without_second_derivatives_names_the_alternative_which_works(float64):
    def loss_fn(params, batch):
        del batch
        return jnp.sum(opaque_square(params))

    params = jnp.ones(3)
    with pytest.raises(TypeError, match="hessian_by_differences"):
        sharpness.hessian(loss_fn, params, None)
    matvec = sharpness.hessian_by_differences(loss_fn, params, None)
    np.testing.assert_allclose(matvec(params), 2 * params, rtol=1e-7)


@jax.custom_vjp
def scaled_tanh(x):
    return jnp.tanh(x)


scaled_tanh.defvjp(
    lambda x: (jnp.tanh(x), x), lambda x, c: (c * (1 - jnp.tanh(x) ** 2),)
)


def test_a_custom_vjp_in_jax_has_a_hessian_but_no_gauss_newton(float64):
    """Forward over reverse differentiates the rule of the custom_vjp."""
    params = jnp.array([0.3, -0.8])

    def model_fn(params, batch):
        del batch
        return scaled_tanh(params)

    def loss_fn(outputs, batch):
        del batch
        return jnp.sum(outputs**2)

    matvec = sharpness.hessian(
        lambda p, batch: loss_fn(model_fn(p, batch), batch), params, None
    )
    expected = jax.hessian(lambda p: jnp.sum(jnp.tanh(p) ** 2))(params) @ params
    np.testing.assert_allclose(matvec(params), expected, rtol=1e-12)
    with pytest.raises(TypeError, match=r"Use sharpness\.hessian"):
        sharpness.gauss_newton(model_fn, loss_fn, params, None)


def test_a_missing_matfree_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matfree", None)
    with pytest.raises(ImportError, match=r"pip install 'optax-vasso\[sharpness\]'$"):
        sharpness.trace(lambda v: v, jnp.ones(7))
