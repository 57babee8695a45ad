"""Faults that a run meets, repeated: kills, damage, disks, processes, signals.

    python -m tests.faults                  # about five minutes
    python -m tests.faults --repeat 1       # each once

Prints a table of how often each was tried and survived. To survive is to restore the
state of some step to the bit, as new as the fault allows, or to refuse in one sentence.
Every part runs in a forked process of its own, and JAX in none but these.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import optax_vasso as ov
from optax_vasso.train import checkpoint

KEEP = 2
DAMAGES_EACH = 12  # for one of the others: they are fast


def state_at(step):
    """The state of a step, which says whether what was restored is right."""
    rng = np.random.default_rng(step)
    params = {"w": rng.normal(size=(64, 64)).astype(np.float32), "b": np.float32(step)}
    return ov.TrainState(np.int32(step), params, (), {"n": rng.integers(9)}, None)


@contextlib.contextmanager
def opened(folder):
    """The checkpoints of a folder."""
    store = checkpoint.checkpoints(folder, {"rho": 0.1}, keep=KEEP)
    try:
        yield store
    finally:
        store.close()


def restored(store):
    """The step that is restored, whose state is right, and whether it warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = store.restore(state_at(0))
    right = state_at(int(found.step))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)
    return int(found.step), any("went back" in str(w.message) for w in caught)


def saved(folder, steps, seconds=None):
    """Restore, then save the next steps; killed if all is not done in so long."""
    with opened(folder) as store:
        first, warned = restored(store)
        assert not warned
        if seconds:
            signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal kills
        begin = time.perf_counter()
        for step in range(first + 1, first + 1 + steps):
            store.save(state_at(step))
        return first, time.perf_counter() - begin


@contextlib.contextmanager
def refused(sentence):
    """What is inside raises an OSError that says so in one line."""
    message = ""
    try:
        yield
    except OSError as error:
        message = str(error)
    assert sentence in message, message
    assert "\n" not in message, message


def start(action, *arguments):
    """Run an action in a forked process; returns its number and what it writes to."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    code = 255
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    try:
        result = action(*arguments)
        os.write(write, json.dumps(result).encode())
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(child, read):
    """The exit code and the result of a forked process."""
    with open(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), json.loads(text) if text else None


def done(action, *arguments):
    """The result of an action in a process of its own, which has to succeed."""
    code, result = finish(*start(action, *arguments))
    assert code == 0, f"{action.__name__} ended with {code}"
    return result


def killed(folder, rng):
    """A process dies at a random moment of saving."""
    done(saved, folder, 2)
    step, seconds = done(saved, folder, 1)
    finish(*start(saved, folder, 1, rng.uniform(0, seconds)))
    found, _ = done(saved, folder, 1)
    assert found in (step + 1, step + 2)
    names = {path.name for path in folder.iterdir()}
    assert len(names) == KEEP + 1, names  # and the lock: nothing half-written


def damage(folder, rng):
    """A file of the newest checkpoint is not what it was."""
    files = sorted(path for path in (folder / "2").rglob("*") if path.is_file())
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    how = rng.choice(["flip", "zeros", "cut", "empty", "remove", "append"])
    place = rng.randrange(len(content) or 1)
    if how == "flip" and content:
        content[place] ^= 1 << rng.randrange(8)
    elif how == "zeros":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    elif how == "append":
        content += rng.randbytes(64)
    file.write_bytes(content[:place] if how == "cut" else content)
    if how == "empty":
        file.write_bytes(b"")
    elif how == "remove":
        file.unlink()


def restores_what_is_damaged(folder, seed):
    """Damage it in many ways, one after another."""
    rng = random.Random(seed)
    whole = folder.with_name("whole")
    with opened(folder) as store:
        for _ in range(DAMAGES_EACH):
            shutil.copytree(folder / "2", whole)
            damage(folder, rng)
            step, went_back = restored(store)
            assert step == (1 if went_back else 2)
            shutil.rmtree(folder / "2")
            whole.rename(folder / "2")


def damaged(folder, rng):
    """A file is cut, emptied, removed, extended, or has other bits."""
    done(saved, folder, 2)
    done(restores_what_is_damaged, folder, rng.randrange(2**32))


def saves_without_room(folder, limit):
    """No file may grow beyond the limit: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(folder) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with refused("could not be written"):
            store.save(state_at(3))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert restored(store) == (2, False)
        store.save(state_at(3))


def full_disk(folder, rng):
    """There is no room for the next checkpoint, and then there is."""
    done(saved, folder, 2)
    done(saves_without_room, folder, int(10 ** rng.uniform(0, 4)))
    names = {path.name for path in folder.iterdir()}
    assert names == {"2", "3", "lock"}, names


