"""The networks that the benchmarks train, as pure functions of their parameters.

:mod:`benchmarks.in_torch` has the perceptron and the byte-level transformer as well.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.transformer import Problem, transformer_problem
from experiments.harness.networks import cross_entropy, mlp
from experiments.vision import models


def perceptron(batch: int = 50, width: int = 256) -> Problem:
    """The perceptron of the digits experiment, 64-256-256-10, on random inputs."""
    random = np.random.default_rng(0)
    network = mlp(64, width, width, 10)
    params = jax.tree.map(jnp.asarray, network.init(random))
    data = (
        jnp.asarray(random.standard_normal((batch, 64), np.float32)),
        jnp.asarray(random.integers(0, 10, batch)),
    )

    def loss_fn(params, batch):
        return cross_entropy(network.logits(params, batch[0]), batch[1])

    return Problem(f"perceptron, batch {batch}", params, data, loss_fn)


def resnet(batch: int = 16) -> Problem:
    """ResNet-18 for images of 32 × 32, with the statistics of the batch."""
    return _classifier(models.create("resnet18", 10), batch, 32, "ResNet-18")


def transformer(width: int, batch: int, length: int, blocks: int = 4) -> Problem:
    """The byte-level transformer."""
    return transformer_problem(width, batch, length, blocks)


def resnet50(batch: int, side: int, dtype: str, smoke: bool = False) -> Problem:
    """ResNet-50 for photographs, or a tiny one."""
    name = "resnet_tiny" if smoke else "resnet50_imagenet"
    return _classifier(models.create(name, 1000, jnp.dtype(dtype)), batch, side, name)


def gpt(
    width: int, blocks: int, vocabulary: int, batch: int, length: int, dtype: str
) -> Problem:
    """A decoder of GPT-2's shape: width 768, 12 blocks, 50,257 tokens are 124 M."""
    random = np.random.default_rng(0)
    params = {
        "tokens": _normal(random, vocabulary, width),
        "positions": _normal(random, length, width),
        "blocks": _stacked_blocks(random, width, blocks),
        "norm": jnp.ones(width),
    }
    tokens = jnp.asarray(random.integers(0, vocabulary, (batch, length + 1)), "int32")

    def loss_fn(params, tokens):
        x = params["tokens"][tokens[:, :-1]] + params["positions"][None]
        x = _through(params["blocks"], x.astype(dtype), causal=True)
        x = _normalized(x) * params["norm"].astype(dtype)
        logits = (x @ params["tokens"].T.astype(dtype)).astype(jnp.float32)
        return cross_entropy(logits.reshape(-1, vocabulary), tokens[:, 1:].ravel())

    name = f"GPT, width {width}, {blocks} blocks, {batch} × {length}"
    return Problem(f"{name}, {dtype}", params, tokens, loss_fn)


def vit(
    width: int, blocks: int, patch: int, side: int, batch: int, dtype: str
) -> Problem:
    """A vision transformer: width 768, 12 blocks, patches of 16 are ViT-B."""
    random = np.random.default_rng(0)
    per_side = side // patch
    params = {
        "patches": _normal(random, 3 * patch**2, width),
        "positions": _normal(random, per_side**2, width),
        "blocks": _stacked_blocks(random, width, blocks),
        "norm": jnp.ones(width),
        "head": _normal(random, width, 1000),
    }
    images = random.standard_normal((batch, side, side, 3), np.float32)
    data = jnp.asarray(images), jnp.asarray(random.integers(0, 1000, batch))

    def loss_fn(params, batch):
        images, labels = batch
        squares = images.reshape(len(images), per_side, patch, per_side, patch, 3)
        x = squares.swapaxes(2, 3).reshape(len(images), per_side**2, -1)
        x = x.astype(dtype) @ params["patches"].astype(dtype)
        x = x + params["positions"][None].astype(dtype)
        x = _normalized(jnp.mean(_through(params["blocks"], x, causal=False), 1))
        x = x * params["norm"].astype(dtype)
        return cross_entropy((x @ params["head"].astype(dtype)), labels)

    return Problem(
        f"ViT, width {width}, {blocks} blocks, batch {batch}, {dtype}",
        params,
        data,
        loss_fn,
    )


def _classifier(model, batch, side, name):
    random = np.random.default_rng(0)
    classes = model.classes
    images = jnp.asarray(random.standard_normal((batch, side, side, 3), np.float32))
    variables = jax.jit(model.init, static_argnames="train")(
        jax.random.key(0), images[:1], train=False
    )

    def loss_fn(params, batch):
        logits, _ = model.apply(
            {**variables, "params": params}, batch[0], True, mutable=["batch_stats"]
        )
        return cross_entropy(logits, batch[1])

    data = images, jnp.asarray(random.integers(0, classes, batch))
    name = f"{name}, batch {batch}, {jnp.dtype(model.dtype).name}"
    return Problem(name, variables["params"], data, loss_fn)


def _normal(random, *shape):
    return jnp.asarray(0.02 * random.standard_normal(shape, np.float32))


def _stacked_blocks(random, width, blocks):
    """The weights of all blocks with an axis of blocks in front, for a scan."""
    return {
        "qkv": _normal(random, blocks, width, 3 * width),
        "out": _normal(random, blocks, width, width),
        "up": _normal(random, blocks, width, 4 * width),
        "down": _normal(random, blocks, 4 * width, width),
        "up_bias": jnp.zeros((blocks, 4 * width)),
        "scales": jnp.ones((blocks, 2, width)),
    }


def _through(blocks, x, causal):
    """Pre-norm blocks with heads of 64, one after another in a scan."""

    def block(x, weights):
        w = jax.tree.map(lambda leaf: leaf.astype(x.dtype), weights)
        heads = max(1, x.shape[-1] // 64)
        qkv = (_normalized(x) * w["scales"][0]) @ w["qkv"]
        q, k, v = (
            part.reshape(*x.shape[:2], heads, -1) for part in jnp.split(qkv, 3, -1)
        )
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        x = x + attended.reshape(x.shape) @ w["out"]
        hidden = (_normalized(x) * w["scales"][1]) @ w["up"] + w["up_bias"]
        return x + jax.nn.gelu(hidden) @ w["down"], None

    return jax.lax.scan(block, x, blocks)[0]


def _normalized(x):
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, -1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)).astype(
        x.dtype
    )
