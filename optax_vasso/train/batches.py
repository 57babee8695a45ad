"""Loss → gradient function: the gradients of a train step, and their examples.

A gradient maker takes the loss of a train step and returns ``grad_fn(inputs) ->
((loss, (model_state, aux)), grads)``, a function of :class:`Inputs`. Makers compose by
their argument ``gradient``: ``microbatched(8, part_of_batch(0.25))``.
"""

from __future__ import annotations

import fractions
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_vasso._internal import checks, mapped
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


def microbatched(count: int, gradient: GradientMaker = whole_batch) -> GradientMaker:
    """Average the gradients of several parts of the batch, one after another.

    Memory for activations falls with the number of parts; for a loss that is a mean
    over examples the result is that of the whole batch. The sums are kept in float32
    or wider. A part takes every ``count``-th example, as in
    :func:`optax.microbatching.microbatch`, so that a batch sharded over devices stays
    where it is. ``aux`` is stacked, part by part.

    The model state also ends as after one evaluation on the whole batch: every part
    starts from the same state, floats are averaged over the parts, and what cannot be
    averaged (counters, flags, random keys) is taken from the last part. So a running
    average of batch statistics keeps its decay per step, and a counter counts steps.
    Each part gets its own ``key``; a random key in the model state is the same for all
    parts.

    Args:
      count: number of parts, >= 1, which divides the number of examples.
      gradient: the gradient of one part.

    Returns:
      A gradient maker for :func:`optax_vasso.make_train_step`.

    Raises:
      ValueError: if count is not an integer >= 1; when the step is first called, if
        count does not divide the batch.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optax_vasso.train import Inputs, microbatched, whole_batch
      >>> def loss_fn(params, model_state, batch, key):
      ...     return jnp.mean((batch - params) ** 2), (model_state, ())
      >>> params, batch = jnp.zeros(()), jnp.arange(8.0)
      >>> for gradient in (whole_batch, microbatched(4)):
      ...     (loss, _), grads = gradient(loss_fn)(Inputs(params, (), batch))
      ...     print(loss, grads)
      17.5 -7.0
      17.5 -7.0
    """
    checks.check_integer("count", count, 1)

    def make(loss_fn: LossFn) -> GradientFn:
        one_part = gradient(loss_fn)

        def grad_fn(at: Inputs) -> Any:
            # Not optax.microbatching, whose parts these are: it gathers a batch that
            # is sharded over an explicit mesh axis, averages in the dtype of each leaf,
            # and takes floats only.
            parts = jax.tree.map(
                lambda leaf: jnp.moveaxis(
                    leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]), 1, 0
                ),
                check_examples(at.batch, count, "microbatches"),
            )

            def evaluate(index: jax.Array, part: PyTree) -> tuple[PyTree, PyTree]:
                key = None if at.key is None else jax.random.fold_in(at.key, index)
                (loss, (model_state, aux)), grads = one_part(
                    at._replace(batch=part, key=key)
                )
                return jax.tree.map(jnp.asarray, (loss, model_state, grads)), aux

            shapes, _ = jax.eval_shape(
                evaluate,
                jnp.zeros((), jnp.int32),
                jax.tree.map(lambda leaf: leaf[0], parts),
            )

            def add(sums: PyTree, item: tuple[jax.Array, PyTree]) -> Any:
                values, aux = evaluate(*item)
                return jax.tree.map(_add, sums, values), aux

            sums, aux = jax.lax.scan(
                add, jax.tree.map(_zeros, shapes), (jnp.arange(count), parts)
            )
            loss, model_state, grads = jax.tree.map(
                lambda total, s: (
                    (total / count).astype(s.dtype) if _is_float(s) else total
                ),
                sums,
                shapes,
            )
            return (loss, (model_state, aux)), grads

        return grad_fn

    return make


