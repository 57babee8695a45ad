"""Loss → gradient function: what a train step differentiates, and where.

A gradient maker takes the loss of a train step and returns ``grad_fn(inputs) ->
((loss, (model_state, aux)), grads)``, a function of :class:`Inputs`. Makers compose by
their argument ``gradient``: ``microbatched(8, part_of_batch(0.25))``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import checks
from optax_vasso._internal.trees import displaced
from optax_vasso.train.losses import LossFn, as_network

PyTree = Any


class Inputs(NamedTuple):
    """What a gradient is taken at and on.

    Attributes:
      params: the parameters to differentiate by.
      model_state: what the model carries besides parameters.
      batch: the examples, a tree of arrays.
      key: a random key, or ``None``.
      clean: x_t, where ``params`` are perturbed, and otherwise ``None``.
    """

    params: PyTree
    model_state: PyTree
    batch: PyTree
    key: jax.Array | None = None
    clean: PyTree | None = None


GradientFn = Callable[[Inputs], tuple[tuple[jax.Array, tuple[PyTree, PyTree]], PyTree]]
GradientMaker = Callable[[LossFn], GradientFn]


def whole_batch(loss_fn: LossFn) -> GradientFn:
    """The gradient of the loss on the whole batch: the default.

    That of complex parameters is conjugated, so that the step against it goes downhill,
    as Optax expects.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def grad_fn(at: Inputs) -> Any:
        value, grads = value_and_grad(at.params, at.model_state, at.batch, at.key)
        return value, jax.tree.map(jnp.conj, grads)

    return grad_fn


def functional(network: Callable[..., Any]) -> GradientMaker:
    """The gradient of Functional SAM: of the network at x + ε, of the loss at x.

    For a loss L(F(x)) of a network's outputs, SAM descends along J(x + ε)ᵀ ∇_F
    L(F(x + ε)), with the Jacobian J of F. Functional SAM keeps the cotangent of the
    clean point, J(x + ε)ᵀ ∇_F L(F(x)): it regularizes the network's function, without
    the pressure to shrink the logits that hurts language models. The loss of the train
    step is then a function of the *outputs*::

        def network(params, batch):
            return model.apply(params, batch["inputs"])

        def loss_fn(outputs, batch):
            return cross_entropy(outputs, batch["labels"]).mean()

        train_step = make_train_step(
            loss_fn, sam(optimizer), gradient=functional(network)
        )

    It costs no more than SAM: at x it is the gradient of the loss, and the compiler
    evaluates F(x) once. Inside :func:`microbatched`, behind a gate or with
    ``separate_keys`` it is evaluated again, which is a third of a gradient. With one
    gradient per step there is no clean point, and it changes nothing.

    Args:
      network: ``network(params, batch) -> outputs``, any tree of float arrays. Like a
        loss, it may take ``model_state`` and then return ``(outputs, new_model_state)``
        and it may take ``key``. Anything else that the loss needs of the parameters,
        such as a penalty, has to be among the outputs.

    Returns:
      A gradient maker for :func:`optax_vasso.make_train_step`, whose loss is
      ``loss_fn(outputs, batch)``.

    Raises:
      ValueError: if network is no function of ``(params, batch)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_vasso.train import Inputs, functional
      >>> def loss_fn(outputs, model_state, batch, key):
      ...     return jnp.sum(outputs**2) / 2, (model_state, ())
      >>> gradient = functional(lambda params, batch: params**2)(loss_fn)
      >>> clean, perturbed = jnp.array(1.0), jnp.array(1.5)
      >>> _, grads = gradient(Inputs(perturbed, (), (), clean=clean))
      >>> print(grads)  # 2 · 1.5, the Jacobian there, times 1², the outputs here
      3.0

    References:
      Singh et al., `Avoiding Spurious Sharpness Minimization Broadens Applicability of
      SAM <https://arxiv.org/abs/2502.02407>`_, 2025.
    """
    evaluate = as_network(network)

    def make(loss_fn: LossFn) -> GradientFn:
        of_outputs = jax.value_and_grad(loss_fn, has_aux=True)

        def grad_fn(at: Inputs) -> Any:
            def run(params: PyTree) -> tuple[PyTree, PyTree]:
                return evaluate(params, at.model_state, at.batch, at.key)

            outputs, pullback, new_state = jax.vjp(run, at.params, has_aux=True)
            result, cotangent = of_outputs(outputs, new_state, at.batch, at.key)
            if at.clean is not None:
                outputs, new_state = run(at.clean)
                _, cotangent = of_outputs(outputs, new_state, at.batch, at.key)
            (grads,) = pullback(cotangent)
            return result, jax.tree.map(jnp.conj, grads)

        return grad_fn

    return make


def perturbed(
    ascent: optax.GradientTransformation, gradient: GradientMaker = whole_batch
) -> GradientMaker:
    """The gradient at a perturbation made from the same examples: m-sharpness.

    ``microbatched(4, perturbed(sam_perturb(0.1)))`` around a plain optimizer perturbs
    every microbatch by an ε from that microbatch's gradient, and descends along the
    mean of the four perturbed gradients. Unlike
    :func:`optax_vasso.train.make_local_train_step`, whose parts are devices, it leaves
    the parameters divided as they are, over all devices (FSDP). It costs two gradients.

    Loss, model state and ``aux`` are those of the clean evaluation.

    Args:
      ascent: an ascent chain without averages or schedules. It receives the loss as
        ``value``, and in float16 with a loss scale scaled gradients, which do not
        affect :func:`optax_vasso.sam_perturb`.
      gradient: the gradient to compute at both points.

    Returns:
      A gradient maker.

    Raises:
      ValueError: if ascent is no transformation; when the step is first called, if its
        perturbation depends on its state, as an average's or a schedule's does.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_vasso import sam_perturb
      >>> from optax_vasso.train import Inputs, perturbed
      >>> def loss_fn(params, model_state, batch, key):
      ...     return jnp.sum(params**2) / 2, (model_state, ())
      >>> gradient = perturbed(sam_perturb(rho=0.5))(loss_fn)
      >>> (loss, _), grads = gradient(Inputs(jnp.array([3.0, 4.0]), (), ()))
      >>> print(loss, grads)
      12.5 [3.3 4.4]
    """
    checks.check_transformation("ascent", ascent)
    ascent = optax.with_extra_args_support(ascent)

    def make(loss_fn: LossFn) -> GradientFn:
        evaluate = gradient(loss_fn)

        def grad_fn(at: Inputs) -> Any:
            result, grads = evaluate(at._replace(clean=None))

            def perturb(state: optax.OptState) -> PyTree:
                return ascent.update(grads, state, at.params, value=result[0])[0]

            state = ascent.init(at.params)
            _check_without_memory(perturb, state)
            point = displaced(at.params, perturb(state))
            _, grads = evaluate(at._replace(params=point, clean=at.params))
            return result, grads

        return grad_fn

    return make


def _check_without_memory(
    perturb: Callable[[optax.OptState], PyTree], state: optax.OptState
) -> None:
    """Raise a ValueError if what ``perturb`` returns depends on the state."""
    if not jax.tree.leaves(state):
        return
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    try:
        # A map over states refuses to return what differs between them as one.
        jax.eval_shape(jax.vmap(perturb, out_axes=None), two)
    except ValueError as error:
        raise ValueError(
            "ascent has an average over steps or a schedule, which does not advance "
            "inside a gradient: pass only a perturbation, such as "
            "sam_perturb(0.1), or use sharpness_aware."
        ) from error