def restores_without_files(folder):
    """No file can be opened, until the second attempt."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with opened(folder) as store:
        restored(store)
        handler = checkpoint.ocp.StandardCheckpointHandler
        read = handler.restore

        def with_few_files(*args, **kwargs):
            lowest = os.open("/", os.O_RDONLY)
            os.close(lowest)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
            try:
                return read(*args, **kwargs)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

        handler.restore = with_few_files
        checkpoint._RETRIES = ()
        with refused("cannot be read now"):
            restored(store)
        handler.restore = read
        assert restored(store) == (2, False)
        store.save(state_at(3))


def unreadable(folder, rng):
    """The newest checkpoint cannot be read for a time; it is good."""
    done(saved, folder, 2)
    done(restores_without_files, folder)
    assert {path.name for path in folder.iterdir()} == {"2", "3", "lock"}


def restores_where_it_cannot_write(folder):
    """As a user who may only read."""
    with opened(folder) as store:
        restored(store)  # imports what it needs, while it may
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555)
    if not os.getuid():
        os.seteuid(65534)  # root may write anywhere
    with opened(folder) as store:
        assert restored(store) == (2, False)
        with refused("could not be written"):
            store.save(state_at(3))
        assert restored(store) == (2, False)


def read_only(folder, rng):
    """The directory may only be read."""
    done(saved, folder, 2)
    done(restores_where_it_cannot_write, folder)


def holds(folder, ready):
    """Have the directory open, with a worker that outlives this process."""
    with opened(folder) as store:
        store.save(state_at(3))
        if not os.fork():
            time.sleep(5)
            os._exit(0)
        os.write(ready, b"1")
        time.sleep(600)


def is_refused(folder):
    """Try to open what another process has open."""
    with refused("another run has"), opened(folder):
        pass


def two_processes(folder, rng):
    """A second process opens the directory; the first one is killed."""
    done(saved, folder, 2)
    read, write = os.pipe()
    child, result = start(holds, folder, write)
    os.read(read, 1)
    done(is_refused, folder)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for end in (read, write, result):
        os.close(end)
    assert done(saved, folder, 1)[0] == 3


def trains(folder, steps, ready=None):
    """Steps that depend on all before them; the state and how many there were."""
    step_fn = jax.jit(
        lambda s: s._replace(step=s.step + 1, params=jnp.sin(3 * s.params + s.step))
    )
    with opened(folder) as store, ov.train.stop_signals() as stop:
        state = ov.TrainState(jnp.int32(0), jnp.linspace(0, 1, 64), (), (), None)
        state = store.restore(state)
        first = int(state.step)
        for step in range(first, steps):
            state = step_fn(state)
            if ready and step == first:
                os.write(ready, b"1")
            if ready:
                time.sleep(0.001)
            stopped = stop(step + 1)
            if stopped or step + 1 == steps:
                store.save(state)
            if stopped:
                break
    return np.asarray(state.params).tobytes().hex()


def signals(folder, rng):
    """Ctrl-C or SIGTERM, at a random moment of training, and a restart."""
    codes = {signal.SIGTERM: 143, signal.SIGINT: 130}
    for number in rng.sample(list(codes), 2):
        read, write = os.pipe()
        child, result = start(trains, folder, 10**6, write)
        os.read(read, 1)
        time.sleep(rng.uniform(0, 0.5))
        os.kill(child, number)
        code, _ = finish(child, result)
        os.close(read)
        os.close(write)
        assert code == codes[number], code
    newest = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    resumed = done(trains, folder, newest + 10)
    assert resumed == done(trains, folder.with_name("whole"), newest + 10)


FAULTS = {
    killed: ("killed while saving", 1),
    damaged: ("a file of the newest checkpoint damaged", DAMAGES_EACH),
    full_disk: ("no room on the disk while saving", 1),
    unreadable: ("a checkpoint that cannot be read for a time", 1),
    read_only: ("a read-only directory", 1),
    two_processes: ("a second process; the first one killed", 1),
    signals: ("Ctrl-C and SIGTERM while training", 2),
}


def main(arguments=None):
    """Try every fault and print a table; 1 if one was not survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=15, help="how often each")
    parser.add_argument("--seed", type=int, default=0, help="of the first repetition")
    options = parser.parse_args(arguments)
    print(f"{'fault':45}{'tried':>7}{'survived':>10}", flush=True)
    lost = 0
    for fault, (title, times) in FAULTS.items():
        survived = 0
        for seed in range(options.seed, options.seed + options.repeat):
            top = Path(tempfile.mkdtemp())
            top.chmod(0o755)
            try:
                fault(top / "run", random.Random(f"{title} {seed}"))
                survived += times
            except AssertionError:
                print(f"{title}, seed {seed}:", file=sys.stderr)
                traceback.print_exc()
            finally:
                shutil.rmtree(top, ignore_errors=True)
        tried = options.repeat * times
        lost += tried - survived
        print(f"{title:45}{tried:7}{survived:10}", flush=True)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
