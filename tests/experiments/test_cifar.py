"""The image experiments train, go on where they were stopped, and say what is wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import archives
import chex
import cifar
import jax
import jax.numpy as jnp
import methods
import models
import numpy as np
import pytest
import small_archives
import vision_batches
import vision_options
import vision_report
import vision_training
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from presets import PRESETS, PUBLISHED
from tiny_experiment import TinyNetwork, keep_final_state

import optax_vasso as ov

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SMALL = ("--model", "tiny", "--batch", "20", "--evaluation-batch", "16")


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory):
    """Runs of the same program, one after another in one process, compile it once."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("compiled")))
    jax.config.update(names[1], 0)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """A network that compiles at once, and a folder of its own to write in."""
    monkeypatch.setitem(models.MODELS, "tiny", TinyNetwork)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """An archive in the true format in which the label is in the colour."""
    draw = small_archives.batch

    def coloured(generator, name, n):
        content = draw(generator, name, n)
        labels = np.array(content[b"labels"])[:, None]
        planes = 20 + 25 * ((labels * np.array([[1, 3, 7]])) % 10)
        content[b"data"] = np.repeat(planes, 1024, axis=1).astype(np.uint8)
        return content

    monkeypatch.setattr(small_archives, "batch", coloured)
    entry = small_archives.write(tmp_path / "data", "cifar10")
    monkeypatch.setitem(archives.ARCHIVES, "cifar10", entry)
    return tmp_path / "data"


@pytest.fixture
def states(monkeypatch):
    """The final states of the runs."""
    found = []
    monkeypatch.setattr(vision_training, "run_seed", vision_training.run_seed)
    keep_final_state(vision_training, found)
    return found


def train(*arguments):
    """Run cifar.py; the results files of its seeds."""
    assert cifar.main([str(argument) for argument in arguments]) == 0
    paths = sorted(Path().glob("**/*_seed[0-9].json"))
    found = map(json.loads, map(Path.read_text, paths))
    return list(found)


def refused(capsys, *arguments):
    """Run cifar.py, which has to refuse in one line; the line."""
    try:
        code = cifar.main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    message = capsys.readouterr().err
    assert message.startswith("cifar.py: ")
    assert message.count("\n") == 1
    assert not list(Path().iterdir())
    return message


def without_time(epochs):
    return [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in epochs]


def images_and_options(*arguments):
    given = ["--dataset", "synthetic", "--model", "tiny", *arguments]
    options = vision_options.parse_arguments(given)
    return cifar.load(options)(0), options


def test_training_on_an_archive_lowers_the_loss_and_is_written_down(data_dir):
    (result,) = train(
        *("--data-dir", data_dir, *SMALL, "--epochs", 6, "--learning-rate", 0.3),
        *("--cutout", 0, "--metrics-directory", "metrics", "--microbatches", 2),
    )
    losses = [epoch["loss"] for epoch in result["epochs"]]
    assert losses[-1] < 0.7 * losses[0]
    assert result["last"] == result["epochs"][-1]["test_accuracy"]
    assert result["best"] == max(e["test_accuracy"] for e in result["epochs"])
    assert result["gradients_per_step"] == 2
    assert result["settings"]["theta"] == 0.4
    assert not result["interrupted"]
    (lines,) = Path("metrics").glob("*/metrics.jsonl")
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    assert written == result["epochs"]
    assert list(Path("metrics").glob("*/events.out.tfevents.*"))


