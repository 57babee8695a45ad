"""Splits never mix what they must keep apart, and noise is what it says."""

import gzip

import jax
import numpy as np
import pytest

from experiments import tasks
from experiments.tasks import fashion, mnist1d, teacher_student, text

NAMES = (
    *("digits-75", "digits-asymmetric", "cancer-40", "wine-50", "text-50"),
    *("mnist1d-40", "mnist1d_cnn-40"),
)


@pytest.mark.parametrize("name", [*NAMES, "teacher-60", "teacher-tilt"])
@pytest.mark.parametrize("seed", [0, 10_003])
def test_a_split_keeps_training_validation_and_test_apart(name, seed):
    task = tasks.load(name)
    split = tasks.split(task, seed)
    sides = [set(task.groups[i]) for i in (split.training, split.validation, task.test)]
    assert not sides[0] & sides[1]
    assert not (sides[0] | sides[1]) & sides[2]
    assert (len(split.training), len(split.validation)) == (
        task.training,
        task.validation,
    )
    assert task.inputs.dtype == np.float32
    assert task.inputs.shape[0] == len(task.labels)
    assert set(task.labels[task.test]) <= set(range(task.classes))


def test_a_seed_draws_the_same_split_and_another_seed_another():
    task = tasks.load("digits-75")
    first, again, other = (tasks.split(task, seed) for seed in (3, 3, 4))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert not np.array_equal(first.training, other.training)
    assert not np.array_equal(first.given_labels, other.given_labels)


def test_the_folds_of_a_seed_share_labels_and_validate_on_all_of_the_pool():
    task = tasks.load("wine-50")
    splits = [tasks.split(task, 4 * 7 + fold) for fold in range(4)]
    held = np.concatenate([split.validation for split in splits])
    assert sorted(held) == sorted(task.pool)
    for split in splits[1:]:
        np.testing.assert_array_equal(split.given_labels, splits[0].given_labels)
    another = tasks.split(task, 4 * 8)
    assert not np.array_equal(another.given_labels, splits[0].given_labels)


def test_a_length_changes_the_epochs_and_nothing_else():
    short, usual, long = (tasks.load(f"digits-75{x}") for x in ("-short", "", "-long"))
    assert (short.epochs, usual.epochs, long.epochs) == (20, 60, 180)
    assert (short.title, long.title) == (
        "digits, 75 % random labels, a third",
        "digits, 75 % random labels, thrice",
    )
    np.testing.assert_array_equal(short.inputs, usual.inputs)


def test_mnist1d_leaves_the_random_numbers_of_the_process_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    inputs, labels = mnist1d.examples()
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert inputs.shape == (5000, 40)
    assert np.bincount(labels).tolist() == [500] * 10


@pytest.fixture
def tiny_fashion(tmp_path, monkeypatch):
    """Files like those of Fashion-MNIST: 60 and 10 images of 4 x 4 pixels."""
    random = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 10)):
        images = random.integers(0, 256, (count, 4, 4))
        labels = np.arange(count) % 10
        for kind, values in (("images", images), ("labels", labels)):
            header = bytes([0, 0, 8, values.ndim])
            header += np.array(values.shape, ">u4").tobytes()
            content = gzip.compress(header + values.astype(np.uint8).tobytes())
            path = tmp_path / f"{part}-{kind}-idx{values.ndim}-ubyte.gz"
            path.write_bytes(content)
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    tasks.load.cache_clear()
    yield tmp_path
    tasks.load.cache_clear()


def test_fashion_mnist_is_read_and_shrunk_to_means(tiny_fashion):
    task = tasks.load("fashion-0")
    assert task.inputs.shape == (70, 4)
    assert (task.training, task.validation, len(task.test)) == (50, 10, 10)
    images = fashion.read_idx(tiny_fashion / "train-images-idx3-ubyte.gz")
    corner = images[3, :2, 2:].mean()
    others = images[:, :2, 2:].mean((1, 2))
    assert np.corrcoef(task.inputs[:60, 1], others)[0, 1] == pytest.approx(1)
    assert corner == others[3]
    assert task.labels[60:].tolist() == list(range(10))


