"""Folders of images: what is found, what is read, and by which process."""

import numpy as np
import pytest
from PIL import Image

from experiments.vision import archives, image_folder

RED, GREEN = (255, 0, 0), (0, 255, 0)


def save(path, colour=RED, size=(12, 9), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path):
    """Eleven images of two classes, each of its own colour."""
    for i in range(5):
        save(tmp_path / "b" / f"{i}.png", (i, 0, 200))
    for i in range(6):
        save(tmp_path / "a" / f"{i}.PNG", (i, 200, 0))
    (tmp_path / "b" / "notes.txt").write_text("no image")
    save(tmp_path / ".hidden" / "0.png")
    return tmp_path


def colours(batches):
    """The colour of the middle of each image of each batch."""
    return np.concatenate([batch["image"][:, 4, 4] for batch in batches])


def evaluated(path, size):
    """One image as it is evaluated on."""
    (batch,) = image_folder.evaluation_batches([path], np.zeros(1, np.int32), 1, size)
    return batch["image"][0]


def test_classes_and_images_are_sorted(root):
    paths, labels, names = image_folder.scan(root)
    assert names == ("a", "b")
    expected = [f"a/{i}.PNG" for i in range(6)] + [f"b/{i}.png" for i in range(5)]
    assert [str(path.relative_to(root)) for path in paths] == expected
    np.testing.assert_array_equal(labels, [0] * 6 + [1] * 5)
    assert labels.dtype == np.int32


def test_an_unusable_folder_is_one_sentence_that_names_it(root, tmp_path):
    (root / "c").mkdir()
    for folder, message in {
        root / "absent": "cannot be listed (No such file or directory)",
        root / "b" / "notes.txt": "cannot be listed (Not a directory)",
        root / "c": "has no folders: expected",
    }.items():
        with pytest.raises(archives.DataError) as caught:
            image_folder.scan(folder)
        assert f"{folder} {message}" in str(caught.value)
    with pytest.raises(archives.DataError, match="has no image") as caught:
        image_folder.scan(root)
    assert str(root / "c") in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no image", "truncated"])
def test_an_unreadable_image_is_one_sentence_that_names_it(root, content):
    paths, labels, _ = image_folder.scan(root)
    if content == "truncated":
        content = save(paths[2], size=(64, 64)).read_bytes()[:60]
    paths[2].write_bytes(content)
    batches = image_folder.evaluation_batches(paths, labels, 4, 8)
    with pytest.raises(archives.DataError) as caught:
        list(image_folder.read_ahead(batches, threads=2))
    assert f"the image {paths[2]} cannot be read (" in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "name", "options"),
    [
        ("RGB", "0.jpeg", {"quality": 95}),
        ("RGBA", "0.png", {}),
        ("P", "0.png", {"transparency": b"\x80" * 256}),
        ("CMYK", "0.jpg", {"quality": 95}),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, name, options):
    path = save(tmp_path / name, mode=mode, **options)
    image = evaluated(path, 6)
    # JPEG rounds in another colour space.
    assert np.abs(image.astype(int) - RED).max() <= 2


def test_grey_images_get_three_equal_channels(tmp_path):
    path = save(tmp_path / "0.png", (40, 40, 40), mode="L")
    assert (evaluated(path, 6) == 40).all()


