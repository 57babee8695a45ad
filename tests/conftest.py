"""No silent broadcasts anywhere, what ``--all`` adds, fixtures of several files."""

import gc
import os

import jax
import pytest
import quick
from hypothesis import settings

# Most of a test's time is compilation, and most of that LLVM's optimization of programs
# that run for milliseconds. Set the variable to 0 to test what users run; .ci/run does
# so for the tests of numerics, of memory and of the authors' trajectories.
OPTIMIZATIONS = "JAX_DISABLE_MOST_OPTIMIZATIONS"
if OPTIMIZATIONS not in os.environ:
    os.environ[OPTIMIZATIONS] = "1"  # for the programs that tests start
    jax.config.update("jax_disable_most_optimizations", True)

# What programs print is compared with what they should, and XLA's log is not of it.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"  # JAX's default

# A vector that meets a matrix unasked is a bug here.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes the first example slow, whatever the test does; the same examples
# every time make a failure repeatable.
settings.register_profile("suite", deadline=None, max_examples=25, derandomize=True)
# On request, with --hypothesis-profile=thorough: other examples every time, and of each
# property in test_properties.py 10,000.
settings.register_profile("thorough", deadline=None, max_examples=834, print_blob=True)
settings.load_profile("suite")


def pytest_addoption(parser):
    parser.addoption(
        "--all",
        action="store_true",
        help="also the products of parameters that cases.py leaves to the night, and "
        "programs as XLA emits them by default",
    )


def pytest_configure(config):
    marker = "exhaustive: one more case of a kind that is tested; runs with --all"
    config.addinivalue_line("markers", marker)
    if os.environ[OPTIMIZATIONS] != "0" and not config.getoption("all"):
        # Read when the first program is compiled, also by programs that tests start.
        known = os.environ.get("XLA_FLAGS", "").split()
        new = [flag for flag in quick.FLAGS if flag not in known]
        os.environ["XLA_FLAGS"] = " ".join([*known, *new])
        quick.share_context()


def pytest_collection_modifyitems(config, items):
    if config.getoption("all"):
        return
    left = [item for item in items if item.get_closest_marker("exhaustive")]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


@pytest.fixture(autouse=True, scope="module")
def young():
    """What is there before a module of tests, the collector does not look through.

    Most of it are programs, millions of objects, which stay to the end.
    """
    gc.freeze()


@pytest.fixture
def x64():
    """Compute in float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict():
    """Forbid implicit promotion between dtypes: for tests that run our code alone.

    Not everywhere, since Optax's own Adam relies on promotion.
    """
    with jax.numpy_dtype_promotion("strict"):
        yield
