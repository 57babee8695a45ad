"""VaSSO in a Flax NNX Optimizer: a network with batch normalization on digits.

``nnx.Optimizer.update`` passes ``grad_fn`` on to Optax. The gradient function works on
a copy of the network that it merges from the perturbed parameters, so the batch
statistics of the perturbed pass are thrown away with the copy.
"""

import command_line
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import optax_vasso as ov


class Network(nnx.Module):
    """Digits of 64 pixels -> ten logits."""

    def __init__(self, rngs):
        """Make the layers."""
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.BatchNorm(128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        """Apply the network."""
        return self.out(nnx.relu(self.norm(self.hidden(x))))


def loss_fn(network, images, labels):
    """Mean cross-entropy; updates the batch statistics of the network it is given."""
    losses = optax.softmax_cross_entropy_with_integer_labels(network(images), labels)
    return jnp.mean(losses)


@nnx.jit
def train_step(network, optimizer, images, labels):
    """One step: two gradients, one update of the batch statistics."""
    graph, _, rest = nnx.split(network, nnx.Param, ...)

    def grad_fn(perturbed):
        copy = nnx.merge(graph, perturbed, rest)
        return nnx.as_pure(nnx.grad(loss_fn)(copy, images, labels))

    loss, grads = nnx.value_and_grad(loss_fn)(network, images, labels)
    optimizer.update(network, grads, grad_fn=grad_fn)
    return loss


@nnx.jit
def accuracy(network, images, labels):
    """The share of images that get their label."""
    return jnp.mean(jnp.argmax(network(images), -1) == labels)


def main() -> None:
    """Train and print the accuracy on the images held out."""
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=command_line.positive_integer, default=20)
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--smoke", action="store_true", help="two epochs")
    arguments = parser.parse_args()
    epochs = min(arguments.epochs, 2) if arguments.smoke else arguments.epochs

    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    order = jax.random.permutation(jax.random.PRNGKey(0), len(labels))
    train, test = order[:1000], order[1000:]
    network = Network(nnx.Rngs(1))
    optimizer = nnx.Optimizer(
        network,
        ov.vasso(optax.sgd(0.05, momentum=0.9), rho=arguments.rho),
        wrt=nnx.Param,
    )
    with command_line.progress_bar() as bar:
        for epoch in bar.track(range(epochs), description="train"):
            key = jax.random.fold_in(jax.random.PRNGKey(2), epoch)
            network.train()
            for batch in jax.random.permutation(key, train).reshape(-1, 50):
                loss = train_step(network, optimizer, images[batch], labels[batch])
            network.eval()
            held_out = float(accuracy(network, images[test], labels[test]))
            print(f"epoch {epoch + 1}: loss {float(loss):.4f}, accuracy {held_out:.4f}")


if __name__ == "__main__":
    command_line.run(main)
