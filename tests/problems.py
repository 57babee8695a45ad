"""Problems that several tests share: the authors' network, and trees of odd shapes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

TRAJECTORIES = Path(__file__).parent / "data" / "trajectories.json"
# The same problem, at one gradient per step.
ONE_GRADIENT = Path(__file__).parent / "data" / "one_gradient.json"


def as_arrays(tree):
    return {
        layer: {name: jnp.asarray(value) for name, value in leaves.items()}
        for layer, leaves in tree.items()
    }


def authors_runs(path=TRAJECTORIES):
    return json.loads(path.read_text())["runs"]


def authors_problem():
    """Initial parameters, the batches' indices (20, 12), and loss(params, indices).

    Call it under x64: the trajectories are in float64.
    """
    problem = json.loads(TRAJECTORIES.read_text())["problem"]
    inputs = jnp.asarray(problem["inputs"])
    labels = jnp.asarray(problem["labels"])

    def loss(params, indices):
        first, last = params["layer0"], params["layer1"]
        h = jnp.tanh(inputs[indices] @ first["kernel"] + first["bias"][None])
        logits = h @ last["kernel"] + last["bias"][None]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, labels[indices]
        )
        return jnp.mean(losses)

    return (
        as_arrays(problem["initial_params"]),
        jnp.asarray(problem["batch_indices"]),
        loss,
    )


def random_tree(seed, dtypes=(np.float32,), scale=1.0):
    """A nested tree with a scalar, a vector, a matrix and an empty leaf."""
    rng = np.random.RandomState(seed)
    shapes = [(), (3,), (4, 2), (0,)]

    def leaf(i, shape):
        dtype = np.dtype(dtypes[i % len(dtypes)])
        values = rng.standard_normal(shape)
        if np.issubdtype(dtype, np.complexfloating):
            values = values + 1j * rng.standard_normal(shape)
        return jnp.asarray(scale * np.asarray(values), dtype)

    leaves = [leaf(i, shape) for i, shape in enumerate(shapes)]
    return {"a": leaves[0], "b": [leaves[1], (leaves[2], leaves[3])]}


def flat(tree):
    """All entries as one NumPy vector in float64 or complex128."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    wide = [
        leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64).ravel()
        for leaf in leaves
    ]
    return np.concatenate(wide)


def run_chain(transform, gradients, params=None):
    """The outputs of a transform for a list of gradients, and its last state."""
    state = transform.init(gradients[0] if params is None else params)
    outputs = []
    for gradient in gradients:
        output, state = transform.update(gradient, state, params)
        outputs.append(output)
    return outputs, state
