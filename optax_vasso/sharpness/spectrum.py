"""What the eigenvalues of a curvature are: the outermost, their sum, their density.

A curvature is any function from a tree like the parameters to another that is linear
and symmetric, as :func:`~optax_vasso.sharpness.hessian` makes one. The estimator of the
trace is matfree's.

References:
  Krämer, `matfree <https://github.com/pnkraemer/matfree>`_, 2023

  Ghorbani et al., `An Investigation into Neural Net Optimization via Hessian Eigenvalue
  Density <https://arxiv.org/abs/1901.10159>`_, 2019
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from optax_vasso.sharpness import batches as data
from optax_vasso.sharpness.batches import Estimate
from optax_vasso.sharpness.hessian import Matvec

PyTree = Any


class Eigenpairs(NamedTuple):
    """Eigenvalues at one end of a spectrum.

    Attributes:
      values: the eigenvalues, an array of shape ``(k,)``, the outermost first.
      vectors: the eigenvectors, of norm 1: a tree like the parameters with one more
        leading axis of length k.
      residuals: ‖Av − λv‖₂ of each pair, shape ``(k,)``, as the Lanczos iteration knows
        it: some eigenvalue of A lies within this distance of λ. Rounding adds about
        10 eps·max abs(λ), 1e-6 of the largest in float32.
    """

    values: jax.Array
    vectors: PyTree
    residuals: jax.Array


class SpectralDensity(NamedTuple):
    """How the eigenvalues are distributed; the density integrates to 1.

    Attributes:
      grid: eigenvalues λ, evenly spaced, shape ``(num_points,)``.
      density: the share of eigenvalues per unit of λ, averaged over the cell around
        each grid point: ``sum(density) * (grid[1] - grid[0])`` is 1.
      nodes: Ritz values of every sample, shape ``(num_samples, num_matvecs)``.
      weights: their quadrature weights, of the same shape and with sum 1:
        ``n * sum(weights * f(nodes))`` estimates the trace of f(A).
    """

    grid: jax.Array
    density: jax.Array
    nodes: jax.Array
    weights: jax.Array


def largest_eigenpairs(
    matvec: Matvec,
    params: PyTree,
    k: int = 1,
    *,
    num_matvecs: int | None = None,
    key: jax.Array | None = None,
) -> Eigenpairs:
    """The k largest eigenvalues by the Lanczos iteration, the largest first.

    The outermost eigenvalues converge first; look at ``residuals``, and raise
    ``num_matvecs`` where they are too large. The Krylov basis takes the memory of
    ``num_matvecs`` sets of parameters.

    Args:
      matvec: a symmetric curvature, as of :func:`hessian`.
      params: a tree of the shapes, dtypes and shardings that the vectors have.
      k: how many.
      num_matvecs: the number of products, at least k; None for 40 + 2k, or the
        number of parameters where that is less.
      key: of the random starting vector; None for ``jax.random.key(0)``.

    Returns:
      :class:`Eigenpairs`. The vectors are sharded as the parameters are.

    Raises:
      ValueError: if k is below 1 or above the number of parameters, or ``num_matvecs``
        outside of [k, number of parameters].

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_vasso import sharpness
      >>> def loss_fn(params, batch):
      ...     return jnp.sum(jnp.array([4.0, 1.0]) * params**2) / 2
      >>> params = jnp.zeros(2)
      >>> curvature = sharpness.hessian(loss_fn, params, None)
      >>> top = sharpness.largest_eigenpairs(curvature, params)
      >>> print(top.values, abs(top.vectors))
      [4.] [[1. 0.]]

    References:
      Lanczos, `An iteration method for the solution of the eigenvalue problem
      <https://doi.org/10.6028/jres.045.026>`_, 1950
    """
    return _outer_eigenpairs(matvec, params, k, num_matvecs, key, from_top=True)


def smallest_eigenpairs(
    matvec: Matvec,
    params: PyTree,
    k: int = 1,
    *,
    num_matvecs: int | None = None,
    key: jax.Array | None = None,
) -> Eigenpairs:
    """The k smallest (most negative) eigenvalues, the smallest first.

    Arguments, result and errors as :func:`largest_eigenpairs`.
    """
    return _outer_eigenpairs(matvec, params, k, num_matvecs, key, from_top=False)


def trace(
    matvec: Matvec,
    params: PyTree,
    *,
    num_samples: int = 32,
    key: jax.Array | None = None,
) -> Estimate:
    """The sum of the eigenvalues by Hutchinson's estimator.

    The mean of zᵀAz over vectors z of random signs, at one product a sample.

    Args:
      matvec: a curvature, as of :func:`hessian`.
      params: a tree of the shapes and dtypes that the vectors have.
      num_samples: the number of products, at least 2.
      key: of the random signs; None for ``jax.random.key(0)``.

    Returns:
      :class:`Estimate`; the standard error falls as 1/√num_samples.

    Raises:
      ValueError: for fewer than two samples.
      ImportError: without matfree.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_vasso import sharpness
      >>> def loss_fn(params, batch):
      ...     return jnp.sum(jnp.array([4.0, 1.0]) * params**2) / 2
      >>> params = jnp.zeros(2)
      >>> curvature = sharpness.hessian(loss_fn, params, None)
      >>> print(sharpness.trace(curvature, params).mean)
      5.0

    References:
      Hutchinson, `A Stochastic Estimator of the Trace of the Influence Matrix
      <https://doi.org/10.1080/03610919008812866>`_, 1990
    """
    _stochtrace()
    data.check_params(params)
    data.check_at_least("num_samples", num_samples, 2)
    key = jax.random.key(0) if key is None else key
    return _trace(_as_tree(matvec), params, key, num_samples, _mesh(params))


def spectral_density(
    matvec: Matvec,
    params: PyTree,
    *,
    num_samples: int = 8,
    num_matvecs: int = 64,
    bandwidth: float | None = None,
    num_points: int = 1024,
    key: jax.Array | None = None,
) -> SpectralDensity:
    """The density of the eigenvalues by stochastic Lanczos quadrature.

    ``num_samples`` Lanczos iterations of ``num_matvecs`` products each give weighted
    Ritz values; a Gaussian of width ``bandwidth`` about each makes a density of them.

    Args:
      matvec: a symmetric curvature, as of :func:`hessian`.
      params: a tree of the shapes and dtypes that the vectors have.
      num_samples: the number of random starting vectors.
      num_matvecs: products for each, cut to the number of parameters.
      bandwidth: standard deviation of the Gaussian, in units of the eigenvalues; None
        for 1% of the range that they span.
      num_points: of the grid, which reaches 6 bandwidths past the eigenvalues.
      key: of the starting vectors; None for ``jax.random.key(0)``.

    Returns:
      :class:`SpectralDensity`.

    Raises:
      ValueError: for a count below 1 (``num_points``: 2) or a bandwidth that is not
        positive.

    References:
      Ghorbani et al., `An Investigation into Neural Net Optimization via Hessian
      Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, 2019
    """
    data.check_params(params)
    data.check_at_least("num_samples", num_samples, 1)
    data.check_at_least("num_matvecs", num_matvecs, 1)
    data.check_at_least("num_points", num_points, 2)
    if bandwidth is not None:
        data.check_positive("bandwidth", bandwidth)
    num_matvecs = min(num_matvecs, _size(params))
    key = jax.random.key(0) if key is None else key
    keys = jax.random.split(key, num_samples)
    nodes, weights = _quadrature(
        _as_tree(matvec), params, keys, num_matvecs, _mesh(params)
    )
    return _smooth(nodes, weights, bandwidth, num_points)


def _outer_eigenpairs(
    matvec: Matvec,
    params: PyTree,
    k: int,
    num_matvecs: int | None,
    key: jax.Array | None,
    *,
    from_top: bool,
) -> Eigenpairs:
    data.check_params(params)
    size = _size(params)
    if not 1 <= k <= size:
        raise ValueError(
            f"k must be between 1 and the number of parameters, {size}; got {k}."
        )
    if num_matvecs is None:
        num_matvecs = min(size, 40 + 2 * k)
    if not k <= num_matvecs <= size:
        raise ValueError(
            f"num_matvecs must be between k = {k} and the number of parameters, {size};"
            f" got {num_matvecs}."
        )
    key = jax.random.key(0) if key is None else key
    pairs = _ritz_pairs(
        _as_tree(matvec), params, key, num_matvecs, k, from_top, _mesh(params)
    )
    return pairs._replace(vectors=_shard_as(pairs.vectors, params))


@functools.partial(jax.jit, static_argnames=("num_matvecs", "k", "mesh"))
def _ritz_pairs(
    matvec: Matvec,
    params: PyTree,
    key: jax.Array,
    num_matvecs: int,
    k: int,
    from_top: jax.Array,
    mesh: Any,
) -> Eigenpairs:
    basis, values, coefficients, last = _lanczos(matvec, params, key, num_matvecs, mesh)
    from_bottom = jnp.arange(k)
    chosen = jnp.where(from_top, num_matvecs - 1 - from_bottom, from_bottom)
    vectors = coefficients[:, chosen].T @ basis
    _, unravel = ravel_pytree(params)
    return Eigenpairs(
        values[chosen],
        jax.vmap(unravel)(vectors),
        last * jnp.abs(coefficients[-1, chosen]),
    )


def _lanczos(
    matvec: Matvec, params: PyTree, key: jax.Array, num_matvecs: int, mesh: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The Krylov basis as rows, Ritz values, their coefficients, the last length.

    matfree has this iteration, too, but keeps the basis as columns: on a CPU its two
    orthogonalizations then add 17% to the time of ten products of a transformer, here
    9% (``benchmarks/hessian_cost.py``). And it divides by zero where the basis becomes
    invariant, at once if A is a multiple of the identity; here it goes on with a fresh
    vector, and so finds eigenvalues as often as they occur.
    """
    flat, unravel = ravel_pytree(params)
    key, start_key = jax.random.split(key)
    start = jax.random.normal(start_key, flat.shape, flat.dtype)
    eps = jnp.finfo(flat.dtype).eps

    def outside(vector: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The part of a vector outside of the basis, and its coefficients inside."""
        first = basis @ vector
        rest = vector - first @ basis
        # Once more for what rounding left in the first time: twice is enough.
        second = basis @ rest
        return _distribute(rest - second @ basis, mesh), first + second

    def step(i: jax.Array, carry: Any) -> Any:
        basis, projected, vector, _ = carry
        basis = _distribute(basis.at[i].set(vector), mesh)
        image = ravel_pytree(matvec(unravel(vector)))[0]
        rest, coefficients = outside(_distribute(image, mesh), basis)
        projected = projected.at[i].set(coefficients)
        length = jnp.linalg.norm(rest)
        # Below this the rest is the rounding of the image.
        is_invariant = length <= 10 * eps * jnp.linalg.norm(image)
        fresh = functools.partial(jax.random.normal, shape=flat.shape, dtype=flat.dtype)
        rest = jax.lax.cond(
            is_invariant,
            lambda: outside(fresh(jax.random.fold_in(key, i)), basis)[0],
            lambda: rest,
        )
        return basis, projected, rest / jnp.linalg.norm(rest), length

    basis = jnp.zeros((num_matvecs, flat.size), flat.dtype)
    projected = jnp.zeros((num_matvecs, num_matvecs), flat.dtype)
    start = _distribute(start / jnp.linalg.norm(start), mesh)
    basis, projected, _, length = jax.lax.fori_loop(
        0, num_matvecs, step, (basis, projected, start, jnp.zeros((), flat.dtype))
    )
    # Row i holds the products of the image of vector i with the vectors up to i.
    lower = jnp.tril(projected)
    values, coefficients = jnp.linalg.eigh(lower + jnp.tril(projected, -1).T)
    return basis, values, coefficients, length


@functools.partial(jax.jit, static_argnames=("num_samples", "mesh"))
def _trace(
    matvec: Matvec, params: PyTree, key: jax.Array, num_samples: int, mesh: Any
) -> Estimate:
    stochtrace = _stochtrace()
    flat, unravel = ravel_pytree(params)
    signs = stochtrace.sampler_signs(flat, num=1)
    quadratic_form = stochtrace.monte_carlo_trace()

    def product(vector: jax.Array) -> jax.Array:
        return ravel_pytree(matvec(unravel(vector)))[0]

    # One after the other: matfree's own estimator runs all the products at once.
    samples = jax.lax.map(
        lambda key: quadratic_form(product, _distribute(signs(key)[0], mesh)),
        jax.random.split(key, num_samples),
    )
    return data.estimate(samples)


@functools.partial(jax.jit, static_argnames=("num_matvecs", "mesh"))
def _quadrature(
    matvec: Matvec, params: PyTree, keys: jax.Array, num_matvecs: int, mesh: Any
) -> tuple[jax.Array, jax.Array]:
    def sample(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, values, coefficients, _ = _lanczos(matvec, params, key, num_matvecs, mesh)
        return values, coefficients[0] ** 2 / keys.shape[0]

    return jax.lax.map(sample, keys)


def _smooth(
    nodes: jax.Array, weights: jax.Array, bandwidth: float | None, num_points: int
) -> SpectralDensity:
    low, high = nodes.min(), nodes.max()
    # All eigenvalues may be equal: then 1% of their size, or of 1 if it is 0.
    spread = jnp.where(high - low > 1e-5 * abs(high), high - low, abs(high))
    default = 0.01 * jnp.where(spread > 0, spread, 1)
    width = default if bandwidth is None else jnp.asarray(bandwidth, nodes.dtype)
    low, high = low - 6 * width, high + 6 * width
    edges = jnp.linspace(low, high, num_points + 1, dtype=nodes.dtype)
    centres = (edges[1:] + edges[:-1]) / 2

    # Averages over cells, not values at points: they sum to 1 for any bandwidth.
    def mass(cell: tuple[jax.Array, jax.Array]) -> jax.Array:
        ends = [(edge - nodes) / width for edge in cell]
        # Both ends on the lower side of the Gaussian, where small masses keep digits.
        flip = ends[0] > 0
        lower = jnp.where(flip, -ends[1], ends[0])
        upper = jnp.where(flip, -ends[0], ends[1])
        cdf = jax.scipy.special.ndtr
        return jnp.sum(weights * (cdf(upper) - cdf(lower)))

    masses = jax.lax.map(mass, (edges[:-1], edges[1:]))
    return SpectralDensity(
        centres, masses * (num_points / (high - low)), nodes, weights
    )


def _size(params: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _as_tree(matvec: Matvec) -> Partial:
    return matvec if isinstance(matvec, Partial) else Partial(matvec)


def _mesh(params: PyTree) -> Any:
    """The devices that the parameters are sharded over, if there are several."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            if AxisType.Explicit in sharding.mesh.axis_types:
                raise ValueError(
                    "The parameters are sharded over a mesh of Explicit axes, on which"
                    " JAX cannot flatten them. Put them on a mesh of Auto axes:"
                    " jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,))."
                )
            return sharding.mesh
    return None


def _distribute(array: jax.Array, mesh: Any) -> jax.Array:
    """Spread flat vectors, or rows of them, evenly over all devices."""
    if mesh is None:
        return array
    spec = PartitionSpec(*[None] * (array.ndim - 1), mesh.axis_names)
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))


def _shard_as(vectors: PyTree, params: PyTree) -> PyTree:
    """Give stacked vectors the sharding of the parameters."""

    def shard(stacked: jax.Array, leaf: jax.Array) -> jax.Array:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            return stacked
        spec = PartitionSpec(None, *sharding.spec)
        return jax.device_put(stacked, NamedSharding(sharding.mesh, spec))

    return jax.tree.map(shard, vectors, params)


def _stochtrace() -> Any:
    try:
        from matfree import stochtrace
    except ImportError:
        raise ImportError(
            "The trace needs matfree: pip install 'optax-vasso[sharpness]'"
        ) from None
    return stochtrace
