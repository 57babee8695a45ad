"""What is saved comes back to the bit; what is damaged is not used."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_vasso as ov
from optax_vasso._internal.description import (
    FORMAT,
    check_same,
    describe,
    digest,
    sealed,
)
from optax_vasso._internal.locks import lock

checkpoint = pytest.importorskip("optax_vasso.train.checkpoint")
CONFIG = {"recipe": "vasso", "rho": 0.1}
PATHS = Path(__file__).parents[1:3]
KEY = jax.random.key(3)
PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}


def a_state(recipe=ov.vasso, params=PARAMS, step=0):
    optimizer = recipe(optax.adam(0.1))
    state = ov.init_train_state(
        params, optimizer, model_state={"m": jnp.ones(2)}, key=KEY
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


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    store = checkpoint.checkpoints(folder, CONFIG)
    for step in (1, 2):
        store.save(a_state(step=step))
    store.close()
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    """Two checkpoints, of steps 1 and 2."""
    return shutil.copytree(saved_once, tmp_path / "run")


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
    with pytest.raises(ValueError, match=r"theta: nothing there, 0.4 here"):
        restore(saved, config=CONFIG | {"theta": 0.4})
    with pytest.raises(ValueError, match=r"rho: 0.1 there, nothing here"):
        restore(saved, config={"recipe": "vasso"})


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
    with pytest.warns(UserWarning, match="went back to checkpoint 1"):
        assert_same(restore(saved), a_state(step=1))


def test_a_run_that_went_back_saves_the_damaged_steps_again(saved):
    store = checkpoint.checkpoints(saved, CONFIG)
    store.save(a_state(step=4))
    for file in data_files(saved / "4"):
        file.write_bytes(b"")
    with pytest.warns(UserWarning, match="went back to checkpoint 2"):
        store.restore(a_state())
    for step in (3, 4):
        store.save(a_state(step=step))
        # The damaged one is gone: nothing to warn of.
        assert_same(store.restore(a_state()), a_state(step=step))
    store.close()


def test_a_step_is_never_removed_before_it_is_written_again(saved, monkeypatch):
    store = checkpoint.checkpoints(saved, CONFIG)
    shutil.rmtree(saved / "1")

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "save", full)
    with pytest.raises(OSError, match="step 2 could not be written.*No space left"):
        store.save(a_state(step=2))
    monkeypatch.undo()
    assert_same(store.restore(a_state()), a_state(step=2))
    store.save(a_state(step=2)._replace(key=jax.random.key(4)))
    assert_same(store.restore(a_state()).key, jax.random.key(4))
    store.close()


EVERY_DTYPE = {
    name: jnp.asarray([[0, 1], [2, 3]]).astype(name)
    for name in (
        *("bool", "int4", "int8", "uint16", "int32", "uint32"),
        *("float8_e4m3fn", "bfloat16", "float16", "float32", "complex64"),
    )
}


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_a_digest_sees_every_bit_and_every_place(dtype):
    leaf = EVERY_DTYPE[dtype]
    found = int(digest(leaf))
    assert found != int(digest(leaf[::-1]))
    raw = np.asarray(leaf)
    for byte in range(0 if dtype in ("bool", "int4") else raw.nbytes):
        for bit in range(8):
            flipped = bytearray(raw.tobytes())
            flipped[byte] ^= 1 << bit
            other = np.frombuffer(bytes(flipped), raw.dtype).reshape(raw.shape)
            assert found != int(digest(jnp.asarray(other)))


def test_a_digest_of_64_bits(x64):
    for dtype in ("int64", "float64", "complex128"):
        leaf = jnp.asarray([1, 2**40 + 1, 3], dtype)
        others = (leaf[::-1], leaf.at[1].set(2**40), leaf.at[1].set(1))
        assert len({int(digest(x)) for x in (leaf, *others)}) == 4


CONFIGURATIONS = {
    "tuple": {"sizes": (8, 16)},
    "nested tuple": {"layers": [{"kernel": (3, 3)}]},
    "integer keys": {"schedule": {1: 0.1, 20: 0.01}},
    "NumPy numbers": {"rho": np.float32(0.1), "n": np.int64(3), "on": np.bool_(True)},
    "arrays": {"weights": np.arange(3.0), "theta": jnp.asarray(0.5)},
    "NaN": {"rho": float("nan"), "rhos": [float("nan"), float("inf")]},
}


@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_run_resumes_with_the_configuration_that_it_saved(tmp_path, config):
    store = checkpoint.checkpoints(tmp_path, config)
    store.save(a_state(step=1))
    assert_same(store.restore(a_state()), a_state(step=1))
    store.close()
    assert_same(restore(tmp_path, config=config), a_state(step=1))
    with pytest.raises(ValueError, match="another configuration .*here"):
        restore(tmp_path, config=dict.fromkeys(config, 7))


@pytest.mark.parametrize("value", [len, {1, 2}, Path("run"), 1j, {(1, 2): 3}])
def test_what_json_cannot_hold_is_refused_at_opening(tmp_path, value):
    with pytest.raises(ValueError, match=r"config\['odd'\] is .* JSON cannot hold"):
        checkpoint.checkpoints(tmp_path / "run", CONFIG | {"odd": value})
    assert not (tmp_path / "run").exists()


def test_nothing_readable_is_an_error_and_not_a_fresh_start(saved):
    for step in ("1", "2"):
        shutil.rmtree(saved / step / "arrays")
    with pytest.raises(OSError, match=r"no checkpoint in .* can be read"):
        restore(saved)


def program(script, arguments=()):
    """Start a Python program that sees what is imported here, with pipes to it."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS))},
    )