def test_an_image_stands_upright_as_exif_says(tmp_path):
    image = Image.new("RGB", (8, 8), RED)
    image.paste(GREEN, (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    image.save(tmp_path / "0.png", exif=exif)
    upright = evaluated(tmp_path / "0.png", 8)
    np.testing.assert_array_equal(upright[0, 0], RED)
    np.testing.assert_array_equal(upright[7, 7], GREEN)


def test_evaluation_shows_seven_eighths_of_the_shorter_side(tmp_path):
    image = Image.new("RGB", (32, 16), GREEN)
    image.paste(RED, (9, 1, 23, 15))
    image.save(tmp_path / "0.png")
    (batch,) = image_folder.evaluation_batches([tmp_path / "0.png"], np.zeros(1), 1, 14)
    assert (batch["image"] == RED).all()


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_reads_each_image_once(root, processes):
    paths, labels, _ = image_folder.scan(root)
    shares = [
        list(image_folder.evaluation_batches(paths, labels, 4, 8, i, processes))
        for i in range(processes)
    ]
    assert {len(share) for share in shares} == {3}
    batches = [batch for share in shares for batch in share]
    own = 4 // processes
    assert {batch["image"].shape for batch in batches} == {(own, 8, 8, 3)}
    weights = np.concatenate([batch["weight"] for batch in batches])
    assert sorted(weights) == [0] + [1] * 11
    seen = colours(batches)[weights == 1]
    assert len(np.unique(seen, axis=0)) == 11
    counted = np.concatenate([batch["label"] for batch in batches])[weights == 1]
    np.testing.assert_array_equal(counted, (seen[:, 2] == 200).astype(int))


def test_an_epoch_shows_each_image_once_in_an_order_of_its_own(root):
    paths, labels, _ = image_folder.scan(root)
    batches = image_folder.train_batches(paths, labels, 11, 8, seed=0)
    epochs = [colours([batches[t]]) for t in range(3)]
    for seen in epochs:
        assert len(np.unique(seen, axis=0)) == 11
    assert not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(batches[2]["label"], epochs[2][:, 2] == 200)
    assert batches[0]["image"].dtype == np.uint8
    other = image_folder.train_batches(paths, labels, 11, 8, seed=1)
    assert not np.array_equal(colours([other[0]]), epochs[0])


@pytest.fixture
def gradients(tmp_path):
    """Six images of which every crop is another."""
    row = np.arange(0, 240, 4, np.uint8)
    image = np.stack([*np.meshgrid(row, row), np.full((60, 60), 7, np.uint8)], -1)
    for i in range(6):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    return [tmp_path / f"{i}.png" for i in range(6)], np.arange(6)


def test_a_batch_does_not_depend_on_the_number_of_processes(gradients):
    alone = image_folder.train_batches(*gradients, 4, 8, seed=0)
    shares = [image_folder.train_batches(*gradients, 4, 8, 0, i, 2) for i in (0, 1)]
    for t in (0, 5):
        for i, share in enumerate(shares):
            for key in ("image", "label"):
                np.testing.assert_array_equal(alone[t][key][i::2], share[t][key])


def test_crops_and_flips_differ_between_images_and_epochs(gradients):
    batches = image_folder.train_batches(*gradients, 6, 8, seed=0)
    images = np.concatenate([batches[t]["image"] for t in range(4)])
    assert len(np.unique(images, axis=0)) == 24
    towards_the_right = images[:, 4, 7, 0] > images[:, 4, 0, 0].astype(int)
    # Half of 24, with a standard deviation of 2.4
    assert 2 < towards_the_right.sum() < 22
    # Rows of a crop are never turned upside down.
    assert (images[:, 7, 4, 1] > images[:, 0, 4, 1]).all()


def test_reading_ahead_starts_anywhere_and_keeps_the_order(gradients):
    batches = image_folder.train_batches(*gradients, 4, 8, seed=0)
    ahead = image_folder.read_ahead(batches, first=3, threads=2)
    for t in range(3, 7):
        np.testing.assert_array_equal(next(ahead)["image"], batches[t]["image"])


def test_a_long_and_narrow_image_still_gives_a_crop(tmp_path):
    path = save(tmp_path / "0.png", size=(200, 1))
    batches = image_folder.train_batches([path], np.zeros(1), 4, 8, seed=0)
    assert (batches[0]["image"] == RED).all()


def test_a_batch_that_the_processes_cannot_share_is_refused(gradients):
    with pytest.raises(ValueError, match="got 4 for 3"):
        image_folder.train_batches(*gradients, 4, 8, 0, 0, 3)
    with pytest.raises(ValueError, match="got 4 for 3"):
        image_folder.evaluation_batches(*gradients, 4, 8, 0, 3)
