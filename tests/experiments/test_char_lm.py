"""The language model: whole files are held out, budgets are equal, nothing leaks."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import char_lm
from experiments.harness import language, tuning
from experiments.harness.language import CONTEXT, STEPS_PER_CALL
from experiments.harness.language_methods import METHODS
from experiments.harness.progress import Progress
from experiments.harness.transformer import Transformer
from experiments.tasks import corpus as texts
from experiments.tasks.corpus import SPLITS, VOCABULARY, read, split_of

MODULES = [f"module_{i}" for i in range(60)]
WIDER = ["--width", "64"]
SMALLEST = Transformer(8, 1, VOCABULARY, CONTEXT)


@pytest.fixture
def library(tmp_path):
    """Modules of 400 characters each; that of module i is the character 32 + i."""
    for i, module in enumerate(MODULES):
        (tmp_path / f"{module}.py").write_text(chr(32 + i) * 400)
    return tmp_path


def test_a_file_is_in_one_split_whole(library):
    corpus = read(library, MODULES)
    for split in SPLITS:
        characters, counts = np.unique(corpus.text[split], return_counts=True)
        expected = {32 + MODULES.index(module) for module in corpus.modules[split]}
        assert set(characters) == expected
        assert set(counts) == {400}
    assert sorted(itertools.chain(*corpus.modules.values())) == sorted(MODULES)


def test_the_split_depends_on_the_name_alone(library):
    whole = read(library, MODULES).modules
    half = read(library, MODULES[30:]).modules
    for split in SPLITS:
        assert set(half[split]) == set(whole[split]) & set(MODULES[30:])
    # Their SHA-256 begin with 0x4c, 0xa4 and 0xf3; the bounds are 0x99 and 0xcc.
    assert [split_of(m) for m in ("functools", "random", "enum")] == list(SPLITS)


def test_tests_are_no_part_of_the_standard_library():
    corpus = read()
    names = list(itertools.chain(*corpus.modules.values()))
    assert len(names) == len(set(names)) > 100
    assert not [name for name in names if name.startswith("test")]


def test_a_module_is_cut(library):
    corpus = read(library, MODULES, characters=300)
    for split in SPLITS:
        assert len(corpus.text[split]) == 300 * len(corpus.modules[split])


def test_characters_beyond_ascii_are_one():
    assert list(texts.encode("aß—z")) == [97, 127, 127, 122]


def test_the_reference_is_whole_and_no_part_of_the_modules():
    """A topic is some kilobytes long; its first sentences stand in no module."""
    from pydoc_data.topics import topics

    corpus = texts.read_reference()
    assert sorted(itertools.chain(*corpus.modules.values())) == sorted(topics)
    assert sum(map(len, corpus.text.values())) == sum(map(len, topics.values()))
    code = bytes(np.concatenate(list(read(characters=100_000).text.values())))
    with_statement = bytes(texts.encode(topics["with"])[:400])
    assert with_statement not in code
    assert with_statement in bytes(corpus.text[split_of("with")])


def test_a_python_without_sources_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="leaves 0 characters to training: run a"):
        read(tmp_path)
    monkeypatch.setattr(texts.sysconfig, "get_paths", lambda: {"stdlib": tmp_path})
    with pytest.raises(SystemExit) as exit_of:
        char_lm.main(["--smoke", "--runs", str(tmp_path / "runs")])
    assert exit_of.value.code == 2
    error = capsys.readouterr().err
    assert "leaves 0 characters to training" in error
    assert error.count("\n") == 1


def test_evaluation_windows_span_the_text():
    windows = texts.evenly_spaced_windows(np.arange(100, dtype=np.uint8), 5, 65)
    assert windows.shape == (5, 65)
    assert (windows[0, 0], windows[-1, -1]) == (0, 99)


def test_frequencies_alone_cost_their_cross_entropy():
    """Two characters, three to one, and as many of each in the test."""
    training = np.repeat(np.uint8([0, 1]), [29_999, 9_999])
    test = np.uint8([0, 1])
    corpus = texts.Corpus({}, {"training": training, "test": test})
    expected = -(np.log(0.75) + np.log(0.25)) / 2
    assert texts.loss_of_frequencies(corpus) == pytest.approx(expected, abs=0.01)


@pytest.fixture(scope="module")
def logits_of():
    """Rows of characters -> their logits, of one untrained network."""
    empty = jnp.zeros((1, CONTEXT), jnp.int32)
    with jax.numpy_rank_promotion("allow"):
        variables = jax.jit(SMALLEST.init)(jax.random.key(0), empty)
    return jax.jit(lambda characters: SMALLEST.apply(variables, characters))


def test_a_later_character_does_not_change_earlier_logits(logits_of):
    characters = jnp.tile(jnp.arange(CONTEXT)[None], (2, 1))
    logits, changed = logits_of(characters.at[1, 40].set(7))
    np.testing.assert_array_equal(changed[:40], logits[:40])
    assert np.all(np.any(changed[40:] != logits[40:], axis=-1))


def test_one_character_means_something_else_at_another_position(logits_of):
    logits, _ = logits_of(jnp.full((2, CONTEXT), 97))
    assert np.all(np.any(logits[1:] != logits[:-1], axis=-1))


@pytest.fixture(scope="module")
def trained():
    """Three trainings of VaSSO that differ in radius and seed, and their progress."""
    corpus, method, progress = read(), METHODS["vasso"], Progress("", 0)
    point = {"learning_rate": 0.01, "weight_decay": 0.1, "rho": 0.01, "theta": 0.5}
    points = [point, point | {"rho": 0.03}, point]
    with jax.numpy_rank_promotion("allow"):
        found = language.train(
            *(corpus, SMALLEST, method, points, [0, 1, 2]),
            calls=1,
            test=True,
            progress=progress,
        )
    return corpus, method, points, found, progress


def test_gradients_are_counted_and_reported_as_progress(trained):
    _, _, _, found, progress = trained
    assert found.gradients.tolist() == [2 * STEPS_PER_CALL] * 3
    assert progress.done == 3 * 2 * STEPS_PER_CALL
    assert found.test.shape == found.validation.shape == found.training.shape == (3,)


def test_training_lowers_the_loss_and_seeds_differ(trained):
    losses = trained[3].test
    # Uniform guessing costs log 128 = 4.85 nats.
    assert (losses < 4.5).all()
    assert len(set(losses.tolist())) == 3


def test_a_search_is_not_shown_the_test_files(trained):
    corpus, method, points, found, _ = trained
    blind = corpus._replace(text=corpus.text | {"test": corpus.text["test"][:65]})
    alone = language.train(
        *(blind, SMALLEST, method, points[:1], [0]), calls=1, progress=Progress("", 0)
    )
    assert alone.test is None
    np.testing.assert_array_equal(alone.validation, found.validation[:1])


def test_results_compare_with_adamw_and_count_who_learned_nothing(trained, tmp_path):
    corpus, method, points, found, _ = trained
    row = char_lm.row(method, points[0], found)
    worse = found._replace(test=found.test + np.array([1.0, 1.0, 9.0]))
    rows = char_lm.compare(
        {"adamw": row, "vasso": char_lm.row(method, points[0], worse)},
        texts.loss_of_frequencies(corpus) + 2,
    )
    assert rows["vasso"]["differences"]["adamw"]["mean"] == pytest.approx(11 / 3)
    assert [found["last"]["collapsed"] for found in rows.values()] == [0, 1]
    header, lines = char_lm.cells(rows)
    assert {len(line) for line in lines} == {len(header)}
    path = tmp_path / "figure.png"
    char_lm.draw(path, {"lengths": {"50": rows, "100": rows}, "seeds": 3})
    assert path.stat().st_size > 5000


def test_learning_rate_and_weight_decay_are_searched_for_every_method():
    spaces = [METHODS[name].space for name in char_lm.METHODS]
    for space in spaces:
        assert space["learning_rate"] == spaces[0]["learning_rate"]
        assert space["weight_decay"] == spaces[0]["weight_decay"]


def test_at_another_length_a_method_may_take_the_point_of_another(
    library, tmp_path, monkeypatch
):
    """The loss is the learning rate; the point that another method picked is lowest."""
    tried = []

    def train(self, points, seeds, length, test=False):
        tried.append(len(points))
        losses = np.array([point["learning_rate"] for point in points])
        gradients = np.full(len(points), float(length))
        return language.Trained(losses, losses, losses, gradients)

    monkeypatch.setattr(char_lm.Study, "_train", train)
    budget = tuning.Budget(2, 1, ((1, 2),), 0)
    plan = char_lm.Plan(3, budget, 100, (100, 200), going_on=2, again=2)
    corpus = read(library, MODULES)
    study = char_lm.Study(corpus, "adamw", plan, tmp_path, Progress("", 0))
    own = [{"learning_rate": rate, "weight_decay": 0.1} for rate in (0.01, 0.02)]
    search = {"picked": own[0], "finalists": own}
    others = [{"learning_rate": 0.005, "weight_decay": 0.2, "rho": 0.3}]
    assert study.test(100, search, others)["hyperparameters"] == own[0]
    found = study.test(200, search, others)["hyperparameters"]
    assert found == {"learning_rate": 0.005, "weight_decay": 0.2}
    # Three points on two seeds, and the test on three.
    assert tried == [3, 6, 3]
    assert plan.work_of(200, others=1) == 200 * (6 + 3)
    assert plan.work(["adamw", "nadamw"]) == (
        2 * plan.work_of_search + 2 * (plan.work_of(100) + plan.work_of(200)) + 200 * 2
    )


def test_a_split_batch_is_one_gradient():
    point = {"learning_rate": 0.01, "weight_decay": 0.1, "rho": 0.1}
    with jax.numpy_rank_promotion("allow"):
        found = language.train(
            *(read(), SMALLEST, METHODS["split_sam"], [point], [0]),
            calls=1,
            progress=Progress("", 0),
        )
    assert found.gradients.tolist() == [STEPS_PER_CALL]


@pytest.mark.exhaustive  # .ci/run makes the same smoke runs
@pytest.mark.parametrize(
    ("arguments", "file"), [([], "char_lm"), (WIDER, "char_lm_width_64")]
)
def test_the_smoke_run_tests_every_length_and_is_not_done_again(
    arguments, file, tmp_path, monkeypatch
):
    arguments = ["--smoke", "--runs", str(tmp_path), *arguments]
    assert char_lm.main(arguments) == 0
    found = json.loads((tmp_path / f"smoke/{file}.json").read_text())
    assert found["finished"]
    for length, rows in found["lengths"].items():
        for row in rows.values():
            assert row["gradients"] == int(length)

    def train(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(language, "train", train)
    assert char_lm.main(arguments) == 0