FLIP = """
import sys, warnings
from pathlib import Path
sys.path.insert(0, {here!r})
from test_checkpoint import CONFIG, a_state, assert_same, checkpoint

store = checkpoint.checkpoints({directory!r}, CONFIG)
like = a_state()
for file in sorted(f for f in Path({directory!r}, "2").rglob("*") if f.is_file()):
    content = file.read_bytes()
    size = len(content)
    for place in sorted({{0, size // 4, size // 2, 3 * size // 4, size - 1}}):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = store.restore(like)
        went_back = any("went back" in str(w.message) for w in caught)
        assert_same(state, a_state(step=1 if went_back else 2))
        print(file.name, place, went_back)
    file.write_bytes(content)
assert_same(store.restore(like), a_state(step=2))
store.close()
print("done")
"""


def test_no_flipped_bit_is_restored(saved):
    # In a process of its own: when Orbax cannot read one array, the tasks of the others
    # complain whenever they are collected.
    here = str(Path(__file__).parent)
    running = program(FLIP.format(here=here, directory=str(saved)))
    out, errors = running.communicate(timeout=300)
    *outcomes, last = out.splitlines()
    assert last == "done", out + errors[-2000:]
    # Some flips do no harm; those in the arrays and in the description do. Orbax writes
    # more files in some runs than in others, and what it adds is not read.
    assert len(outcomes) > 50
    assert sum(line.endswith("True") for line in outcomes) > 12


SAVE_AND_DIE = """
import os, signal, sys
import numpy as np
from optax_vasso import TrainState
from optax_vasso.train.checkpoint import checkpoints

def a_state(step):
    return TrainState(np.int32(step), np.full(3, step, np.float32), (), (), None)

def save(moment):
    "Go on from the last checkpoint; die at the n-th change to the file system."
    changes = 0
    def on_event(event, arguments):
        nonlocal changes
        writes = event == "open" and set(str(arguments[1])) & set("wax+")
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            changes += 1
            if changes == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    store = checkpoints({directory!r}, {{}}, keep=1)
    state = store.restore(a_state(0))
    step = int(state.step)
    assert (np.asarray(state.params) == step).all()
    print("restored", step, flush=True)
    sys.addaudithook(on_event)
    store.save(a_state(step + 1))
    return changes

def in_a_child(moment):
    # JAX is not running in this process, so that it may fork.
    child = os.fork()
    if not child:
        try:
            os._exit(save(moment))
        finally:
            os._exit(255)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("code", code, flush=True)
    return code

in_a_child(0)  # what the others find
changes = in_a_child(0)
# From one of the last changes, when old files are removed, to the first: what a killed
# process has left is removed by the next, which makes more changes.
for seventh in range(7, -1, -1):
    in_a_child(1 + int(0.95 * changes * seventh / 7))
in_a_child(0)
"""


