"""The image experiments train, go on where they were stopped, and say what is wrong."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_archives
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from tiny_experiment import TinyNetwork, keep_final_state

import optax_vasso as ov
from experiments.vision import (
    archives,
    batches,
    cifar,
    methods,
    models,
    options as vision_options,
    programs,
    training,
)

HERE = Path(__file__).parent
SMALL = ("--model", "tiny", "--batch", "10", "--evaluation-batch", "8")
# 5 steps per epoch; one program serves most tests
RUN = (
    *(*SMALL, "--epochs", "6", "--learning-rate", "0.3", "--cutout", "0"),
    *("--label-noise", "0.2", "--seed", "3"),
)


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory):
    """Runs of the same program, one after another, compile it once."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("compiled")))
    jax.config.update(names[1], 0)
    compilation_cache.reset_cache()
    prepare, known = programs.prepare, {}

    @functools.wraps(prepare)
    def prepared_once(options, images, mesh):
        key = json.dumps([cifar.settings(options), images[:3]])
        if key not in known:
            known[key] = prepare(options, images, mesh)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "prepare", prepared_once)
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


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """An archive in the true format in which the label is in the colour; its entry."""
    draw = small_archives.batch

    def coloured(generator, name, n):
        content = draw(generator, name, n)
        labels = np.array(content[b"labels"])[:, None]
        planes = 20 + 25 * ((labels * np.array([[1, 3, 7]])) % 10)
        content[b"data"] = np.repeat(planes, 1024, axis=1).astype(np.uint8)
        return content

    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_archives, "batch", coloured)
        return folder, small_archives.write(folder, "cifar10", 10, 20)


@pytest.fixture
def data(archive, monkeypatch):
    """The options that find the archive."""
    folder, entry = archive
    monkeypatch.setitem(archives.ARCHIVES, "cifar10", entry)
    return "--data-dir", folder


@pytest.fixture
def states(monkeypatch):
    """The final states of the runs."""
    found = []
    monkeypatch.setattr(training, "run_seed", training.run_seed)
    keep_final_state(training, found)
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


def prepared(*arguments):
    """Options, images and programs of a command line."""
    options = vision_options.parse_arguments(list(map(str, arguments)))
    images = cifar.load(options)(options.seeds[0])
    run = programs.prepare(options, images, programs.data_mesh())
    return options, images, run


def synthetic(*arguments):
    return prepared("--dataset", "synthetic", "--model", "tiny", *arguments)


@pytest.fixture(scope="module")
def whole(archive, tmp_path_factory):
    """Results, final state and metrics folder of ``RUN``, which nothing stopped."""
    states = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny", TinyNetwork)
        patch.setitem(archives.ARCHIVES, "cifar10", archive[1])
        patch.setattr(training, "run_seed", training.run_seed)
        folder = tmp_path_factory.mktemp("whole")
        patch.chdir(folder)
        keep_final_state(training, states)
        given = (*RUN, "--data-dir", archive[0], "--metrics-directory", folder)
        (result,) = train(*given)
    return result, states[0], folder


