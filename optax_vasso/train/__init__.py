"""A compiled train step, the examples of its gradients, and many devices.

:mod:`optax_vasso.train.checkpoint` needs Orbax, so it is imported by its full name.
"""

from __future__ import annotations

from optax_vasso.train.averages import average_over, synchronized
from optax_vasso.train.batches import microbatched, on_batch, part_of_batch
from optax_vasso.train.gradients import Inputs, functional, perturbed, whole_batch
from optax_vasso.train.local import init_local_state, make_local_train_step
from optax_vasso.train.mesh import fsdp_specs, shard_batch, shard_state, state_shardings
from optax_vasso.train.scanned import apart
from optax_vasso.train.signals import stop_signals
from optax_vasso.train.split import split_batch
from optax_vasso.train.step import TrainState, init_train_state, make_train_step

__all__ = [
    "Inputs",
    "TrainState",
    "apart",
    "average_over",
    "fsdp_specs",
    "functional",
    "init_local_state",
    "init_train_state",
    "make_local_train_step",
    "make_train_step",
    "microbatched",
    "on_batch",
    "part_of_batch",
    "perturbed",
    "shard_batch",
    "shard_state",
    "split_batch",
    "state_shardings",
    "stop_signals",
    "synchronized",
    "whole_batch",
]