def test_a_run_killed_at_any_moment_of_saving_goes_on(tmp_path):
    out, errors = program(SAVE_AND_DIE.format(directory=str(tmp_path))).communicate()
    restored = [int(line.split()[1]) for line in out.splitlines()[::2]]
    codes = [int(line.split()[1]) for line in out.splitlines()[1::2]]
    assert codes[2:10] == [-signal.SIGKILL] * 8, out + errors
    assert all(0 < code < 255 for code in (*codes[:2], codes[10])), out + errors
    # Nothing saved is lost, and the first kill comes after the new one is whole.
    assert restored[:3] == [0, 1, 2]
    steps = [new - old for old, new in itertools.pairwise(restored)]
    assert set(steps) == {0, 1}
    assert restored[-1] > 2
    # Nothing half-written is left.
    assert {f.name for f in tmp_path.iterdir()} == {f"{restored[-1] + 1}", "lock"}


HOLD = """
import os, sys
from optax_vasso.train.checkpoint import checkpoints
store = checkpoints({directory!r}, {{}})
if not os.fork():  # as a data loader's workers
    sys.stdin.read()
    os._exit(0)
print("open", flush=True)
sys.stdin.read()
"""


def test_two_runs_cannot_have_one_directory_and_a_killed_one_leaves_it(tmp_path):
    running = program(HOLD.format(directory=str(tmp_path)))
    try:
        assert running.stdout.readline() == "open\n", running.stderr.read()
        with pytest.raises(OSError, match=r"another run has .* open: wait"):
            checkpoint.checkpoints(tmp_path, CONFIG)
        running.kill()
        running.wait()
        checkpoint.checkpoints(tmp_path, CONFIG).close()
    finally:
        running.kill()
        running.communicate()  # closes the pipe that its child waits for


TWO_PROCESSES = """
import pathlib, sys, warnings
import jax
jax.config.update("jax_num_cpu_devices", 1)
index = int(sys.argv[1])
jax.distributed.initialize("localhost:{port}", 2, index)
import jax.numpy as jnp
from jax.experimental import multihost_utils
import optax, optax_vasso as ov
from optax_vasso.train.checkpoint import checkpoints

mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
params, optimizer = jax.random.normal(jax.random.key(1), (8192,)), optax.sgd(0.1)
state = ov.init_train_state(params, optimizer, key=jax.random.key(0))
like = ov.train.shard_state(state, optimizer, mesh, ov.train.fsdp_specs(params, mesh))
store = checkpoints({directory!r}, {{}})
state = like
for step in (1, 2):
    state = jax.jit(lambda state: state._replace(step=state.step + 1))(state)
    store.save(state)
if index == 1:
    for file in pathlib.Path({directory!r}, "2/arrays/ocdbt.process_1/d").iterdir():
        file.write_bytes(b"")
multihost_utils.sync_global_devices("damaged")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    restored = store.restore(like)
reasons = [str(w.message) for w in caught if "went back" in str(w.message)]
same = jnp.array_equal(restored.params, like.params)
print(int(restored.step), bool(same), *reasons, flush=True)
store.close()
"""


