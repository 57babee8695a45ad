"""The language model: whole files are held out, budgets are equal, nothing leaks."""

import itertools
import json
import math
import platform
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "examples"))
pytest.importorskip("flax")

import char_lm
import char_transformer
from char_lm import SMALLEST
from char_transformer import CONTEXT, SPLITS, read_corpus, split_of

MODULES = [f"module_{i}" for i in range(60)]


@pytest.fixture
def library(tmp_path):
    """Modules of 400 characters each; that of module i is the character 32 + i."""
    for i, module in enumerate(MODULES):
        (tmp_path / f"{module}.py").write_text(chr(32 + i) * 400)
    return tmp_path


def test_a_file_is_in_one_split_whole(library):
    corpus = read_corpus(library, MODULES)
    for split in SPLITS:
        characters, counts = np.unique(corpus.text[split], return_counts=True)
        expected = {32 + MODULES.index(module) for module in corpus.modules[split]}
        assert set(characters) == expected
        assert set(counts) == {400}
    assert sorted(itertools.chain(*corpus.modules.values())) == sorted(MODULES)


def test_the_split_depends_on_the_name_alone(library):
    whole = read_corpus(library, MODULES).modules
    half = read_corpus(library, MODULES[30:]).modules
    for split in SPLITS:
        assert set(half[split]) == set(whole[split]) & set(MODULES[30:])
    # Their SHA-256 begin with 0x4c, 0xa4 and 0xf3; the bounds are 0x99 and 0xcc.
    assert [split_of(m) for m in ("functools", "random", "enum")] == list(SPLITS)


def test_tests_are_no_part_of_the_standard_library():
    corpus = read_corpus()
    names = list(itertools.chain(*corpus.modules.values()))
    assert len(names) == len(set(names)) > 100
    assert not [name for name in names if name.startswith("test")]


def test_a_module_is_cut_and_characters_beyond_ascii_are_one():
    codes = char_transformer.encode("aß—" + 5000 * "z")
    assert len(codes) == char_transformer.CHARACTERS_PER_MODULE
    assert list(codes[:4]) == [97, 127, 127, 122]


def test_a_python_without_sources_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="leaves 0 characters to train: run a Python"):
        read_corpus(tmp_path)
    paths = {"stdlib": tmp_path}
    monkeypatch.setattr(char_transformer.sysconfig, "get_paths", lambda: paths)
    assert_refused(["--smoke"], "leaves 0 characters to train", capsys)


def test_evaluation_windows_span_the_text():
    text = np.arange(100, dtype=np.uint8)
    windows = char_transformer.evenly_spaced_windows(text, 5)
    chex.assert_shape(windows, (5, CONTEXT + 1))
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 99


@pytest.fixture(scope="module")
def logits_of():
    """Two rows of characters -> their logits, of one untrained network."""
    params = char_transformer.init_of(SMALLEST)(jnp.arange(2, dtype=jnp.int32))
    variables = {"params": jax.tree.map(lambda leaf: leaf[0], params)}
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
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    arguments = ["--smoke", "--methods", "base,vasso"]
    assert char_lm.main([*arguments, "--results", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def results(smoke):
    return json.loads((smoke / "char_lm.json").read_text())


def test_the_smoke_run_writes_a_figure_and_the_numbers(smoke, results):
    names = sorted(path.name for path in smoke.iterdir())
    assert names == ["char_lm.json", "char_lm.png"]
    assert results["text"]["python"] == platform.python_version()
    assert list(results["methods"]) == ["base", "vasso"]


def test_budgets_are_equal_in_gradients_that_were_counted(results):
    methods = results["methods"]
    assert [s["gradients"] for s in methods.values()] == [[40, 40], [40, 40]]
    assert [s["steps"] for s in methods.values()] == [40, 20]
    for summary in methods.values():
        np.testing.assert_allclose(summary["curve_gradients"], 2 * np.arange(1, 21))


def test_the_summary_is_the_mean_over_seeds_and_their_differences(results):
    base, vasso = results["methods"].values()
    compared = vasso["difference_to_adamw"]["validation_loss"]["mean"]
    expected = vasso["mean"]["validation_loss"] - base["mean"]["validation_loss"]
    assert compared == pytest.approx(expected)
    for seed in range(2):
        numbers = {key: values[seed] for key, values in vasso["seeds"].items()}
        nats = numbers["validation_loss"]
        assert numbers["validation_bits"] == pytest.approx(nats / math.log(2))
        assert numbers["gap"] == pytest.approx(nats - numbers["training_loss"])
        # Uniform guessing costs log 128 = 4.85 nats; training lowers it.
        assert nats < 4.5
        assert numbers["lambda_max"] > 10 * numbers["residual"] > 0


def test_tuning_evaluates_on_the_tuning_files_and_sorts(tmp_path, monkeypatch):
    corpus = read_corpus()
    evaluated = []

    def train(make_optimizer, rows, seeds, text, windows, **_):
        np.testing.assert_array_equal(text, corpus.text["train"])
        evaluated.append(windows)
        # The loss of each run falls with its ρ.
        loss = np.tile(5 - rows["rho"][:, None], (1, char_transformer.EVALUATIONS))
        return char_transformer.Runs(loss, loss, {}, 20)

    monkeypatch.setattr(char_transformer, "train", train)
    arguments = ["--smoke", "--tune", "--methods", "sam"]
    assert char_lm.main([*arguments, "--results", str(tmp_path)]) == 0
    expected = char_transformer.evenly_spaced_windows(corpus.text["tune"], 32)
    np.testing.assert_array_equal(evaluated[0], expected)
    tuned = json.loads((tmp_path / "char_lm_tuning.json").read_text())["methods"]
    assert [r["rho"] for r in tuned["sam"]] == sorted(char_lm.GRIDS["sam"]["rho"])[::-1]
    assert [r["loss"] for r in tuned["sam"]] == [5 - r["rho"] for r in tuned["sam"]]


def test_what_was_picked_is_the_best_of_the_tuning_file():
    path = Path(__file__).parents[2] / "results" / "char_lm_tuning.json"
    tuned = json.loads(path.read_text())["methods"]
    for name, rows in tuned.items():
        best = {k: v for k, v in rows[0].items() if k not in ("loss", "standard_error")}
        shared = {"learning_rate": char_lm.LEARNING_RATE} if name == "base" else {}
        assert best == char_lm.PICKED[name] | shared


def test_an_interrupted_run_saves_the_methods_that_were_finished(
    results, tmp_path, monkeypatch
):
    def interrupted(name, *_):
        if name == "sam":
            raise KeyboardInterrupt
        return results["methods"][name]

    monkeypatch.setattr(char_lm, "train_and_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        char_lm.main(["--methods", "base,sam", "--results", str(tmp_path)])
    saved = json.loads((tmp_path / "char_lm.json").read_text())
    assert saved["interrupted"]
    assert list(saved["methods"]) == ["base"]


def assert_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        char_lm.main(arguments)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--gradients", "100", "must be a multiple of 40"),
        ("--gradients", "many", "must be an integer >= 1, got 'many'"),
        ("--seeds", "0", "must be an integer >= 1, got '0'"),
        ("--methods", "sam,adamw", "'adamw' is none of base, sam"),
        ("--results", __file__, "is not a folder"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_two(option, value, message, capsys):
    assert_refused([option, value], message, capsys)
