"""The methods around AdamW that language models are trained with.

What a method does to the loss and to the optimizer; learning rate, weight decay and
schedule are the experiment's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_vasso as ov
from experiments.harness.methods import THETA, Hyperparameters, Range
from experiments.harness.transformer import Transformer

SHARED = {
    "learning_rate": Range(0.003, 0.03),
    "weight_decay": Range(0.01, 0.5, least=1e-4),
}
RHO = Range(0.001, 0.1, least=1e-5)


class Objective(NamedTuple):
    """What a train step differentiates.

    Attributes:
      loss: that of :func:`optax_vasso.make_train_step`; a batch is of windows, (batch,
        length + 1) characters.
      makers: its gradient makers, by the names of its arguments.
    """

    loss: Callable[[Any, jax.Array], jax.Array]
    makers: dict[str, Any]


def of_logits(logits: jax.Array, windows: jax.Array) -> jax.Array:
    """Nats per character, from the logits of all but the last character."""
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    )


def network_of(model: Transformer) -> Callable[[Any, jax.Array], jax.Array]:
    """(params, windows) -> logits of every character but the first."""
    return lambda params, windows: model.apply({"params": params}, windows[:, :-1])


def whole(model: Transformer) -> Objective:
    """The loss on the whole batch."""
    network = network_of(model)
    return Objective(
        lambda params, windows: of_logits(network(params, windows), windows), {}
    )


def split(model: Transformer) -> Objective:
    """An eighth of the batch for the ascent, the rest for the descent."""
    return whole(model)._replace(makers=dict(ov.train.split_batch()))


def functional(model: Transformer) -> Objective:
    """The Jacobian is perturbed, the gradient by the logits is not."""
    return Objective(of_logits, {"gradient": ov.train.functional(network_of(model))})


@dataclasses.dataclass(frozen=True, eq=False)  # to be found in a cache by identity
class Method:
    """A method around AdamW.

    Attributes:
      label: its name in tables and figures.
      color: a colour-blind safe colour (Okabe and Ito).
      marker: of Matplotlib.
      gradients: per step.
      own: the ranges of its own hyperparameters.
      wrap: (base optimizer, hyperparameters, seed) -> optimizer.
      nesterov: whether the base optimizer is NAdamW.
      objective: what is differentiated.
    """

    label: str
    color: str
    marker: str
    gradients: int
    own: dict[str, Range]
    wrap: Callable[[optax.GradientTransformation, Hyperparameters, Any], Any]
    nesterov: bool = False
    objective: Callable[[Transformer], Objective] = whole

    @property
    def space(self) -> dict[str, Range]:
        """All that is searched."""
        return SHARED | self.own

    def make(self, schedule: Any, hyperparameters: Hyperparameters, seed: Any) -> Any:
        """The optimizer.

        Args:
          schedule: the learning rate of a step.
          hyperparameters: ``weight_decay`` and those of the method; may be traced.
          seed: of random directions.
        """
        base = optax.chain(
            optax.scale_by_adam(b2=0.99, nesterov=self.nesterov),
            optax.add_decayed_weights(hyperparameters["weight_decay"]),
            optax.scale_by_learning_rate(schedule),
        )
        return self.wrap(base, hyperparameters, seed)


class RandomState(NamedTuple):
    """State of :func:`random_perturb`: updates so far."""

    step: jax.Array


def random_perturb(rho: Any, seed: Any) -> optax.GradientTransformation:
    """ε = ρ n/‖n‖ with Gaussian noise n, whatever the gradient."""

    def update(grads: Any, state: RandomState, params: Any = None) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        noise = optax.tree.random_like(key, grads)
        ascent = optax.tree.scale(rho / optax.tree.norm(noise), noise)
        return ascent, RandomState(state.step + 1)

    return optax.GradientTransformation(
        lambda params: RandomState(jnp.zeros((), jnp.int32)), update
    )


def _sam(base: Any, h: Hyperparameters, seed: Any) -> Any:
    return ov.sam(base, h["rho"])


def _momentum_sam(base: Any, h: Hyperparameters, seed: Any) -> Any:
    return ov.momentum_sam(base, h["rho"])


# The order of tables and figures.
METHODS = {
    "adamw": Method("AdamW", "#000000", "o", 1, {}, lambda b, h, s: b),
    "nadamw": Method("NAdamW", "#117733", "D", 1, {}, lambda b, h, s: b, True),
    "momentum_sam": Method(
        "Momentum-SAM",
        "#999999",
        "<",
        1,
        {"rho": Range(0.03, 3.0, least=1e-3)},
        _momentum_sam,
    ),
    "momentum_sam_nadamw": Method(
        "Momentum-SAM, NAdamW",
        "#661100",
        ">",
        1,
        {"rho": Range(0.03, 3.0, least=1e-3)},
        _momentum_sam,
        True,
    ),
    "lagged_vasso": Method(
        "lagged VaSSO",
        "#8B0000",
        "*",
        1,
        {"rho": RHO, "theta": THETA},
        lambda b, h, s: ov.lagged_vasso(b, h["rho"], theta=h["theta"]),
    ),
    "split_sam": Method(
        "split SAM",
        "#009E73",
        "d",
        1,
        {"rho": RHO._replace(high=1.0)},
        _sam,
        objective=split,
    ),
    "sam": Method("SAM", "#0072B2", "s", 2, {"rho": RHO}, _sam),
    "vasso": Method(
        "VaSSO",
        "#D55E00",
        "^",
        2,
        {"rho": RHO, "theta": THETA},
        lambda b, h, s: ov.vasso(b, h["rho"], theta=h["theta"]),
    ),
    "functional_sam": Method(
        "Functional SAM",
        "#CC79A7",
        "X",
        2,
        {"rho": RHO._replace(high=1.0)},
        _sam,
        objective=functional,
    ),
    "random": Method(
        "random perturbation",
        "#DDCC77",
        "P",
        1,
        {"rho": Range(0.03, 3.0, least=1e-3)},
        lambda b, h, s: ov.lagged(b, random_perturb(h["rho"], s)),
    ),
}
