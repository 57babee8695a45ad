"""A small causal transformer in Flax: of the language model and of the benchmarks."""

import flax.linen as nn
import jax


class Transformer(nn.Module):
    """Logits of the next token: (batch, length) int32 -> (batch, length, vocabulary).

    Pre-norm blocks of four heads, with a GELU MLP of four times the width.

    Attributes:
      width: of the residual stream.
      blocks: how many.
      vocabulary: how many tokens there are.
      context: learned positions, the longest length; 0 for none.
    """

    width: int
    blocks: int = 4
    vocabulary: int = 256
    context: int = 0

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Apply the network."""
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        if self.context:
            positions = self.param(
                "positions", nn.initializers.normal(0.02), (1, self.context, self.width)
            )
            x += positions[:, : tokens.shape[-1]]
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.blocks):
            x += nn.MultiHeadDotProductAttention(num_heads=4)(
                nn.LayerNorm()(x), mask=mask
            )
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x += nn.Dense(self.width)(hidden)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))
