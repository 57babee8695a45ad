"""A compiled train step: model state, random keys and metrics around an optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso import numerics
from optax_vasso.ascent import StabilityState
from optax_vasso.gradients import GradientMaker, LossFn, whole_batch
from optax_vasso.lagged import LaggedState, lagged_eval_params
from optax_vasso.nonfinite import SkipState
from optax_vasso.precision import ArrivalState
from optax_vasso.sharpness_aware import SharpnessAwareState
from optax_vasso.states import find_states
from optax_vasso.validation import check_params

PyTree = Any
Step = Callable[[Any, PyTree], tuple[Any, dict[str, Any]]]


class TrainState(NamedTuple):
    """Everything a training run needs to go on, a tree of arrays.

    Attributes:
      step: steps done, an int32 scalar.
      params: the parameters; with :func:`optax_vasso.lagged`, the perturbed ones.
      opt_state: the state of the optimizer.
      model_state: what the model carries besides parameters, such as batch
        statistics; any tree, ``()`` if there is nothing.
      key: the random key of the run (dropout, augmentation); ``None`` if unused.
    """

    step: jax.Array
    params: PyTree
    opt_state: optax.OptState
    model_state: PyTree
    key: jax.Array | None


def init_train_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    model_state: PyTree = (),
    key: jax.Array | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
      params: initial parameters. They are copied, since the train step donates its
        buffers: the caller's arrays stay alive.
      optimizer: the transformation that :func:`make_train_step` is given.
      model_state: initial batch statistics and the like; copied too.
      key: a random key, if the loss needs one.

    Raises:
      ValueError: if params has no leaves or an integer leaf.
    """
    check_params(params)
    params, model_state, key = jax.tree.map(jnp.copy, (params, model_state, key))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # Copied as well: an optimizer may share one zero between several scalars, and
        # a buffer can be donated only once.
        opt_state=jax.tree.map(jnp.copy, optimizer.init(params)),
        model_state=model_state,
        key=key,
    )


def eval_params(opt_state: optax.OptState, params: PyTree) -> PyTree:
    """The parameters to evaluate: less the perturbation, if the optimizer is lagged."""
    if find_states(opt_state, LaggedState):
        return lagged_eval_params(opt_state, params)
    return params


