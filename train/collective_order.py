"""The order of collectives on CPUs, where each device takes independent ones as they come.

XLA:CPU runs what does not depend on each other at the same time, and a collective holds its thread
until all devices are there. The sum of what the loss counts does not depend on the layers, whose
loop has collectives of its own: one device waits in the sum, another in the loop, and both for ever
(the process is aborted after 40 seconds). Beside other work a test of eight devices met that end in
20 of 30 processes. What a program must not take in any order, it has to make depend on each other.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from train.plugs import Batch


def after(batch: Batch, counts: Any) -> Batch:
    """Returns the batch, on a CPU that plays several devices not before the counts are there.

    Elsewhere nothing is ordered, and the program has nothing of this.

    Args:
      batch: arrays.
      counts: numbers that are never negative, which no compiler knows.

    >>> batch = {"tokens": jnp.arange(3)}
    >>> after(batch, {"cross_entropy": jnp.float32(3)})["tokens"].tolist()
    [0, 1, 2]
    """
    if not several_here():
        return batch
    there = jnp.bool_(True)
    for number in jax.tree.leaves(counts):
        there &= (jnp.asarray(number) >= 0).all()
    return jax.tree.map(lambda leaf: jnp.where(there, leaf, jnp.zeros_like(leaf)), batch)


def several_here() -> bool:
    """Whether a program that is traced now is for several devices that one CPU plays."""
    mesh = jax.sharding.get_abstract_mesh()
    platform = None if mesh.empty else getattr(mesh.abstract_device, "platform", None)
    return jax.default_backend() == "cpu" and jax.device_count() > 1 and platform in (None, "cpu")
