"""Texts that come with Python, to model: its standard library, its reference.

The one is the beginning of every module that is one file (``sys.stdlib_module_names``,
which has no tests in it), in alphabetical order, the other the topics of ``help()``. A
hash of its name puts a module or a topic, whole, into one of three splits: about 60 %
train, 20 % validate and 20 % test. The texts depend on the version of Python.
"""

import hashlib
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SPLITS = ("training", "validation", "test")
CHARACTERS_PER_MODULE = 2048
VOCABULARY = 128  # ASCII; what is not, is 127, which no text uses.


class Corpus(NamedTuple):
    """Texts by split.

    Attributes:
      modules: the names of the modules, or topics, of each split, sorted.
      text: the characters of each split, uint8 in [0, 127], (length,).
    """

    modules: dict[str, list[str]]
    text: dict[str, np.ndarray]

    def describe(self) -> dict[str, Any]:
        """What a results file says of the text; its hash tells two texts apart."""
        whole = b"".join(map(bytes, self.text.values()))
        return {
            "sha256": hashlib.sha256(whole).hexdigest(),
            "modules": {split: len(names) for split, names in self.modules.items()},
            "characters": {split: len(text) for split, text in self.text.items()},
        }


def split_of(name: str) -> str:
    """The split of a module or topic, by the first byte of the SHA-256 of its name."""
    share = hashlib.sha256(name.encode()).digest()[0] / 256
    return SPLITS[(share >= 0.6) + (share >= 0.8)]


def read(
    folder: Path | None = None,
    modules: Iterable[str] = sys.stdlib_module_names,
    *,
    characters: int = CHARACTERS_PER_MODULE,
) -> Corpus:
    """The text of the modules that are single files in ``folder``.

    Args:
      folder: where the sources lie; ``None`` for the standard library of this Python.
      modules: names of modules; those without a ``.py`` file there are left out.
      characters: how many of each module are taken, from its beginning.

    Raises:
      ValueError: if a split is left with less than a thousand characters.
    """
    folder = Path(folder or sysconfig.get_paths()["stdlib"])
    paths = {module: folder / f"{module}.py" for module in modules}
    return split_up(
        {
            module: path.read_text(encoding="utf-8")[:characters]
            for module, path in paths.items()
            if path.is_file()
        },
        f"{folder}",
    )


def read_reference() -> Corpus:
    """English, with some Python: the topics of the language reference in ``help()``.

    Whole topics are held out, as modules are. None of it is text of :func:`read`.

    Raises:
      ValueError: as of :func:`read`.
    """
    from pydoc_data.topics import topics

    return split_up(topics, "pydoc_data.topics")


def split_up(texts: dict[str, str], source: str) -> Corpus:
    """A corpus of texts by their names.

    Args:
      texts: whole ones; the name of each says in which split it is.
      source: where they are from, for the error.

    Raises:
      ValueError: if a split is left with less than a thousand characters.
    """
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    parts = {split: [np.empty(0, np.uint8)] for split in SPLITS}
    for name in sorted(texts):
        names[split_of(name)].append(name)
        parts[split_of(name)].append(encode(texts[name]))
    text = {split: np.concatenate(part) for split, part in parts.items()}
    for split, codes in text.items():
        if len(codes) < 1000:
            raise ValueError(
                f"{source} leaves {len(codes)} characters to {split}: run a "
                "Python that has the sources of its standard library as files."
            )
    return Corpus(names, text)


def encode(text: str) -> np.ndarray:
    """Characters as integers in [0, 127], uint8."""
    codes = np.array([ord(c) for c in text], np.uint32)
    return np.minimum(codes, VOCABULARY - 1).astype(np.uint8)


def evenly_spaced_windows(text: np.ndarray, count: int, length: int) -> np.ndarray:
    """The same windows every time, (count, length) int32, to evaluate on."""
    starts = np.linspace(0, len(text) - length, count).astype(int)
    return text[starts[:, None] + np.arange(length)].astype(np.int32)


def loss_of_frequencies(corpus: Corpus) -> float:
    """Nats per test character of who knows only how often characters occur."""
    counts = np.bincount(corpus.text["training"], minlength=VOCABULARY) + 1.0
    return float(-np.mean(np.log(counts / counts.sum())[corpus.text["test"]]))
