"""Mutants that compute the same, each with its reason: (file, old lines, new lines)."""

EQUIVALENT = {
    (
        "sharpness/programs.py",
        "ends[-1].atexit = False",
        "ends[-1].atexit = True",
    ): "programs are let go when the process ends, called for or not",
    (
        "_internal/numerics.py",
        "parts = [leaf.real, leaf.imag] if jnp.iscomplexobj(leaf) else [leaf]",
        "parts = ([leaf.real, leaf.imag])",
    ): "the imaginary part of a real leaf is zero",
    (
        "gate.py",
        "default = jax.random.key_data(jax.random.key(0)).shape",
        "default = jax.random.key_data(jax.random.key(1)).shape",
    ): "all keys of one kind have one shape",
    (
        "descent.py",
        "norm = numerics.norm(clean_grads)",
        "norm = numerics.norm(updates)",
    ): "on a step that did not ascend they are one, and on others nobody asks",
    (
        "steps/one_gradient.py",
        "one = float(rho is None)",
        "one = 1.0",
    ): "a scale and a norm of a direction that is zero until the first step",
    (
        "_internal/numerics.py",
        "dtype = scalars[0].dtype",
        "dtype = scalars[1].dtype",
    ): "all three have one dtype",
    (
        "train/step.py",
        "if is_on_host:",
        "if True:",
    ): "each leaf is moved to where it is",
    (
        "sharpness/batches.py",
        "data = jax.tree.map(jnp.asarray, data)",
        "data = (data)",
    ): "NumPy cuts the data as JAX does, and the measures take either",
    (
        "steps/one_gradient.py",
        "return target.astype(jnp.result_type(param)), direction, rounding",
        "return (target), direction, rounding",
    ): "a parameter of 32 bits or more has the dtype of its perturbation",
    (
        "train/averages.py",
        "at._replace(params=params, key=key, clean=clean)",
        "at._replace(params=params, key=key)",
    ): "nothing is differentiated at the clean parameters",
    (
        "recipes.py",
        "ascent = optax.chain(optax.scale(-1.0), carried_ema(theta))",
        "ascent = optax.chain(optax.scale(-2.0), carried_ema(theta))",
    ): "a direction has no length",
}