def needs_grad_fn(opt_state: optax.OptState) -> bool:
    """Whether ``update`` wants a ``grad_fn``: is a sharpness-aware optimizer in it?"""
    return bool(find_states(opt_state, SharpnessAwareState))


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    separate_keys: bool = False,
    gradient: GradientMaker = whole_batch,
    ascent_gradient: GradientMaker | None = None,
    state_shardings: PyTree = None,
) -> Step:
    """Compile one step of training.

    The same function serves one device and a mesh of them: :func:`jax.jit` takes the
    shardings of state and batch from its arguments, and norms are global whatever
    they are.

    The loss is ``loss_fn(params, model_state, batch, key) -> (loss, (model_state,
    aux))`` with a scalar loss. It is evaluated at x_t and, by a sharpness-aware
    optimizer, at x_t + ε_t on the same batch. The new model state and ``aux`` are those
    of the clean evaluation, so batch statistics are updated once, as in plain
    training. Any Optax optimizer will do; without a sharpness-aware one there is one
    evaluation and the metrics have no perturbed loss.

    Args:
      loss_fn: the loss, of the signature above. ``key`` is derived from the state's
        key and step, and is ``None`` if the state has none.
      optimizer: any Optax transformation; a sharpness-aware one may be anywhere in it.
      separate_keys: let the perturbed evaluation draw its own dropout masks. By
        default both evaluations use the same ones, so that the perturbed gradient is
        the gradient of the same function.
      gradient: what is differentiated, and on which examples, for instance
        :func:`optax_vasso.microbatched`.
      ascent_gradient: the same for the clean gradient of a sharpness-aware optimizer,
        where it differs, for instance :func:`optax_vasso.part_of_batch`. Loss, model
        state and ``aux`` are then those of the examples of the ascent, and there is no
        ``sharpness`` among the metrics. A step whose gate is closed descends on this
        gradient.
      state_shardings: a tree of shardings like the state, to which the returned state
        is held; by default the compiler chooses, which keeps them in all but unusual
        layouts.

    Returns:
      ``train_step(state, batch) -> (state, metrics)``, jitted, with the buffers of
      ``state`` donated: use the returned state only. ``metrics`` has the scalars

      - ``loss``: at x_t (with :func:`optax_vasso.lagged`, at the perturbed point);
      - ``grad_norm``: ‖g_t‖₂ of the clean gradient;

      and, with a sharpness-aware optimizer,

      - ``ascended``: whether this step took a second gradient;
      - ``perturbed_loss``: at x_t + ε_t; equal to ``loss`` if it did not ascend;
      - ``sharpness``: perturbed_loss − loss, along the direction of ascent;
      - ``perturbation_norm``: ‖ε_t‖₂, 0 if it did not ascend;
      - ``cosine``: between ε_t and g_t, 0 if it did not ascend;
      - ``stability``: ‖ε_t − ε_{t−1}‖₂/‖ε_t‖₂, with
        :func:`optax_vasso.track_stability` in the ascent chain;
      - ``arrived``: cosine of what the parameters took in with ε_t, with
        :func:`optax_vasso.track_arrival` in the ascent chain;

      with :func:`optax_vasso.skip_nonfinite`, ``finite`` and ``skipped`` (in all), and
      ``loss_scale`` if it has one;

      and ``aux``, the tree that the clean evaluation returned.

    Raises:
      ValueError: when it is first called, if ``ascent_gradient`` is given with an
        optimizer that does not ascend; if the loss is not a scalar, a TypeError of JAX.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_vasso as ov
      >>> def loss_fn(params, model_state, batch, key):
      ...     predictions = batch["x"] @ params
      ...     loss = jnp.mean((predictions - batch["y"]) ** 2)
      ...     return loss, (model_state, {"predictions": predictions})
      >>> batch = {"x": jnp.eye(2), "y": jnp.array([1.0, 2.0])}
      >>> optimizer = ov.vasso(optax.sgd(0.1), rho=0.05)
      >>> train_step = ov.make_train_step(loss_fn, optimizer)
      >>> state = ov.init_train_state(jnp.zeros(2), optimizer)
      >>> state, metrics = train_step(state, batch)
      >>> print(metrics["loss"], metrics["perturbed_loss"])
      2.5 2.613
      >>> print(metrics["aux"]["predictions"])
      [0. 0.]
    """
    step = build_train_step(
        loss_fn,
        optimizer,
        separate_keys=separate_keys,
        gradient=gradient,
        ascent_gradient=ascent_gradient,
    )
    out_shardings = None if state_shardings is None else (state_shardings, None)
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def build_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    separate_keys: bool = False,
    gradient: GradientMaker = whole_batch,
    ascent_gradient: GradientMaker | None = None,
) -> Step:
    """The step of :func:`make_train_step`, not compiled: to map over an axis."""
    optimizer = optax.with_extra_args_support(optimizer)

    def train_step(
        state: TrainState, batch: PyTree
    ) -> tuple[TrainState, dict[str, Any]]:
        key = perturbed_key = None
        if state.key is not None:
            key = perturbed_key = jax.random.fold_in(state.key, state.step)
            if separate_keys:
                key, perturbed_key = jax.random.split(key)

        skip_states = find_states(state.opt_state, SkipState)
        ascends = needs_grad_fn(state.opt_state)
        if ascent_gradient is not None and not ascends:
            raise ValueError(
                "ascent_gradient is given, but the optimizer takes no second gradient: "
                "leave it out, or use a sharpness-aware optimizer."
            )
        scales = [s.loss_scale for s in skip_states if hasattr(s.loss_scale, "scale")]

        def evaluate(
            maker: GradientMaker, params: PyTree, key: jax.Array | None
        ) -> tuple[Any, PyTree]:
            scaled = _scaled_loss(loss_fn, scales[0]) if scales else loss_fn
            (loss, rest), grads = maker(scaled)(params, state.model_state, batch, key)
            if scales:
                loss, grads = scales[0].unscale((loss, grads))
            return (loss, rest), grads

        def grad_fn(params: PyTree) -> tuple[jax.Array, PyTree]:
            (value, _), grads = evaluate(gradient, params, perturbed_key)
            return value, grads

        (loss, (model_state, aux)), grads = evaluate(
            ascent_gradient or gradient, state.params, key
        )
        extra_args: dict[str, Any] = {"grad_fn": grad_fn} if ascends else {}
        if skip_states:
            extra_args["value"] = loss
        updates, opt_state = optimizer.update(
            grads,
            state.opt_state,
            state.params,
            **extra_args,
        )
        metrics = {"loss": loss, "grad_norm": numerics.norm(grads)}
        for skipped in find_states(opt_state, SkipState):
            model_state = optax.tree.where(
                skipped.finite, model_state, state.model_state
            )
            metrics |= {"finite": skipped.finite, "skipped": skipped.total}
            if hasattr(skipped.loss_scale, "loss_scale"):
                metrics["loss_scale"] = skipped.loss_scale.loss_scale
        for found in find_states(opt_state, SharpnessAwareState):
            metrics |= found.metrics._asdict()
            metrics["perturbed_loss"] = jnp.where(
                found.metrics.ascended, found.metrics.perturbed_loss, loss
            )
            if ascent_gradient is None:
                metrics["sharpness"] = metrics["perturbed_loss"] - loss
        for tracked in find_states(opt_state, StabilityState):
            metrics["stability"] = tracked.stability
        for arrival in find_states(opt_state, ArrivalState):
            metrics["arrived"] = arrival.arrived
        new_state = TrainState(
            step=optax.safe_increment(state.step),
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            model_state=model_state,
            key=state.key,
        )
        return new_state, metrics | {"aux": aux}

    return train_step


def _scaled_loss(loss_fn: LossFn, loss_scale: Any) -> LossFn:
    """The loss in float32 or wider, multiplied by a loss scale."""

    def scaled(*args: Any) -> tuple[jax.Array, tuple[PyTree, PyTree]]:
        loss, rest = loss_fn(*args)
        wide = numerics.widen(loss, numerics.accumulation_dtype(loss))
        return loss_scale.scale(wide), rest

    return scaled