def test_all_processes_go_back_if_one_cannot_read_its_shards(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = TWO_PROCESSES.format(directory=str(tmp_path), port=port)
    running = [program(script, arguments=(str(i),)) for i in range(2)]
    outcomes = [process.communicate(timeout=300) for process in running]
    for out, errors in outcomes:
        assert "\n1 True went back to checkpoint 1" in out, out + errors[-2000:]
    assert "process 1 could not do its part" in outcomes[0][0]


SAVE_ON_A_FULL_DISK = """
import resource, sys
sys.path.insert(0, {here!r})
from test_checkpoint import CONFIG, a_state, checkpoint
import jax.numpy as jnp
store = checkpoint.checkpoints({directory!r}, CONFIG)
state = a_state(step=3)
# No file may grow beyond this: writes fail as they do on a full disk.
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
try:
    store.save(state)
except OSError as error:
    print("OSError", error)
assert int(store.restore(a_state()).step) == 2
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # there is room again
store.save(state)
print("saved step 3")
"""


def test_a_full_disk_is_an_error_and_keeps_the_last_good_checkpoint(saved):
    here = str(Path(__file__).parent)
    running = program(SAVE_ON_A_FULL_DISK.format(here=here, directory=str(saved)))
    out, errors = running.communicate(timeout=300)
    said = "OSError the checkpoint of step 3 could not be written"
    assert said in out, out + errors[-2000:]
    assert "saved step 3" in out, out + errors[-2000:]
    assert_same(restore(saved), a_state(step=3))


def test_keep_is_how_many_intact_checkpoints_stay(tmp_path):
    store = checkpoint.checkpoints(tmp_path, CONFIG, keep=3)
    for step in range(1, 6):
        store.save(a_state(step=step))
    store.close()
    assert {f.name for f in tmp_path.iterdir()} == {"3", "4", "5", "lock"}


def test_a_damaged_checkpoint_is_set_aside_and_does_not_count(saved):
    store = checkpoint.checkpoints(saved, CONFIG)
    for step in (3, 3):
        store.save(a_state(step=step))  # 3, then 4
    for number in (3, 4):
        data_files(saved / str(number))[0].write_bytes(b"")
    shutil.copytree(saved / "3", saved / "2")  # older, and damaged as well
    shutil.rmtree(saved / "3")
    (saved / "4.damaged").mkdir()  # of an earlier time
    store.save(a_state(step=5))
    for file in data_files(saved / "5"):
        file.write_bytes(b"")
    with pytest.raises(OSError, match="no checkpoint in .* can be read"):
        store.restore(a_state())
    # Nothing is touched until there is a good one again.
    assert {"4", "5"} <= {f.name for f in saved.iterdir()}
    for step in (6, 7):
        store.save(a_state(step=step))
    store.close()
    names = {f.name for f in saved.iterdir()}
    assert names == {"6", "7", "4.damaged", "4.damaged.2", "5.damaged", "lock"}


def failing(times, error, read=checkpoint.ocp.StandardCheckpointHandler.restore):
    """A read that fails so many times."""
    left = [times]

    def restore(*args, **kwargs):
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return read(*args, **kwargs)

    return restore


HICCUPS = {
    "disk": OSError(errno.EIO, "Input/output error"),
    "network": ValueError("UNAVAILABLE: Error reading local file"),
    "permission": ValueError("PERMISSION_DENIED: Failed to open [os_error_code='13']"),
    "files": OSError(errno.EMFILE, "Too many open files"),
    "memory": MemoryError(),
    "device": RuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
}


@pytest.mark.parametrize("error", HICCUPS.values(), ids=HICCUPS)
def test_a_read_that_fails_for_a_time_is_no_damage(saved, monkeypatch, error):
    monkeypatch.setattr(checkpoint, "_RETRIES", (0, 0))
    handler = checkpoint.ocp.StandardCheckpointHandler
    store = checkpoint.checkpoints(saved, CONFIG)
    monkeypatch.setattr(handler, "restore", failing(2, error))
    assert_same(store.restore(a_state()), a_state(step=2))
    monkeypatch.setattr(handler, "restore", failing(3, error))
    with pytest.raises(OSError, match="checkpoint 2 in .* cannot be read now"):
        store.restore(a_state())
    store.save(a_state(step=3))
    store.close()
    assert {f.name for f in saved.iterdir()} == {"2", "3", "lock"}


def test_a_file_that_cannot_be_opened_is_no_damage(saved, monkeypatch):
    # To the kernel a link to itself is an error like that of a bad disk.
    monkeypatch.setattr(checkpoint, "_RETRIES", ())
    (file,) = (saved / "2" / "arrays" / "d").iterdir()
    file.rename(saved / "elsewhere")
    file.symlink_to(file)
    with pytest.raises(OSError, match="cannot be read now"):
        restore(saved)
    file.unlink()
    (saved / "elsewhere").rename(file)
    assert_same(restore(saved), a_state(step=2))


def test_a_missing_description_is_one_sentence(saved):
    shutil.rmtree(saved / "2" / "description")
    with pytest.warns(UserWarning, match=r"\(checkpoint 2: it has no description\)\.$"):
        assert_same(restore(saved), a_state(step=1))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (ov.vasso, ov.friendly_sam),
        (ov.friendly_sam, ov.vasso),
        (ov.lagged_vasso, ov.momentum_sam),
        (ov.momentum_sam, ov.lagged_vasso),
    ],
)
def test_a_state_of_another_type_is_refused(tmp_path, first, second):
    store = checkpoint.checkpoints(tmp_path, CONFIG)
    store.save(a_state(first, step=1))
    with pytest.raises(ValueError, match=r"ascent_state.*: \w+ there, \w+ here"):
        store.restore(a_state(second))
    store.close()


