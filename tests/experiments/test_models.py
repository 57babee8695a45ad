"""The models of the image experiments are the published ones."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.vision import models
from experiments.vision.models.pyramidnet import PyramidBottleneck, PyramidNet
from experiments.vision.models.resnet import BottleneckBlock, ResNet
from experiments.vision.models.vgg import VGG
from experiments.vision.models.vit import ViT
from experiments.vision.models.wide_resnet import WideResNet

# Of the shapes of the published models, small enough to run
SMALL = {
    "resnet, CIFAR": ResNet(classes=5, stage_sizes=(1, 1), width=4),
    "resnet, ImageNet": ResNet(
        classes=5,
        stage_sizes=(1, 1),
        width=4,
        block=BottleneckBlock,
        stem="imagenet",
    ),
    "wide resnet": WideResNet(classes=5, depth=10, widening=1),
    "pyramidnet": PyramidNet(classes=5, blocks=1, widening=3),
    "pyramidnet, bottleneck": PyramidNet(
        classes=5, blocks=1, widening=3, block=PyramidBottleneck
    ),
    "vgg, VaSSO": VGG(classes=5, stages=((4,), (8,)), hidden=(6, 6)),
    "vgg, Friendly SAM": VGG(
        classes=5, stages=((4,), (8,)), hidden=(6, 6), drop_first=True
    ),
    "vit, token": ViT(classes=5, patch=4, hidden=8, depth=1, heads=2),
    "vit, mean": ViT(classes=5, patch=4, hidden=8, depth=1, heads=2, pool="mean"),
}
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


def abstract(model, side):
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    init = lambda key, images: model.init(key, images, train=False)  # noqa: E731
    return jax.eval_shape(init, jax.random.key(0), images)


@functools.cache
def published(name, classes):
    """A model by its name, the side of its images, and its abstract variables."""
    model = models.create(name, classes, jnp.bfloat16)
    side = 224 if "imagenet" in name or name == "vit_s16" else 32
    return model, side, abstract(model, side)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("resnet18", 10, 11_173_962),
        ("wrn28_10", 10, 36_479_194),
        cases.exhaustive("wrn34_10", 10, 46_160_474),
        # As model zoos count the network of the paper
        cases.exhaustive("pyramidnet110", 10, 28_485_477),
        # As the layers of Friendly SAM's code add up
        ("pyramidnet110_bottleneck", 10, 18_323_787),
        # The convolutions of VGG-16 have 14,723,136 with their normalization.
        ("vgg16_bn", 10, 14_723_136 + 513 * 4096 + 4097 * 4096 + 4097 * 10),
        ("vgg16_bn_512", 10, 14_723_136 + 2 * 513 * 512 + 513 * 10),
        cases.exhaustive("vgg16_bn_512", 100, 15_299_748),
        # Those of VGG-11 have 9,225,984.
        ("vgg11_bn", 10, 9_225_984 + 513 * 4096 + 4097 * 4096 + 4097 * 10),
        ("resnet18_imagenet", 1000, 11_689_512),
        ("resnet50_imagenet", 1000, 25_557_032),
        ("vit_s16", 1000, 22_050_664),
    ],
)
def test_it_has_as_many_parameters_as_the_published_model(name, classes, expected):
    assert count(published(name, classes)[2]["params"]) == expected


def test_the_vit_for_cifar_has_the_width_and_depth_of_vit_tiny():
    # ViT-Tiny/16 has 5,717,416 parameters at 1,000 classes and 224 x 224 pixels; here
    # there are 990 classes, 132 positions and 720 numbers per patch less.
    less = 990 * 193 + 132 * 192 + 720 * 192
    assert count(published("vit", 10)[2]["params"]) == 5_717_416 - less


def operand_dtypes(jaxpr, primitive):
    """The dtypes that a primitive is applied to, in nested programs too."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive:
            found |= {variable.aval.dtype.name for variable in equation.invars}
        for inner in jax.tree.leaves(equation.params):
            if hasattr(inner, "eqns"):
                found |= operand_dtypes(inner, primitive)
    return found


# Of each kind the smallest.
KINDS = ("pyramidnet110_bottleneck", "resnet18", "resnet18_imagenet", "resnet_tiny")
KINDS += ("vgg11_bn", "vit", "wrn28_10")


