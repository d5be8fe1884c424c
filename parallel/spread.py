"""Work on a batch of small problems, shared out over all devices of the mesh."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


def spread(fn: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Returns `fn(*arrays)`, each device of the current mesh having done its share of the rows.

    For what the compiler cannot divide by itself, such as batched eigenvalue problems: the roots of
    distributed Shampoo (Anil et al., arXiv 2002.09018; Shi et al., arXiv 2309.06497). One
    all-gather brings the rows together. Without a mesh (`jax.set_mesh`), or inside a `shard_map`
    over all of it, it is `fn` itself.

    Args:
      fn: maps arrays [N, ...] row by row to one array [N, ...], for any N.
      arrays: with the same N; the last share is filled up with copies of the first row.

    >>> spread(lambda x: x * 2, jnp.arange(3.0)).tolist()
    [0.0, 2.0, 4.0]
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = [a for a, n in mesh.shape.items() if a not in mesh.manual_axes and n > 1]
    devices = math.prod(mesh.shape[axis] for axis in free)
    if devices == 1:
        return fn(*arrays)
    rows = arrays[0].shape[0]
    filling = -rows % devices
    if filling:
        arrays = tuple(
            jnp.concatenate([a, jnp.broadcast_to(a[:1], (filling, *a.shape[1:]))]) for a in arrays
        )
    shared = jax.shard_map(
        fn, in_specs=P(tuple(free)), out_specs=P(tuple(free)), axis_names=set(free)
    )(*arrays)
    return jax.lax.with_sharding_constraint(shared[:rows] if filling else shared, P())
