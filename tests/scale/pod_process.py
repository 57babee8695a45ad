"""One process of a pod that trains as ``examples/pod.py`` does; prints JSON.

Its argument is JSON as well: ``address`` of process 0, ``id`` of this one, and
``runs``, each with the number of ``steps``, the ``directory`` of checkpoints and
perhaps the devices along the axis of the ``model``, or the step before which process 1
gets a ``signal``, ``signal_at``.
"""

import hashlib
import importlib.util
import json
import signal
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from jax.experimental import multihost_utils

POD = Path(__file__).parents[2] / "examples" / "pod.py"
PROCESSES = 2


def load():
    """The example, with checkpoints every 4 steps."""
    spec = importlib.util.spec_from_file_location("pod", POD)
    pod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pod)
    pod.SAVE_EVERY = 4
    return pod


def train(pod, steps, directory, seed=0, model=1):
    """Train on random images, in float64."""
    rng = np.random.default_rng(0)
    images, labels = rng.random((200, 64)), rng.integers(0, 10, 200)
    state = pod.train(steps, seed, directory, images, labels, model)
    shards = {k: leaf.addressable_shards[0] for k, leaf in state.params.items()}
    params = multihost_utils.process_allgather(state.params, tiled=True)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    return {
        "step": int(state.step),
        "devices": jax.device_count(),
        "shards": {name: shard.data.shape for name, shard in shards.items()},
        "sums": [float(leaf.sum()) for leaf in leaves],
        "digest": hashlib.sha256(b"".join(x.tobytes() for x in leaves)).hexdigest(),
    }


def main():
    job = json.loads(sys.argv[1])
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(job["address"], PROCESSES, job["id"])
    # Not used here, and as long to import as JAX.
    for name in ("sklearn", "sklearn.datasets", "sklearn.model_selection"):
        sys.modules[name] = mock.Mock()
    pod = load()
    own_rows = pod.own_rows
    for run in job["runs"]:
        steps = []

        def counted(seed, step, size, run=run, steps=steps):
            if step == run.get("signal_at") and job["id"] == 1:
                signal.raise_signal(run["signal"])
            steps.append(step)
            return own_rows(seed, step, size)

        pod.own_rows = counted
        found = train(pod, run["steps"], run["directory"], model=run.get("model", 1))
        print(json.dumps(found | {"done": len(steps)}), flush=True)


if __name__ == "__main__":
    main()
