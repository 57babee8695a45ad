"""Eigenvalues of a curvature: the outermost, their sum, and their density.

A curvature is any function from a tree like the parameters to another that is linear
and symmetric, as :func:`~optax_vasso.sharpness.hessian` makes one.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from optax_vasso.sharpness import checks, programs
from optax_vasso.sharpness.batches import Estimate, estimate
from optax_vasso.sharpness.curvature import Matvec
from optax_vasso.sharpness.lanczos import (
    distribute,
    flat_product,
    lanczos,
    matmul,
    mesh_of,
    shard_as,
)

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


def eigenpairs(
    matvec: Matvec,
    params: PyTree,
    k: int = 1,
    *,
    which: str = "largest",
    num_matvecs: int | None = None,
    key: jax.Array | None = None,
) -> Eigenpairs:
    """The k largest or smallest eigenvalues by the Lanczos iteration.

    The outermost eigenvalues converge first; look at ``residuals``, and raise
    ``num_matvecs`` if they are too large. The Krylov basis takes the memory of
    ``num_matvecs`` sets of parameters.

    Args:
      matvec: a symmetric curvature, as of :func:`hessian`.
      params: a tree of the shapes, dtypes and shardings that the vectors have.
      k: number of eigenvalues.
      which: ``"largest"`` for the largest, the largest first; ``"smallest"`` for the
        smallest (most negative), the smallest first.
      num_matvecs: the number of products, at least k; None for 40 + 2k, or the
        number of parameters where that is less.
      key: random key of the starting vector; None for ``jax.random.key(0)``.

    Returns:
      :class:`Eigenpairs`. The vectors are sharded as the parameters are.

    Raises:
      ValueError: if k is below 1 or above the number of parameters, ``num_matvecs``
        outside of [k, number of parameters], another ``which``, or ``matvec`` does not
        return a tree like ``params``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_vasso import sharpness
      >>> def loss_fn(params, batch):
      ...     return jnp.sum(jnp.array([4.0, 1.0]) * params**2) / 2
      >>> params = jnp.zeros(2)
      >>> curvature = sharpness.hessian(loss_fn, params, None)
      >>> top = sharpness.eigenpairs(curvature, params)
      >>> print(top.values, abs(top.vectors))
      [4.] [[1. 0.]]

    References:
      Lanczos, `An iteration method for the solution of the eigenvalue problem
      <https://doi.org/10.6028/jres.045.026>`_, 1950
    """
    product = _checked(matvec, params)
    if which not in ("largest", "smallest"):
        raise ValueError(f'which must be "largest" or "smallest", got {which!r}.')
    size = _size(params)
    k = checks.count("k", k, 1)
    if num_matvecs is None:
        num_matvecs = min(size, 40 + 2 * k)
    num_matvecs = checks.count("num_matvecs", num_matvecs, 1)
    if not k <= num_matvecs <= size:
        raise ValueError(
            f"k must be at most num_matvecs, and that at most {size}, the number of"
            f" parameters, got k = {k} and num_matvecs = {num_matvecs}."
        )
    key, from_top = checks.key_or_default(key), which == "largest"
    pairs = _ritz_pairs(product, params, key, num_matvecs, k, from_top, mesh_of(params))
    return pairs._replace(vectors=shard_as(pairs.vectors, params))


def trace(
    matvec: Matvec,
    params: PyTree,
    *,
    num_samples: int = 32,
    key: jax.Array | None = None,
) -> Estimate:
    """The sum of the eigenvalues by Hutchinson's estimator.

    The mean of zᵀAz over vectors z of random signs, at one product per sample.

    Args:
      matvec: a curvature, as of :func:`hessian`.
      params: a tree of the shapes and dtypes that the vectors have.
      num_samples: the number of products, at least 2.
      key: random key of the signs; None for ``jax.random.key(0)``.

    Returns:
      :class:`Estimate`; the standard error falls as 1/√num_samples.

    Raises:
      ValueError: for fewer than two samples, or if ``matvec`` does not return a tree
        like ``params``.

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
    product = _checked(matvec, params)
    num_samples = checks.count("num_samples", num_samples, 2)
    keys = jax.random.split(checks.key_or_default(key), num_samples)
    return _trace(product, params, keys, mesh_of(params))


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
      num_points: number of points of the grid, which reaches 6 bandwidths past the
        eigenvalues.
      key: random key of the starting vectors; None for ``jax.random.key(0)``.

    Returns:
      :class:`SpectralDensity`.

    Raises:
      ValueError: for a count below 1 (``num_points``: 2), a bandwidth that is not
        positive, or if ``matvec`` does not return a tree like ``params``.

    References:
      Ghorbani et al., `An Investigation into Neural Net Optimization via Hessian
      Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, 2019
    """
    product = _checked(matvec, params)
    num_samples = checks.count("num_samples", num_samples, 1)
    num_matvecs = min(checks.count("num_matvecs", num_matvecs, 1), _size(params))
    num_points = checks.count("num_points", num_points, 2)
    if bandwidth is not None:
        checks.check_positive("bandwidth", bandwidth)
    keys = jax.random.split(checks.key_or_default(key), num_samples)
    nodes, weights = _quadrature(product, params, keys, num_matvecs, mesh_of(params))
    return _smooth(nodes, weights, bandwidth, num_points)


def _checked(matvec: Matvec, params: PyTree) -> Partial:
    checks.check_float_params("params", params)
    return checks.as_partial("matvec", matvec)


def _size(params: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@programs.compiled(static_argnames=("num_matvecs", "k", "mesh"))
def _ritz_pairs(
    matvec: Matvec,
    params: PyTree,
    key: jax.Array,
    num_matvecs: int,
    k: int,
    from_top: jax.Array,
    mesh: Any,
) -> Eigenpairs:
    found = lanczos(matvec, params, key, num_matvecs, mesh)
    from_bottom = jnp.arange(k)
    chosen = jnp.where(from_top, num_matvecs - 1 - from_bottom, from_bottom)
    vectors = matmul(found.coefficients[:, chosen].T, found.basis)
    _, unravel = ravel_pytree(params)
    return Eigenpairs(
        found.values[chosen],
        jax.vmap(unravel)(vectors),
        found.next_length * jnp.abs(found.coefficients[-1, chosen]),
    )


@programs.compiled(static_argnames="mesh")
def _trace(matvec: Matvec, params: PyTree, keys: jax.Array, mesh: Any) -> Estimate:
    flat, _ = ravel_pytree(params)
    product = flat_product(matvec, params, mesh)

    def quadratic_form(key: jax.Array) -> jax.Array:
        signs = jax.random.rademacher(key, flat.shape, flat.dtype)
        signs = distribute(signs, mesh)
        return jnp.sum(signs * product(signs))

    # In turn, since in parallel they would need the memory of all.
    return estimate(jax.lax.map(quadratic_form, keys))


@programs.compiled(static_argnames=("num_matvecs", "mesh"))
def _quadrature(
    matvec: Matvec, params: PyTree, keys: jax.Array, num_matvecs: int, mesh: Any
) -> tuple[jax.Array, jax.Array]:
    def sample(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = lanczos(matvec, params, key, num_matvecs, mesh)
        return found.values, found.coefficients[0] ** 2 / keys.shape[0]

    return jax.lax.map(sample, keys)


@functools.partial(jax.jit, static_argnames="num_points")
def _smooth(
    nodes: jax.Array,
    weights: jax.Array,
    bandwidth: jax.Array | None,
    num_points: int,
) -> SpectralDensity:
    low, high = nodes.min(), nodes.max()
    # If all eigenvalues are equal, 1% of their size, or of 1 if that is 0.
    spread = jnp.where(high - low > 1e-5 * abs(high), high - low, abs(high))
    default = 0.01 * jnp.where(spread > 0, spread, 1)
    width = default if bandwidth is None else jnp.asarray(bandwidth, nodes.dtype)
    low, high = low - 6 * width, high + 6 * width
    edges = jnp.linspace(low, high, num_points + 1, dtype=nodes.dtype)
    centres = (edges[1:] + edges[:-1]) / 2

    # Averages over cells sum to 1 for any bandwidth; values at points do not.
    def mass(cell: tuple[jax.Array, jax.Array]) -> jax.Array:
        ends = [(edge - nodes) / width for edge in cell]
        # Move both ends to the lower side of the Gaussian, where small masses keep
        # their digits.
        flip = ends[0] > 0
        lower = jnp.where(flip, -ends[1], ends[0])
        upper = jnp.where(flip, -ends[0], ends[1])
        cdf = jax.scipy.special.ndtr
        return jnp.sum(weights * (cdf(upper) - cdf(lower)))

    masses = jax.lax.map(mass, (edges[:-1], edges[1:]))
    return SpectralDensity(
        centres, masses * (num_points / (high - low)), nodes, weights
    )
