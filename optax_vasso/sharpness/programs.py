"""Compiled measures that live no longer than the functions that they measure.

A loss is usually a closure over its data. :func:`jax.jit` keeps every function that a
:class:`jax.tree_util.Partial` brings into a program, and with it the data, so a common
cache would free nothing. Here each loss has its own programs, which hold no reference
to it and are freed with it.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import Partial

PyTree = Any
# What is kept for each combination of functions, by their identities.
_kept: dict[tuple[Any, ...], dict[Any, Any]] = {}
# A Partial wraps a functools.partial in a new object of this type each time.
_Shim = type(Partial(functools.partial(len)).func)


class WeakFunction:
    """A function that is compared by identity, and called but not kept alive.

    Of a bound method, which Python creates anew each time, the object counts. An owner
    without weak references is kept.
    """

    def __init__(self, function: Callable[..., Any]):
        if isinstance(function, _Shim):
            function = getattr(function, "fun", function)
        owner: Any = function
        self.method: Any = None
        if isinstance(function, types.MethodType):
            owner, self.method = function.__self__, function.__func__
        self.identity = (id(owner), id(self.method))
        self.owner: Callable[[], Any]
        try:
            self.owner = weakref.ref(owner)
        except TypeError:
            self.owner = lambda: owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, which the program's caller still holds."""
        function = self.owner()
        if self.method is not None:
            function = types.MethodType(self.method, function)
        return function(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WeakFunction) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


def weakened(tree: PyTree) -> tuple[PyTree, list[WeakFunction]]:
    """The tree with weak functions in its Partials, and these functions."""
    found: list[WeakFunction] = []

    def weaken(node: Any) -> Any:
        if not isinstance(node, Partial):
            return node
        function = node.func
        if not isinstance(function, WeakFunction):
            function = WeakFunction(function)
        found.append(function)
        args, keywords = weaken_all((node.args, node.keywords))
        return Partial(function, *args, **keywords)

    def weaken_all(tree: PyTree) -> PyTree:
        return jax.tree.map(weaken, tree, is_leaf=lambda n: isinstance(n, Partial))

    return weaken_all(tree), found


def kept_with(functions: list[WeakFunction]) -> dict[Any, Any]:
    """A dictionary that lives as long as all of the functions."""
    key = tuple(function.identity for function in functions)
    if key not in _kept:
        _kept[key] = {}
        ends: list[Any] = []

        def end() -> None:
            _kept.pop(key, None)
            for other in ends:
                other.detach()

        for function in functions:
            if isinstance(function.owner, weakref.ref):
                ends.append(weakref.finalize(function.owner(), end))
                ends[-1].atexit = False
    return _kept[key]


def compiled(
    function: Callable[..., Any] | None = None,
    *,
    static_argnames: str | tuple[str, ...] = (),
) -> Any:
    """:func:`jax.jit` of a function whose arguments hold other functions in Partials.

    The jitted function compiles once for these, as long as they live.
    """
    if function is None:
        return functools.partial(compiled, static_argnames=static_argnames)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        (weak_args, weak_kwargs), functions = weakened((args, kwargs))
        kept = kept_with(functions)
        if call not in kept:
            # A new function, since JAX caches programs by the function.
            own = functools.wraps(function)(lambda *a, **k: function(*a, **k))
            kept[call] = jax.jit(own, static_argnames=static_argnames)
        return kept[call](*weak_args, **weak_kwargs)

    return call