def test_none_and_an_empty_tuple_are_different_states(tmp_path):
    store = checkpoint.checkpoints(tmp_path, CONFIG)
    store.save(a_state()._replace(model_state=None))
    with pytest.raises(ValueError, match=r"model_state: NoneType there, tuple here"):
        store.restore(a_state()._replace(model_state=()))
    store.close()


@pytest.mark.parametrize("version", [None, 1, FORMAT + 1, "new"])
def test_an_unknown_format_is_one_sentence(saved, version):
    file = saved / "2" / "description" / "metadata"
    description = json.loads(file.read_text())["description"]
    assert (description.pop("format"), description["library"]) == (2, ov.__version__)
    if version is not None:
        description |= {"format": version, "library": "9.8"}
    file.write_text(json.dumps(sealed(description)))
    found = "1, written by optax_vasso 0.1.0" if version is None else version
    with pytest.raises(ValueError, match=f"has format {found}.*reads format 2") as one:
        restore(saved)
    assert "\n" not in str(one.value)
    assert (saved / "2").is_dir()


def test_a_description_knows_nothing_of_the_process_that_wrote_it():
    # A function or an address would be another one after a restart.
    state = a_state()._replace(model_state={"m": optax.EmptyState(), "n": [None]})
    text = json.dumps(describe(state, {}))
    assert "0x" not in text
    assert "state.model_state['n']" in text


def test_what_is_closed_cannot_be_used(saved):
    store = checkpoint.checkpoints(saved, CONFIG)
    store.close()
    store.close()
    with pytest.raises(ValueError, match="were closed: open them again"):
        store.save(a_state(step=3))
    with pytest.raises(ValueError, match="were closed: open them again"):
        store.restore(a_state())


OPEN = """
import sys
from optax_vasso.train.checkpoint import checkpoints
for line in sys.stdin:
    try:
        checkpoints({directory!r}, {{}}).close()
        print("opened", flush=True)
    except OSError as error:
        print(error, flush=True)
"""


