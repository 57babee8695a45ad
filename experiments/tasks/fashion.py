"""Fashion-MNIST: images of clothes, of which networks see means over 2 × 2 pixels.

A seed draws 10,000 training and 2,000 validation images from the 60,000 that its
authors train on; all of their 10,000 test images are tested on. In batches of 100 an
MLP 196-64-64-10 is trained for 18 epochs, and a convolutional network for 12: 3 × 3
convolutions of 8 and of 16 filters with stride 2 and batch normalization.

The files are those of Debian's package dataset-fashion-mnist, or lie in the folder that
the environment variable FASHION_MNIST names.

References:
  Xiao et al., `Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
  Algorithms <https://arxiv.org/abs/1708.07747>`_, 2017.
"""

import functools
import gzip
import math
import os
from pathlib import Path

import numpy as np

from experiments.harness.networks import mlp, strided_convnet
from experiments.tasks import Task, is_cnn, with_random_labels

CLASSES = 10
FOLDER = Path("/usr/share/datasets/fashion-mnist")


def load(name: str, variant: str) -> Task:
    """Fashion-MNIST with a percentage of random labels."""
    inputs, labels, trained_on = examples(Path(os.environ.get("FASHION_MNIST", FOLDER)))
    side = math.isqrt(inputs.shape[1])
    convolutional = is_cnn(name)
    return Task(
        name=name,
        inputs=inputs,
        labels=labels,
        given_labels=with_random_labels(labels, int(variant) / 100, CLASSES),
        pool=np.arange(trained_on),
        test=np.arange(trained_on, len(labels)),
        groups=np.arange(len(labels)),
        training=min(10_000, 5 * trained_on // 6),
        validation=min(2_000, trained_on // 6),
        classes=CLASSES,
        network=strided_convnet(
            (side, side), ((3, 8), (3, 16)), CLASSES, normalized=True
        )
        if convolutional
        else mlp(side**2, 64, 64, CLASSES),
        epochs=12 if convolutional else 18,
        batch=100,
        epochs_per_call=2 if convolutional else 3,
    )


@functools.cache
def examples(folder: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Inputs (examples, 196) float32, labels, and how many are not test examples."""
    images, labels = zip(
        *(
            (
                read_idx(folder / f"{part}-images-idx3-ubyte.gz"),
                read_idx(folder / f"{part}-labels-idx1-ubyte.gz"),
            )
            for part in ("train", "t10k")
        ),
        strict=True,
    )
    count, side, _ = images[0].shape
    both = np.concatenate(images).astype(np.float32) / 255
    small = both.reshape(len(both), side // 2, 2, side // 2, 2).mean((2, 4))
    inputs = small.reshape(len(both), -1)
    inputs = (inputs - inputs[:count].mean()) / inputs[:count].std()
    return inputs, np.concatenate(labels).astype(np.int32), count


def read_idx(path: Path) -> np.ndarray:
    """The array of a file in the IDX format of MNIST, compressed by gzip."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise SystemExit(
            f"there is no {path}: install Debian's package dataset-fashion-mnist, or "
            "name the folder of these files in the variable FASHION_MNIST"
        ) from error
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    return values.reshape(shape.astype(int))