@pytest.mark.parametrize("name", cases.every(sorted(models.MODELS), KINDS))
def test_parameters_are_float32_whatever_is_computed_in(name):
    model, _, variables = published(name, 10)
    assert model.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", sorted(SMALL))
def test_bfloat16_is_what_is_computed_in_and_logits_are_float32(name):
    model = SMALL[name].clone(dtype=jnp.bfloat16)
    traced = jax.make_jaxpr(
        lambda variables: model.apply(variables, IMAGES, train=False)
    )(abstract(model, IMAGES.shape[1]))
    (logits,) = traced.out_avals
    assert (logits.shape, logits.dtype) == ((2, 5), jnp.float32)
    assert operand_dtypes(traced.jaxpr, "conv_general_dilated") == {"bfloat16"}


@pytest.mark.parametrize("name", sorted(SMALL))
def test_only_training_changes_the_batch_statistics(name):
    model = SMALL[name]
    generator = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: generator.uniform(0.1, 1, leaf.shape).astype(leaf.dtype),
        abstract(model, IMAGES.shape[1]),
    )
    before = variables.get("batch_stats", {})
    assert bool(before) == (not name.startswith("vit"))

    @jax.jit
    def apply(variables):
        rngs = {"dropout": jax.random.key(0)}
        return [
            model.apply(
                variables, IMAGES, train=train, mutable=["batch_stats"], rngs=rngs
            )
            for train in (True, False)
        ]

    (_, trained), (logits, evaluated) = apply(variables)
    assert np.isfinite(logits).all()
    for old, new, same in zip(
        jax.tree.leaves(before),
        jax.tree.leaves(trained.get("batch_stats", {})),
        jax.tree.leaves(evaluated.get("batch_stats", {})),
        strict=True,
    ):
        assert (old != new).any()
        np.testing.assert_array_equal(old, same)


@pytest.mark.parametrize("drop_first", [False, True])
def test_the_heads_of_vgg_drop_out_while_training_only(drop_first):
    # Without convolutions, which would only take time to compile
    model = VGG(5, stages=(), hidden=(6,), drop_first=drop_first)
    shapes = abstract(model, IMAGES.shape[1])
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)

    @jax.jit
    def logits(key):
        rngs = {"dropout": key}
        return [model.apply(variables, IMAGES, train, rngs=rngs) for train in (1, 0)]

    (trained, evaluated), (others, same) = (logits(jax.random.key(i)) for i in (1, 2))
    np.testing.assert_array_equal(evaluated, same)
    assert (np.asarray(trained) != np.asarray(others)).any()


def test_a_pyramid_shortcut_averages_squares_and_fills_up_with_zeros():
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    shortcut = models.pyramidnet._shortcut(x, np.zeros((1, 2, 2, 3)), 2)
    expected = [[2.5, 4.5], [10.5, 12.5]]
    np.testing.assert_array_equal(shortcut[0, ..., 0], expected)
    np.testing.assert_array_equal(shortcut[0, ..., 1:], 0)


def test_a_pyramid_widens_evenly_to_what_it_is_asked_for():
    variables = published("pyramidnet110", 10)[2]["params"]
    kernels = [variables[f"PyramidBlock_{i}"]["Conv_1"]["kernel"] for i in range(54)]
    # From 16, by 270 in all
    assert [kernel.shape[-1] for kernel in kernels] == list(range(21, 287, 5))


def test_convolutions_start_with_the_variance_2_over_fan_out():
    layer = models.layers.convolution(64, 3, 1, dtype=jnp.float32)
    kernel = layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 64)))["params"]["kernel"]
    # 36,864 normal numbers: the variance is known to a relative 0.0074.
    assert np.var(kernel) == pytest.approx(2 / (9 * 64), rel=0.04)


def test_an_unknown_model_gets_the_names_that_exist():
    with pytest.raises(ValueError, match="no model 'resnet': the names are resnet18,"):
        models.create("resnet", 10)


def test_a_patch_that_does_not_divide_the_image_is_refused():
    with pytest.raises(ValueError, match="16 x 16 pixels do not divide into patches"):
        abstract(ViT(classes=2, patch=5, hidden=4, depth=1, heads=1), 16)