def test_training_on_an_archive_lowers_the_loss_and_is_written_down(whole):
    result, _, folder = whole
    losses = [epoch["loss"] for epoch in result["epochs"]]
    assert losses[-1] < 0.8 * losses[0]
    assert result["last"] == result["epochs"][-1]["test_accuracy"]
    assert result["best"] == max(e["test_accuracy"] for e in result["epochs"])
    assert result["gradients_per_step"] == 2
    assert result["settings"]["theta"] == 0.4
    assert not result["interrupted"]
    (lines,) = folder.glob("*/metrics.jsonl")
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    assert written == result["epochs"]
    assert list(folder.glob("*/events.out.tfevents.*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_goes_on_after_a_signal_to_the_bit(
    data, whole, states, monkeypatch, capsys, number
):
    arguments = [*map(str, (*data, *RUN)), "--directory", "run", "--results", "stopped"]

    def interrupt(step, total):
        if step == 7:  # in the second epoch
            signal.raise_signal(number)

    run_seed = training.run_seed

    def interrupted(*args, **kwargs):
        args = [*args[:6], interrupt, *args[7:]]
        return run_seed(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "run_seed", interrupted)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            cifar.main(arguments)
    (stopped,) = Path("stopped").iterdir()
    stopped = json.loads(stopped.read_text())
    assert stopped["interrupted"]
    assert without_time(stopped["epochs"]) == without_time(whole[0]["epochs"][:1])

    assert cifar.main(arguments) == 0
    (resumed,) = map(json.loads, map(Path.read_text, Path("stopped").iterdir()))
    assert not resumed["interrupted"]
    # The means over the epoch that was interrupted are those of all its steps.
    assert without_time(resumed["epochs"]) == without_time(whole[0]["epochs"])
    chex.assert_trees_all_equal(states[-1], whole[1])
    assert resumed["wrong_labels"] > 0

    capsys.readouterr()
    assert cifar.main([*arguments, "--rho", "0.3"]) == 2
    assert "rho: 0.1 there, 0.3 here" in capsys.readouterr().err


class Killed(BaseException):
    """What nothing in the program expects."""


@pytest.mark.parametrize("written", [False, True])
def test_a_run_killed_around_every_second_checkpoint_loses_nothing(
    data, whole, states, monkeypatch, written
):
    open_store, saves = training.checkpoints, 0

    def mortal(*args):
        store = open_store(*args)

        def save(progress):
            nonlocal saves
            saves += 1
            if saves % 2 == 0 and not written:
                raise Killed
            store.save(progress)
            if saves % 2 == 0:
                raise Killed

        return store._replace(save=save)

    monkeypatch.setattr(training, "checkpoints", mortal)
    arguments = [*map(str, (*data, *RUN)), "--directory", "run", "--save-every", "3"]
    starts = 0
    while True:
        starts += 1
        try:
            assert cifar.main(arguments) == 0
        except Killed:
            continue
        break
    assert starts > 3
    (path,) = Path("runs/cifar").iterdir()
    found = json.loads(path.read_text())
    assert without_time(found["epochs"]) == without_time(whole[0]["epochs"])
    chex.assert_trees_all_equal(states[-1], whole[1])
    # What a run goes on from is one thing, so that no part can be newer than another.
    assert [path.name for path in Path("run").iterdir()] == ["seed_3"]


def test_an_unfinished_run_does_not_replace_a_finished_one(data, whole, monkeypatch):
    results = Path("runs/cifar/tiny.json")
    monkeypatch.setattr(cifar, "results_file", lambda options, seed: results)
    results.parent.mkdir(parents=True)
    run_seed = training.run_seed

    def stops(*args):
        run_seed(*args)
        del args[4]["epochs"][1:]
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "run_seed", stops)
    for finished in (True, False):
        results.write_text(json.dumps({"interrupted": not finished}))
        with pytest.raises(KeyboardInterrupt):
            cifar.main([*map(str, (*data, *RUN))])
        assert ("epochs" in json.loads(results.read_text())) != finished


def test_the_host_asks_the_device_for_nothing_within_an_epoch(data, whole, monkeypatch):
    asked, device_get = [], jax.device_get

    def counted(tree):
        asked.append(tree)
        return device_get(tree)

    monkeypatch.setattr(jax, "device_get", counted)
    train(*data, *RUN)
    assert len(asked) == 6  # epochs


def test_so_many_steps_are_under_way_as_batches_fit_into_memory():
    for shape, steps in (((128, 32, 32, 3), 64), ((4096, 224, 224, 3), 2)):
        batch = {"image": np.broadcast_to(np.uint8(0), shape)}
        assert training.steps_ahead(batch) == steps


def test_the_seeds_of_a_run_share_what_is_compiled(data, whole, monkeypatch):
    prepare, calls = programs.prepare, []

    def counted(*args):
        calls.append(args)
        return prepare(*args)

    monkeypatch.setattr(programs, "prepare", counted)
    one, other = train(*data, *RUN, "--seeds", "3,4")
    assert len(calls) == 1
    # And a run does not depend on whether another was before it.
    assert without_time(one["epochs"]) == without_time(whole[0]["epochs"])
    assert without_time(other["epochs"]) != without_time(whole[0]["epochs"])


