"""Only the published archives are opened, and what is wrong is said in one message."""

import hashlib
import os
import pickle
import sys
import tarfile

import numpy as np
import pytest
import small_archives

from experiments.vision import archives


@pytest.fixture(params=["cifar10", "cifar100"])
def archive(request, tmp_path, monkeypatch):
    """A small archive in tmp_path that takes the place of the published one."""
    entry = small_archives.write(tmp_path, request.param)
    monkeypatch.setitem(archives.ARCHIVES, request.param, entry)
    return request.param, entry


def unpack(entry, folder):
    with tarfile.open(folder / entry.file) as packed:
        packed.extractall(folder, filter="data")
    (folder / entry.file).unlink()


def test_the_table_holds_the_published_sizes_and_hashes():
    ten, hundred = archives.ARCHIVES["cifar10"], archives.ARCHIVES["cifar100"]
    assert (ten.size, ten.md5) == (170498071, "c58f30108f718f92721af3b95e74349a")
    assert hundred.size == 169001437
    assert hundred.md5 == "eb9058c3a382ffc7106e4002c42a8d85"


def test_an_archive_gives_images_labels_and_names(archive, tmp_path):
    name, entry = archive
    data = archives.load(name, tmp_path)
    n = 20 * len(entry.train)
    assert data.train_images.shape == (n, 32, 32, 3)
    assert data.test_images.shape == (20, 32, 32, 3)
    assert data.train_images.dtype == data.test_images.dtype == np.uint8
    assert data.train_labels.shape == (n,)
    assert data.train_labels.dtype == data.test_labels.dtype == np.int32
    assert data.class_names[3] == "class 3"
    assert len(data.class_names) == {"cifar10": 10, "cifar100": 100}[name]


def test_a_row_is_a_red_a_green_and_a_blue_plane(archive, tmp_path):
    name, _ = archive
    row = small_archives.batch(np.random.default_rng(0), name, 20)[b"data"][7]
    image = archives.load(name, tmp_path).train_images[7]
    for channel, y, x in [(0, 0, 0), (0, 0, 5), (1, 3, 31), (2, 31, 2)]:
        assert image[y, x, channel] == row[1024 * channel + 32 * y + x]


def test_labels_are_those_of_the_files_in_order(archive, tmp_path):
    name, entry = archive
    generator = np.random.default_rng(0)
    batches = [small_archives.batch(generator, name, 20) for _ in entry.train]
    labels = np.concatenate([batch[entry.label_key] for batch in batches])
    np.testing.assert_array_equal(archives.load(name, tmp_path).train_labels, labels)


def test_the_unpacked_folder_gives_the_same(archive, tmp_path):
    name, entry = archive
    packed = archives.load(name, tmp_path)
    unpack(entry, tmp_path)
    unpacked = archives.load(name, tmp_path)
    for one, other in zip(packed, unpacked, strict=True):
        np.testing.assert_array_equal(one, other)


