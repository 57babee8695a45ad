"""The digits of scikit-learn with noisy labels, for an MLP and a convolutional network.

1,797 images of 8 × 8 pixels, divided by 16, under one fixed permutation: 1,200 to be
split by seed into 1,000 training and 200 validation images, and 597 test images. The
MLP 64-256-256-10 is trained for 60 epochs in batches of 50.
"""

from collections.abc import Callable

import numpy as np
from sklearn.datasets import load_digits

from experiments.harness.networks import mlp, small_convnet
from experiments.tasks import Task, with_random_labels

CLASSES = 10
# Digits that are mistaken for each other: Patrini et al., `Making Deep Neural Networks
# Robust to Label Noise <https://arxiv.org/abs/1609.03683>`_, 2017, on MNIST.
CONFUSED = {2: 7, 3: 8, 5: 6, 6: 5, 7: 1}


def load(name: str, variant: str) -> Task:
    """Digits with a percentage of random labels, or with 40 % asymmetric noise."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(images))
    images = (images[order] / 16).astype(np.float32)
    labels = labels[order].astype(np.int32)
    if variant == "asymmetric":
        given = with_asymmetric_labels(labels, 0.4)
    else:
        given = with_random_labels(labels, int(variant) / 100, CLASSES)
    convolutional = name.startswith("convnet")
    return Task(
        name=name,
        inputs=images,
        labels=labels,
        given_labels=given,
        pool=np.arange(1200),
        test=np.arange(1200, len(images)),
        groups=np.arange(len(images)),
        training=1000,
        validation=200,
        classes=CLASSES,
        network=small_convnet(8, (8, 16), CLASSES)
        if convolutional
        else mlp(64, 256, 256, CLASSES),
        epochs=30 if convolutional else 60,
        batch=50,
        epochs_per_call=3 if convolutional else 2,
    )


def with_asymmetric_labels(
    labels: np.ndarray, share: float
) -> Callable[[np.random.Generator], np.ndarray]:
    """A digit that has a double in CONFUSED becomes it with probability ``share``."""
    double = np.array([CONFUSED.get(digit, digit) for digit in range(CLASSES)])

    def given(random: np.random.Generator) -> np.ndarray:
        return np.where(random.random(len(labels)) < share, double[labels], labels)

    return given
