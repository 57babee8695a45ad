"""VGG (Simonyan, Zisserman 2014, https://arxiv.org/abs/1409.1556) for small images.

As CIFAR papers train it: batch normalization after every convolution, and one linear
layer in place of three.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .layers import batch_norm, classify, convolution


class VGG(nn.Module):
    """VGG-16 with batch normalization.

    Attributes:
      classes: how many logits an image gets.
      stages: features of the 3x3 convolutions between one max pooling and the next;
        images must be at least 2^len(stages) pixels wide.
      dtype: what is computed in.
    """

    classes: int
    stages: tuple[tuple[int, ...], ...] = (
        (64, 64),
        (128, 128),
        (256, 256, 256),
        (512, 512, 512),
        (512, 512, 512),
    )
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Images (N, H, W, 3) -> logits (N, classes), float32."""
        x = images
        for stage in self.stages:
            for features in stage:
                # With the bias of the original, though normalization takes it away.
                x = convolution(features, 3, dtype=self.dtype, use_bias=True)(x)
                x = nn.relu(batch_norm(train, self.dtype)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return classify(x, self.classes)
