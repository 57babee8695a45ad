"""Curvature of parameters that are sharded over four devices: run as a program.

The number of host devices has to be set before JAX starts, so this cannot share the
process of the tests.
"""
# ruff: noqa: E402

import jax

jax.config.update("jax_num_cpu_devices", 4)

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_vasso import sharpness
from optax_vasso.sharpness.lanczos import mesh_of
from optax_vasso.sharpness.spectrum import _ritz_pairs


def loss_fn(params, batch):
    return jnp.mean(jnp.tanh(batch @ params["w"]) ** 2) + jnp.sum(params["b"] ** 4)


whole = {"w": jnp.linspace(-1, 1, 8192).reshape(8, 1024), "b": jnp.arange(3.0)}
batch = jnp.cos(jnp.arange(80.0)).reshape(10, 8)
specs = {"w": P(None, "x"), "b": P()}
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
shards = jax.tree.map(
    lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), whole, specs
)
curvatures = [sharpness.hessian(loss_fn, p, batch) for p in (shards, whole)]
found, expected = (
    sharpness.eigenpairs(c, p, k=3, num_matvecs=40)
    for c, p in zip(curvatures, (shards, whole), strict=True)
)
# In units of the largest, whose rounding all of them have.
np.testing.assert_allclose(
    found.values, expected.values, rtol=0, atol=1e-5 * float(expected.values[0])
)
assert found.vectors["w"].sharding.spec == P(None, None, "x")
assert found.vectors["w"].addressable_shards[0].data.shape == (3, 8, 256)
traces = [
    sharpness.trace(c, p, num_samples=4).mean
    for c, p in zip(curvatures, (shards, whole), strict=True)
]
np.testing.assert_allclose(*traces, rtol=1e-5)


# The Krylov basis, the largest array by far, is spread over the devices: a quarter
# each, of which XLA keeps two.
def temporary(params, curvature):
    args = curvature, params, jax.random.key(0), 40, 3, True, mesh_of(params)
    program = jax.jit(_ritz_pairs, static_argnums=(3, 4, 6)).lower(*args).compile()
    return program.memory_analysis().temp_size_in_bytes


assert temporary(shards, curvatures[0]) < 0.6 * temporary(whole, curvatures[1])

explicit = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
vector = jax.device_put(jnp.ones(8), NamedSharding(explicit, P("x")))
with pytest.raises(ValueError, match="mesh of Auto axes"):
    sharpness.eigenpairs(lambda v: v, vector)
print("sharded")
