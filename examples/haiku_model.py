"""eVASSO on a Haiku network with ``make_train_step``.

    python examples/haiku_model.py --steps 500

eVASSO takes a second gradient on a random 30 % of the steps. It has the same dropout
mask as the first and does not update the batch statistics.
"""

import argparse

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_vasso as ov


@hk.transform_with_state
def network(images, is_training):
    """A perceptron: 64 pixels, 128 hidden units, 10 classes."""
    x = hk.Linear(128)(images)
    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(
        x, is_training
    )
    x = jax.nn.relu(x)
    if is_training:
        x = hk.dropout(hk.next_rng_key(), 0.1, x)
    return hk.Linear(10)(x)


def loss_fn(params, batch, model_state, key):
    """The mean cross-entropy and the new batch statistics."""
    logits, model_state = network.apply(
        params, model_state, key, batch["images"], is_training=True
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return losses.mean(), model_state


@jax.jit
def accuracy(params, model_state, images, labels):
    """The share of correct answers."""
    logits, _ = network.apply(params, model_state, None, images, is_training=False)
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def main(argv=None):
    """Train, and print the accuracies and the number of gradients."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.seed < 0:
        parser.error("--steps must be at least 1 and --seed at least 0")

    images, labels = load_digits(return_X_y=True)
    images = np.float32(images / 16)
    images, test_images, labels, test_labels = train_test_split(
        images, labels, random_state=0
    )

    base = optax.sgd(0.05, momentum=0.9)
    optimizer = ov.evasso(base, rho=0.1, theta=0.4, probability=0.3)
    train_step = ov.make_train_step(loss_fn, optimizer)
    init_key, dropout_key = jax.random.split(jax.random.key(arguments.seed))
    params, model_state = network.init(init_key, images[:1], is_training=True)
    state = ov.init_train_state(
        params, optimizer, model_state=model_state, key=dropout_key
    )
    rng = np.random.default_rng(arguments.seed)
    gradients = 0
    for _ in range(arguments.steps):
        rows = rng.choice(len(images), 64, replace=False)
        batch = {"images": images[rows], "labels": labels[rows]}
        state, metrics = train_step(state, batch)
        gradients += 1 + int(metrics["ascended"])

    trained = state.params, state.model_state
    print(f"{arguments.steps} steps, {gradients} gradients")
    print(f"training accuracy {accuracy(*trained, images, labels):.3f}")
    print(f"test accuracy {accuracy(*trained, test_images, test_labels):.3f}")


if __name__ == "__main__":
    main()
