"""The Python blocks of a page of the documentation, run in order as a reader would.

Pages about the trainers of others need packages that are in no list of dependencies
here: such a page is skipped where one of them is missing. What these packages warn of,
where they let arrays broadcast, and that some switch to float64 when they are imported,
is kept to the page.
"""

import ast
import contextlib
import functools
import importlib
import importlib.util
import os
import re
import warnings
from pathlib import Path

import jax
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when Keras is imported first
ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FOREIGN = {
    "flowjax",
    "gpjax",
    "haliax",
    "jaxopt",
    "keras",
    "levanter",
    "netket",
    "numpyro",
    "optimistix",
    "penzai",
}


def run(page):
    """Run a page; the names that its blocks define."""
    text = (ROOT / page).read_text()
    blocks = [
        (text.count("\n", 0, match.start()) + 1, match[1])
        for match in BLOCK.finditer(text)
    ]
    namespace = {"__name__": Path(page).stem}
    with contextlib.ExitStack() as stack:
        if foreign := foreign_imports("\n".join(source for _, source in blocks)):
            require(*foreign)
            stack.enter_context(others_at_home())
        for line, source in blocks:
            exec(compile("\n" * line + source, page, "exec"), namespace)
    return namespace


@functools.cache
def names_of(page):
    """As :func:`run`, once in a process: what a page registers, it registers once."""
    return run(page)


def foreign_imports(source):
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    return sorted(imported & FOREIGN)


def require(*packages):
    """Skip the test or the module if a package is missing; import the others."""
    for name in packages:
        if importlib.util.find_spec(name.split(".")[0]) is None:
            pytest.skip(f"needs {name}", allow_module_level=True)
    with others_at_home():
        modules = [importlib.import_module(name) for name in packages]
    return modules[0] if len(modules) == 1 else modules


@contextlib.contextmanager
def others_at_home():
    """What code of other projects may do that ours may not, and no longer after it."""
    x64 = jax.config.jax_enable_x64
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    jax.config.update("jax_enable_x64", x64)
