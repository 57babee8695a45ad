"""Language models that are pretrained once and annealed by many methods.

AdamW pretrains at a learning rate that warms up and then stays. From there a method
goes on with AdamW's moments, while the learning rate falls to 0 along a line; then the
loss is measured with the weights as they are and rounded to few bits.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_vasso as ov
from experiments.harness.language import BATCH, CONTEXT
from experiments.harness.language_methods import METHODS, Method, whole
from experiments.harness.progress import Progress
from experiments.harness.rounding import levels_of, round_weights
from experiments.harness.rows import over_rows, place
from experiments.harness.transformer import Transformer

WARMUP = 200
STEPS_PER_CALL = 50
WINDOWS_AT_ONCE = 32
# Streams of random numbers: a seed's batches are the same for every method.
PRETRAINING, ANNEALING = 1, 2

Leaves = list[np.ndarray]


def pretrain(
    model: Transformer,
    text: np.ndarray,
    setting: dict[str, float],
    seeds: Sequence[int],
    *,
    steps: int,
    progress: Progress,
) -> Leaves:
    """Train with AdamW from the start.

    Args:
      model: the network.
      text: characters to train on, int32.
      setting: ``learning_rate`` and ``weight_decay``.
      seeds: each draws an initialization and batches.
      steps: a multiple of ``STEPS_PER_CALL``.
      progress: advanced by the gradients that were taken.

    Returns:
      The flat leaves of weights and Adam's moments, each with a leading axis of seeds.
    """
    program = _pretraining(model)
    found = []
    for rows, some in _in_turn(setting | {"newest": 1.0}, seeds):
        carry = program.start(rows)
        random = [np.random.default_rng([seed, PRETRAINING]) for seed in some]
        carry = _run(program, text, carry, rows, random, steps, 1, progress)
        found.append([np.asarray(leaf)[: len(some)] for leaf in program.kept(carry)])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def anneal(
    model: Transformer,
    method: Method,
    text: np.ndarray,
    windows: dict[str, np.ndarray],
    setting: dict[str, float],
    starts: Leaves,
    seeds: Sequence[int],
    *,
    bits: Sequence[int],
    gradients: int,
    progress: Progress,
) -> dict[str, np.ndarray]:
    """Go on from pretrained weights; the losses at the end.

    Args:
      model: the network.
      method: that goes on.
      text: characters to train on, int32.
      windows: to evaluate on, by the names of the texts: (windows, length).
      setting: ``learning_rate`` at the start, ``weight_decay``, ``newest``, the weight
        of the newest weights in the average that is evaluated (1: none), and what the
        method itself has.
      starts: of :func:`pretrain`, with the same seeds.
      seeds: each draws batches, and random directions.
      bits: that weights are rounded to.
      gradients: how many are taken; a method of two takes half the steps.
      progress: advanced by the gradients that were taken.

    Returns:
      By text, (seeds, 1 + 2 formats) in nats per character: not rounded, then with
      so many bits per channel, then per tensor.
    """
    program = _annealing(model, method, tuple(bits))
    steps = gradients // method.gradients
    setting = setting | {"steps": steps}
    found: dict[str, list[np.ndarray]] = {name: [] for name in windows}
    done = 0
    for rows, some in _in_turn(setting, seeds):
        own = [leaf[done : done + len(some)] for leaf in starts]
        carry = program.start(place(own, jax.local_device_count()), rows)
        random = [np.random.default_rng([seed, ANNEALING]) for seed in some]
        carry = _run(
            program, text, carry, rows, random, steps, method.gradients, progress
        )
        for name, of_text in windows.items():
            found[name].append(np.asarray(program.losses(of_text, carry))[: len(some)])
        done += len(some)
    return {name: np.concatenate(parts) for name, parts in found.items()}


class Program(NamedTuple):
    """Compiled functions of rows.

    Attributes:
      start: rows, or (flat leaves, rows) -> carry.
      run: (text, carry, rows, starts of windows) -> carry, that many steps later.
      kept: carry -> flat leaves: weights and Adam's moments.
      losses: (windows, carry) -> losses, rounded and not.
    """

    start: Callable[..., Any]
    run: Callable[..., Any]
    kept: Callable[..., Any]
    losses: Callable[..., Any]


@functools.cache
def _pretraining(model: Transformer) -> Program:
    def schedule(row: dict[str, Any], step: Any) -> Any:
        return row["learning_rate"] * jnp.minimum((step + 1) / WARMUP, 1.0)

    fresh, run, kept, losses = _functions(model, METHODS["adamw"], schedule, ())
    return _compiled(fresh, run, kept, losses)


@functools.cache
def _annealing(model: Transformer, method: Method, bits: tuple[int, ...]) -> Program:
    def schedule(row: dict[str, Any], step: Any) -> Any:
        return row["learning_rate"] * (1 - jnp.minimum(step / row["steps"], 1.0))

    fresh, run, kept, losses = _functions(model, method, schedule, bits)

    def resumed(leaves: list[jax.Array], row: dict[str, Any]) -> tuple[Any, Any]:
        """The method's own state is new, Adam's is the one before."""
        state, params = fresh(row)
        tree = jax.tree.structure((params, _moments(state.opt_state)))
        params, adam = jax.tree.unflatten(tree, leaves)
        opt_state = jax.tree.map(
            lambda old: adam if _is_adam(old) else old,
            state.opt_state,
            is_leaf=_is_adam,
        )
        return state._replace(params=params, opt_state=opt_state), params

    return _compiled(resumed, run, kept, losses)


def _compiled(start: Any, run: Any, kept: Any, losses: Any) -> Program:
    return Program(
        over_rows(start),
        over_rows(run, shared=1, donate_argnums=1),
        over_rows(kept),
        over_rows(losses, shared=1),
    )


def _functions(
    model: Transformer,
    method: Method,
    schedule: Callable[[dict[str, Any], Any], Any],
    bits: tuple[int, ...],
) -> tuple[Callable[..., Any], ...]:
    """Of one row; what is carried is the state and an average of the weights."""
    objective, loss_fn = method.objective(model), whole(model).loss

    def optimizer_of(row: dict[str, Any]) -> optax.GradientTransformation:
        return method.make(functools.partial(schedule, row), row, row["seed"])

    def fresh(row: dict[str, Any]) -> tuple[Any, Any]:
        empty = jnp.zeros((1, CONTEXT), jnp.int32)
        params = model.init(jax.random.key(row["seed"]), empty)["params"]
        return ov.init_train_state(params, optimizer_of(row)), params

    def run(text: jax.Array, carry: Any, row: dict[str, Any], starts: jax.Array) -> Any:
        train_step = ov.make_train_step(
            objective.loss, optimizer_of(row), **objective.makers
        )

        def step(carry: Any, starts: jax.Array) -> tuple[Any, None]:
            state, average = carry
            windows = text[starts[:, None] + jnp.arange(CONTEXT + 1)[None]]
            state, _ = train_step(state, windows)
            average = optax.tree.add(
                optax.tree.scale(1 - row["newest"], average),
                optax.tree.scale(row["newest"], evaluated(state)),
            )
            return (state, average), None

        return jax.lax.scan(step, carry, starts)[0]

    def evaluated(state: Any) -> Any:
        return ov.eval_params(state.opt_state, state.params)

    def kept(carry: Any) -> list[jax.Array]:
        state, _ = carry
        return jax.tree.leaves((evaluated(state), _moments(state.opt_state)))

    def losses(windows: jax.Array, carry: Any) -> jax.Array:
        batches = windows.reshape(-1, WINDOWS_AT_ONCE, windows.shape[-1])
        levels = jnp.array([levels_of(b) for b in bits], jnp.float32)
        _, average = carry

        def loss(params: Any) -> jax.Array:
            return jnp.mean(jax.lax.map(lambda batch: loss_fn(params, batch), batches))

        def rounded(each: bool, levels: jax.Array) -> jax.Array:
            return loss(round_weights(average, levels, per_channel=each))

        of_bits = [
            jax.lax.map(functools.partial(rounded, each), levels)
            for each in (True, False)
        ]
        return jnp.concatenate([loss(average)[None], *of_bits])

    return fresh, run, kept, losses


def _in_turn(
    setting: dict[str, float], seeds: Sequence[int]
) -> Iterator[tuple[Any, list[int]]]:
    """Rows of one setting, one on each device, and their seeds."""
    size = jax.local_device_count()  # one network keeps a core busy
    for begin in range(0, len(seeds), size):
        some = list(seeds[begin : begin + size])
        rows: dict[str, np.ndarray] = {
            name: np.full(len(some), value, np.float32)
            for name, value in setting.items()
        }
        yield place(rows | {"seed": np.array(some, np.uint32)}, size), some


def _run(
    program: Program,
    text: np.ndarray,
    carry: Any,
    rows: Any,
    random: list[np.random.Generator],
    steps: int,
    gradients: int,
    progress: Progress,
) -> Any:
    if steps % STEPS_PER_CALL:
        raise ValueError(
            f"{steps} steps are no multiple of {STEPS_PER_CALL}: take a multiple of "
            f"{2 * STEPS_PER_CALL} gradients."
        )
    for _ in range(steps // STEPS_PER_CALL):
        shape = STEPS_PER_CALL, BATCH
        starts = np.array([r.integers(0, len(text) - CONTEXT, shape) for r in random])
        placed = place(starts, jax.local_device_count())
        carry = jax.block_until_ready(program.run(text, carry, rows, placed))
        progress.advance(len(random) * STEPS_PER_CALL * gradients)
    return carry


def _is_adam(state: Any) -> bool:
    return isinstance(state, optax.ScaleByAdamState)


def _moments(opt_state: Any) -> optax.ScaleByAdamState:
    return next(filter(_is_adam, jax.tree.leaves(opt_state, is_leaf=_is_adam)))
