"""CIFAR-10 and CIFAR-100 from their authors' archives, checked before they are opened.

The archives hold pickles, and a pickle runs what it names: so size and hash are
compared with the published archive first. Files with the same MD5 can be made, so what
is unpickled can call nothing either. Nothing is downloaded here.
"""

import hashlib
import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


class DataError(ValueError):
    """The data cannot be used; the message is for the person at the command line."""


class Dataset(NamedTuple):
    """Images to train on and to test on.

    Attributes:
      train_images: (n, 32, 32, 3) uint8, in the order of the archive.
      train_labels: (n,) int32.
      test_images: (m, 32, 32, 3) uint8.
      test_labels: (m,) int32.
      class_names: class_names[label] is what the images show.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]


class Archive(NamedTuple):
    """A published archive and what is in it.

    Attributes:
      title: its name for people.
      file: its file name.
      size: in bytes.
      md5: of the archive.
      folder: the folder in it.
      train: training files -> their md5.
      test: test files -> their md5.
      meta: the file with the class names -> its md5.
      label_key: where a batch has its labels.
      names_key: where the meta file has the class names.
    """

    title: str
    file: str
    size: int
    md5: str
    folder: str
    train: dict[str, str]
    test: dict[str, str]
    meta: dict[str, str]
    label_key: bytes
    names_key: bytes

    @property
    def link(self) -> str:
        """Where the authors offer it."""
        return f"https://www.cs.toronto.edu/~kriz/{self.file}"


ARCHIVES = {
    "cifar10": Archive(
        title="CIFAR-10",
        file="cifar-10-python.tar.gz",
        size=170_498_071,
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        train={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        test={"test_batch": "40351d587109b95175f43aff81a1287e"},
        meta={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
        label_key=b"labels",
        names_key=b"label_names",
    ),
    "cifar100": Archive(
        title="CIFAR-100",
        file="cifar-100-python.tar.gz",
        size=169_001_437,
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        train={"train": "16019d7e3df5f24257cddd939b257f8d"},
        test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        meta={"meta": "7973b15100ade9c7d40fb424638fde48"},
        label_key=b"fine_labels",
        names_key=b"fine_label_names",
    ),
}


def load(name: str, data_dir: Path | str) -> Dataset:
    """Read a dataset from the archive in ``data_dir``, or from the unpacked folder.

    The archive is read where it lies; nothing is written. If both are there, the
    archive is read.

    Args:
      name: a key of ``ARCHIVES``; "cifar100" has its 100 fine labels.
      data_dir: the folder that holds the archive or the folder unpacked from it.

    Raises:
      DataError: what was found is not the published data.
      ValueError: there is no dataset of this name.
    """
    if name not in ARCHIVES:
        raise ValueError(
            f"there is no dataset {name!r}: the names are {', '.join(ARCHIVES)}"
        )
    archive, data_dir = ARCHIVES[name], Path(data_dir)
    path, folder = data_dir / archive.file, data_dir / archive.folder
    try:
        if path.exists():
            contents = _contents_of_archive(archive, path)
        elif folder.exists():
            contents = _contents_of_folder(archive, folder)
        elif not data_dir.is_dir():
            raise DataError(f"{data_dir} is not a folder")
        else:
            raise DataError(f"{data_dir} has neither {path.name} nor {folder.name}")
        return _parse(archive, contents)
    except DataError as error:
        found = str(error)
    except OSError as error:
        found = f"{error.filename or path} cannot be read ({error.strerror or error})"
    raise DataError(
        f"{archive.title} cannot be loaded: {found}. Download {archive.link} "
        f"({archive.size:,} bytes, described at {PAGE}) to {path}; there is no need to "
        f"unpack it, but {folder} will do as well."
    )


def _contents_of_archive(archive: Archive, path: Path) -> dict[str, bytes]:
    """The files that are needed, by name, out of an archive that is the published."""
    with path.open("rb") as file:
        size = path.stat().st_size
        if size != archive.size:
            raise DataError(
                f"{path} has {size:,} bytes instead of {archive.size:,}"
                + (", as after a download cut short" if size < archive.size else "")
            )
        _compare(path, hashlib.file_digest(file, "md5").hexdigest(), archive.md5)
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:gz") as packed:
                return {
                    name: packed.extractfile(f"{archive.folder}/{name}").read()
                    for name in _members(archive)
                }
        except (tarfile.TarError, zlib.error, EOFError, KeyError) as error:
            raise DataError(f"{path} cannot be unpacked ({error})") from error


def _contents_of_folder(archive: Archive, folder: Path) -> dict[str, bytes]:
    """The files that are needed, by name, each compared with the published one."""
    contents = {}
    for name, md5 in _members(archive).items():
        contents[name] = (folder / name).read_bytes()
        _compare(folder / name, hashlib.md5(contents[name]).hexdigest(), md5)
    return contents


def _members(archive: Archive) -> dict[str, str]:
    return archive.train | archive.test | archive.meta


def _compare(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise DataError(f"{path} has the MD5 {found} instead of {expected}")


def _parse(archive: Archive, contents: dict[str, bytes]) -> Dataset:
    """Unpickle the files, all of which have been compared with the published ones."""
    (meta,) = archive.meta
    (names,) = _unpickle(meta, contents[meta], archive.names_key)
    return Dataset(
        *_join(archive, archive.train, contents),
        *_join(archive, archive.test, contents),
        tuple(name.decode() for name in names),
    )


ImagesAndLabels = tuple[np.ndarray, np.ndarray]


def _join(
    archive: Archive, files: dict[str, str], contents: dict[str, bytes]
) -> ImagesAndLabels:
    """Images and labels of several files, in their order."""
    batches = [_batch(archive, name, contents[name]) for name in files]
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _batch(archive: Archive, name: str, content: bytes) -> ImagesAndLabels:
    """Images (n, 32, 32, 3) uint8 and labels (n,) int32 of one file."""
    images, labels = _unpickle(name, content, b"data", archive.label_key)
    # A row is the red, then the green, then the blue plane, each row by row.
    images = np.asarray(images, np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.asarray(labels, np.int32)


def _unpickle(name: str, content: bytes, *keys: bytes) -> tuple[Any, ...]:
    """The values of a pickled dictionary at these keys."""
    try:
        found = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        values = [found[key] for key in keys]
        return tuple(v.array if isinstance(v, _Bytes) else v for v in values)
    except Exception as error:  # unpickling may raise anything
        raise DataError(f"{name} cannot be unpickled ({error!r})") from error


class _Unpickler(pickle.Unpickler):
    """Reads dictionaries, lists, numbers, text and arrays of bytes; calls nothing."""

    def find_class(self, module: str, name: str) -> Any:
        """Our own stand-ins for the three names in a pickled array.

        Nothing is imported, and not even NumPy's own functions are in reach.
        """
        match module, name:
            case ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct"):
                return _Bytes
            case "numpy", "dtype":
                return _ByteType
            case "numpy", "ndarray":
                return None  # what _reconstruct is told to make
        raise pickle.UnpicklingError(f"{module}.{name} is not part of an array")


class _ByteType:
    """The dtype of a pickled array, which has to be uint8."""

    def __init__(self, kind: bytes | str, *flags: Any) -> None:
        if kind not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"an array of {kind!r} is not one of bytes")

    def __setstate__(self, state: Any) -> None:
        """Byte order and fields, which bytes do not have."""


class _Bytes:
    """A pickled array of bytes; ``array`` once its state is set."""

    def __init__(self, *of_an_empty_one: Any) -> None:
        self.array = np.zeros(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, _, is_fortran, content = state
        order = "F" if is_fortran else "C"
        self.array = np.frombuffer(content, np.uint8).reshape(shape, order=order)
