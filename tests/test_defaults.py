"""A default is a promise: with another one, the same program is another run."""

import inspect

import pytest

import optax_vasso as ov
from optax_vasso import sharpness
from optax_vasso.train import checkpoint

ON_DATA = {"axis": "data"}
MEASURED = {"p": 2}
SEARCHED = {"num_steps": 50, "num_restarts": 3}
# Of every public function beside the recipes: its defaults that are plain values.
DEFAULTS = {
    ov.ascent: {
        "asam_perturb": {"eta": 0.01},
        "fisher_perturb": {"eta": 1.0},
        "hold_rise": {"rise": 0.25},
        "per_layer": {"stacked": False},
        "sam_perturb": {"p": 2},
    },
    ov.descent: {},
    ov.factors: {"balanced": {"stacked": False}},
    ov.gate: {"adaptive": {"threshold": 0.0, "decay": 0.9}, "bernoulli": {"seed": 0}},
    ov.metrics: {
        "check_uphill": {"least": 0.0},
        "running_mean": {"decay": 0.99},
        "track": {"every": 1},
    },
    ov.train: {
        "fsdp_specs": ON_DATA,
        "init_local_state": ON_DATA,
        "make_local_train_step": ON_DATA | {"has_aux": False, "separate_keys": False},
        "make_train_step": {"has_aux": False, "separate_keys": False},
        "shard_batch": ON_DATA,
        "split_batch": {"share": 1 / 8},
    },
    checkpoint: {"checkpoints": {"keep": 2}},
    ov.wrappers: {"check_finite": {"max_consecutive": 20}},
    sharpness: {
        "ascent_sharpness": MEASURED,
        "average_sharpness": MEASURED | {"num_samples": 32},
        "eigenpairs": {"k": 1, "which": "largest"},
        "keskar_sharpness": SEARCHED | {"epsilon": 1e-3},
        "m_sharpness": MEASURED,
        "spectral_density": {"num_samples": 8, "num_matvecs": 64, "num_points": 1024},
        "trace": {"num_samples": 32},
        "worst_sharpness": MEASURED | SEARCHED,
    },
}


@pytest.mark.parametrize("module", DEFAULTS, ids=lambda module: module.__name__)
def test_defaults(module):
    names = getattr(module, "__all__", [n for n in vars(module) if n[0] != "_"])
    found = {}
    for name in names:
        function = getattr(module, name)
        own = inspect.isfunction(function) and function.__module__.startswith(
            "optax_vasso."
        )
        for parameter in inspect.signature(function).parameters.values() if own else ():
            if isinstance(parameter.default, bool | int | float | str):
                found.setdefault(name, {})[parameter.name] = parameter.default
    public = {
        n: d for n, d in found.items() if n in DEFAULTS[module] or _is_own(module, n)
    }
    assert public == DEFAULTS[module]


def _is_own(module, name):
    """Not what a module imports from others for its own use."""
    return hasattr(module, "__all__") or (
        getattr(module, name).__module__ == module.__name__
    )
