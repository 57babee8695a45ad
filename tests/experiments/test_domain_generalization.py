"""The unseen domain is not seen: not in training, not in the choice of ρ and θ."""

import json

import domain_generalization as dg
import domain_training
import jax
import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def data():
    """Three domains of 10, 20 and 30 images."""
    domains = np.repeat(np.arange(3), [10, 20, 30])
    return domain_training.Data(
        ("a", "b", "c"), 2, np.zeros((60, 4)), domains * 0, domains
    )


def test_each_digit_is_in_one_domain_and_the_first_is_not_rotated():
    digits = domain_training.rotated_digits()
    assert len(digits.images) == 1797
    assert set(np.bincount(digits.domains)) == {299, 300}
    upright = digits.images[digits.domains == 0] * 16
    np.testing.assert_array_equal(upright, np.round(upright))


def test_a_fifth_of_each_domain_is_held_out(data):
    held_out = domain_training.hold_out(data.domains, seed=0)
    assert np.bincount(data.domains[held_out]).tolist() == [2, 4, 6]
    assert (held_out != domain_training.hold_out(data.domains, seed=1)).any()


@pytest.mark.parametrize("unseen", [0, 1, 2])
def test_a_batch_has_as_many_images_of_each_domain_but_the_unseen(data, unseen):
    row = domain_training.make_row(data, unseen, 0, {})
    drawn = np.asarray(domain_training.draw_batch(jax.random.key(0), row, 50))
    expected = [0 if domain == unseen else 50 for domain in range(3)]
    assert np.bincount(data.domains[drawn], minlength=3).tolist() == expected
    assert not domain_training.hold_out(data.domains, 0)[drawn].any()


def test_the_unseen_domain_does_not_count_for_validation(data):
    correct = data.domains == 1
    assert dg.accuracies(correct, data, unseen=1, seed=0) == (0, 100)
    assert dg.accuracies(~correct, data, unseen=1, seed=0) == (100, 0)


def test_the_mean_over_seeds_picks_a_point_for_each_unseen_domain():
    validation = np.array([[[90.0, 90], [80, 80]], [[95, 80], [70, 95]]])
    assert dg.select(validation).tolist() == [0, 1]


def test_a_folder_of_domains_is_trained_on_end_to_end(tmp_path):
    root, results = tmp_path / "tiny", tmp_path / "results"
    generator = np.random.RandomState(0)
    for domain in ("art", "photo", "sketch"):
        for name, level in (("cat", 60), ("dog", 190)):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = generator.randint(level - 50, level + 50, (10, 12, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    arguments = ["--data-dir", root, "--model", "resnet_tiny", "--image-size", "8"]
    arguments += ["--smoke", "--batch", "2", "--methods", "sam", "--results", results]
    assert dg.main(list(map(str, arguments))) == 0
    names = sorted(path.name for path in results.iterdir())
    stem = "domain_generalization_tiny"
    assert names == [f"{stem}.json", f"{stem}.png"]
    written = json.loads((results / names[0]).read_text())
    assert written["domains"] == ["art", "photo", "sketch"]
    sam = written["methods"]["sam"]
    assert list(map(len, sam["accuracy"].values())) == [written["seeds"]] * 3
    assert sam["gradients_per_step"] == 2


def test_a_folder_without_domains_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        dg.main(["--data-dir", str(tmp_path / "missing")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
