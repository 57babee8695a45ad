"""Weights rounded to few bits: the levels, the channels, and another quantizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness.rounding import levels_of, nearest, round_weights
from experiments.harness.transformer import Transformer

WEIGHTS = jax.random.normal(jax.random.key(0), (24, 16))


@pytest.fixture(scope="module")
def params():
    with jax.numpy_rank_promotion("allow"):
        tokens = jnp.zeros((1, 4), jnp.int32)
        model = Transformer(8, 1, vocabulary=12, context=4)
        return jax.jit(model.init)(jax.random.key(1), tokens)["params"]


@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 7), (3, 3)])
def test_a_signed_integer_has_as_many_levels_on_both_sides_of_zero(bits, levels):
    assert levels_of(bits) == levels
    rounded = nearest(WEIGHTS, levels, None)
    assert len(np.unique(rounded)) <= 2 * levels + 1


def test_every_weight_goes_to_the_nearest_level():
    levels = 3
    scale = jnp.max(jnp.abs(WEIGHTS), axis=0, keepdims=True) / levels
    grid = scale * jnp.arange(-levels, levels + 1)[:, None, None]
    distance = jnp.min(jnp.abs(grid - WEIGHTS), axis=0)
    error = jnp.abs(nearest(WEIGHTS, levels, (0,)) - WEIGHTS)
    np.testing.assert_allclose(error, distance, atol=1e-6)  # float32 rounds the scale


def test_rounding_twice_is_rounding_once_and_the_largest_weight_stays():
    rounded = nearest(WEIGHTS, 7, (0,))
    np.testing.assert_allclose(nearest(rounded, 7, (0,)), rounded, rtol=1e-6)
    np.testing.assert_allclose(
        jnp.max(jnp.abs(rounded), axis=0), jnp.max(jnp.abs(WEIGHTS), axis=0), rtol=1e-6
    )


def test_a_channel_of_zeros_stays_zero():
    weights = WEIGHTS.at[:, 0].set(0.0)
    np.testing.assert_array_equal(nearest(weights, 7, (0,))[:, 0], 0.0)


def test_scales_of_channels_are_those_of_what_a_layer_sums_over(params):
    """To scale an output channel scales its rounded weights, and no others."""
    block = "MultiHeadDotProductAttention_0"
    rounded = jax.jit(lambda params: round_weights(params, 3, per_channel=True))

    def scaled(factor, *path):
        changed = jax.tree.map(lambda leaf: leaf, params)
        layer = changed
        for name in path[:-1]:
            layer = layer[name]
        layer[path[-1]] = layer[path[-1]] * factor
        return changed

    for path, channels in (
        (("Dense_0", "kernel"), (1, 32)),
        ((block, "query", "kernel"), (1, 4, 2)),
        ((block, "out", "kernel"), (1, 1, 8)),
        (("Embed_0", "embedding"), (12, 1)),
    ):
        # Powers of two, so that scaling rounds nothing by itself.
        factor = 2.0 ** np.arange(np.prod(channels)).reshape(channels) % 7 + 1
        factor = 2.0 ** np.round(factor)
        before, after = rounded(params), rounded(scaled(factor, *path))
        for name in path:
            before, after = before[name], after[name]
        np.testing.assert_array_equal(after, before * factor)


def test_only_weight_matrices_are_rounded(params):
    rounded = round_weights(params, 1, per_channel=False)
    for (path, before), after in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(rounded), strict=True
    ):
        if path[-1].key in ("kernel", "embedding"):
            assert len(np.unique(after)) <= 3
        else:
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(("bits", "kind"), [(8, jnp.int8), (4, jnp.int4), (3, "int3")])
@pytest.mark.parametrize("axes", [(0,), None])
def test_rounding_is_that_of_qwix(bits, kind, axes):
    """Qwix puts half a level above the largest, so its range is taken as much wider."""
    qwix = pytest.importorskip("qwix")
    levels = levels_of(bits)
    quantized = qwix.quantize(
        WEIGHTS,
        kind,
        channelwise_axes=() if axes is None else (1,),
        calibration_method=f"absmax,{(levels + 0.5) / levels}",
    )
    np.testing.assert_allclose(
        nearest(WEIGHTS, levels, axes), qwix.dequantize(quantized), rtol=1e-5
    )