def test_a_directory_open_twice_in_one_process_stays_locked_until_both_close(tmp_path):
    another = program(OPEN.format(directory=str(tmp_path)))

    def from_another():
        another.stdin.write("open\n")
        another.stdin.flush()
        return another.stdout.readline()

    try:
        first, second = (checkpoint.checkpoints(tmp_path, CONFIG) for _ in range(2))
        (tmp_path / "lock").read_bytes()  # as a copy does; POSIX's locks end by it
        assert "another run has" in from_another()
        first.close()
        first.close()
        assert "another run has" in from_another()
        second.save(a_state(step=1))
        second.close()
        assert from_another() == "opened\n"
    finally:
        another.kill()
        another.communicate()


READ_ONLY = """
import os, sys, warnings
from pathlib import Path
sys.path.insert(0, {here!r})
from test_checkpoint import CONFIG, a_state, assert_same, checkpoint, restore
warnings.simplefilter("error")

top = Path({directory!r})
store = checkpoint.checkpoints(top, CONFIG)
store.save(a_state(step=1))
store.restore(a_state())
store.close()
if {without_lock}:
    (top / "lock").unlink()
for folder, _, _ in os.walk(top):
    os.chmod(folder, 0o555)
if not os.getuid():
    os.seteuid(65534)  # root may write anywhere
store = checkpoint.checkpoints(top, CONFIG)
assert_same(store.restore(a_state()), a_state(step=1))
try:
    store.save(a_state(step=2))
except OSError as error:
    print(error)
assert_same(store.restore(a_state()), a_state(step=1))
"""


@pytest.mark.parametrize("without_lock", [True, cases.exhaustive(False)])
def test_a_read_only_directory_restores(without_lock):
    here = str(Path(__file__).parent)
    with tempfile.TemporaryDirectory() as folder:  # one that others may enter
        script = READ_ONLY.format(
            here=here, directory=folder, without_lock=without_lock
        )
        out, errors = program(script).communicate(timeout=300)
    assert "step 2 could not be written" in out, out + errors[-2000:]
    assert errors == ""


def test_an_array_of_size_zero_is_saved(tmp_path):
    params = PARAMS | {"none": jnp.zeros((0, 3)), "keys": jax.random.split(KEY, 2)[:0]}
    state = a_state()._replace(model_state=params, step=jnp.int32(1))
    store = checkpoint.checkpoints(tmp_path, CONFIG)
    store.save(state)
    assert_same(store.restore(state._replace(step=jnp.int32(0))), state)
    other = params | {"none": jnp.zeros((0, 4))}
    with pytest.raises(
        ValueError, match=r"float32\[0, 3\] there, float32\[0, 4\] here"
    ):
        store.restore(state._replace(model_state=other))
    store.close()


def test_seeds_and_keys_mapped_by_vmap_are_saved(tmp_path):
    optimizer = ov.evasso(optax.sgd(0.1))

    def init(seed):
        key = jax.random.key(seed)
        return ov.init_train_state(jax.random.normal(key, (3,)), optimizer, key=key)

    states = jax.vmap(init)(jnp.arange(4))
    states = states._replace(step=jnp.arange(4), model_state=jax.random.split(KEY, 2))
    store = checkpoint.checkpoints(tmp_path, CONFIG)
    store.save(states)
    assert_same(
        store.restore(
            jax.vmap(init)(jnp.arange(4, 8))._replace(
                step=states.step * 0, model_state=jax.random.split(KEY, 2)[::-1]
            )
        ),
        states,
    )
    store.close()
    assert (tmp_path / "3").is_dir()


def test_what_a_failed_save_has_left_is_removed_by_the_next(saved):
    left = saved / "7.orbax-checkpoint-tmp"
    store = checkpoint.checkpoints(saved, CONFIG)
    left.mkdir()
    (left / "half").touch()
    store.save(a_state(step=3))
    store.close()
    assert {f.name for f in saved.iterdir()} == {"2", "3", "lock"}