def test_an_epoch_is_shuffled_once_and_shows_each_image_once(data):
    _, images, _ = prepared(*data, *RUN)
    batches.epoch_order.cache_clear()
    source = images.train(0)
    shown = [source[t] for t in range(10)]
    assert batches.epoch_order.cache_info().misses == 2
    for epoch in (shown[:5], shown[5:]):
        labels = np.concatenate([batch["label"] for batch in epoch])
        assert len(labels) == 50
        np.testing.assert_array_equal(
            np.sort(labels), np.sort(np.concatenate([b["label"] for b in shown[:5]]))
        )
    order = batches.epoch_order(50, 0, 0)
    assert sorted(order) == list(range(50))
    assert (order != batches.epoch_order(50, 0, 1)).any()


def test_validation_images_are_not_trained_on_and_have_the_labels_of_training(data):
    _, plain, _ = prepared(*data, *RUN)
    options, images, _ = prepared(*data, *RUN, "--validation", "0.2")
    assert (plain.train_count, images.train_count) == (50, 40)
    held_out = list(images.held_out())
    weight = np.concatenate([batch["weight"] for batch in held_out])
    labels = np.concatenate([batch["label"] for batch in held_out])[weight == 1]
    assert len(labels) == 10
    trained = np.concatenate([images.train(0)[t]["label"] for t in range(4)])
    both = np.concatenate([trained, labels])
    everything = np.concatenate([plain.train(0)[t]["label"] for t in range(5)])
    np.testing.assert_array_equal(np.sort(both), np.sort(everything))
    kept, out = batches.split(50, 0.2, 3)
    assert sorted([*kept, *out]) == list(range(50))
    noisy = batches.random_labels(
        cifar_labels(options), options.label_noise, 10, seed=3
    )
    np.testing.assert_array_equal(labels, noisy[out])


def cifar_labels(options):
    return archives.load("cifar10", options.data_dir).train_labels


def test_batch_statistics_are_of_the_clean_pass_and_evaluation_uses_them(data):
    _, images, run = prepared(*data, *RUN)
    batch = images.train(3)[0]
    before = run.init(3)
    start = jax.tree.map(jnp.copy, before)
    state, metrics = run.step(before, run.place(batch))
    assert metrics["ascended"]
    model = TinyNetwork(images.classes, jnp.float32)
    loss = programs.make_loss(model, images, 0.0)
    key = jax.random.fold_in(start.key, 0)
    expected = jax.jit(loss)(start.params, batch, start.model_state, key)[1][0]
    # Compiled alone or in a step: another order of float32 sums.
    chex.assert_trees_all_close(state.model_state, expected, rtol=1e-5, atol=1e-6)

    variables = {"params": state.params, **state.model_state}
    right, losses = [], []
    evaluate = jax.jit(lambda x: model.apply(variables, images.normalize(x), False))
    for test in images.held_out():  # 20 images in batches of 8, the third filled up
        logits = evaluate(test["image"])
        real = test["weight"] == 1
        right += list((np.argmax(logits, -1) == test["label"])[real])
        each = -jax.nn.log_softmax(logits)[np.arange(8), test["label"]]
        losses += list(each[real])
    assert len(right) == 20
    found = run.evaluate(state, run.statistics(state, images, 3), images)
    assert found == pytest.approx([np.sum(right), np.sum(losses), 20], rel=1e-5)


def test_recollected_statistics_are_those_of_the_evaluated_parameters(data):
    options, images, run = prepared(
        *(*data, *RUN, "--method", "lagged_vasso", "--rho", "2")
    )
    assert options.recollect == 40
    state, _ = run.step(run.init(0), run.place(images.train(0)[0]))
    shown = [images.train(0)[t] for t in range(5)]  # an epoch
    pictures = np.concatenate([batch["image"] for batch in shown])
    # The crops of ten images at a time are what is left of a difference.
    mean_colours = jax.jit(images.augment)(jax.random.key(1), pictures).mean((1, 2))

    def distance(model_state, params):
        layer = params["Dense_0"]
        hidden = mean_colours @ layer["kernel"] + layer["bias"][None]
        found = model_state["batch_stats"]["BatchNorm_0"]["mean"]
        return float(jnp.linalg.norm(found - hidden.mean(axis=0)))

    found = run.statistics(state, images, 0)
    evaluated = ov.eval_params(state.opt_state, state.params)
    assert distance(found, evaluated) < 0.2 * distance(found, state.params)
    assert distance(found, evaluated) < 0.2 * distance(state.model_state, evaluated)


def test_other_methods_keep_the_statistics_of_training(data):
    options, images, run = prepared(*data, *RUN)
    assert options.recollect == 0
    state = run.init(3)
    assert run.statistics(state, images, 3) is state.model_state


