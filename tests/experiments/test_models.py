"""The models of the examples are the published ones."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from models.resnet import BottleneckBlock, ResNet
from models.vgg import VGG
from models.vit import ViT
from models.wide_resnet import WideResNet

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
    "vgg": VGG(classes=5, stages=((4,), (8, 8))),
    "vit, token": ViT(classes=5, patch=4, hidden=8, depth=1, heads=2),
    "vit, mean": ViT(classes=5, patch=4, hidden=8, depth=1, heads=2, pool="mean"),
}
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


def abstract(model, side):
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    init = lambda key, images: model.init(key, images, train=False)  # noqa: E731
    return jax.eval_shape(init, jax.random.key(0), images)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "classes", "side", "published"),
    [
        ("resnet18", 10, 32, 11_173_962),
        ("wrn28_10", 10, 32, 36_479_194),
        ("vgg16_bn", 10, 32, 14_728_266),
        ("resnet18_imagenet", 1000, 224, 11_689_512),
        ("resnet50_imagenet", 1000, 224, 25_557_032),
        ("vit_s16", 1000, 224, 22_050_664),
    ],
)
def test_it_has_as_many_parameters_as_the_published_model(
    name, classes, side, published
):
    assert count(abstract(models.create(name, classes), side)["params"]) == published


def test_the_vit_for_cifar_has_the_width_and_depth_of_vit_tiny():
    # ViT-Tiny/16 has 5,717,416 parameters at 1,000 classes and 224 x 224 pixels; here
    # there are 990 classes, 132 positions and 720 numbers per patch less.
    less = 990 * 193 + 132 * 192 + 720 * 192
    found = count(abstract(models.create("vit", 10), 32)["params"])
    assert found == 5_717_416 - less


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_parameters_and_logits_are_float32_whatever_is_computed_in(name):
    model = models.create(name, 10, jnp.bfloat16)
    side = 224 if "imagenet" in name or name == "vit_s16" else 32
    variables = abstract(model, side)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    images = jax.ShapeDtypeStruct((3, side, side, 3), jnp.bfloat16)
    logits = jax.eval_shape(
        lambda variables, images: model.apply(variables, images, train=False),
        variables,
        images,
    )
    assert (logits.shape, logits.dtype) == ((3, 10), jnp.float32)


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
        return [
            model.apply(variables, IMAGES, train=train, mutable=["batch_stats"])
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