def test_a_directory_that_cannot_be_read_is_no_empty_one(saved, monkeypatch):
    """Else a run would begin anew, and save over the numbers of the old one."""

    def unreadable(folder):
        raise PermissionError(f"cannot list {folder}")

    store = checkpoint.checkpoints(saved, CONFIG)
    monkeypatch.setattr(checkpoint, "_whole", unreadable)
    with pytest.raises(PermissionError, match="cannot list"):
        store.restore(a_state())
    with pytest.raises(PermissionError, match="cannot list"):
        store.save(a_state(step=3))
    store.close()


def test_what_was_set_aside_and_has_come_back_is_not_set_aside_again(saved):
    """As after a repair by hand: it is an old one like others, and goes as they do."""
    store = checkpoint.checkpoints(saved, CONFIG)
    data_files(saved / "2")[0].write_bytes(b"")
    with pytest.warns(UserWarning, match="went back to checkpoint 1"):
        store.restore(a_state())
    store.save(a_state(step=3))
    (saved / "2.damaged").rename(saved / "2")
    store.save(a_state(step=4))
    store.close()
    assert {f.name for f in saved.iterdir()} == {"3", "4", "lock"}


def test_without_a_good_checkpoint_a_save_that_fails_sets_nothing_aside(
    saved, monkeypatch
):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    store = checkpoint.checkpoints(saved, CONFIG)
    for number in "12":
        data_files(saved / number)[0].write_bytes(b"")
    with pytest.raises(OSError, match="no checkpoint in .* can be read"):
        store.restore(a_state())
    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "save", full)
    with pytest.raises(OSError, match="could not be written"):
        store.save(a_state(step=3))
    store.close()
    assert {f.name for f in saved.iterdir()} == {"1", "2", "lock"}


def test_a_checkpoint_that_was_repaired_is_not_set_aside(saved):
    store = checkpoint.checkpoints(saved, CONFIG)
    file = data_files(saved / "2")[0]
    content = file.read_bytes()
    file.write_bytes(b"")
    with pytest.warns(UserWarning, match="went back to checkpoint 1"):
        store.restore(a_state())
    file.write_bytes(content)
    assert_same(store.restore(a_state()), a_state(step=2))
    store.save(a_state(step=3))
    store.close()
    assert {f.name for f in saved.iterdir()} == {"2", "3", "lock"}


def test_half_of_a_removed_checkpoint_is_removed_by_the_next_save(saved, monkeypatch):
    """As where the process is killed between renaming the oldest and removing it."""
    rename = checkpoint._rename

    def killed(path, name):
        rename(path, name)
        raise OSError("killed")

    store = checkpoint.checkpoints(saved, CONFIG)
    monkeypatch.setattr(checkpoint, "_rename", killed)
    with pytest.warns(UserWarning, match="could not be removed: OSError: killed"):
        store.save(a_state(step=3))
    assert len(list(saved.iterdir())) == 4
    monkeypatch.setattr(checkpoint, "_rename", rename)
    store.save(a_state(step=4))
    store.close()
    assert {f.name for f in saved.iterdir()} == {"3", "4", "lock"}


def test_digests_are_those_of_the_checkpoints_that_exist():
    """With another digest every checkpoint of this format would count as damaged."""
    leaf = jnp.arange(6).reshape(2, 3)
    assert {
        name: int(digest(leaf.astype(name)))
        for name in ("bool", "int8", "uint32", "bfloat16", "float32", "complex64")
    } == {
        "bool": 3432440032,
        "int8": 3312959184,
        "uint32": 3312959184,
        "bfloat16": 942375099,
        "float32": 3748759872,
        "complex64": 1930491267,
    }


@pytest.mark.parametrize("off", [-1, 1])
def test_a_digest_that_is_off_either_way_is_damage(saved, monkeypatch, off):
    right = checkpoint.description.digests
    monkeypatch.setattr(
        checkpoint.description,
        "digests",
        lambda arrays: {name: value + off for name, value in right(arrays).items()},
    )
    with pytest.raises(OSError, match="arrays are not as they were"):
        restore(saved)


