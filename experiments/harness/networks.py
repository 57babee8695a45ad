"""The networks of the experiments: pure functions of a tree of parameters."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Params = Any


class Network(NamedTuple):
    """A classifier.

    Attributes:
      init: random generator -> parameters, NumPy arrays: drawn on the host, since
        generators of random numbers take long to compile.
      logits: (parameters, inputs, reference) -> (batch, classes). Without a reference,
        batch normalization uses the statistics of the inputs, as in training; with one,
        those of the reference, which are training inputs.
    """

    init: Callable[[np.random.Generator], Params]
    logits: Callable[..., jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of (batch, classes) logits, in nats."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


def norm(params: Params) -> float:
    """The Euclidean norm of all parameters."""
    return float(optax.tree.norm(params))


# The same network twice is one object, so that what was compiled for it is found.
@functools.cache
def mlp(*widths: int) -> Network:
    """A multilayer perceptron with ReLU, from input to output widths.

    He initialization: kernels of variance 2/fan-in, biases 0.
    """

    def init(random: np.random.Generator) -> Params:
        return [
            _dense(random, n_in, n_out) for n_in, n_out in itertools.pairwise(widths)
        ]

    def logits(
        params: Params, inputs: jax.Array, reference: jax.Array | None = None
    ) -> jax.Array:
        *hidden, last = params
        h = inputs
        for layer in hidden:
            h = jax.nn.relu(h @ layer["kernel"] + layer["bias"][None])
        return h @ last["kernel"] + last["bias"][None]

    return Network(init, logits)


@functools.cache
def small_convnet(side: int, channels: tuple[int, ...], classes: int) -> Network:
    """3 × 3 convolutions with batch normalization and ReLU; 2 × 2 means between them.

    Inputs are (batch, side²). A convolution of so few pixels is one product with its
    matrix, which is the fastest on a CPU where every row has its own kernel.
    """
    final = side // 2 ** (len(channels) - 1)

    def init(random: np.random.Generator) -> Params:
        layers = [
            _kernel(random, 9, n_in, n_out) | {"scale": np.ones(n_out, np.float32)}
            for n_in, n_out in zip((1, *channels[:-1]), channels, strict=True)
        ]
        return layers, _dense(random, channels[-1] * final**2, classes)

    def logits(
        params: Params, inputs: jax.Array, reference: jax.Array | None = None
    ) -> jax.Array:
        layers, last = params
        both, known = _with_reference(inputs, reference)
        h = both[..., None]
        for depth, layer in enumerate(layers):
            if depth:
                h = _halved(h, side // 2 ** (depth - 1))
            h = _convolved(h, layer["kernel"], side // 2**depth)
            h = jax.nn.relu(_normalized(h, layer, known))
        h = h[: len(inputs)].reshape(len(inputs), -1)
        return h @ last["kernel"] + last["bias"][None]

    return Network(init, logits)


@functools.cache
def strided_convnet(
    shape: tuple[int, ...],
    convolutions: tuple[tuple[int, int], ...],
    classes: int,
    *,
    normalized: bool,
) -> Network:
    """Convolutions of stride 2 with ReLU, in any number of dimensions, and one layer.

    A convolution is the product of its patches with its kernel: where every row has
    its own kernel, a CPU takes eight times as long for XLA's convolution.

    Args:
      shape: of an input without its channel; inputs are (batch, product of these).
      convolutions: (size, filters) of each. Inputs are padded by one zero on each side.
      classes: how many.
      normalized: with batch normalization before every ReLU.
    """
    dimensions = len(shape)
    final = np.array(shape)
    for size, _ in convolutions:
        final = (final + 2 - size) // 2 + 1

    def init(random: np.random.Generator) -> Params:
        layers, channels = [], 1
        for size, filters in convolutions:
            layer = _kernel(random, size**dimensions, channels, filters)
            layer |= {"scale": np.ones(filters, np.float32)} if normalized else {}
            layers.append(layer)
            channels = filters
        return layers, _dense(random, channels * int(final.prod()), classes)

    def logits(
        params: Params, inputs: jax.Array, reference: jax.Array | None = None
    ) -> jax.Array:
        layers, last = params
        both, known = _with_reference(inputs, reference if normalized else None)
        h = both.reshape(len(both), *shape, 1)
        for layer, (size, _) in zip(layers, convolutions, strict=True):
            kernel = layer["kernel"]
            h = _patches(h, size) @ kernel.reshape(-1, kernel.shape[-1])
            h = _normalized(h, layer, known) if normalized else h + layer["bias"]
            h = jax.nn.relu(h)
        h = h[: len(inputs)].reshape(len(inputs), -1)
        return h @ last["kernel"] + last["bias"][None]

    return Network(init, logits)


def _he(random: np.random.Generator, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
    return random.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / fan_in))


def _dense(random: np.random.Generator, n_in: int, n_out: int) -> dict[str, np.ndarray]:
    return {
        "kernel": _he(random, (n_in, n_out), n_in),
        "bias": np.zeros(n_out, np.float32),
    }


def _kernel(
    random: np.random.Generator, size: int, n_in: int, n_out: int
) -> dict[str, np.ndarray]:
    """Of a convolution over ``size`` pixels."""
    return {
        "kernel": _he(random, (size, n_in, n_out), size * n_in),
        "bias": np.zeros(n_out, np.float32),
    }


def _with_reference(
    inputs: jax.Array, reference: jax.Array | None
) -> tuple[jax.Array, slice]:
    """Inputs and reference, to go through together; whose statistics are used."""
    if reference is None:
        return inputs, slice(None)
    return jnp.concatenate([inputs, reference]), slice(len(inputs), None)


def _normalized(h: jax.Array, layer: Params, known: slice) -> jax.Array:
    """Batch normalization of (batch, ..., c) by the statistics of some of the batch."""
    axes = tuple(range(h.ndim - 1))
    mean = jnp.mean(h[known], axes, keepdims=True)
    variance = jnp.var(h[known], axes, keepdims=True)
    scale, bias = (jnp.expand_dims(layer[name], axes) for name in ("scale", "bias"))
    return (h - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias


def _patches(h: jax.Array, size: int) -> jax.Array:
    """What a kernel of stride 2 sees: (batch, n, …, c) -> (batch, n/2, …, sizeᵈ c)."""
    dimensions = h.ndim - 2
    padded = jnp.pad(h, [(0, 0), *[(1, 1)] * dimensions, (0, 0)])
    counts = [(n - size) // 2 + 1 for n in padded.shape[1:-1]]
    seen = []
    for shift in itertools.product(range(size), repeat=dimensions):
        every = zip(shift, counts, strict=True)
        seen.append(padded[:, *(slice(i, i + 2 * count, 2) for i, count in every)])
    return jnp.concatenate(seen, axis=-1)


def _convolved(h: jax.Array, kernel: jax.Array, side: int) -> jax.Array:
    """(batch, side², c) by a kernel (9, c, d) -> (batch, side², d), zeros around."""
    shifts = np.stack(
        [
            np.kron(np.eye(side, k=-i), np.eye(side, k=-j))
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
        ]
    )
    channels, filters = kernel.shape[1:]
    matrix = jnp.einsum("kpq,kcd->pcqd", shifts.astype(np.float32), kernel)
    matrix = matrix.reshape(side**2 * channels, side**2 * filters)
    return (h.reshape(len(h), -1) @ matrix).reshape(len(h), side**2, filters)


def _halved(h: jax.Array, side: int) -> jax.Array:
    """Means over squares of 2 × 2: (batch, side², c) -> (batch, side²/4, c)."""
    squares = h.reshape(len(h), side // 2, 2, side // 2, 2, h.shape[-1])
    return squares.mean((2, 4)).reshape(len(h), side**2 // 4, h.shape[-1])