def test_a_run_goes_on_after_an_interrupt_to_the_bit(
    data_dir, states, monkeypatch, capsys
):
    arguments = (
        *("--data-dir", data_dir, *SMALL, "--epochs", 3, "--label-noise", 0.4),
        *("--seed", 3),
    )
    (whole,) = train(*arguments, "--results", "whole")
    goes_on = ("--directory", "run", "--results", "stopped")
    add = vision_training.Sums.add

    def interrupt(self, metrics):
        add(self, metrics)
        if interrupt.steps == 0:
            os.kill(os.getpid(), signal.SIGINT)
        interrupt.steps -= 1

    interrupt.steps = 5  # in the second epoch
    monkeypatch.setattr(vision_training.Sums, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cifar.main([*map(str, arguments), *goes_on])
    monkeypatch.setattr(vision_training.Sums, "add", add)
    (stopped,) = Path("stopped").iterdir()
    stopped = json.loads(stopped.read_text())
    assert stopped["interrupted"]
    assert without_time(stopped["epochs"]) == without_time(whole["epochs"][:1])

    assert cifar.main([*map(str, arguments), *goes_on]) == 0
    (resumed,) = map(json.loads, map(Path.read_text, Path("stopped").iterdir()))
    assert not resumed["interrupted"]
    # The means over the epoch that was interrupted are those of all its steps.
    assert without_time(resumed["epochs"]) == without_time(whole["epochs"])
    chex.assert_trees_all_equal(*states)
    assert resumed["wrong_labels"] > 0

    capsys.readouterr()
    changed = (*arguments, "--directory", "run", "--rho", "0.3")
    assert cifar.main(list(map(str, changed))) == 2
    assert "rho: 0.1 there, 0.3 here" in capsys.readouterr().err


def test_batch_statistics_are_of_the_clean_pass_and_evaluation_uses_them():
    images, options = images_and_options("--rho", "0.5", "--evaluation-batch", "48")
    mesh = vision_training.data_mesh()
    run = vision_training.prepare(options, images, mesh, 0)
    batch = images.train(0)[0]
    before = jax.tree.map(jnp.copy, run.state)
    state, metrics = run.step(run.state, run.place(batch))
    assert metrics["perturbation_norm"] == pytest.approx(0.5, rel=1e-5)
    model = TinyNetwork(images.classes, jnp.float32)
    loss_fn = vision_training.make_loss(model, images, 0.0)
    key = jax.random.fold_in(before.key, 0)
    expected = jax.jit(loss_fn)(before.params, before.model_state, batch, key)[1][0]
    # Compiled alone or in a step: another order of float32 sums.
    chex.assert_trees_all_close(state.model_state, expected, rtol=1e-5, atol=1e-6)

    variables = {"params": state.params, **state.model_state}
    right = []
    for test in images.test():  # 80 images in batches of 48, the second filled up
        logits = model.apply(variables, images.normalize(test["image"]), train=False)
        hits = np.argmax(logits, -1) == test["label"]
        right += list(hits[test["weight"] == 1])
    assert len(right) == 80
    found = run.evaluate(state, run.statistics(state))
    assert found["accuracy"] == pytest.approx(100 * np.mean(right))


def test_recollected_statistics_are_those_of_the_evaluated_parameters():
    images, options = images_and_options(
        *("--method", "lagged_vasso", "--rho", "2", "--recollect", "100")
    )
    run = vision_training.prepare(options, images, vision_training.data_mesh(), 0)
    state, _ = run.step(run.state, run.place(images.train(0)[0]))
    batches = [images.train(0)[t] for t in range(10)]  # an epoch
    pictures = np.concatenate([batch["image"] for batch in batches])
    mean_colours = jax.jit(images.augment)(jax.random.key(1), pictures).mean((1, 2))

    def distance(model_state, params):
        layer = params["Dense_0"]
        hidden = mean_colours @ layer["kernel"] + layer["bias"][None]
        found = model_state["batch_stats"]["BatchNorm_0"]["mean"]
        return float(jnp.linalg.norm(found - hidden.mean(axis=0)))

    found = run.statistics(state)
    evaluated = ov.eval_params(state.opt_state, state.params)
    # The augmentation of 32 images at a time is what is left of a difference.
    assert distance(found, evaluated) < 0.2 * distance(found, state.params)
    assert distance(found, evaluated) < 0.2 * distance(state.model_state, evaluated)


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_method_makes_a_step(method, optimizer):
    given = ("--method", method, "--optimizer", optimizer)
    if method in ("sam", "gsam") and optimizer == "adamw":
        given += ("--final-rho", "0", "--clip", "1", "--warmup-epochs", "5")
    if method in ("vasso", "friendly_sam") and optimizer == "adamw":
        given += ("--local-ascent", "4", "--dtype", "bfloat16")
    images, options = images_and_options(*given)
    run = vision_training.prepare(options, images, vision_training.data_mesh(), 0)
    batch = images.train(0)[0]
    state, metrics = jax.eval_shape(run.step, run.state, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, run.state)
    assert metrics["loss"].shape == ()


def test_random_labels_are_a_fixed_draw_of_the_share_asked_for():
    labels = np.arange(50_000, dtype=np.int32) % 10
    noisy = vision_batches.random_labels(labels, 0.5, 10, seed=1)
    # 25,000 are drawn anew and 9 of 10 of them are wrong: 5 standard deviations.
    assert abs(np.sum(noisy != labels) - 22_500) < 5 * np.sqrt(25_000 * 0.9 * 0.1)
    again = vision_batches.random_labels(labels, 0.5, 10, seed=1)
    np.testing.assert_array_equal(noisy, again)
    other = vision_batches.random_labels(labels, 0.5, 10, seed=2)
    assert np.mean(noisy != other) > 0.5
    assert np.bincount(noisy).max() < 5_000 + 5 * np.sqrt(25_000 * 0.1 * 0.9)
    np.testing.assert_array_equal(
        vision_batches.random_labels(labels, 0, 10, 1), labels
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "adam"], "no preset 'adam'"),
        (["--method", "sam", "--theta", "0.1"], "--theta: sam does not take it"),
        (["--rho", "-1"], "rho must be a finite number >= 0, got -1"),
        (["--data-dir", "nowhere"], "Download https://www.cs.toronto.edu"),
        (["--dataset", "folder"], "needs --data-dir"),
        (["--dataset", "folder", "--data-dir", "gone"], "gone/train"),
        (["--smoke", "--seeds", "0,0"], "must be different integers >= 0"),
        (["--epochs", "2", "--warmup-epochs", "2"], "leaves nothing of --epochs 2"),
        (["--label-noise", "1.5"], "must be a number from 0 to 1, got '1.5'"),
        (["--method", "base", "--local-ascent"], "base has no ascent"),
        (["--smoke", "--batch", "33", "--microbatches", "2"], "--batch: 33 is not"),
        (["--smoke", "--batch", "900"], "are not one batch of 900"),
        (["--process-id", "1"], "go together"),
        (["--report", "."], "no results of finished runs"),
    ],
)
def test_what_is_wrong_is_one_line_and_no_file(arguments, message, capsys):
    assert message in refused(capsys, *arguments)


