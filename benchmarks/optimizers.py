"""What is compared: every recipe, Optax's own SAM, and a plain training step."""

from collections.abc import Callable
from typing import Any

import jax
import optax

import optax_vasso as ov

PyTree = Any
RHO, THETA = 0.05, 0.4
BASE = optax.sgd(0.01, momentum=0.9)
RECIPES: dict[str, Callable[..., optax.GradientTransformation]] = {
    "SAM": lambda base: ov.sam(base, RHO),
    "VaSSO": lambda base: ov.vasso(base, RHO, theta=THETA),
    "eVASSO, p = 0.3": lambda base: ov.evasso(base, RHO, theta=THETA, probability=0.3),
    "lagged VaSSO": lambda base: ov.lagged_vasso(base, RHO, theta=THETA),
    "single-step SAM": lambda base: ov.single_step_sam(base, RHO),
    "Momentum-SAM": lambda base: ov.momentum_sam(base, RHO),
    "Friendly SAM": lambda base: ov.friendly_sam(base, RHO),
    "ASAM": lambda base: ov.asam(base, RHO),
    "Fisher SAM": lambda base: ov.fisher_sam(base, RHO),
    "GSAM": lambda base: ov.gsam(base, RHO),
    "LookSAM, k = 5": lambda base: ov.looksam(base, RHO),
    "WSAM": lambda base: ov.wsam(base, RHO, learning_rate=0.01),
    "AE-SAM": lambda base: ov.ae_sam(base, RHO),
}


def contrib_sam(
    base: optax.GradientTransformation, opaque: bool
) -> optax.GradientTransformation:
    """SAM as Optax has it: opaque, or transparent with two updates per step."""
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    return optax.contrib.sam(base, adversary, opaque_mode=opaque)


OPTAX = {
    "optax.contrib.sam, opaque": lambda base: contrib_sam(base, True),
    "optax.contrib.sam, transparent": lambda base: contrib_sam(base, False),
}
ALL: dict[str, Callable[..., optax.GradientTransformation]] = {
    "SGD": lambda base: base,
    **RECIPES,
    **OPTAX,
}


def make_step(
    optimizer: optax.GradientTransformation, loss_fn: Callable[[PyTree, PyTree], Any]
) -> Callable[..., tuple[PyTree, PyTree]]:
    """(params, state, batch) -> (params, state): a whole step of a user's own loop."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(params: PyTree, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        def grad_fn(params: PyTree, *adversarial_step: int) -> PyTree:
            return jax.grad(loss_fn)(params, batch)

        contrib = isinstance(state, optax.contrib.SAMState)
        for _ in range(2 if contrib and state.cache is not None else 1):
            updates, state = optimizer.update(
                grad_fn(params), state, params, grad_fn=grad_fn
            )
            params = optax.apply_updates(params, updates)
        return params, state

    return step


class Running:
    """A compiled step with its parameters and state: each call takes one step."""

    def __init__(self, program: Any, params: PyTree, state: PyTree, batch: Any) -> None:
        self.program, self.params, self.state = program, params, state
        self.batch = batch

    def __call__(self) -> PyTree:
        """Take a step; the new parameters."""
        self.params, self.state = self.program(self.params, self.state, self.batch)
        return self.params
