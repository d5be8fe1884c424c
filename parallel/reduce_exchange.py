"""Sum by two exchanges of codes: all-to-all, then all-gather, as a ring all-reduce does by halves.

    error-corrected gradient --encode--> all-to-all --decode, sum--> own slice
    own slice + its error    --encode--> all-gather --decode-------> the whole sum

Every worker sums the slice of the vector that is its own, so each value crosses the wire twice,
encoded both times, whatever the number of workers; and both losses are kept and added to what is
sent next (error feedback, Karimireddy et al. 2019, arXiv:1901.09847; both sides of the exchange as
in Tang et al. 2019, arXiv:1905.05957).

Shapes: n values of the gradient laid end to end and padded, W workers, S = n / W of a slice.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from parallel.reduce import (
    Carry,
    Reduce,
    accumulator,
    all_gather_bytes,
    all_to_all_bytes,
    spread_error,
    zero_error,
)

PyTree = Any


class VectorCodec(Protocol):
    """An encoder of vectors, as `compress.gradients` makes them."""

    @property
    def multiple(self) -> int:
        """What the length of a vector must be a multiple of."""

    def encode(self, x: jax.Array, key: jax.Array) -> PyTree:
        """Returns the code of x [S]."""

    def decode(self, code: PyTree) -> jax.Array:
        """Returns float32 [S]."""

    def code_bytes(self, size: int) -> int:
        """Bytes of the code of S values."""


def exchange_reduce(codec: VectorCodec, axis: str = "data") -> Reduce:
    """Returns the reduce that sends codes.

    All leaves are laid end to end and sent as one vector; a leaf that other mesh axes shard is
    gathered over them for that.

    Args:
      codec: encodes and decodes a vector.
      axis: the mesh axis of the workers.
    """

    def init(params: PyTree, workers: int) -> Carry:
        size = _padded(_size(params), workers, codec.multiple) // workers
        slice_error = jnp.zeros(size, _dtype(params))
        return Carry({"error": zero_error(params), "slice_error": slice_error}, {})

    def apply(grads: PyTree, carry: Carry, key: jax.Array) -> tuple[PyTree, Carry]:
        workers, me = lax.axis_size(axis), lax.axis_index(axis)
        dtype = _dtype(grads)
        # A worker draws for itself: equal draws would add up instead of averaging out.
        key, slice_key = jax.random.split(jax.random.fold_in(key, me))
        corrected = jax.tree.map(lambda g, e: g.astype(e.dtype) + e, grads, carry.worker["error"])
        n = _padded(_size(grads), workers, codec.multiple)
        x_WS = _join(corrected, n, dtype).reshape(workers, -1)
        code = jax.vmap(codec.encode)(x_WS, jax.random.split(key, workers))
        error_WS = x_WS - jax.vmap(codec.decode)(code).astype(dtype)

        arrived = jax.tree.map(lambda a: lax.all_to_all(a, axis, 0, 0), code)
        mine_S = jax.vmap(codec.decode)(arrived).astype(dtype).sum(axis=0)
        mine_S = mine_S + carry.worker["slice_error"]
        code = codec.encode(mine_S, slice_key)
        slice_error = mine_S - codec.decode(code).astype(dtype)

        gathered = jax.tree.map(lambda a: lax.all_gather(a, axis, to="invarying"), code)
        total = _split(jax.vmap(codec.decode)(gathered).astype(dtype).reshape(-1), grads)
        error = _split(error_WS.reshape(-1), carry.worker["error"])
        return total, Carry({"error": error, "slice_error": slice_error}, {})

    def redistribute(carry: Carry, workers: int) -> Carry:
        # The slices end to end are a gradient as well: the first worker takes it over.
        error, slices = carry.worker["error"], carry.worker["slice_error"]
        one = jax.tree.map(lambda e: e[0], error)
        owed = _split(slices.reshape(-1), one)
        error = jax.tree.map(lambda e, o: e.at[0].add(o), error, owed)
        error = spread_error(Carry(error, {}), workers).worker
        size = _padded(_size(one), workers, codec.multiple) // workers
        return Carry({"error": error, "slice_error": jnp.zeros((workers, size), slices.dtype)}, {})

    def bytes_sent(shapes: PyTree, workers: int) -> float:
        n = _padded(_size(shapes), workers, codec.multiple)
        code = codec.code_bytes(n // workers)
        return all_to_all_bytes(code * workers, workers) + all_gather_bytes(code, workers)

    return Reduce(axis, init, apply, redistribute, bytes_sent)


def _size(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _padded(size: int, workers: int, multiple: int) -> int:
    return -(-size // (workers * multiple)) * workers * multiple


def _dtype(tree: PyTree) -> jnp.dtype:
    """The widest of the accumulators of the leaves."""
    dtypes = [accumulator(leaf.dtype) for leaf in jax.tree.leaves(tree)]
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def _join(tree: PyTree, size: int, dtype) -> jax.Array:
    flat = jnp.concatenate([leaf.astype(dtype).reshape(-1) for leaf in jax.tree.leaves(tree)])
    return jnp.pad(flat, (0, size - flat.size))


def _split(flat: jax.Array, like: PyTree) -> PyTree:
    """Cuts a vector into leaves of the shapes and types of `like`."""
    leaves, structure = jax.tree.flatten(like)
    parts, start = [], 0
    for leaf in leaves:
        part = lax.slice_in_dim(flat, start, start + leaf.size)
        parts.append(part.reshape(leaf.shape).astype(leaf.dtype))
        start += leaf.size
    return jax.tree.unflatten(structure, parts)
