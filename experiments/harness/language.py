"""Training of language models, every hyperparameter a traced number.

The learning rate of every method warms up over a twentieth of the run's own steps and
falls to 0 along a half cosine.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_vasso as ov
from experiments.harness.language_methods import Method, whole
from experiments.harness.methods import Hyperparameters
from experiments.harness.progress import Progress
from experiments.harness.rows import over_rows, place
from experiments.harness.transformer import Transformer
from experiments.tasks.corpus import Corpus, evenly_spaced_windows

CONTEXT = 32
BATCH = 8
STEPS_PER_CALL = 50
EVALUATION_WINDOWS = 1024


class Trained(NamedTuple):
    """What came of some trainings: (trainings,), losses in nats per character.

    Attributes:
      validation: on the validation files.
      test: on the test files; ``None`` unless it was asked for.
      training: on some of the training text; like ``test``.
      gradients: as counted.
    """

    validation: np.ndarray
    test: np.ndarray | None
    training: np.ndarray | None
    gradients: np.ndarray


def schedule(hyperparameters: Hyperparameters, steps: Any, step: jax.Array) -> Any:
    """The learning rate of a step of ``steps``, which may be traced."""
    warmup = steps / 20
    gone = jnp.clip((step - warmup) / (steps - warmup), 0.0, 1.0)
    falling = 0.5 * (1 + jnp.cos(jnp.pi * gone))
    return hyperparameters["learning_rate"] * jnp.minimum(step / warmup, falling)


def train(
    corpus: Corpus,
    model: Transformer,
    method: Method,
    hyperparameters: Sequence[Hyperparameters],
    seeds: Sequence[int],
    *,
    calls: int,
    test: bool = False,
    progress: Progress,
) -> Trained:
    """Train one network for each pair of hyperparameters and seed.

    Args:
      corpus: the text.
      model: the network.
      method: the optimizer; all trainings have the same one.
      hyperparameters: one for each training, by the names of ``method.space``.
      seeds: one for each training: it draws initialization and batches.
      calls: length of all trainings, in units of ``STEPS_PER_CALL``.
      test: evaluate on the other files too; a search must not.
      progress: advanced by the gradients that were taken.
    """
    start, run, losses = _program(method, model)
    size = jax.local_device_count()  # one network keeps a core busy
    splits = ("validation", "test", "training") if test else ("validation",)
    windows = {
        split: evenly_spaced_windows(
            corpus.text[split], EVALUATION_WINDOWS, CONTEXT + 1
        )
        for split in splits
    }
    text = jnp.asarray(corpus.text["training"], jnp.int32)
    found: list[dict[str, np.ndarray]] = []
    for begin in range(0, len(seeds), size):
        some = seeds[begin : begin + size]
        points = hyperparameters[begin : begin + size]
        rows = place(
            {
                "hyperparameters": {
                    name: np.array([h[name] for h in points], np.float32)
                    for name in method.space
                },
                "seed": np.array(some, np.uint32),
                "steps": np.full(len(some), calls * STEPS_PER_CALL, np.float32),
            },
            size,
        )
        random = [np.random.default_rng([seed, 1]) for seed in some]
        carry = jax.block_until_ready(start(rows))
        for _ in range(calls):
            drawn = [
                r.integers(0, len(text) - CONTEXT, (STEPS_PER_CALL, BATCH))
                for r in random
            ]
            carry = run(text, carry, rows, place(np.array(drawn), size))
            jax.block_until_ready(carry)
            progress.advance(len(some) * STEPS_PER_CALL * method.gradients)
        result = {split: losses(windows[split], carry) for split in splits}
        result["gradients"] = carry[1]
        found.append(
            {name: np.asarray(value)[: len(some)] for name, value in result.items()}
        )
    merged = {key: np.concatenate([part[key] for part in found]) for key in found[0]}
    return Trained(
        validation=merged["validation"],
        test=merged.get("test"),
        training=merged.get("training"),
        gradients=merged["gradients"],
    )


@functools.cache
def _program(method: Method, model: Transformer) -> tuple[Callable[..., Any], ...]:
    """Compiled functions of rows: start, run and losses."""
    objective, loss = method.objective(model), whole(model).loss

    def optimizer_of(row: dict[str, Any]) -> optax.GradientTransformation:
        chosen = row["hyperparameters"]
        of_step = functools.partial(schedule, chosen, row["steps"])
        return method.make(of_step, chosen, row["seed"])

    def start(row: dict[str, Any]) -> Any:
        empty = jnp.zeros((1, CONTEXT), jnp.int32)
        params = model.init(jax.random.key(row["seed"]), empty)["params"]
        return ov.init_train_state(params, optimizer_of(row)), jnp.zeros(())

    def run(text: jax.Array, carry: Any, row: dict[str, Any], starts: jax.Array) -> Any:
        train_step = ov.make_train_step(
            objective.loss, optimizer_of(row), **objective.makers
        )

        def step(carry: Any, starts: jax.Array) -> tuple[Any, None]:
            state, gradients = carry
            windows = text[starts[:, None] + jnp.arange(CONTEXT + 1)[None]]
            state, metrics = train_step(state, windows)
            # Two parts of a batch are one gradient of it.
            second = jnp.asarray(metrics.get("ascended", False))
            second &= "ascent_gradient" not in objective.makers
            return (state, gradients + 1 + second), None

        return jax.lax.scan(step, carry, starts)[0]

    def losses(windows: jax.Array, carry: Any) -> jax.Array:
        state, _ = carry
        params = ov.eval_params(state.opt_state, state.params)
        batches = windows.reshape(-1, BATCH, CONTEXT + 1)
        return jnp.mean(jax.lax.map(lambda batch: loss(params, batch), batches))

    return (
        over_rows(start),
        over_rows(run, shared=1, donate_argnums=1),
        over_rows(losses, shared=1),
    )
