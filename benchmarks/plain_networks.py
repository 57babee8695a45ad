"""Networks as pure functions of their parameters, which need JAX and Optax alone.

ResNet-18, a decoder of GPT-2's shape and a vision transformer, on random data.
:mod:`benchmarks.networks` has those that are made with Flax.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.networks import cross_entropy

PyTree = Any
Shape = tuple[int, ...]
# Features and stride of the first block of each stage; a stage has two blocks.
RESNET18 = ((64, 1), (128, 2), (256, 2), (512, 2))
SMALL_RESNET = ((8, 1), (16, 2))


class Problem(NamedTuple):
    """A network to train.

    Attributes:
      name: network and batch, for tables.
      params: initial parameters.
      batch: what a step is given, with the examples in front.
      loss_fn: (params, batch) -> mean cross-entropy in nats.
    """

    name: str
    params: PyTree
    batch: PyTree
    loss_fn: Callable[[PyTree, PyTree], jax.Array]


def resnet(stages: tuple[tuple[int, int], ...], batch: int, dtype: str) -> Problem:
    """A residual network for 10 classes of images of 32 × 32, as for CIFAR.

    Batch normalization uses the statistics of the batch.
    """
    random = np.random.default_rng(0)
    features = stages[0][0]
    params = {"stem": _convolution(random, 3, 3, features)}
    for i, (wide, stride) in enumerate(stages):
        for j in range(2):
            params[f"block{i}{j}"] = _block(random, features, wide, stride)
            features, stride = wide, 1
    params["head"] = _normal(random, features, 10)
    images = jnp.asarray(random.standard_normal((batch, 32, 32, 3), np.float32))
    data = images, jnp.asarray(random.integers(0, 10, batch))

    def loss_fn(params: PyTree, batch: PyTree) -> jax.Array:
        images, labels = batch
        x = jax.nn.relu(_convolved(images.astype(dtype), params["stem"]))
        for i, (_, first) in enumerate(stages):
            for j in range(2):
                weights, stride = params[f"block{i}{j}"], 1 if j else first
                y = jax.nn.relu(_convolved(x, weights["first"], stride))
                y = _convolved(y, weights["second"])
                if "shortcut" in weights:
                    x = _convolved(x, weights["shortcut"], stride)
                x = jax.nn.relu(x + y)
        pooled = jnp.mean(x.astype(jnp.float32), (1, 2))
        return cross_entropy(pooled @ params["head"], labels)

    name = f"ResNet-{2 + 4 * len(stages)}, batch {batch}, {dtype}"
    return Problem(name, params, data, loss_fn)


def gpt_shapes(width: int, blocks: int, vocabulary: int, length: int) -> PyTree:
    """Shapes of a decoder: width 768, 12 blocks and 50,257 tokens are 124 M."""
    return {
        "tokens": (vocabulary, width),
        "positions": (length, width),
        "blocks": _stacked_blocks(width, blocks),
        "norm": (width,),
    }


def gpt_loss(
    params: PyTree,
    tokens: jax.Array,
    dtype: str = "float32",
    layer: Callable[[Any], Any] = lambda block: block,
) -> jax.Array:
    """Cross-entropy of the next token.

    Args:
      params: of :func:`gpt_shapes`.
      tokens: (batch, length + 1), int32.
      dtype: what is computed in.
      layer: goes around each block, for instance :func:`jax.checkpoint`.
    """
    x = params["tokens"][tokens[:, :-1]] + params["positions"][None]
    x = _through(params["blocks"], x.astype(dtype), layer, causal=True)
    x = _normalized(x) * params["norm"].astype(dtype)
    logits = (x @ params["tokens"].T.astype(dtype)).astype(jnp.float32)
    return cross_entropy(logits, tokens[:, 1:])


def gpt(
    width: int, blocks: int, vocabulary: int, batch: int, length: int, dtype: str
) -> Problem:
    """A decoder on random tokens."""
    random = np.random.default_rng(0)
    shapes = gpt_shapes(width, blocks, vocabulary, length)
    tokens = jnp.asarray(random.integers(0, vocabulary, (batch, length + 1)), "int32")
    name = f"GPT, width {width}, {blocks} blocks, {batch} × {length}, {dtype}"
    loss_fn = functools.partial(gpt_loss, dtype=dtype)
    return Problem(name, _drawn(random, shapes), tokens, loss_fn)


def vit(
    width: int, blocks: int, patch: int, side: int, batch: int, dtype: str
) -> Problem:
    """A vision transformer: width 384, 12 blocks and patches of 16 are ViT-S."""
    random = np.random.default_rng(0)
    per_side = side // patch
    shapes = {
        "patches": (3 * patch**2, width),
        "positions": (per_side**2, width),
        "blocks": _stacked_blocks(width, blocks),
        "norm": (width,),
        "head": (width, 1000),
    }
    images = random.standard_normal((batch, side, side, 3), np.float32)
    data = jnp.asarray(images), jnp.asarray(random.integers(0, 1000, batch))

    def loss_fn(params: PyTree, batch: PyTree) -> jax.Array:
        images, labels = batch
        squares = images.reshape(len(images), per_side, patch, per_side, patch, 3)
        x = squares.swapaxes(2, 3).reshape(len(images), per_side**2, -1)
        x = x.astype(dtype) @ params["patches"].astype(dtype)
        x = x + params["positions"][None].astype(dtype)
        x = _through(params["blocks"], x, lambda block: block, causal=False)
        x = _normalized(jnp.mean(x, 1)) * params["norm"].astype(dtype)
        logits = (x @ params["head"].astype(dtype)).astype(jnp.float32)
        return cross_entropy(logits, labels)

    name = f"ViT, width {width}, {blocks} blocks, batch {batch}, {dtype}"
    return Problem(name, _drawn(random, shapes), data, loss_fn)


def is_shape(node: Any) -> bool:
    """Whether a node of a tree of shapes is a shape."""
    return isinstance(node, tuple)


def _drawn(random: np.random.Generator, shapes: PyTree) -> PyTree:
    """Normal weights of deviation 0.02; scales are ones and biases zeros."""

    def draw(path: Any, shape: Shape) -> jax.Array:
        name = path[-1].key
        if "norm" in name:
            return jnp.ones(shape)
        return jnp.zeros(shape) if "bias" in name else _normal(random, *shape)

    return jax.tree_util.tree_map_with_path(draw, shapes, is_leaf=is_shape)


def _normal(random: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(0.02 * random.standard_normal(shape, np.float32))


def _convolution(
    random: np.random.Generator, kernel: int, n_in: int, n_out: int
) -> dict[str, jax.Array]:
    """A convolution and the batch normalization behind it, He et al. 2015."""
    weights = random.standard_normal((kernel, kernel, n_in, n_out), np.float32)
    return {
        "kernel": jnp.asarray(weights * np.float32((2 / (kernel**2 * n_out)) ** 0.5)),
        "scale": jnp.ones(n_out),
        "bias": jnp.zeros(n_out),
    }


def _block(random: np.random.Generator, n_in: int, n_out: int, stride: int) -> PyTree:
    block = {
        "first": _convolution(random, 3, n_in, n_out),
        "second": _convolution(random, 3, n_out, n_out),
    }
    if stride > 1 or n_in != n_out:
        block["shortcut"] = _convolution(random, 1, n_in, n_out)
    return block


def _convolved(x: jax.Array, weights: PyTree, stride: int = 1) -> jax.Array:
    """A convolution with batch normalization, of which the statistics are float32."""
    kernel = weights["kernel"].astype(x.dtype)
    pad = (kernel.shape[0] // 2,) * 2
    x = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        (pad, pad),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, (0, 1, 2), keepdims=True)
    square = jnp.mean(wide**2, (0, 1, 2), keepdims=True)
    factor = jax.lax.rsqrt(square - mean**2 + 1e-5) * weights["scale"]
    return ((wide - mean) * factor + weights["bias"]).astype(x.dtype)


def _stacked_blocks(width: int, blocks: int) -> dict[str, Shape]:
    """The weights of all blocks with an axis of blocks in front, for a scan."""
    return {
        "qkv": (blocks, width, 3, width),
        "out": (blocks, width, width),
        "up": (blocks, width, 4 * width),
        "down": (blocks, 4 * width, width),
        "up_bias": (blocks, 4 * width),
        "norms": (blocks, 2, width),
    }


def _through(
    blocks: PyTree, x: jax.Array, layer: Callable[[Any], Any], *, causal: bool
) -> jax.Array:
    """Pre-norm blocks with heads of 64, one after another in a scan."""

    def block(x: jax.Array, weights: PyTree) -> tuple[jax.Array, None]:
        w = jax.tree.map(lambda leaf: leaf.astype(x.dtype), weights)
        heads = max(1, x.shape[-1] // 64)
        # An axis of three, not three times the width: tensor parallelism divides each.
        qkv = jnp.tensordot(_normalized(x) * w["norms"][0], w["qkv"], 1)
        q, k, v = (qkv[:, :, i].reshape(*x.shape[:2], heads, -1) for i in range(3))
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        x = x + attended.reshape(x.shape) @ w["out"]
        hidden = (_normalized(x) * w["norms"][1]) @ w["up"] + w["up_bias"]
        return x + jax.nn.gelu(hidden) @ w["down"], None

    return jax.lax.scan(layer(block), x, blocks)[0]


def _normalized(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, -1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype)
