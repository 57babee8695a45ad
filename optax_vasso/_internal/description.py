"""The description of a saved state: configuration, types, and digests of arrays."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
FORMAT = 2  # of the description and of the checkpoint that it describes


def as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as it comes back from a file."""

    def plain(value: Any) -> Any:
        if isinstance(value, (np.generic, np.ndarray, jax.Array)):
            return value.tolist()
        raise TypeError(f"{type(value).__name__} is not a type of JSON")

    normalized: dict[str, Any] = {}
    for name, value in config.items():
        try:
            normalized |= json.loads(json.dumps({name: value}, default=plain))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"config[{name!r}] is {value!r}, which JSON cannot hold ({error}): "
                "give numbers, strings, booleans, None, lists or dictionaries of them."
            ) from error
    return normalized


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def sealed(description: dict[str, Any]) -> dict[str, Any]:
    """A description with a digest of its own."""
    sha256 = hashlib.sha256(_text(description).encode()).hexdigest()
    return {"description": description, "sha256": sha256}


def unsealed(found: dict[str, Any]) -> dict[str, Any]:
    """The description that was sealed; a ValueError or KeyError if it was changed."""
    description = found["description"]
    if found["sha256"] != sealed(description)["sha256"]:
        raise ValueError("its description was changed")
    return description


@jax.jit
def digest(leaf: jax.Array) -> jax.Array:
    """A uint32 of the bits of all entries and their positions, however it is sharded.

    The sum modulo 2³² does not depend on the order or the mesh. Each entry's bits pass
    through a one-to-one mixing (the finalizer of MurmurHash3): damage to one entry
    always changes the sum, other damage in all but one case in 2³².
    """
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    if leaf.dtype.itemsize == 8:
        words = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    elif jnp.issubdtype(leaf.dtype, jnp.floating):
        bits = f"uint{jnp.finfo(leaf.dtype).bits}"
        words = jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32)
    else:
        words = leaf.astype(jnp.uint32)
    position, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position += along * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(_mix(words + _mix(position)), dtype=jnp.uint32)


def _mix(bits: jax.Array) -> jax.Array:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


def digests(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """The digest of each array; all are dispatched before the first is read."""
    under_way = {name: digest(leaf) for name, leaf in arrays.items()}
    return {name: int(found) for name, found in under_way.items()}


def describe(state: PyTree, config: dict[str, Any]) -> dict[str, Any]:
    """A state without its values: the types of its nodes and arrays, and versions.

    Types are described by their names, since a class may move to another module.
    """
    tree = {}

    def note(path: Any, node: Any) -> bool:
        tree[f"state{jax.tree_util.keystr(path)}"] = type(node).__name__
        return False

    leaves = jax.tree.leaves_with_path(state, is_leaf=note, is_leaf_takes_path=True)
    for path, leaf in leaves:
        kind = f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
        tree[f"state{jax.tree_util.keystr(path)}"] = kind
    library = sys.modules["optax_vasso"].__version__
    return {"format": FORMAT, "library": library, "config": config, "tree": tree}


def check_same(found: Any, wanted: Any, folder: Any) -> None:
    """Raise a ValueError that says in what two descriptions differ."""
    if found.get("format") != FORMAT:
        raise ValueError(
            f"the checkpoint {folder} has format {found.get('format', 1)}, written by "
            f"optax_vasso {found.get('library', 'before 0.1.0')}, and optax_vasso "
            f"{wanted['library']} reads format {FORMAT}: finish the run with the "
            "version that wrote it, or choose another directory."
        )
    absent = "nothing"
    for part, what in (("config", "configuration"), ("tree", "state")):
        old, new = found[part], wanted[part]
        different = [
            f"{name}: {old.get(name, absent)} there, {new.get(name, absent)} here"
            for name in sorted(old.keys() | new.keys())
            if not _same(old.get(name, absent), new.get(name, absent))
        ]
        if different:
            shown = "; ".join(different[:5])
            more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
            raise ValueError(
                f"the checkpoint {folder} is of another {what} ({shown}{more}): use "
                "the same, or choose another directory."
            )


def _same(a: Any, b: Any) -> bool:
    return a == b or _text(a) == _text(b)  # 1 is 1.0, and NaN is NaN