@pytest.mark.parametrize(
    ("method", "optimizer"), cases.in_turn(methods.METHODS, ["adamw", "sgd"])
)
def test_every_method_makes_a_step(method, optimizer):
    given = ("--method", method, "--optimizer", optimizer)
    if method in ("sam", "gsam") and optimizer == "adamw":
        given += ("--final-rho", "0", "--clip", "1", "--warmup-epochs", "5")
    if method in ("vasso", "friendly_sam") and optimizer == "adamw":
        given += ("--local-ascent", "4", "--dtype", "bfloat16")
    _, images, run = synthetic(*given)
    before = jax.eval_shape(run.init, 0)
    state, metrics = jax.eval_shape(run.step, before, images.train(0)[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
    assert metrics["loss"].shape == ()


def test_the_gates_of_two_seeds_draw_differently(data):
    _, _, run = synthetic("--method", "evasso", "--optimizer", "sgd")
    one, other = (jax.tree.leaves(run.init(seed).opt_state) for seed in (0, 1))
    pairs = zip(one, other, strict=True)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)


def test_random_labels_are_a_fixed_draw_of_the_share_asked_for():
    labels = np.arange(50_000, dtype=np.int32) % 10
    noisy = batches.random_labels(labels, 0.5, 10, seed=1)
    # 25,000 are drawn anew and 9 of 10 of them are wrong: 5 standard deviations.
    assert abs(np.sum(noisy != labels) - 22_500) < 5 * np.sqrt(25_000 * 0.9 * 0.1)
    again = batches.random_labels(labels, 0.5, 10, seed=1)
    np.testing.assert_array_equal(noisy, again)
    other = batches.random_labels(labels, 0.5, 10, seed=2)
    assert np.mean(noisy != other) > 0.5
    assert np.bincount(noisy).max() < 5_000 + 5 * np.sqrt(25_000 * 0.1 * 0.9)
    np.testing.assert_array_equal(batches.random_labels(labels, 0, 10, 1), labels)


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
        (["--validation", "1"], "must be a number from 0 to 0.9, got '1'"),
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


def test_microbatches_train_as_well(data):
    """Batch normalization sees smaller batches, so the numbers are others."""
    (result,) = train(
        *(*data, *SMALL, "--epochs", 1, "--microbatches", 2),
    )
    assert result["settings"]["microbatches"] == 2
    assert np.isfinite(result["epochs"][-1]["loss"])


# That a batch does not depend on the processes, test_image_folder.py tests, and that
# two processes train as one, test_pod.py.
@pytest.mark.exhaustive
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
    try:
        train(*arguments, "one", "--results", "one_results")
        said = [worker.communicate(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    (path,) = Path("one_results").iterdir()
    alone = json.loads(path.read_text())
    assert [worker.returncode for worker in workers] == [0, 0], said
    (path,) = Path("two_results").iterdir()
    together = json.loads(path.read_text())
    assert together["last"] == alone["last"]
    for one, two in zip(alone["epochs"], together["epochs"], strict=True):
        # The sums over the batch are taken in another order, in float32.
        assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-4)
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    parameters = np.load("two.npz").values()
    for one, two in zip(jax.tree.leaves(states[0].params), parameters, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)


def test_a_folder_validates_on_images_that_it_does_not_train_on(tmp_path):
    for part in ("train", "val"):
        for i in range(10):
            path = tmp_path / part / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i + 1, 0, part == "val")).save(path)
    given = ("--dataset", "folder", "--data-dir", tmp_path, "--validation", "0.2")
    options = vision_options.parse_arguments(
        [*map(str, given), "--image-size", "8", "--batch", "4", "--model", "tiny"]
    )
    images = batches.from_folder(tmp_path, options, 0)
    colours = [
        {tuple(image[4, 4]) for image, weight in zip(*each, strict=True) if weight}
        for each in (
            (np.concatenate([images.train(0)[t]["image"] for t in (0, 1)]), [1] * 8),
            next((b["image"], b["weight"]) for b in images.held_out()),
        )
    ]
    assert (images.train_count, len(colours[0]), len(colours[1])) == (8, 8, 2)
    assert not colours[0] & colours[1]
    assert {colour[2] for colour in colours[0] | colours[1]} == {0}
