"""Folders of images, read with Grain: a folder a class, or a folder a domain.

    root/<class>/<image>              scan
    root/<domain>/<class>/<image>     domains, as PACS is laid out

Batch t of training is at index t, so a restart needs the number of the step and no
state of an iterator; each process reads its own share.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np


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
    """The images of ``root/<class>/<image>``; ``archives.DataError`` if unusable."""
    raise NotImplementedError


def domains(root: Path | str) -> dict[str, Folder]:
    """The images of ``root/<domain>/<class>/<image>`` by domain, of the same classes."""
    raise NotImplementedError


def train_batches(
    paths: Sequence[Path],
    labels: np.ndarray,
    batch: int,
    size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """Batch t of this process at index t: {"image", "label"}, for ever."""
    raise NotImplementedError


def evaluation_batches(
    paths: Sequence[Path],
    labels: np.ndarray,
    batch: int,
    size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """Every image once: {"image", "label", "weight"}; weight 0 is padding."""
    raise NotImplementedError


def load_arrays(paths: Sequence[Path], size: int) -> np.ndarray:
    """All images as one array (n, size, size, 3) uint8, for small sets."""
    raise NotImplementedError
