"""What is saved comes back to the bit; what is damaged is not used."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_vasso as ov

checkpoint = pytest.importorskip("optax_vasso.checkpoint")
CONFIG = {"recipe": "vasso", "rho": 0.1}
PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}


def a_state(recipe=ov.vasso, params=PARAMS, step=0):
    optimizer = recipe(optax.adam(0.1))
    state = ov.init_train_state(
        params, optimizer, model_state={"m": jnp.ones(2)}, key=jax.random.key(3)
    )
    return state._replace(
        step=jnp.asarray(step, jnp.int32),
        params=jax.tree.map(lambda x: x + step, state.params),
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints, of steps 1 and 2."""
    store = checkpoint.checkpoints(tmp_path / "run", CONFIG)
    for step in (1, 2):
        store.save(a_state(step=step))
    store.close()
    return tmp_path / "run"


def restore(directory, like=None, config=CONFIG):
    store = checkpoint.checkpoints(directory, config)
    try:
        return store.restore(a_state() if like is None else like)
    finally:
        store.close()


def test_the_whole_state_comes_back(saved):
    assert_same(restore(saved), a_state(step=2))


def test_without_a_checkpoint_training_starts_at_the_beginning(tmp_path):
    state = a_state()
    assert restore(tmp_path / "empty", state) is state


def test_a_checkpoint_of_another_configuration_is_refused(saved):
    with pytest.raises(ValueError, match=r"rho: 0.1 there, 0.2 here"):
        restore(saved, config=CONFIG | {"rho": 0.2})


def test_a_checkpoint_of_another_recipe_is_refused(saved):
    with pytest.raises(ValueError, match=r"another state .*ema.* there, nothing here"):
        restore(saved, a_state(ov.sam))


def test_a_checkpoint_of_another_tree_is_refused(saved):
    params = PARAMS | {"w": jnp.zeros((2, 4))}
    with pytest.raises(
        ValueError, match=r"float32\[2, 3\] there, float32\[2, 4\] here"
    ):
        restore(saved, a_state(params=params))


def data_files(directory):
    """The files of a checkpoint that hold arrays, the largest first."""
    files = [f for f in (directory / "arrays").rglob("*") if f.is_file()]
    return sorted(files, key=lambda f: -f.stat().st_size)


@pytest.mark.parametrize("damage", ["truncated", "removed", "emptied"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(saved, damage):
    for file in data_files(saved / "2"):
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        elif damage == "emptied":
            file.write_bytes(b"")
        else:
            file.unlink()
    with pytest.warns(UserWarning, match="went back to the checkpoint of step 1"):
        assert_same(restore(saved), a_state(step=1))


def test_a_run_that_went_back_saves_the_damaged_steps_again(saved):
    store = checkpoint.checkpoints(saved, CONFIG)
    store.save(a_state(step=4))
    for file in data_files(saved / "4"):
        file.write_bytes(b"")
    with pytest.warns(UserWarning, match="went back to the checkpoint of step 2"):
        store.restore(a_state())
    store.save(a_state(step=3))
    with pytest.warns(UserWarning, match="went back to the checkpoint of step 3"):
        assert_same(store.restore(a_state()), a_state(step=3))
    store.save(a_state(step=4))
    assert_same(store.restore(a_state()), a_state(step=4))
    store.close()


def test_nothing_readable_is_an_error_and_not_a_fresh_start(saved):
    for step in ("1", "2"):
        shutil.rmtree(saved / step / "arrays")
    with pytest.raises(OSError, match=r"no checkpoint in .* can be read"):
        restore(saved)


SAVE_ON_A_FULL_DISK = """
import resource, sys
sys.path.insert(0, {here!r})
from test_checkpoint import CONFIG, a_state, checkpoint
import jax.numpy as jnp
store = checkpoint.checkpoints({directory!r}, CONFIG)
state = a_state(step=3)
# No file may grow beyond this: writes fail as they do on a full disk.
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
try:
    store.save(state)
except OSError as error:
    print("OSError", error)
"""


def test_a_full_disk_is_an_error_and_keeps_the_last_good_checkpoint(saved):
    here = Path(__file__).parent
    script = SAVE_ON_A_FULL_DISK.format(here=str(here), directory=str(saved))
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(here.parents[1])},
        timeout=300,
    )
    assert "OSError the checkpoint of step 3 could not be written" in done.stdout, (
        done.stdout + done.stderr[-2000:]
    )
    assert_same(restore(saved), a_state(step=2))


def test_keep_is_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="keep must be"):
        checkpoint.checkpoints(tmp_path, CONFIG, keep=0)


def test_a_missing_orbax_names_the_extra():
    script = (
        "import sys; sys.modules['orbax'] = None; sys.modules['orbax.checkpoint'] = "
        "None; import optax_vasso; import optax_vasso.checkpoint"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=300,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: optax_vasso.checkpoint needs Orbax: pip")