def test_convolutions_see_what_the_mlp_sees(tiny_fashion):
    for name in ("mnist1d", "fashion"):
        plain, convolved = (tasks.load(f"{name}{x}-40") for x in ("", "_cnn"))
        np.testing.assert_array_equal(plain.inputs, convolved.inputs)
        params = convolved.network.init(np.random.default_rng(0))
        logits = convolved.network.logits(params, convolved.inputs[:3])
        assert logits.shape == (3, convolved.classes)
        assert convolved.title.startswith(f"{plain.title}, convolutions")


def test_without_its_files_fashion_mnist_says_where_they_are(tiny_fashion):
    (tiny_fashion / "t10k-labels-idx1-ubyte.gz").unlink()
    fashion.examples.cache_clear()
    with pytest.raises(SystemExit, match="install Debian's package dataset-fashion"):
        tasks.load("fashion-0")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("digits-0", 0.0), ("digits-75", 0.75 * 0.9), ("wine-50", 1 / 3)],
)
def test_a_share_of_the_labels_is_uniformly_random(name, wrong):
    task = tasks.load(name)
    given = np.stack([tasks.split(task, seed).given_labels for seed in range(20)])
    assert np.mean(given != task.labels) == pytest.approx(wrong, abs=0.02)


def test_asymmetric_noise_turns_digits_into_their_doubles_only():
    task = tasks.load("digits-asymmetric")
    given = np.stack([tasks.split(task, seed).given_labels for seed in range(20)])
    for digit in range(10):
        found = given[:, task.labels == digit]
        double = {2: 7, 3: 8, 5: 6, 6: 5, 7: 1}.get(digit)
        assert set(np.unique(found)) == {digit, digit if double is None else double}
        if double is not None:
            assert np.mean(found == double) == pytest.approx(0.4, abs=0.03)


def test_a_training_has_collapsed_below_twice_chance():
    digits, cancer = tasks.load("digits-75"), tasks.load("cancer-40")
    assert tasks.collapsed_below(digits) == 2 * tasks.chance(digits) > 20
    assert 60 < tasks.chance(cancer) < tasks.collapsed_below(cancer) < 70


def test_trigrams_are_counted_wherever_they_stand():
    first, second = text.trigrams(b"abcabc"), text.trigrams(b"xxabc")
    assert (first.sum(), second.sum()) == (4, 3)
    assert text.trigrams(b"abc").argmax() == first.argmax()
    assert text.trigrams(b"abc").sum() == 1


def test_no_class_of_the_teacher_is_a_good_guess():
    assert tasks.chance(tasks.load("teacher-60")) < 25


def test_at_the_teacher_the_hessian_is_the_fisher_information():
    """Over the teacher's own labels, whose expectation is taken exactly."""
    inputs = teacher_student.teacher_inputs(3)
    network = tasks.load("teacher-60").network
    flat, unravel = jax.flatten_util.ravel_pytree(teacher_student.teacher())
    target = jax.nn.softmax(network.logits(unravel(flat), inputs))

    def loss(flat):
        scores = jax.nn.log_softmax(network.logits(unravel(flat), inputs))
        return -(target * scores).sum(1).mean()

    @jax.jit
    def curvature(direction):
        return jax.jvp(jax.grad(loss), (flat,), (direction,))[1]

    trace, largest = teacher_student.fisher_information(unravel(flat), inputs)
    vector = jax.random.normal(jax.random.key(0), flat.shape)
    for _ in range(20):
        vector = curvature(vector / np.linalg.norm(vector))
    assert np.linalg.norm(vector) == pytest.approx(largest, rel=1e-2)
    assert trace > largest > 0