def test_metrics_need_tensorboard_x(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    message = refused(capsys, "--smoke", "--metrics-directory", "metrics")
    assert "pip install tensorboardX" in message


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_parses_and_every_value_has_a_source(name):
    preset = PRESETS[name]
    options = vision_options.parse_arguments(["--preset", name, "--data-dir", "x"])
    assert options.model in models.MODELS
    assert options.method in methods.METHODS
    assert not options.changed
    for option, (value, source) in preset.settings.items():
        assert getattr(options, option) == value
        assert source or option in ("dataset", "model", "method")


def test_options_change_a_preset_and_the_name_says_so():
    given = ["--preset", "vasso_resnet18_cifar10", "--data-dir", "x", "--rho", "0.2"]
    options = vision_options.parse_arguments(given)
    assert options.hyperparameters == {"rho": 0.2, "theta": 0.4}
    assert cifar.run_name(options) == "vasso_resnet18_cifar10_rho=0.2"
    # Another method has its own hyperparameters, not those of the preset's.
    options = vision_options.parse_arguments([*given[:4], "--method", "friendly_sam"])
    assert options.hyperparameters == {"rho": 0.2, "sigma": 1.0, "lmbda": 0.6}


def test_a_report_has_what_is_published_beside(capsys):
    given = ["--preset", "vasso_resnet18_cifar10", "--data-dir", "x"]
    settings = cifar.settings(vision_options.parse_arguments(given))
    for seed, accuracies in enumerate([(96.0, 95.0), (97.0, 97.0), (50.0, 10.0)]):
        result = {
            "name": given[1],
            "preset": given[1],
            "changed": {},
            "seed": seed,
            "settings": settings,
            "interrupted": seed == 2,
            "epochs": [
                {"epoch": i + 1, "test_accuracy": accuracy, "gradients": 2.0}
                for i, accuracy in enumerate(accuracies)
            ],
        }
        Path(f"run_seed{seed}.json").write_text(json.dumps(result))
    assert cifar.main(["--report", "."]) == 0
    assert "1 interrupted" in capsys.readouterr().out
    text = Path("report.md").read_text()
    row = next(line for line in text.splitlines() if given[1] in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # Last epochs 95 and 97, best 96 and 97; standard errors |difference|/2.
    assert cells[:6] == [
        *(given[1], "VaSSO, ρ = 0.1, θ = 0.4", "2"),
        *("96.00 ± 1.00", "96.50 ± 0.50", "2.00"),
    ]
    assert cells[6] == "96.77 (within 0.03)"
    assert "BingcongLi/VaSSO" in cells[7]


def test_the_page_has_every_published_figure():
    assert set(PUBLISHED) <= set(PRESETS)
    page = (ROOT / "docs" / "cifar.md").read_text()
    for name, found in PUBLISHED.items():
        for published in found:
            accuracy = vision_report.show(published)
            assert f"| `{name}` | {accuracy} | {published.source} |" in page


def test_two_processes_train_on_a_folder_as_one_does(tmp_path, states):
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 5)):
        for name in ("a", "b"):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (10, 12, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    arguments = (
        *("--dataset", "folder", "--data-dir", tmp_path / "pictures"),
        *("--model", "tiny", "--image-size", 8, "--cutout", 0, "--batch", 4),
        # 10 test images: each process has some that only fill up.
        *("--evaluation-batch", 4, "--epochs", 2, "--directory"),
    )
    (alone,) = train(*arguments, "one")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = (*arguments, "two", "--results", "two_results", "--coordinator", address)
    workers = [
        subprocess.Popen(
            [
                *(sys.executable, HERE / "tiny_experiment.py", "two.npz"),
                *map(str, shared),
                *("--process-count", "2", "--process-id", str(i)),
            ],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    (path,) = Path("two_results").iterdir()
    together = json.loads(path.read_text())
    assert together["last"] == alone["last"]
    for one, two in zip(alone["epochs"], together["epochs"], strict=True):
        # The sums over the batch are taken in another order, in float32.
        assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    parameters = np.load("two.npz").values()
    for one, two in zip(jax.tree.leaves(states[0].params), parameters, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)
