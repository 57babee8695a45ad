"""Errors that are easy to make and hard to see: (file, old text, new text).

The old text occurs once in the file; where it has moved on, the mutant is reported as
not applicable.
"""

SAMPA = "steps/side_by_side.py"
LAGGED = "steps/one_gradient.py"
TWO = "steps/two_gradients.py"
STEP = "train/step.py"
LOCAL = "train/local.py"
AVERAGES = "train/averages.py"
SAVED = "train/checkpoint.py"
WRAPPERS = "wrappers.py"
TRACKING = "metrics/tracking.py"
SMOOTHING = "ascent/smoothing.py"
DESCENT = "descent.py"
NUMERICS = "_internal/numerics.py"
DESCRIBED = "_internal/description.py"

BY_HAND = [
    # Two gradients that do not wait for each other.
    (
        SAMPA,
        "gradient = optax.tree.zeros_like(params)",
        "gradient = optax.tree.ones_like(params)",
    ),
    (SAMPA, "add_scaled(clean, -rate,", "add_scaled(params, -rate,"),
    (SAMPA, "step = optax.safe_increment(state.step)", "step = state.step"),
    (SAMPA, "value_at(lmbda, state.step)", "value_at(lmbda, state.step + 1)"),
    (
        SAMPA,
        "value_at(learning_rate, state.step)",
        "value_at(learning_rate, state.step + 1)",
    ),
    (SAMPA, "rho: Hyperparameter = 0.1,", "rho: Hyperparameter = 0.05,"),
    (SAMPA, "lmbda: Hyperparameter = 0.2,", "lmbda: Hyperparameter = 0.3,"),
    (
        SAMPA,
        'check_not_negative("learning_rate", learning_rate)',
        'check_not_negative("learning_rate", 0.0)',
    ),
    (SAMPA, "lambda v: 0 <= v <= 1)", "lambda v: 0 < v <= 1)"),
    (SAMPA, '"in [0, 1]", lambda v: 0 <= v <= 1)', '"in [0, 1]", lambda v: 0 <= v)'),
    (SAMPA, "numerics.cast_like(gradient, state.gradient),", "gradient,"),
    (SAMPA, "numerics.finite_or(new, old) if moves", "new if moves"),
    (SAMPA, "grad_fn=lambda _: gradient)", "grad_fn=lambda _: mixed)"),
    # One gradient per step.
    (LAGGED, "one = float(rho is None)", "one = 1.0"),
    (LAGGED, "direction=last, grad_fn=grad_fn)", "direction=before, grad_fn=grad_fn)"),
    (
        LAGGED,
        "            point,\n            **passing(extra_args, direction",
        "            params,\n            **passing(extra_args, direction",
    ),
    (
        LAGGED,
        "            point,\n            **passing(extra_args, perturbation",
        "            params,\n            **passing(extra_args, perturbation",
    ),
    (LAGGED, "perturbation=before, ascended", "perturbation=output, ascended"),
    (LAGGED, "value_at(rho, state.step)", "value_at(rho, state.step + 1)"),
    (LAGGED, "numerics.finite_or(d, old)", "d"),
    (
        LAGGED,
        "numerics.finite_or(d, old)",
        "numerics.finite_or(d, jnp.zeros_like(old))",
    ),
    (LAGGED, "new, direction + (there - target), None", "new, direction, None"),
    (
        LAGGED,
        "return new, direction, there - target",
        "return new, direction, target - there",
    ),
    (LAGGED, "return new, _scaled(kept, last), rounding", "return new, last, rounding"),
    (LAGGED, "last_scale / jnp.where(scale == 0, 1, scale)", "last_scale / scale"),
    (LAGGED, '{"direction", "scale"} <= fields.keys()', '"direction" in fields'),
    (LAGGED, "if moves or numerics.has_few_bits(param):", "if moves:"),
    # Two gradients per step.
    (TWO, "scale(1 / ascent_steps, parts)", "scale(1.0, parts)"),
    (TWO, "range(ascent_steps - 1)", "range(ascent_steps)"),
    (TWO, '"grads": updates, "params": params}', '"grads": updates}'),
    (TWO, "found = jnp.where(ascended, value, jnp.nan)", "found = value"),
    (TWO, "clean_grads=updates,", "clean_grads=descent,"),
    (
        TWO,
        "if ascent_steps == 1 else total,\n            ),",
        "if ascent_steps >= 1 else total,\n            ),",
    ),
    (NUMERICS, "None if x is None else jnp.asarray(u, jnp.result_type(x))", "u"),
    (TWO, "if is_whole else None", "if True else None"),
    (TWO, "else first\n", "else optax.tree.zeros_like(first)\n"),
    # The train step.
    (STEP, "step=optax.safe_increment(state.step),", "step=state.step + 1.0,"),
    (STEP, "fold_in(state.key, state.step)", "fold_in(state.key, 0)"),
    (
        STEP,
        "key, perturbed_key = jax.random.split(key)",
        "key, perturbed_key = key, jax.random.split(key)[1]",
    ),
    (
        STEP,
        "moved = at._replace(params=params, key=perturbed_key)",
        "moved = at._replace(key=perturbed_key)",
    ),
    (STEP, "key=perturbed_key, clean=at.params)", "clean=at.params)"),
    (STEP, "key=perturbed_key, clean=at.params)", "key=perturbed_key)"),
    (STEP, "clear_metrics(state.opt_state)", "state.opt_state"),
    (STEP, "optax.tree.conj(grads)", "grads"),
    (
        STEP,
        '"finite"], model_state, state.model_state',
        '"finite"], state.model_state, state.model_state',
    ),
    (
        STEP,
        "loss, grads = loss_scale.unscale((loss, grads))",
        "_, grads = loss_scale.unscale((loss, grads))",
    ),
    (STEP, "donate_argnums=0, out_shardings", "out_shardings"),
    (
        STEP,
        "if ascent_gradient is None:\n                ours",
        "if True:\n                ours",
    ),
    # Local ascents.
    (
        AVERAGES,
        "key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))",
        "key = jax.random.fold_in(key, 0)",
    ),
    (AVERAGES, '("clean_grads", "grad", "value")', '("clean_grads", "grad")'),
    (AVERAGES, '("clean_grads", "grad", "value")', '("grad", "value")'),
    (AVERAGES, "return value, jax.lax.pmean(grads, axis_name)", "return value, grads"),
    (
        AVERAGES,
        "mean_of_floats((loss, model_state), axis_name)",
        "mean_of_floats(loss, axis_name), model_state",
    ),
    (
        AVERAGES,
        "at._replace(params=params, key=key, clean=clean)",
        "at._replace(key=key, clean=clean)",
    ),
    (
        AVERAGES,
        "lambda axes, _, cotangents: (jax.lax.pmean(cotangents, axes),)",
        "lambda axes, _, cotangents: (cotangents,)",
    ),
    (LOCAL, '({"aux": aux} if has_aux else {})', '{"aux": aux}'),
    (
        LOCAL,
        "lambda leaf: mean_of_floats(leaf, axis), state.opt_state",
        "lambda leaf: leaf, state.opt_state",
    ),
    (LOCAL, "separate_keys=separate_keys,\n", "\n"),
    (LOCAL, "axis_name=axis,\n    )", ")"),
    (
        LOCAL,
        "ascent_gradient and local_gradient(axis, ascent_gradient)",
        "ascent_gradient",
    ),
    (LOCAL, "if mesh.shape[axis] != groups:", "if mesh.shape[axis] < groups:"),
    # Gates.
    ("gate.py", "(ratio >= bound) | is_extreme", "(ratio > bound) | is_extreme"),
    ("gate.py", "if axes:  # a local", "if False:  # a local"),
    ("gate.py", "jax.lax.pmax(value, axis_name)", "value"),
    ("gate.py", "newest > 10 * usual", "newest >= 10 * usual"),
    (
        "gate.py",
        "jnp.where(is_extreme, 2 * usual, newest)",
        "jnp.where(is_extreme, usual, newest)",
    ),
    ("gate.py", "jnp.minimum(variance, 1e24)", "variance"),
    ("gate.py", "lambda step: step >= n", "lambda step: step > n"),
    ("gate.py", "jax.random.bernoulli(draw,", "jax.random.bernoulli(key,"),
    ("gate.py", "lambda v: 0 <= v < 1", "lambda v: 0 < v < 1"),
    ("gate.py", "jnp.copy(key)", "key"),
    # Guards and recipes.
    ("ascent/radius.py", "params, value=value, **extra_args", "params, **extra_args"),
    (
        "recipes.py",
        "chain(optax.scale(-1.0), carried_ema(theta))",
        "chain(carried_ema(theta))",
    ),
    (
        "recipes.py",
        "lambda v: 0 <= v < 1)\n\n    def theta",
        "lambda v: 0 <= v <= 1)\n\n    def theta",
    ),
    ("recipes.py", "(1 - decay ** (step + 1)", "(1 - decay ** (step + 2)"),
    # Checkpoints.
    (DESCRIBED, "_mix(words + _mix(position))", "_mix(words)"),
    (DESCRIBED, "_mix(words + _mix(position))", "words + _mix(position)"),
    (DESCRIBED, "return a == b or _text(a) == _text(b)", "return a == b"),
    (DESCRIBED, "json.dumps(value, sort_keys=True)", "json.dumps(value)"),
    (DESCRIBED, "old.keys() | new.keys()", "old.keys()"),
    (SAVED, "[:-keep]", "[: -keep - 1]"),
    (SAVED, "[:-keep]", "[:-1]"),
    (SAVED, "number = max(step, newest() + 1)", "number = step"),
    (SAVED, "if _whole(folder) - damaged:", "if _whole(folder):"),
    (
        SAVED,
        "        set_aside()\n        for number in sorted",
        "        for number in sorted",
    ),
    (SAVED, "                    path.rmtree()", "                    pass"),
    (SAVED, "found[name] != described", "found[name] < described"),
    (
        SAVED,
        "            damaged.clear()\n\n    def restore",
        "            pass\n\n    def restore",
    ),
    (SAVED, "        damaged.clear()\n        reasons", "        reasons"),
    (SAVED, "damaged.add(number)", "damaged.add(number + 1)"),
    (SAVED, "{number}{_UNFINISHED}.old", "{number}.old"),
    (SAVED, "            if unlock:\n                unlock()", "            pass"),
    (SAVED, 'check_integer("keep", keep, 1)', 'check_integer("keep", keep, 0)'),
    # Wrappers and metrics.
    (WRAPPERS, "jax.tree.map(jnp.array, loss_scale)", "loss_scale"),
    (
        WRAPPERS,
        '(with_synonyms(extra_args).get("value"), updates, new_updates)',
        "(updates, new_updates)",
    ),
    (WRAPPERS, ") & all_finite(optimizer_state, state.optimizer_state)", ")"),
    (WRAPPERS, "finite | ~jnp.isfinite(*old) if old else finite", "finite"),
    (WRAPPERS, "finite & (new.total == old.total)", "finite"),
    (WRAPPERS, "finite & (new.total == old.total)", "new.total == old.total"),
    (
        WRAPPERS,
        "consecutive=(state.consecutive + 1) * skipped",
        "consecutive=state.consecutive + skipped",
    ),
    (
        WRAPPERS,
        "if consecutive > max_consecutive:",
        "if consecutive >= max_consecutive:",
    ),
    (WRAPPERS, "axes) == 1 if axes else finite", "axes) == 1 if False else finite"),
    (
        WRAPPERS,
        "_widen(updates), state, _widen(params)",
        "updates, state, _widen(params)",
    ),
    (WRAPPERS, "optimizer.init(_widen(params))", "optimizer.init(params)"),
    (TRACKING, "jnp.where(is_finite, decay, 1)", "decay"),
    (TRACKING, "total / jnp.where(weight == 0, 1, weight)", "total"),
    (
        TRACKING,
        "kept=() if every == 1 else values",
        "kept=() if every == 1 else state.kept",
    ),
    (
        TRACKING,
        "grads = updates if clean_grads is None else clean_grads",
        "grads = updates",
    ),
    (TRACKING, "jnp.where(ascended, v, jnp.zeros_like(v))", "v"),
    ("metrics/arrival.py", "if slope < least:", "if slope <= least:"),
    ("metrics/arrival.py", "1 + missing /", "1 - missing /"),
    (
        "metrics/arrival.py",
        "dot(perturbation_of(optimizer_state), following)",
        "dot(perturbation_of(optimizer_state), params)",
    ),
    # Directions and perturbations.
    (
        SMOOTHING,
        "return weight / jnp.where(first & (weight != 0), weight, 1.0)",
        "return weight / jnp.where(first, weight, 1.0)",
    ),
    (
        SMOOTHING,
        "_combine(weight, numerics.finite_or(g, d), 1 - weight, d)",
        "_combine(weight, g, 1 - weight, d)",
    ),
    (
        SMOOTHING,
        "_saturated(_combine(1.0, g, share, m), g)",
        "_combine(1.0, g, share, m).astype(g.dtype)",
    ),
    (SMOOTHING, "if info.nexp < 8:", "if info.nexp <= 8:"),
    (
        SMOOTHING,
        "jnp.where(jnp.isfinite(like), jnp.clip(wide, -most, most), wide)",
        "jnp.clip(wide, -most, most)",
    ),
    (SMOOTHING, "twin if jnp.iscomplexobj(x) else dtype", "dtype"),
    (SMOOTHING, "1.0 - value_at(lmbda, step)", "value_at(lmbda, step)"),
    ("ascent/perturb.py", "lambda v: v > 1)", "lambda v: v >= 1)"),
    (
        "ascent/perturb.py",
        "value_at(eta, step), dtype)\n\n        # No entry",
        "value_at(eta, 0), dtype)\n\n        # No entry",
    ),
    (
        "ascent/perturb.py",
        "unit = numerics.scale_to_one(updates)",
        "unit = numerics.widen_tree(updates)",
    ),
    (
        "ascent/perturb.py",
        "1 / jnp.hypot(jnp.ones((), dtype), root",
        "1 / jnp.hypot(jnp.zeros((), dtype) + 0.5, root",
    ),
    # Descents.
    (DESCENT, "s if moves else jnp.zeros_like(s)", "s"),
    (
        DESCENT,
        "norm = numerics.norm(clean_grads)",
        "norm = numerics.norm(updates)",
    ),
    (DESCENT, "numerics.cast_like(orthogonal, state.orthogonal)", "orthogonal"),
    (
        DESCENT,
        "numerics.orthogonal_to(clean, perturbed)",
        "numerics.orthogonal_to(perturbed, clean)",
    ),
    (
        DESCENT,
        "            clean_grads=clean_grads,\n            **extra_args",
        "            **extra_args",
    ),
    # Norms and products.
    (
        NUMERICS,
        "map_updates(jnp.subtract, *map(widen_tree, (a, b)))",
        "map_updates(jnp.subtract, a, b)",
    ),
    (
        NUMERICS,
        "norm = jnp.minimum(root / factor, jnp.finfo(root.dtype).max)",
        "norm = root / factor",
    ),
    (NUMERICS, "leaf * inverse * inverse", "leaf * (inverse * inverse)"),
    (NUMERICS, "leaf * factor * scale", "leaf * (factor * scale)"),
    (NUMERICS, "2.0 ** (info.minexp + 66)", "2.0 ** (info.minexp + 24)"),
    (NUMERICS, "jnp.real(jnp.conj(x) * y)", "jnp.real(x * y)"),
    (
        NUMERICS,
        "jnp.clip(inner / _nonzero(root_a) / _nonzero(root_b), -1, 1)",
        "inner / _nonzero(root_a) / _nonzero(root_b)",
    ),
    (
        NUMERICS,
        "jnp.where(root == 0, 0, jnp.asarray(length, root.dtype))",
        "jnp.asarray(length, root.dtype)",
    ),
    (NUMERICS, "jnp.isfinite(newest.astype(old.dtype))", "jnp.isfinite(newest)"),
]
