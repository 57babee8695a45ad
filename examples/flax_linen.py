"""VaSSO in a Flax Linen TrainState: a network with batch normalization on digits.

Batch statistics come from the clean pass alone, as in plain training; the perturbed
pass normalizes by its own batch and throws its statistics away.
"""

import functools

import command_line
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from sklearn.datasets import load_digits

import optax_vasso as ov


class Network(nn.Module):
    """Digits of 64 pixels -> ten logits."""

    @nn.compact
    def __call__(self, x, train):
        """Apply the network."""
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(128)(x)))
        return nn.Dense(10)(x)


class TrainState(train_state.TrainState):
    """Flax's own state, with the batch statistics beside the parameters."""

    batch_stats: dict


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, images, labels):
    """One step: two gradients, one update of the batch statistics."""

    def loss_fn(params):
        logits, new = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), new["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = state.tx.update(
        grads,
        state.opt_state,
        state.params,
        grad_fn=jax.grad(lambda params: loss_fn(params)[0]),
    )
    return state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        batch_stats=batch_stats,
    ), loss


@jax.jit
def accuracy(state, images, labels):
    """The share of images that get their label, by the running statistics."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, images, train=False)
    return jnp.mean(jnp.argmax(logits, -1) == labels)


def main() -> None:
    """Train and print the accuracy on the images held out."""
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=command_line.positive_integer, default=20)
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--smoke", action="store_true", help="two epochs")
    arguments = parser.parse_args()
    epochs = min(arguments.epochs, 2) if arguments.smoke else arguments.epochs

    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images / 16, jnp.float32)
    order = jax.random.permutation(jax.random.PRNGKey(0), len(labels))
    train, test = order[:1000], order[1000:]
    network = Network()
    variables = network.init(jax.random.PRNGKey(1), images[:1], train=False)
    state = TrainState.create(
        apply_fn=network.apply,
        params=variables["params"],
        tx=ov.vasso(optax.sgd(0.05, momentum=0.9), rho=arguments.rho),
        batch_stats=variables["batch_stats"],
    )
    with command_line.progress_bar() as bar:
        for epoch in bar.track(range(epochs), description="train"):
            key = jax.random.fold_in(jax.random.PRNGKey(2), epoch)
            for batch in jax.random.permutation(key, train).reshape(-1, 50):
                state, loss = train_step(state, images[batch], labels[batch])
            held_out = float(accuracy(state, images[test], labels[test]))
            print(f"epoch {epoch + 1}: loss {float(loss):.4f}, accuracy {held_out:.4f}")


if __name__ == "__main__":
    command_line.run(main)