def test_loading_leaves_the_folder_as_it_was(archive, tmp_path):
    name, entry = archive
    archives.load(name, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [entry.file]


def missing(entry, folder):
    (folder / entry.file).unlink()
    return f"{folder} has neither {entry.file} nor {entry.folder}"


def without_a_folder(entry, folder):
    missing(entry, folder)
    folder.rmdir()
    return f"{folder} is not a folder"


def truncated(entry, folder):
    path = folder / entry.file
    path.write_bytes(path.read_bytes()[:1000])
    return f"has 1,000 bytes instead of {entry.size:,}, as after a download cut short"


def of_another_hash(entry, folder):
    path = folder / entry.file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return f"instead of {entry.md5}"


def a_folder(entry, folder):
    (folder / entry.file).unlink()
    (folder / entry.file).mkdir()
    return "cannot be read (Is a directory)"


def unpacked_with_a_changed_file(entry, folder):
    unpack(entry, folder)
    (path,) = [folder / entry.folder / name for name in entry.test]
    path.write_bytes(b"")
    return f"{path} has the MD5 d41d8cd98f00b204e9800998ecf8427e instead of"


def unpacked_without_a_file(entry, folder):
    unpack(entry, folder)
    (path,) = [folder / entry.folder / name for name in entry.meta]
    path.unlink()
    return f"{path} cannot be read (No such file or directory)"


@pytest.mark.parametrize(
    "damage",
    [
        missing,
        without_a_folder,
        truncated,
        of_another_hash,
        a_folder,
        unpacked_with_a_changed_file,
        unpacked_without_a_file,
    ],
)
def test_damage_is_one_line_with_link_and_layout(archive, tmp_path, damage):
    name, entry = archive
    found = damage(entry, tmp_path)
    with pytest.raises(archives.DataError) as caught:
        archives.load(name, tmp_path)
    message = str(caught.value)
    assert found in message
    assert "\n" not in message
    assert f"https://www.cs.toronto.edu/~kriz/{entry.file}" in message
    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in message
    assert str(tmp_path / entry.file) in message
    assert str(tmp_path / entry.folder) in message


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened before its hash was compared",)


@pytest.mark.parametrize("unpacked", [False, True])
def test_no_pickle_is_opened_before_its_hash_is_compared(archive, tmp_path, unpacked):
    name, entry = archive
    unpack(entry, tmp_path)
    for file in (tmp_path / entry.folder).iterdir():
        file.write_bytes(pickle.dumps(Bomb()))
    if not unpacked:
        with tarfile.open(tmp_path / entry.file, "w:gz") as packed:
            packed.add(tmp_path / entry.folder, entry.folder)
    with pytest.raises(archives.DataError, match="instead of"):
        archives.load(name, tmp_path)


class Calls:
    """Pickled, a call of a function by its name."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


MALICIOUS = {
    "command": pickle.dumps(Calls(os.system, "touch pwned")),
    "code": pickle.dumps(Calls(eval, "open('pwned', 'w').close()")),
    "file": pickle.dumps(Calls(open, "pwned", "w")),
    # By an attribute of a module that is allowed.
    "numpy": pickle.dumps(Calls(np.save, "pwned.npy", 0)),
    "dotted": b"cnumpy\n_core.multiarray.np\n.",
    "module": b"cantigravity\ngeohash\n.",
    "numpy's loader": pickle.dumps(Calls(np.load, "x.npy", None, True)),
    "buffer": pickle.dumps(Calls(np.ndarray, (1,), "u1", b"a"), protocol=2),
    "numbers of another kind": pickle.dumps(np.arange(3), protocol=2),
    "objects": pickle.dumps(np.array([Calls(os.system, "touch pwned")]), protocol=2),
    "in a key": pickle.dumps({b"data": 0, b"labels": Calls(open, "pwned", "w")}),
    "protocol 4": pickle.dumps(Calls(os.system, "touch pwned"), protocol=4),
    "extension": b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("content", MALICIOUS.values(), ids=MALICIOUS)
def test_a_pickle_behind_a_forged_hash_runs_nothing(
    archive, tmp_path, monkeypatch, content
):
    name, entry = archive
    unpack(entry, tmp_path)
    monkeypatch.chdir(tmp_path)
    (file,) = entry.meta
    (tmp_path / entry.folder / file).write_bytes(content)
    forged = entry._replace(meta={file: hashlib.md5(content).hexdigest()})
    monkeypatch.setitem(archives.ARCHIVES, name, forged)
    with pytest.raises(archives.DataError, match="cannot be unpickled") as caught:
        archives.load(name, tmp_path)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {entry.folder}
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("content", [b"no archive", b"\x1f\x8b\x08\x00 no gzip"])
def test_what_is_no_archive_is_said_to_be_none(tmp_path, monkeypatch, content):
    entry = small_archives.write(tmp_path, "cifar10")
    (tmp_path / entry.file).write_bytes(content)
    md5 = hashlib.md5(content).hexdigest()
    entry = entry._replace(size=len(content), md5=md5)
    monkeypatch.setitem(archives.ARCHIVES, "cifar10", entry)
    with pytest.raises(archives.DataError, match="cannot be unpacked"):
        archives.load("cifar10", tmp_path)


def test_an_unknown_dataset_gets_the_names_that_exist(tmp_path):
    with pytest.raises(ValueError, match="'mnist': the names are cifar10, cifar100"):
        archives.load("mnist", tmp_path)