def test_the_order_of_names_in_a_configuration_does_not_matter():
    """Nor where NaN is among the values, which is not equal to itself."""
    found, wanted = (
        describe(PARAMS, {"options": options})
        for options in ({"a": float("nan"), "b": 1}, {"b": 1, "a": float("nan")})
    )
    check_same(found, wanted, "here")


def test_what_differs_is_counted_beyond_the_first_five():
    def message(number):
        state = {f"leaf{i}": jnp.ones(2) for i in range(number)}
        wanted = describe(jax.tree.map(lambda x: x[:1], state), {})
        with pytest.raises(ValueError, match="is of another state") as error:
            check_same(describe(state, {}), wanted, "here")
        return str(error.value)

    assert "more" not in message(5)
    assert "and 1 more)" in message(6)
    assert "leaf4" in message(6)


def test_swapped_entries_have_another_digest():
    # Any two of the places, in any number of axes.
    for shape in ((6,), (2, 3), (1, 2, 3), (2, 1, 3)):
        leaf = np.arange(6.0, dtype=np.float32)
        found = set()
        for order in itertools.permutations(range(6)):
            found.add(int(digest(jnp.asarray(leaf[list(order)].reshape(shape)))))
        assert len(found) == 720


FAIL = """
import resource, sys
sys.path.insert(0, {here!r})
from test_checkpoint import *
store = checkpoint.checkpoints({directory!r}, CONFIG)
what = sys.argv[1]
if what == "save":
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
    store.save(a_state(step=3))
for number in "12" if what == "nothing" else "2":
    Path({directory!r}, number, "arrays/array_metadatas/process_0").write_bytes(b"")
store.restore(a_state())
del store
"""


@pytest.mark.parametrize(
    ("what", "last", "lines"),
    [
        cases.exhaustive(
            "save", "OSError: the checkpoint of step 3 could not be written", 10
        ),
        cases.exhaustive("nothing", "OSError: no checkpoint in .* can be read", 10),
        ("newest", "<string>:.*UserWarning: went back to checkpoint 1", 1),
    ],
)
def test_an_error_is_not_buried_under_those_of_tensorstore(saved, what, last, lines):
    script = FAIL.format(here=str(Path(__file__).parent), directory=str(saved))
    _, errors = program(script, (what,)).communicate(timeout=300)
    found = [line for line in errors.splitlines() if "ResourceWarning" not in line]
    assert re.match(rf"\s*{last}", found[-1]), errors
    assert len(found) <= lines, errors


def test_a_lock_that_is_about_to_be_released_is_waited_for(tmp_path):
    """As of a worker of a killed run, which ends a little later."""
    fcntl = pytest.importorskip("fcntl")
    held = open(tmp_path / "lock", "a")  # noqa: SIM115
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(0.2, held.close).start()
    lock(tmp_path)()


@pytest.mark.parametrize("keep", [0, 2.0, None])
def test_keep_is_at_least_one(tmp_path, keep):
    with pytest.raises(ValueError, match="keep must be an integer >= 1"):
        checkpoint.checkpoints(tmp_path, CONFIG, keep=keep)


def test_a_missing_orbax_names_the_extra():
    script = (
        "import sys; sys.modules['orbax'] = None; sys.modules['orbax.checkpoint'] = "
        "None; import optax_vasso; import optax_vasso.train.checkpoint"
    )
    _, errors = program(script).communicate(timeout=300)
    last = errors.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: optax_vasso.train.checkpoint needs Orbax: run pip"
    )


def test_a_url_reaches_orbax_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = []

    def path(directory):
        opened.append(directory)
        return tmp_path / "bucket"

    monkeypatch.setattr(checkpoint.epath, "Path", path)
    checkpoint.checkpoints("gs://bucket/run", CONFIG).close()
    assert opened == ["gs://bucket/run"]
    assert not list((tmp_path / "bucket").iterdir())  # no lock
