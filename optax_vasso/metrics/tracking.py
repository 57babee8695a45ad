"""Metrics of the perturbation, computed inside the training loop on request.

:func:`track` is an Optax transformation that changes nothing. Put it into the base
optimizer, to which :func:`optax_vasso.sharpness_aware` and :func:`optax_vasso.lagged`
pass the perturbation::

    vasso(optax.chain(track(perturbation_norm, cosine), optax.sgd(0.1)))

A new measure is a function of a :class:`Seen`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import checks, mapped, numerics
from optax_vasso._internal.trees import Report, of_ascent

PyTree = Any


class Seen(NamedTuple):
    """The arrays of a step that a measure can read.

    Attributes:
      params: x_t.
      perturbation: ε_t, like the parameters; of :func:`optax_vasso.lagged` ε_{t−1}, at
        which this step's gradient was taken.
      grads: the clean gradient g_t(x_t); with a lagged optimizer the only gradient,
        g_t(x_t + ε_{t−1}).
      descent: the gradient that the base optimizer receives.
    """

    params: PyTree
    perturbation: PyTree
    grads: PyTree
    descent: PyTree


class Measure(NamedTuple):
    """A measure with a state, as a pair of pure functions.

    Attributes:
      name: its name among the metrics.
      init: (params) -> state, a tree of arrays.
      update: (seen, state) -> (measured, state), where ``measured`` is a scalar or
        another array of a fixed shape.
    """

    name: str
    init: Callable[[PyTree], PyTree]
    update: Callable[[Seen, PyTree], tuple[jax.Array, PyTree]]


@of_ascent("kept", "measure_states")
class TrackState(NamedTuple):
    """State of :func:`track`.

    Attributes:
      step: updates so far, an int32 scalar.
      report: the measures of the last step by name; zero before the first step, and
        after one that did not ascend.
      kept: the measures of the last measured step, in their order, since the report may
        be cleared; ``()`` if every step is measured.
      measure_states: the states of the measures, in their order; without names, so that
        ``optax.tree.get(state, name)`` finds only the metric.
    """

    step: jax.Array
    report: Report
    kept: tuple[jax.Array, ...]
    measure_states: tuple[PyTree, ...]


def perturbation_norm(seen: Seen) -> jax.Array:
    """‖ε_t‖₂, in the units of the parameters."""
    return numerics.norm(seen.perturbation)


def grad_norm(seen: Seen) -> jax.Array:
    """‖g_t‖₂ of the gradient that the ascent received."""
    return numerics.norm(seen.grads)


def cosine(seen: Seen) -> jax.Array:
    """The cosine between ε and the gradient.

    For :func:`optax_vasso.sam_perturb` it is the cosine between d_t and g_t, and
    √(θ(2 − θ)) for VaSSO in pure noise. With a lagged optimizer it is
    ⟨g_t, ε_{t−1}⟩/(‖g_t‖‖ε_{t−1}‖): if negative, the perturbation points downhill.
    Leaves that are not perturbed count in the length of the gradient.
    """
    return numerics.cosine(seen.perturbation, seen.grads)


def arrival(seen: Seen) -> jax.Array:
    """The cosine between ε and the part of it that survives the rounding of x + ε.

    The neighbours of a weight of 0.03 in bfloat16 are 1e-4 away; a smaller perturbation
    does not change it.
    """

    # x + ε and x are so close that their difference is exact.
    def taken_in(e: jax.Array, x: jax.Array) -> jax.Array:
        if not numerics.has_few_bits(x):
            return (x + e) - x
        wide = x.astype(jnp.float32)
        return numerics.round_to(wide + e.astype(jnp.float32), x.dtype) - wide

    rounded = numerics.map_updates(taken_in, seen.perturbation, seen.params)
    return numerics.cosine(rounded, seen.perturbation)


def _moved(seen: Seen, previous: PyTree) -> tuple[jax.Array, PyTree]:
    length = numerics.norm(seen.perturbation)
    move = numerics.norm(
        numerics.map_updates(
            lambda e, old: e - old.astype(e.dtype), seen.perturbation, previous
        )
    )
    share = move / jnp.where(length == 0, 1, length)
    return share, numerics.cast_like(seen.perturbation, previous)


#: How far the adversary moves from step to step, ‖ε_t − ε_{t−1}‖/‖ε_t‖. It lies
#: between 0 and 2, and is 1 at the first step. The papers bound it by O(√θ σ) for
#: VaSSO where SAM has O(σ). It keeps the last perturbation, a copy of the parameters.
stability = Measure("stability", optax.tree.zeros_like, _moved)


def running_mean(measure: Callable[[Seen], jax.Array], decay: float = 0.99) -> Measure:
    """The exponential moving average of a measure, corrected for its start.

    Non-finite values are skipped. An outlier of 1e30 fades to the size of one within
    69/(1 − decay) steps.

    Args:
      measure: a function of a :class:`Seen`; also one in :func:`functools.partial`.
      decay: decay of the average, in [0, 1); it covers about 1/(1 − decay) steps.

    Raises:
      ValueError: if measure is no function or decay is outside [0, 1).
    """
    if not callable(measure):
        raise ValueError(
            f"measure must be a function of a Seen, got a "
            f"{type(measure).__name__}: a Measure has its own state, and cannot be "
            "averaged."
        )
    checks.check_number("decay", decay, "in [0, 1)", lambda v: 0 <= v < 1)

    def init(params: PyTree) -> tuple[jax.Array, jax.Array]:
        shape = jax.eval_shape(measure, Seen(*4 * (params,))).shape
        return jnp.zeros(shape), jnp.zeros(shape)

    def update(seen: Seen, state: Any) -> tuple[jax.Array, Any]:
        newest = measure(seen)
        # A non-finite value would stay in the average.
        is_finite = jnp.isfinite(newest)
        kept = jnp.where(is_finite, decay, 1)
        total = kept * state[0] + jnp.where(is_finite, (1 - decay) * newest, 0)
        weight = kept * state[1] + jnp.where(is_finite, 1 - decay, 0)
        return total / jnp.where(weight == 0, 1, weight), (total, weight)

    return Measure(f"mean_{checks.name_of(measure)}", init, update)


def track(
    *measures: Callable[[Seen], jax.Array] | Measure,
    every: int = 1,
    **named: Callable[[Seen], jax.Array],
) -> optax.GradientTransformationExtraArgs:
    """Measure the perturbation at each step, from inside the base optimizer.

    The updates pass unchanged. A measure costs what it computes: a norm or a cosine
    reads the perturbation once more, :data:`~optax_vasso.metrics.stability` keeps a
    copy of the parameters, and a measure that needs ε after the second gradient keeps ε
    until then.

    Args:
      *measures: functions of a :class:`~optax_vasso.metrics.Seen` that return a
        scalar (or another array of a fixed shape), known by their names, or
        :class:`~optax_vasso.metrics.Measure`; by default
        :func:`~optax_vasso.metrics.perturbation_norm` and
        :func:`~optax_vasso.metrics.cosine`.
      every: measure at steps 0, ``every``, 2 ``every``, ..., and keep the numbers in
        between, also where those steps do not ascend. A
        :class:`~optax_vasso.metrics.Measure` sees the measured steps alone:
        :data:`~optax_vasso.metrics.stability` compares ε with that of the last of
        them. (Under :func:`jax.vmap` the measures are computed at every step.)
      **named: more functions of a :class:`~optax_vasso.metrics.Seen`, such as
        closures, under these names.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` to chain before the base
      optimizer. Read the numbers with ``optax.tree.get(state, name)``, or among the
      metrics of :func:`optax_vasso.make_train_step`.

    Raises:
      ValueError: if every is not an integer >= 1 or two measures have one name; at
        ``update``, if it is not called from inside of a sharpness-aware optimizer.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso import vasso
      >>> from optax_vasso.metrics import track
      >>> from optax_vasso.metrics import perturbation_norm, stability
      >>> base = optax.chain(track(perturbation_norm, stability), optax.sgd(0.1))
      >>> optimizer = vasso(base, rho=0.5)
      >>> params, grad_fn = jnp.array([3.0, 4.0]), lambda x: x
      >>> state = optimizer.init(params)
      >>> _, state = optimizer.update(params, state, params, grad_fn=grad_fn)
      >>> print(optax.tree.get(state, "perturbation_norm"))
      0.5
      >>> print(optax.tree.get(state, "stability"))
      1.0
    """
    checks.check_integer("every", every, 1)
    chosen = [_as_measure(m) for m in measures or (() if named else _DEFAULT)]
    chosen += [_as_measure(m, name) for name, m in named.items()]
    names = [measure.name for measure in chosen]
    if len(set(names)) < len(names):
        raise ValueError(
            f"measures must have different names, got {names}: pass functions by "
            "keyword to name them, as in track(mine=function)."
        )

    def init_fn(params: PyTree) -> TrackState:
        states = mapped.vary(
            tuple(measure.init(params) for measure in chosen),
            mapped.varying_axes(params),
        )
        shapes = jax.eval_shape(
            lambda x: _take(chosen, Seen(x, x, x, x), states)[0], params
        )
        zeros, kept = (
            jax.tree.map(mapped.zeros_like, shapes)
            for _ in range(2)  # each with its own buffer, since states are donated
        )
        return TrackState(
            step=jnp.zeros((), jnp.int32),
            report=Report(dict(zip(names, zeros, strict=True))),
            kept=() if every == 1 else kept,
            measure_states=states,
        )

    def update_fn(
        updates: PyTree,
        state: TrackState,
        params: PyTree = None,
        *,
        perturbation: PyTree = None,
        clean_grads: PyTree = None,
        ascended: jax.typing.ArrayLike = True,
        **extra_args: Any,
    ) -> tuple[PyTree, TrackState]:
        del extra_args
        checks.check_update(state, TrackState, params, "track")
        if perturbation is None:
            raise ValueError(
                "track needs the extra argument perturbation: put it inside a "
                "sharpness-aware optimizer, as in "
                "vasso(optax.chain(track(), optimizer))."
            )
        grads = updates if clean_grads is None else clean_grads
        seen = Seen(params, perturbation, grads, updates)

        def measure() -> tuple[tuple[jax.Array, ...], tuple[PyTree, ...]]:
            values, states = _take(chosen, seen, state.measure_states)
            like = tuple(state.report.metrics[name] for name in names)
            # A step that did not ascend has no perturbation to measure.
            values = tuple(jnp.where(ascended, v, jnp.zeros_like(v)) for v in values)
            return _as(values, like), _as(states, state.measure_states)

        if every == 1:
            values, states = measure()
        else:
            values, states = mapped.cond(
                state.step % every == 0,
                measure,
                lambda: (state.kept, state.measure_states),
            )
        return updates, TrackState(
            step=optax.safe_increment(state.step),
            report=Report(dict(zip(names, values, strict=True))),
            kept=() if every == 1 else values,
            measure_states=states,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


_DEFAULT = (perturbation_norm, cosine)


def _as_measure(
    measure: Callable[[Seen], jax.Array] | Measure, name: str | None = None
) -> Measure:
    if isinstance(measure, Measure):
        return measure if name is None else measure._replace(name=name)
    if not callable(measure):
        raise ValueError(
            f"a measure must be a function of a Seen, or a Measure, got "
            f"{checks.shown(measure)}: choose from optax_vasso.metrics, or write one."
        )
    return Measure(
        name or checks.name_of(measure),
        lambda params: (),
        lambda seen, _: (measure(seen), ()),
    )


def _take(
    measures: list[Measure], seen: Seen, states: tuple[PyTree, ...]
) -> tuple[tuple[jax.Array, ...], tuple[PyTree, ...]]:
    pairs = [m.update(seen, state) for m, state in zip(measures, states, strict=True)]
    return tuple(jnp.asarray(v) for v, _ in pairs), tuple(state for _, state in pairs)


def _as(tree: PyTree, like: PyTree) -> PyTree:
    """Cast to the types of the state, even if the precision is switched later."""
    return mapped.vary_like(numerics.cast_like(tree, like), like)
