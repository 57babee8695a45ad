"""Folders of images, ``root/<class>/<image>``, read with Grain.

Batch t of training is at index t, so a restart needs the number of the step and no
state of an iterator. The images of a step do not depend on how many processes there
are: each reads its own share of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from experiments.vision.archives import DataError

if TYPE_CHECKING:
    import grain

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
# Szegedy et al. 2014 (https://arxiv.org/abs/1409.4842): share of the area, and ratio of
# the sides, of a random crop.
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
# Of the shorter side, what the central crop shows: 224 pixels of 256.
CENTRAL_SHARE = 224 / 256
READING_THREADS = min(16, os.cpu_count() or 1)


class Folder(NamedTuple):
    """The images under a folder.

    Attributes:
      paths: the files, sorted by class and name.
      labels: (n,) int32.
      class_names: class_names[label] is the name of the class's folder, sorted.
    """

    paths: list[Path]
    labels: np.ndarray
    class_names: tuple[str, ...]


def scan(root: Path | str) -> Folder:
    """The images of ``root/<class>/<image>``, found by suffix and not yet opened.

    Raises:
      DataError: there is no such folder, it has no classes, or a class no images.
    """
    root = Path(root)
    folders = [path for path in _entries(root) if path.is_dir()]
    if not folders:
        raise DataError(f"{root} has no folders: expected {root}/<class>/<image>")
    paths, labels = [], []
    for label, folder in enumerate(folders):
        found = [p for p in _entries(folder) if p.suffix.lower() in SUFFIXES]
        if not found:
            raise DataError(f"the class {folder} has no image ({', '.join(SUFFIXES)})")
        paths += found
        labels += [label] * len(found)
    names = tuple(folder.name for folder in folders)
    return Folder(paths, np.array(labels, np.int32), names)


def train_batches(
    paths: Sequence[Path],
    labels: np.ndarray,
    batch: int,
    size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """Batch t of this process at index t, for ever, shuffled anew in each epoch.

    An image is a random resized crop, flipped half of the time.

    Args:
      paths: the image files.
      labels: (n,) integers.
      batch: images of a batch of all processes together; ``process_count`` divides it.
      size: side of the images in pixels.
      seed: of order and augmentation.
      process_index: which process this is.
      process_count: how many there are.

    Returns:
      {"image": (batch/process_count, size, size, 3) uint8, "label": int32} at each
      index. To read ahead of the training, see ``read_ahead``.
    """
    import grain

    own = _own_batch(batch, process_count)

    def example(i: int, generator: np.random.Generator) -> dict[str, Any]:
        original = _read(paths[i])
        image = _resize(original, _random_box(original.size, generator), size)
        if generator.random() < 0.5:
            image = image[:, ::-1]
        return {"image": image, "label": np.int32(labels[i])}

    # The processes share what comes before the slice, random numbers included.
    dataset = grain.MapDataset.source(range(len(paths))).seed(seed).shuffle().repeat()
    dataset = dataset.random_map(example)[process_index::process_count]
    return dataset.batch(own, drop_remainder=True)


def evaluation_batches(
    paths: Sequence[Path],
    labels: np.ndarray,
    batch: int,
    size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """Every image once, in order; all processes have the same number of batches.

    An image is the central crop of ``size`` after its shorter side was resized to
    size · 256/224. The arguments are those of ``train_batches``.

    Returns:
      {"image": (batch/process_count, size, size, 3) uint8, "label": int32, "weight":
      float32} at each index; weight is 1 for an image and 0 for what fills up the
      last batch.
    """
    import grain

    own = _own_batch(batch, process_count)

    def example(i: int) -> dict[str, Any]:
        if i >= len(paths):
            image, label, weight = np.zeros((size, size, 3), np.uint8), 0, 0
        else:
            original = _read(paths[i])
            box = _central_box(original.size, CENTRAL_SHARE)
            image = _resize(original, box, size)
            label, weight = labels[i], 1
        return {
            "image": image,
            "label": np.int32(label),
            "weight": np.float32(weight),
        }

    filled_up = -(-len(paths) // batch) * batch
    dataset = grain.MapDataset.source(range(filled_up)).map(example)
    return dataset[process_index::process_count].batch(own)


def read_ahead(
    batches: grain.MapDataset, first: int = 0, threads: int = READING_THREADS
) -> Iterator[dict[str, np.ndarray]]:
    """The batches from ``first`` on, in order, each read by one of several threads.

    As many batches as threads are kept in memory.
    """
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return iter(batches[first:].to_iter_dataset(options))


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted, without hidden files."""
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error.strerror})") from error


def _own_batch(batch: int, process_count: int) -> int:
    if batch % process_count:
        raise ValueError(
            f"batch must be a multiple of the number of processes, got {batch} for "
            f"{process_count}"
        )
    return batch // process_count


def _read(path: Path) -> Image.Image:
    """An RGB image, upright as EXIF says; transparency is dropped."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        if image.has_transparency_data:
            # A palette with transparency has no direct way to RGB.
            image = image.convert("RGBA")
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the image {path} cannot be read ({reason})") from error


Box = tuple[float, float, float, float]


def _resize(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """A box (left, upper, right, lower) of an image as (size, size, 3) uint8."""
    square = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(square)


def _central_box(sides: tuple[int, int], share: float) -> Box:
    """The central square whose side is a share of the shorter side."""
    width, height = sides
    half = share * min(sides) / 2
    return width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half


def _random_box(sides: tuple[int, int], generator: np.random.Generator) -> Box:
    """A box of random area, ratio and place."""
    width, height = sides
    for _ in range(10):
        area = generator.uniform(*CROP_AREA) * width * height
        ratio = np.exp(generator.uniform(*np.log(CROP_RATIO)))
        w, h = (area * ratio) ** 0.5, (area / ratio) ** 0.5
        if w <= width and h <= height:
            left = generator.uniform(0, width - w)
            upper = generator.uniform(0, height - h)
            # Rounding must not carry the box over the border.
            return left, upper, min(left + w, width), min(upper + h, height)
    return _central_box(sides, 1)  # a long and narrow image
