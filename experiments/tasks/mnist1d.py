"""MNIST-1D: drawn curves of ten shapes, 40 numbers each.

The generator of its authors makes 4,000 examples, to be split by seed into 3,200
training and 800 validation examples, and 1,000 test examples. In batches of 64 an MLP
40-100-100-10 is trained for 30 epochs, and a convolutional network for 120: that of the
authors, with 16 filters in each of its three convolutions instead of 25.

References:
  Greydanus and Kobak, `Scaling Down Deep Learning with MNIST-1D
  <https://arxiv.org/abs/2011.14439>`_, 2024.
"""

import random

import numpy as np

from experiments.harness.networks import mlp, strided_convnet
from experiments.tasks import Task, is_cnn, with_random_labels

CLASSES = 10


def load(name: str, variant: str) -> Task:
    """MNIST-1D with a percentage of random labels."""
    inputs, labels = examples()
    convolutional = is_cnn(name)
    return Task(
        name=name,
        inputs=inputs,
        labels=labels,
        given_labels=with_random_labels(labels, int(variant) / 100, CLASSES),
        pool=np.arange(4000),
        test=np.arange(4000, 5000),
        groups=np.arange(5000),
        training=3200,
        validation=800,
        classes=CLASSES,
        network=strided_convnet(
            (40,), ((5, 16), (3, 16), (3, 16)), CLASSES, normalized=False
        )
        if convolutional
        else mlp(40, 100, 100, CLASSES),
        epochs=120 if convolutional else 30,
        batch=64,
        epochs_per_call=5,
    )


def examples() -> tuple[np.ndarray, np.ndarray]:
    """Inputs (5000, 40) float32 and labels (5000,), the test examples last."""
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ModuleNotFoundError as error:
        raise SystemExit(
            "the package mnist1d is not installed: pip install '.[experiments]'"
        ) from error

    # The generator seeds the generators of the whole process.
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        made = make_dataset(get_dataset_args())
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
    inputs = np.concatenate([made["x"], made["x_test"]]).astype(np.float32)
    return inputs, np.concatenate([made["y"], made["y_test"]]).astype(np.int32)