def part_of_batch(
    fraction: float, gradient: GradientMaker = whole_batch
) -> GradientMaker:
    """The gradient of a part of the batch: a cheaper ascent.

    As ``ascent_gradient`` of :func:`optax_vasso.make_train_step`, it makes a step cost
    1 + fraction gradients, and the descent sees the examples of the ascent again;
    :func:`optax_vasso.train.split_batch` keeps them apart. The chosen examples are
    spread evenly, so that each device takes the same share of a sharded batch.

    Args:
      fraction: share of the examples, in [1e-6, 1].
      gradient: the gradient on that share.

    Returns:
      A gradient maker.

    Raises:
      ValueError: if fraction is outside [1e-6, 1]; when the step is first called, if
        fraction times the batch is not a whole number of examples.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_vasso.train import Inputs, part_of_batch
      >>> def loss_fn(params, model_state, batch, key):
      ...     return jnp.mean(batch * params), (model_state, ())
      >>> gradient = part_of_batch(0.25)(loss_fn)
      >>> _, grads = gradient(Inputs(jnp.ones(()), (), jnp.arange(8.0)))
      >>> print(grads)  # the mean of examples 0 and 4
      2.0
    """
    share = exact_share("fraction", fraction, "in [1e-6, 1]", 1.0)
    taken, of = share.numerator, share.denominator

    def choose(batch: PyTree) -> PyTree:
        batch = check_examples(batch, of, f"a fraction of {share}")
        return take_of_groups(batch, of, slice(None, taken))

    return on_chosen(choose, gradient)


def on_batch(name: Any, gradient: GradientMaker = whole_batch) -> GradientMaker:
    """The gradient of one of several batches that a step receives together.

    ``gradient=on_batch("descent"), ascent_gradient=on_batch("ascent")`` ascends and
    descends on different examples; the batch is then
    ``{"descent": ..., "ascent": ...}``.

    Args:
      name: key or index of the batch.
      gradient: the gradient on it.
    """

    def choose(batch: PyTree) -> PyTree:
        if jax.tree_util.all_leaves([batch]):
            raise ValueError(
                f"on_batch({name!r}) needs several batches, got one array of shape "
                f"{jnp.shape(batch)}: pass them in a dict or a tuple."
            )
        try:
            return batch[name]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"on_batch({name!r}) needs a batch that has an entry {name!r}, "
                f"got {jax.tree.structure(batch)}."
            ) from error

    return on_chosen(choose, gradient)


def on_chosen(
    choose: Callable[[PyTree], PyTree], gradient: GradientMaker
) -> GradientMaker:
    """The gradient on what a function chooses of the batch."""

    def make(loss_fn: LossFn) -> GradientFn:
        grad_fn = gradient(loss_fn)
        return lambda at: grad_fn(at._replace(batch=choose(at.batch)))

    return make


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


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """What microbatches are added to: at least in float32, sharded as they are."""
    narrow = _is_float(shape) and shape.dtype.itemsize < 4
    return mapped.zeros_like(shape, jnp.float32 if narrow else None)


def _add(total: jax.Array, value: jax.Array) -> jax.Array:
    return total + value.astype(total.dtype) if _is_float(value) else value


def exact_share(
    name: str, value: float, allowed: str, most: float
) -> fractions.Fraction:
    """A share of the examples as a fraction, which decides the sizes of arrays."""
    # In float32, in which all numbers are looked at, 1e-6 is a little less.
    least = np.float32(1e-6)
    checks.check_number(name, value, allowed, lambda v: least <= v <= most)
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name} is being traced, but it decides how many examples are taken: pass "
            "a number."
        )
    return fractions.Fraction(float(value)).limit_denominator(10**6)


def take_of_groups(batch: PyTree, size: int, within: slice) -> PyTree:
    """Some of each group of ``size`` examples: a sharded batch stays where it is."""

    def take(leaf: jax.Array) -> jax.Array:
        grouped = leaf.reshape(leaf.shape[0] // size, size, *leaf.shape[1:])
        return grouped[:, within].reshape(-1, *leaf.shape[1:])

    return jax.tree.map(take, batch)


def check_examples(batch: PyTree, parts: int, what: str) -> PyTree:
    """The batch as arrays, if its leading axis can be divided into ``parts``."""
    batch = jax.tree.map(jnp.asarray, batch)
    for path, leaf in jax.tree.leaves_with_path(batch):
        name = f"batch{jax.tree_util.keystr(path)}"
        if not leaf.ndim:
            raise ValueError(
                f"{name} is a scalar, but {what} need a leading axis divisible by "
                f"{parts}: repeat it once per example, or bind it to the loss."
            )
        if leaf.shape[0] % parts:
            raise ValueError(
                f"{name} has {leaf.shape[0]} examples, but {what} need a multiple of "
                f"{parts}: change one of the two."
            )
    return batch
