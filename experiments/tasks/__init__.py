"""The tasks of the evidence by name; their data need no download.

A name may end in ``-short`` or ``-long``: a third of the epochs, or thrice as many.

The modules that make them are imported when a task is loaded.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

TITLES = {
    "digits-0": "digits, true labels",
    "digits-25": "digits, 25 % random labels",
    "digits-50": "digits, 50 % random labels",
    "digits-75": "digits, 75 % random labels",
    "digits-asymmetric": "digits, 40 % asymmetric noise",
    "convnet-50": "digits, 50 % random labels, convolutions with batch normalization",
    "mnist1d-0": "MNIST-1D, true labels",
    "mnist1d-40": "MNIST-1D, 40 % random labels",
    "fashion-0": "Fashion-MNIST, true labels",
    "fashion-40": "Fashion-MNIST, 40 % random labels",
    "mnist1d_cnn-0": "MNIST-1D, true labels, convolutions",
    "mnist1d_cnn-40": "MNIST-1D, 40 % random labels, convolutions",
    "fashion_cnn-0": (
        "Fashion-MNIST, true labels, convolutions with batch normalization"
    ),
    "fashion_cnn-40": (
        "Fashion-MNIST, 40 % random labels, convolutions with batch normalization"
    ),
    "cancer-40": "breast cancer, 40 % random labels",
    "wine-50": "wine, 50 % random labels",
    "teacher-60": "teacher and student, 60 % random labels",
    "teacher-tilt": "teacher and student, noise added to the gradients",
    "text-50": "standard library's text, 50 % random labels",
}
LENGTHS = {"-short": 1 / 3, "": 1.0, "-long": 3.0}


class Task(NamedTuple):
    """A classification task and how a network is trained on it.

    Attributes:
      name: as in TITLES, or what it is called in tables.
      inputs: (examples, features) float32.
      labels: (examples,) int32, the true ones.
      given_labels: random generator -> the labels (examples,) that training and
        validation are given; the test set is scored with the true ones.
      pool: indices of what is split, by seed, into training and validation examples.
      test: indices of the test examples, the same for all seeds.
      groups: (examples,); examples of one group, such as a file, are on one side of
        every split.
      training: how many examples are trained on.
      validation: how many are held out of the pool to validate on.
      classes: how many there are.
      network: what is trained, a :class:`experiments.harness.networks.Network`.
      epochs: a whole training of one gradient per step.
      batch: examples per step.
      epochs_per_call: epochs between evaluations.
      folds: how many seeds in a row share their labels and hold out one part of the
        pool each, so that together they validate on all of it; 1 draws all anew.
      gradient_noise: expected norm of the Gaussian noise that is added to the
        gradients, the same to both gradients of a step; 0 adds none.
    """

    name: str
    inputs: np.ndarray
    labels: np.ndarray
    given_labels: Callable[[np.random.Generator], np.ndarray]
    pool: np.ndarray
    test: np.ndarray
    groups: np.ndarray
    training: int
    validation: int
    classes: int
    network: Any
    epochs: int
    batch: int
    epochs_per_call: int
    folds: int = 1
    gradient_noise: float = 0.0

    @property
    def title(self) -> str:
        """Its name in tables and figures."""
        return title(self.name)

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch; what is left of an epoch is left out."""
        return self.training // self.batch


class Split(NamedTuple):
    """Indices of the examples of one seed, and the labels of all examples."""

    training: np.ndarray
    validation: np.ndarray
    given_labels: np.ndarray


def split(task: Task, seed: int) -> Split:
    """Training and validation examples, and noisy labels, of a seed.

    Whole groups are held out. Both sides are cut to the task's numbers.
    """
    draw, fold = divmod(seed, task.folds)
    random = np.random.default_rng([draw, 20230915])
    names, sizes = np.unique(task.groups[task.pool], return_counts=True)
    order = random.permutation(len(names))
    order = np.roll(order, -fold * (len(order) // task.folds))
    count = np.searchsorted(np.cumsum(sizes[order]), task.validation) + 1
    is_held = np.isin(task.groups[task.pool], names[order[:count]])
    given_labels = task.given_labels(random).astype(np.int32)
    validation = random.permutation(task.pool[is_held])[: task.validation]
    training = random.permutation(task.pool[~is_held])[: task.training]
    if len(training) < task.training:
        raise ValueError(
            f"seed {seed} of {task.name} leaves {len(training)} training examples: "
            f"lower training from {task.training}."
        )
    return Split(training, validation, given_labels)


def title(name: str) -> str:
    """What a task is called in tables and figures."""
    base, length = parted(name)
    return TITLES.get(base, base) + {"-short": ", a third", "-long": ", thrice"}.get(
        length, ""
    )


def is_cnn(name: str) -> bool:
    """Whether its network is one of those that have a table of their own."""
    return "_cnn-" in name


def parted(name: str) -> tuple[str, str]:
    """The name without its length, and its length."""
    for length in filter(None, LENGTHS):
        if name.endswith(length):
            return name.removesuffix(length), length
    return name, ""


@functools.cache
def load(name: str) -> Task:
    """A task by its name in TITLES, which may have a length behind it."""
    base, length = parted(name)
    module, _, variant = base.partition("-")
    room = {"convnet": "digits", "cancer": "tabular", "wine": "tabular"}
    room |= {"teacher": "teacher_student"}
    module = module.removesuffix("_cnn")
    task = importlib.import_module(f"{__name__}.{room.get(module, module)}").load(
        base, variant
    )
    return task._replace(name=name, epochs=round(LENGTHS[length] * task.epochs))


def with_random_labels(
    labels: np.ndarray, share: float, classes: int
) -> Callable[[np.random.Generator], np.ndarray]:
    """Each label is replaced, with probability ``share``, by a uniformly random one."""

    def given(random: np.random.Generator) -> np.ndarray:
        replaced = random.random(len(labels)) < share
        return np.where(replaced, random.integers(0, classes, len(labels)), labels)

    return given


def chance(task: Task) -> float:
    """Accuracy in percent of the best constant prediction on the test set."""
    counts = np.bincount(task.labels[task.test], minlength=task.classes)
    return 100.0 * float(counts.max()) / len(task.test)


def collapsed_below(task: Task) -> float:
    """The accuracy in percent below which a training has collapsed: twice chance.

    With two or three classes that is out of reach; there, a ninth of the way from
    chance to 100 %, which for ten classes is the same.
    """
    constant = chance(task)
    return 2 * constant if constant < 25 else constant + (100 - constant) / 9
