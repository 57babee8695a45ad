"""Batches of the image experiments: CIFAR in memory, folders by Grain, label noise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.vision import archives, augmentation, image_folder

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]


class Images(NamedTuple):
    """What a run trains on and is evaluated on, as one process sees it.

    Attributes:
      classes: number of classes.
      side: height and width of an image in pixels.
      train_count: training images of all processes.
      train: seed -> batches of this process, batch t at index t, for ever:
        {"image": (b, side, side, 3) uint8, "label": (b,) int32}.
      held_out: () -> the batches of one pass over the images to evaluate on, with
        "weight" beside: 0 where an image only fills up the batch.
      wrong_labels: training labels that --label-noise has made wrong.
      augment: (key, images) -> normalized, augmented images.
      normalize: images -> normalized images.
    """

    classes: int
    side: int
    train_count: int
    train: Callable[[int], grain.MapDataset]
    held_out: Callable[[], Iterable[Batch]]
    wrong_labels: int
    augment: Callable[[jax.Array, jax.Array], jax.Array]
    normalize: Callable[[jax.Array], jax.Array]


def random_labels(
    labels: np.ndarray, share: float, classes: int, seed: int
) -> np.ndarray:
    """Symmetric label noise: a share of the labels drawn anew from all classes.

    A fixed number of labels, share · n rounded, is chosen and each is replaced by a
    uniformly random one of all classes, its own among them, so that (classes − 1) /
    classes of them become wrong. This is how the authors of Friendly SAM draw it.

    Args:
      labels: (n,) integers.
      share: of the labels that are drawn anew, 0 to 1.
      classes: number of classes.
      seed: the same seed draws the same labels.
    """
    generator = np.random.default_rng([seed, 1])
    chosen = generator.permutation(len(labels))[: round(share * len(labels))]
    noisy = np.array(labels)
    noisy[chosen] = generator.integers(0, classes, len(chosen), labels.dtype)
    return noisy


def split(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and to validate on, both in ascending order.

    Args:
      count: of images.
      share: to validate on, 0 to 1.
      seed: the same seed holds out the same images.
    """
    order = np.random.default_rng([seed, 3]).permutation(count)
    held_out = round(share * count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


@functools.lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the images in an epoch, made once and not for each batch."""
    order = np.random.default_rng([seed, 2, epoch]).permutation(count)
    order.flags.writeable = False  # it is shared
    return order


def from_arrays(data: archives.Dataset, options: Any, seed: int) -> Images:
    """CIFAR, or arrays like it: random crops, flips and cutout on the device.

    With options.validation, that share of the training images, with the labels that
    training sees, takes the place of the test images.
    """
    classes = len(data.class_names)
    noisy = random_labels(data.train_labels, options.label_noise, classes, seed)
    wrong = noisy != data.train_labels
    images, labels = data.train_images, noisy
    test_images, test_labels = data.test_images, data.test_labels
    if options.validation:
        kept, held_out = split(len(labels), options.validation, seed)
        test_images, test_labels = images[held_out], labels[held_out]
        images, labels, wrong = images[kept], labels[kept], wrong[kept]
    own = _own_part(options.batch)
    steps = max(1, len(labels) // options.batch)

    def train(seed: int) -> grain.MapDataset:
        import grain

        def batch(t: int) -> Batch:
            epoch, i = divmod(int(t), steps)
            order = epoch_order(len(labels), seed, epoch)
            chosen = order[i * options.batch : (i + 1) * options.batch][own]
            return {"image": images[chosen], "label": labels[chosen]}

        return grain.MapDataset.range(2**50).map(batch)

    def evaluated() -> Iterable[Batch]:
        count, size = len(test_labels), options.evaluation_batch
        for start in range(0, count, size):
            chosen = np.arange(start, start + size)[_own_part(size)]
            inside = np.minimum(chosen, count - 1)
            yield {
                "image": test_images[inside],
                "label": test_labels[inside],
                "weight": (chosen < count).astype(np.float32),
            }

    mean, std = augmentation.STATISTICS[
        "cifar100" if options.dataset == "cifar100" else "cifar10"
    ]

    def normalize(images: jax.Array) -> jax.Array:
        return augmentation.normalize(images, mean, std)

    def augment(key: jax.Array, images: jax.Array) -> jax.Array:
        crop_key, flip_key, cutout_key = jax.random.split(key, 3)
        images = augmentation.random_crop(crop_key, images)
        images = normalize(augmentation.random_flip(flip_key, images))
        return cutout(cutout_key, images, options)

    return Images(
        classes=classes,
        side=images.shape[1],
        train_count=len(labels),
        train=train,
        held_out=evaluated,
        wrong_labels=int(np.sum(wrong)),
        augment=augment,
        normalize=normalize,
    )


def from_folder(root: Path, options: Any, seed: int) -> Images:
    """``root/train/<class>/<image>`` and ``root/val/<class>/<image>``, as ImageNet is.

    Crops and flips happen where an image is read; cutout on the device. The option
    validation is as in :func:`from_arrays`, and then ``root/val`` is not read.

    Raises:
      DataError: the folders are not there, are empty or have different classes.
    """
    train_folder = image_folder.scan(root / "train")
    test_folder = image_folder.scan(root / "val")
    differ = set(train_folder.class_names) ^ set(test_folder.class_names)
    if differ:
        raise archives.DataError(
            f"{root / 'train'} and {root / 'val'} must have the same classes, and only "
            f"one of them has {', '.join(sorted(differ)[:5])}"
        )
    classes = len(train_folder.class_names)
    paths = train_folder.paths
    labels = random_labels(train_folder.labels, options.label_noise, classes, seed)
    wrong = labels != train_folder.labels
    test_paths, test_labels = test_folder.paths, test_folder.labels
    if options.validation:
        kept, held_out = split(len(paths), options.validation, seed)
        test_paths, test_labels = [paths[i] for i in held_out], labels[held_out]
        paths, labels, wrong = [paths[i] for i in kept], labels[kept], wrong[kept]
    place = (jax.process_index(), jax.process_count())

    def train(seed: int) -> grain.MapDataset:
        return image_folder.train_batches(
            paths, labels, options.batch, options.image_size, seed, *place
        )

    def evaluated() -> Iterable[Batch]:
        return image_folder.read_ahead(
            image_folder.evaluation_batches(
                *(test_paths, test_labels, options.evaluation_batch),
                options.image_size,
                *place,
            )
        )

    mean, std = augmentation.STATISTICS["imagenet"]

    def normalize(images: jax.Array) -> jax.Array:
        return augmentation.normalize(images, mean, std)

    return Images(
        classes=classes,
        side=options.image_size,
        train_count=len(labels),
        train=train,
        held_out=evaluated,
        wrong_labels=int(np.sum(wrong)),
        augment=lambda key, images: cutout(key, normalize(images), options),
        normalize=normalize,
    )


def synthetic(classes: int = 10, per_class: int = 32) -> archives.Dataset:
    """Noisy copies of one coarse picture a class: to see that a program runs."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(32, 224, (classes, 4, 4, 3))
    pictures = coarse.repeat(8, axis=1).repeat(8, axis=2)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.tile(np.arange(classes, dtype=np.int32), count)
        noise = generator.integers(-32, 33, (len(labels), 32, 32, 3))
        return (pictures[labels] + noise).astype(np.uint8), labels

    names = tuple(f"class {label}" for label in range(classes))
    return archives.Dataset(*draw(per_class), *draw(max(1, per_class // 4)), names)


def cutout(key: jax.Array, images: jax.Array, options: Any) -> jax.Array:
    """A square of the mean in a share of the images; size 0 leaves all as they are."""
    if not options.cutout:
        return images
    square_key, share_key = jax.random.split(key)
    cut = jax.random.bernoulli(
        share_key, options.cutout_probability, (images.shape[0], 1, 1, 1)
    )
    return jnp.where(
        cut, augmentation.cutout(square_key, images, options.cutout), images
    )


def _own_part(batch: int) -> slice:
    """Which examples of a batch this process takes.

    Contiguous, so that an example has the same place in the batch, and with it the
    same augmentation, whatever the number of processes.
    """
    size = batch // jax.process_count()
    return slice(jax.process_index() * size, (jax.process_index() + 1) * size)
