"""The short examples: independent of each other, and each does what it says."""

import ast
import importlib.util
import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_vasso as ov

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = [
    "checkpoint_resume",
    "equinox_model",
    "flax_linen",
    "flax_nnx",
    "haiku_model",
    "lora",
    "measure_flatness",
    "one_gradient",
    "optax_loop",
    "pod",
]
STEPS = 20


@pytest.fixture(autouse=True)
def as_users_run_it():
    """Networks that add a bias to a batch promote ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, capsys, *options):
    """What an example prints."""
    load(name).main(["--steps", str(STEPS), *options])
    return capsys.readouterr().out


def figure(name, printed):
    return float(re.search(rf"{name} ([\d.]+)", printed)[1])


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_stands_alone(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 120
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [getattr(node, "module", None)] + [a.name for a in node.names]
            root = (modules[0] or modules[1]).split(".")[0]
            assert not (EXAMPLES / f"{root}.py").exists()
            assert not (EXAMPLES.parent / root).exists() or root == "optax_vasso"
    assert f"python examples/{name}.py" in ast.get_docstring(tree)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options", [["--steps", "0"], ["--steps", "nan"], ["--seed", "-1"]]
)
def test_a_bad_number_is_refused_in_a_sentence(name, options, capsys):
    with pytest.raises(SystemExit, match="2"):
        load(name).main(options)
    *usage, error = capsys.readouterr().err.splitlines()
    assert usage[0].startswith("usage")
    assert "error: " in error
    assert options[0] in error


# Chance is 0.1.
@pytest.mark.parametrize(
    ("name", "gradients"),
    [
        ("equinox_model", 40),
        ("flax_linen", 40),
        ("flax_nnx", 40),
        ("lora", 20),
        ("one_gradient", 20),
        ("optax_loop", 40),
    ],
)
def test_a_network_learns_the_digits(name, gradients, capsys):
    printed = run(name, capsys)
    assert f"20 steps, {gradients} gradients" in printed
    assert figure("training accuracy", printed) > 0.5
    assert figure("test accuracy", printed) > 0.5
    if name == "one_gradient":
        assert figure("norm of the perturbation", printed) == 0.1
    if name == "lora":  # two moments and ε for each adapter, and a few counters
        assert "2344 weights trained, 19210 frozen" in printed
        assert "3.00 numbers kept for each" in printed
        assert figure("test accuracy", printed) > figure("accuracy before", printed)


def test_what_is_exported_has_the_clean_adapters_in_its_weights():
    from flax import nnx

    example = load("lora")
    images, labels = batch()
    network = example.Network(nnx.Rngs(0))
    tx = ov.lagged_vasso(optax.sgd(0.1), rho=0.5)
    optimizer = nnx.Optimizer(network, tx, wrt=nnx.LoRAParam)
    for _ in range(2):  # the second step perturbs both factors
        example.train_step(network, optimizer, images, labels, nnx.LoRAParam)
    exported = example.merged(network, optimizer)
    perturbed = network(images)
    adapters = nnx.state(network, nnx.LoRAParam)
    nnx.update(network, ov.eval_params(optimizer.opt_state, adapters))
    assert not np.allclose(exported(images), perturbed, atol=1e-2)
    np.testing.assert_allclose(exported(images), network(images), rtol=1e-4, atol=1e-5)


def test_haiku_takes_the_second_gradient_on_some_steps(capsys):
    printed = run("haiku_model", capsys)
    assert 20 < figure("20 steps,", printed) < 40
    assert figure("test accuracy", printed) > 0.5


def test_a_pod_may_be_one_device(tmp_path, capsys):
    printed = run("pod", capsys, "--directory", str(tmp_path))
    assert "20 steps, devices: 1" in printed
    assert figure("test accuracy", printed) > 0.5


def test_flatness_is_measured_for_both_networks(capsys):
    title, *rows = run("measure_flatness", capsys).splitlines()
    assert title.split()[-1] == "gradients"
    for row, name, gradients in zip(rows, ["SGD", "SAM"], [20, 40], strict=True):
        found, *numbers = row.split()
        loss, test, eigenvalue, trace, rise, spent = map(float, numbers)
        assert (found, spent) == (name, gradients)
        assert 0 < loss < np.log(10)
        assert test > 0.5
        # Of a positive trace and a gradient that is not zero.
        assert 0 < eigenvalue < trace
        assert rise > 0


def test_a_resumed_run_is_bit_identical(tmp_path, capsys, monkeypatch):
    example = load("checkpoint_resume")
    monkeypatch.setattr(example, "SAVE_EVERY", 8)
    rng = np.random.default_rng(0)
    images, labels = rng.random((100, 64), np.float32), rng.integers(0, 10, 100)

    def train(steps, name, seed=0):
        return example.train(steps, seed, tmp_path / name, images, labels)

    whole, done = train(14, "whole")
    assert done == 14
    with monkeypatch.context() as patch:
        patch.setattr(example.np.random, "default_rng", stops_at(12))
        with pytest.raises(KeyboardInterrupt):
            train(14, "interrupted")
    resumed, done = train(14, "interrupted")
    assert done == 14 - 8
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        train(14, "whole", seed=1)

    arguments = ["--directory", str(tmp_path / "digits")]
    printed = run("checkpoint_resume", capsys, *arguments)
    assert "20 steps, 20 of them in this run (40 gradients)" in printed
    assert figure("test accuracy", printed) > 0.5
    again = run("checkpoint_resume", capsys, *arguments)
    assert again == printed.replace("20 of", "0 of").replace("(40", "(0")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["checkpoint_resume", "pod"])
def test_a_signal_saves_the_step_that_it_falls_into(
    name, number, tmp_path, monkeypatch
):
    example = load(name)
    rng = np.random.default_rng(0)
    images, labels = rng.random((100, 64), np.float32), rng.integers(0, 10, 100)
    default_rng = np.random.default_rng

    def in_step_5(seed):
        if seed[1] == 5:
            signal.raise_signal(number)
        return default_rng(seed)

    monkeypatch.setattr(example.np.random, "default_rng", in_step_5)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        example.train(14, 0, tmp_path, images, labels)
    assert {f.name for f in tmp_path.iterdir()} == {"6", "lock"}


def stops_at(stop, default_rng=np.random.default_rng):
    """A generator of batches that is interrupted before a step."""

    def interrupted(seed):
        if seed[1] == stop:
            raise KeyboardInterrupt
        return default_rng(seed)

    return interrupted


def measuring(gate=None):
    """An optimizer that moves nothing and perturbs nothing.

    Its state is the largest difference between the gradients of the two passes so far.
    Since ε is zero, there is one only if the passes are of different functions.
    """

    def update(updates, state, params=None, *, clean_grads, **extra_args):
        differences = jax.tree.map(
            lambda g, clean: jnp.max(jnp.abs(g - clean)), updates, clean_grads
        )
        largest = jnp.max(jnp.stack(jax.tree.leaves(differences)))
        return optax.tree.zeros_like(updates), jnp.maximum(state, largest)

    base = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)
    return ov.sharpness_aware(base, ov.sam_perturb(0.0), gate=gate)


def batch():
    rng = np.random.default_rng(0)
    return rng.random((32, 64), np.float32), rng.integers(0, 10, 32)


@pytest.mark.parametrize("gate", [None, ov.gate.every(2)])
def test_nnx_passes_share_masks_and_update_statistics_once(gate):
    from flax import nnx

    example = load("flax_nnx")
    images, labels = batch()
    network, clean = (example.Network(nnx.Rngs(0)) for _ in range(2))
    optimizer = nnx.Optimizer(network, measuring(gate), wrt=nnx.Param)
    for _ in range(2):
        example.train_step(network, optimizer, images, labels)
        clean(images)
    kept, expected = (nnx.state(n, nnx.BatchStat) for n in (network, clean))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        nnx.to_pure_dict(kept),
        nnx.to_pure_dict(expected),
    )
    # One mask a step was drawn.
    assert network.dropout.rngs.count[...] == clean.dropout.rngs.count[...] == 2
    assert optimizer.opt_state.optimizer_state[...] < 1e-6


def test_linen_passes_share_masks_and_update_statistics_once():
    example = load("flax_linen")
    images, labels = batch()
    network = example.Network()
    variables = network.init(jax.random.key(0), images, train=False)
    state = example.TrainState.create(
        apply_fn=network.apply,
        tx=measuring(),
        key=jax.random.key(1),
        **variables,
    )
    state = example.train_step(state, images, labels)
    _, clean = network.apply(
        variables,
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(2)},
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        state.batch_stats,
        clean["batch_stats"],
    )
    assert state.opt_state.optimizer_state < 1e-6
