"""A compiled train step: model state, random keys and metrics around an optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_vasso._internal import mapped, numerics, trees
from optax_vasso._internal.checks import (
    check_params,
    check_transformation,
    is_key,
    shown,
)
from optax_vasso._internal.extra_args import passing
from optax_vasso.steps.two_gradients import SharpnessAwareState
from optax_vasso.train.gradients import GradientFn, GradientMaker, Inputs, whole_batch
from optax_vasso.train.losses import LossFn, as_canonical
from optax_vasso.wrappers import SkipState, settled

PyTree = Any


class TrainState(NamedTuple):
    """Everything needed to continue a training run, as a tree of arrays.

    Attributes:
      step: steps done, an int32 scalar.
      params: the parameters; with :func:`optax_vasso.lagged`, the perturbed ones.
      opt_state: the state of the optimizer.
      model_state: state of the model besides parameters, such as batch statistics; any
        tree, ``()`` without one.
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
      ValueError: if params has no leaves or an integer leaf, optimizer is no
        transformation, or key is no random key.
    """
    check_transformation("optimizer", optimizer)
    check_params(params)
    is_array = isinstance(key, jax.Array | np.ndarray)
    if key is not None and not (is_array and (is_key(key) or key.dtype == jnp.uint32)):
        raise ValueError(
            f"key must be a random key, got {shown(key)}: pass jax.random.key(0)."
        )
    params, model_state, key = jax.tree.map(jnp.copy, (params, model_state, key))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # Copied too, since an optimizer may use one buffer for several scalars, and a
        # buffer can be donated only once.
        opt_state=jax.tree.map(jnp.copy, optimizer.init(params)),
        model_state=model_state,
        key=key,
    )


Step = Callable[[TrainState, PyTree], tuple[TrainState, dict[str, Any]]]


def make_train_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    *,
    has_aux: bool = False,
    separate_keys: bool = False,
    gradient: GradientMaker = whole_batch,
    ascent_gradient: GradientMaker | None = None,
    state_shardings: PyTree = None,
) -> Step:
    """Compile one step of training.

    The same function serves one device and a mesh of them: :func:`jax.jit` takes the
    shardings of state and batch from its arguments, and norms are global whatever they
    are. It may be called inside :func:`jax.jit`, :func:`jax.lax.scan` and
    :func:`jax.vmap`, as for many steps or many seeds in one program. Parts of the state
    in host memory (``pinned_host``) are moved to the device for the step, and back.

    The loss is ``loss_fn(params, batch) -> loss``, a scalar. It requests anything else
    by argument name: ``model_state`` (batch statistics and the like) makes it
    return ``(loss, new_model_state)``; ``key`` is a random key, derived
    from the state's key and step. With ``has_aux=True`` it returns auxiliary output as
    well: ``(loss, aux)``, or ``(loss, (new_model_state, aux))``.

    The loss is evaluated at x_t and, by a sharpness-aware optimizer, at x_t + ε_t on
    the same batch. The new model state and ``aux`` are those of the clean evaluation,
    so batch statistics are updated once, as in plain training.

    Args:
      loss_fn: the loss, as above.
      optimizer: any Optax optimizer; a sharpness-aware one may be anywhere in it. Its
        ``update`` receives the loss as ``value``, the gradient as ``grad`` (not
        conjugated, where it is complex), and the loss as a function of the parameters
        as ``value_fn`` and ``obj_fn``.
      has_aux: whether the loss returns auxiliary output, as in
        :func:`jax.value_and_grad`.
      separate_keys: let the perturbed evaluation draw its own dropout masks. By
        default both evaluations use the same ones, so that the perturbed gradient is
        the gradient of the same function.
      gradient: maker of the gradient, which chooses its examples, for instance
        :func:`optax_vasso.train.microbatched`.
      ascent_gradient: maker of the clean gradient of a sharpness-aware optimizer, if it
        differs, for instance :func:`optax_vasso.train.part_of_batch`;
        ``**split_batch()`` gives both (:func:`optax_vasso.train.split_batch`). Loss,
        model state and ``aux`` are then those of the examples of the ascent, and there
        is no ``sharpness`` among the metrics. A step whose gate is closed descends on
        this gradient.
      state_shardings: shardings of the returned state, a tree like the state; by
        default the compiler chooses, and keeps them in all but unusual layouts.

    Returns:
      ``train_step(state, batch) -> (state, metrics)``, jitted, with the buffers of
      ``state`` donated: use the returned state only. ``metrics`` has the scalar

      - ``loss``: at x_t (with :func:`optax_vasso.lagged`, at the perturbed point);

      with a sharpness-aware optimizer of two gradients

      - ``ascended``: whether this step took a second gradient;
      - ``perturbed_loss``: at x_t + ε_t; equal to ``loss`` if it did not ascend;
      - ``sharpness``: perturbed_loss − loss, along the direction of ascent;

      then the metrics of every :class:`optax_vasso.metrics.Report` in the optimizer's
      state, as those of :func:`optax_vasso.metrics.track` and
      :func:`optax_vasso.wrappers.skip_nonfinite` (``finite`` and ``skipped``, the count
      of all, with ``loss_scale`` if there is one); and, with ``has_aux``, ``aux``.

    Raises:
      ValueError: if optimizer is no transformation or the loss has another signature;
        when the step is called, if the buffers of ``state`` were donated to a step
        before; when it is first called, if the loss returns something else than above,
        needs a key that the state does not have, ``ascent_gradient`` is given with an
        optimizer that does not ascend or missing with one that needs it, two metrics
        have one name, or, in :func:`jax.shard_map`, the loss differs between devices
        that share their parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_vasso as ov
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)
      >>> batch = {"x": jnp.eye(2), "y": jnp.array([1.0, 2.0])}
      >>> optimizer = ov.vasso(optax.sgd(0.1), rho=0.05)
      >>> train_step = ov.make_train_step(loss_fn, optimizer)
      >>> state = ov.init_train_state(jnp.zeros(2), optimizer)
      >>> state, metrics = train_step(state, batch)
      >>> print(metrics["loss"], metrics["perturbed_loss"])
      2.5 2.613
    """
    step = build_train_step(
        as_canonical(loss_fn, has_aux),
        optimizer,
        has_aux=has_aux,
        separate_keys=separate_keys,
        gradient=gradient,
        ascent_gradient=ascent_gradient,
    )
    out_shardings = None if state_shardings is None else (state_shardings, None)
    return compiled_step(step, out_shardings)


def compiled_step(step: Step, out_shardings: PyTree = None) -> Step:
    """The jitted step, which donates its state and reports one that was donated before.

    It looks for one only after a call has failed, so the check costs nothing.
    """
    jitted = jax.jit(step, donate_argnums=0, out_shardings=out_shardings)

    @functools.wraps(step)
    def train_step(
        state: TrainState, batch: PyTree
    ) -> tuple[TrainState, dict[str, Any]]:
        try:
            return jitted(state, batch)
        except (RuntimeError, ValueError) as error:
            # A step that failed midway has deleted them too, so look at JAX's message.
            if "deleted" in str(error) and _is_deleted(state):
                raise ValueError(
                    "state was given to a step before, which reused its buffers: go "
                    "on with the state that the step returned, as in state, metrics = "
                    "train_step(state, batch), or pass jax.tree.map(jnp.copy, state)."
                ) from error
            raise

    for name in ("lower", "trace", "eval_shape", "clear_cache", "_cache_size"):
        setattr(train_step, name, getattr(jitted, name))
    return train_step


def _is_deleted(state: PyTree) -> bool:
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    return any(
        leaf.is_deleted() for leaf in arrays if not isinstance(leaf, jax.core.Tracer)
    )


def build_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    *,
    has_aux: bool = False,
    separate_keys: bool = False,
    gradient: GradientMaker = whole_batch,
    ascent_gradient: GradientMaker | None = None,
    axis_name: str | None = None,
) -> Step:
    """The step of :func:`make_train_step`, not compiled: to map over an axis.

    The loss is a canonical one, of ``train.losses.as_canonical``.
    """
    check_transformation("optimizer", optimizer)
    for name, maker in {
        "gradient": gradient,
        "ascent_gradient": ascent_gradient,
    }.items():
        if maker is not None and not callable(maker):
            raise ValueError(
                f"{name} must be a gradient maker, got {shown(maker)}: pass one of "
                "optax_vasso.train, as in microbatched(4)."
            )
    if isinstance(optimizer, optax.MultiSteps):
        # Its own conversion drops the extra arguments.
        update = optimizer.update
    else:
        update = optax.with_extra_args_support(optimizer).update
    # What moves the parameters itself needs less memory for it.
    move = getattr(optimizer, "move", None)

    def train_step(
        state: TrainState, batch: PyTree
    ) -> tuple[TrainState, dict[str, Any]]:
        check_roles(state, batch)
        spaces = [jax.typeof(leaf).memory_space for leaf in jax.tree.leaves(state)]
        is_on_host = jax.memory.Space.Host in spaces
        if is_on_host:
            state = _moved(state, [jax.memory.Space.Device] * len(spaces))
        key = perturbed_key = None
        if state.key is not None:
            key = perturbed_key = jax.random.fold_in(state.key, state.step)
            if separate_keys:
                key, perturbed_key = jax.random.split(key)

        skips = trees.find_states(state.opt_state, SkipState)
        scales = [skip.loss_scale for skip in skips if skip.loss_scale != ()]
        at = Inputs(state.params, state.model_state, batch, key)

        def evaluate(maker: GradientMaker, at: Inputs) -> Any:
            maker = _with_loss_scale(scales[0], maker) if scales else maker
            return maker(loss_fn)(at)

        def grad_fn(params: PyTree) -> tuple[jax.Array, PyTree]:
            moved = at._replace(params=params, key=perturbed_key, clean=at.params)
            (value, _), grads = evaluate(gradient, moved)
            return value, grads

        def value_fn(params: PyTree) -> jax.Array:
            moved = at._replace(params=params, key=perturbed_key)
            return evaluate(gradient, moved)[0][0]

        ascends = bool(trees.find_states(state.opt_state, SharpnessAwareState))
        if ascent_gradient is not None and not ascends:
            raise ValueError(
                "ascent_gradient is given, but the optimizer takes no second gradient: "
                "leave it out, or use a sharpness-aware optimizer."
            )
        if ascent_gradient is None and trees.follows_loss(state.opt_state):
            raise ValueError(
                "The optimizer's radius follows the loss of examples that the ascent "
                "did not see, and ascent_gradient is None: add **split_batch()."
            )
        (loss, (model_state, aux)), grads = evaluate(ascent_gradient or gradient, at)
        apart = mapped.disagreement(loss, state.params)
        if apart:
            raise ValueError(
                f"loss_fn differs between the devices of axis {apart[0]!r}, which "
                "share their parameters, so that JAX would sum their gradients: pass "
                f"gradient=synchronized({apart[0]!r}), or average the loss by "
                f"jax.lax.pmean(loss, {apart[0]!r})."
            )
        new, opt_state = (move or update)(
            grads,
            # An optimizer that is not called on this step has nothing to report.
            trees.clear_metrics(state.opt_state),
            state.params,
            **passing(
                # A line search differentiates by itself, as JAX does.
                {"value": loss, "grad": optax.tree.conj(grads), "value_fn": value_fn},
                obj_fn=value_fn,
                grad_fn=grad_fn,
                **({} if axis_name is None else {"axis_name": axis_name}),
            ),
        )
        if skips and not isinstance(opt_state, SkipState):
            opt_state = settled(
                opt_state, state.opt_state, state.params, (loss, grads), axis_name
            )
        ours: dict[str, Any] = {"loss": loss}
        metrics = trees.collect_metrics(opt_state)
        if ascends:
            metrics["perturbed_loss"] = jnp.where(
                metrics["ascended"], metrics["perturbed_loss"], loss
            )
            if ascent_gradient is None:
                ours["sharpness"] = metrics["perturbed_loss"] - loss
        for skip in trees.find_states(opt_state, SkipState):
            model_state = optax.tree.where(
                skip.report.metrics["finite"], model_state, state.model_state
            )
            if skip.loss_scale != ():
                ours["loss_scale"] = skip.loss_scale.loss_scale
        if has_aux:
            ours["aux"] = aux
        new_state = TrainState(
            step=optax.safe_increment(state.step),
            params=new if move else optax.apply_updates(state.params, new),
            opt_state=opt_state,
            model_state=model_state,
            key=state.key,
        )
        if is_on_host:
            new_state = _moved(new_state, spaces)
        return new_state, trees.merge_metrics(ours, metrics)

    return train_step


def check_roles(state: Any, batch: PyTree) -> None:
    """Raise a ValueError for anything but a train state, or an undivided batch."""
    if not isinstance(state, TrainState):
        found = (
            f"an array of shape {jnp.shape(state)}"
            if isinstance(state, jax.Array)
            else f"a {type(state).__name__}"
        )
        raise ValueError(
            f"state must be a TrainState, got {found}: make it with init_train_state, "
            "and call train_step(state, batch)."
        )
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(batch)]
    kinds = [
        *(kind for kind in types if kind.ndim),
        *(jax.typeof(leaf) for leaf in jax.tree.leaves(state.params)),
    ]
    if not any(kind.ndim for kind in types):
        return
    mesh: Any = next(
        (k.sharding.mesh for k in kinds if not k.sharding.mesh.empty), None
    )
    for axis in () if mesh is None else mesh.explicit_axes:
        if mesh.shape[axis] > 1 and not any(
            axis in jax.tree.leaves(tuple(kind.sharding.spec)) for kind in kinds
        ):
            raise ValueError(
                f"batch is whole on all devices of the explicit mesh axis {axis!r}, "
                "and so are the parameters, so that all would compute the same: divide "
                f"it with shard_batch(batch, mesh, {axis!r})."
            )


def _moved(state: TrainState, spaces: list[Any]) -> TrainState:
    """The state with each leaf in the memory space given for it."""
    structure: Any = jax.tree.structure(state)
    leaves = jax.tree.leaves(state)
    moved = [jax.device_put(x, space) for x, space in zip(leaves, spaces, strict=True)]
    return structure.unflatten(moved)


def _with_loss_scale(loss_scale: Any, gradient: GradientMaker) -> GradientMaker:
    """The gradient, computed from the loss times a scale in float32 or wider."""

    def make(loss_fn: LossFn) -> GradientFn:
        def scaled(*args: Any) -> tuple[jax.Array, tuple[PyTree, PyTree]]:
            loss, rest = loss_fn(*args)
            wide = numerics.widen(loss, numerics.accumulation_dtype(loss))
            return loss_scale.scale(wide), rest

        def unscaled(at: Inputs) -> Any:
            (loss, rest), grads = gradient(scaled)(at)
            loss, grads = loss_scale.unscale((loss, grads))
            return (loss, rest), grads

        return unscaled

    return make
