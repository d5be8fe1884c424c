"""Batches of matrices that LAPACK factorizes, on a CPU one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def one_by_one(fn: Callable[..., Any], *batches: jax.Array) -> Any:
    """Returns `fn` of each matrix of a batch; whoever calls LAPACK on a batch does it through here.

    On a CPU, LAPACK on a batch (`eigh`, `qr`, `svd`, `cholesky`, a triangular solve) hands its
    matrices to the very threads that run the program, and the thread that called it waits for them.
    Two such calls that stand side by side in a program take both threads of two cores, and then all
    wait for ever; in jaxlib 0.10.2 the update of SOAP did so after ten or twenty steps. One matrix
    is factorized by the thread that calls. Elsewhere the batch is done at once. It stays so under
    `jax.vmap`, which makes batches of its own.

    Args:
      fn: maps matrices to an array or a tree of them.
      batches: [..., m, n], all with the same leading axes, of which there may be none.

    Returns:
      The results, with those leading axes.

    >>> A = jnp.stack([jnp.eye(2), 4 * jnp.eye(2)])
    >>> one_by_one(jnp.linalg.cholesky, A)[:, 0, 0].tolist()
    [1.0, 2.0]
    """
    shape = batches[0].shape[:-2]
    each = custom_vmap(lambda *one: fn(*one))  # without what else `fn` could be given

    @each.def_vmap
    def batched(axis_size, in_batched, *arrays):
        """In a loop on a CPU, at once elsewhere."""
        arrays = tuple(
            a if there else jnp.broadcast_to(a, (axis_size, *a.shape))
            for a, there in zip(arrays, in_batched, strict=True)
        )
        results = jax.lax.platform_dependent(
            *arrays,
            cpu=lambda *a: jax.lax.map(lambda one: each(*one), a),
            default=lambda *a: jax.vmap(fn)(*a),
        )
        return results, jax.tree.map(lambda _: True, results)

    if not shape:
        return each(*batches)
    flat = (b.reshape(-1, *b.shape[-2:]) for b in batches)
    return jax.tree.map(lambda r: r.reshape(*shape, *r.shape[1:]), jax.vmap(each)(*flat))
