"""What a reduce is, and the plain one: the sum of all workers' gradients by one all-reduce.

A reduce is what `parallel.per_worker` does with the gradients that every worker computed from its
own rows. The loss is already divided by counts over the whole batch, so local gradients are shares
and are **summed**, never averaged. Reduces that send less take their encoders as arguments:
`parallel.reduce_exchange`, `parallel.reduce_gather`, `parallel.reduce_factored`.

Bytes are those that one worker sends when every collective is done as a ring over W workers
(Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any


class Carry(NamedTuple):
    """What a reduce carries from step to step.

    Attributes:
      worker: what each worker has for itself (its error). Outside of shard_map every leaf has a
        leading axis [W, ...], sharded over the workers; inside, it has none.
      shared: what is the same on all of them (a warm start).
    """

    worker: PyTree
    shared: PyTree


class Reduce(NamedTuple):
    """How the gradients of the workers become one.

    Attributes:
      axis: the mesh axis of the workers.
      init: `(params, workers) -> Carry`, `worker` as one worker has it.
      apply: `(grads, carry, key) -> (grads, carry)`, inside shard_map: from what this worker
        computed to the same result on all of them, in the types of the gradients that came in. The
        key is the same everywhere.
      redistribute: `(carry, workers) -> carry` for another number of workers, outside of shard_map:
        all that the old workers still owed the parameters is still owed, no more and no less.
      bytes_sent: `(shapes, workers) -> bytes`, what one worker sends in a step.
    """

    axis: str
    init: Callable[[PyTree, int], Carry]
    apply: Callable[[PyTree, Carry, jax.Array], tuple[PyTree, Carry]]
    redistribute: Callable[[Carry, int], Carry]
    bytes_sent: Callable[[PyTree, int], float]


def all_reduce(axis: str = "data") -> Reduce:
    """The exact sum.

    >>> shapes = {"kernel": jax.ShapeDtypeStruct((4, 8), jnp.float32)}
    >>> all_reduce().bytes_sent(shapes, 4)
    192.0
    """

    def init(params: PyTree, workers: int) -> Carry:
        return Carry({}, {})

    def apply(grads: PyTree, carry: Carry, key: jax.Array) -> tuple[PyTree, Carry]:
        return lax.psum(grads, axis), carry

    def bytes_sent(shapes: PyTree, workers: int) -> float:
        return sum(all_reduce_bytes(nbytes(leaf), workers) for leaf in jax.tree.leaves(shapes))

    return Reduce(axis, init, apply, lambda carry, workers: carry, bytes_sent)


def spread_error(carry: Carry, workers: int) -> Carry:
    """Gives each of the new workers an equal part of the sum of all errors: a `redistribute`.

    Raises:
      ValueError: for less than one worker.

    >>> spread_error(Carry(jnp.array([[1.0], [3.0]]), ()), 1).worker.tolist()
    [[4.0]]
    """
    if workers < 1:
        raise ValueError(f"{workers} workers; there must be at least 1")

    def spread(leaf: jax.Array) -> jax.Array:
        share = leaf.sum(axis=0, keepdims=True) / workers
        return jnp.broadcast_to(share, (workers, *leaf.shape[1:]))

    return carry._replace(worker=jax.tree.map(spread, carry.worker))


def accumulator(dtype) -> jnp.dtype:
    """Returns the type that sums and errors are kept in: at least float32.

    >>> accumulator(jnp.bfloat16), accumulator(jnp.float64)
    (dtype('float32'), dtype('float64'))
    """
    return jnp.dtype(dtype if jnp.finfo(dtype).bits > 32 else jnp.float32)


def zero_error(params: PyTree) -> PyTree:
    """Returns zeros of the shapes of the parameters, in the type of `accumulator`.

    >>> zero_error({"a": jnp.ones(2, jnp.bfloat16)})
    {'a': Array([0., 0.], dtype=float32)}
    """
    return jax.tree.map(lambda p: jnp.zeros(p.shape, accumulator(p.dtype)), params)


def nbytes(shape: Any) -> int:
    """Returns the bytes of an array or shape.

    >>> nbytes(jax.ShapeDtypeStruct((4, 8), jnp.bfloat16))
    64
    """
    return math.prod(shape.shape) * jnp.dtype(shape.dtype).itemsize


def all_reduce_bytes(size: float, workers: int) -> float:
    """2 (W - 1) / W of the array, each worker's of `size` bytes.

    >>> all_reduce_bytes(100, 4)
    150.0
    """
    return 2 * (workers - 1) / workers * size


def all_to_all_bytes(size: float, workers: int) -> float:
    """(W - 1) / W of the array that a worker starts with, of `size` bytes.

    >>> all_to_all_bytes(100, 4)
    75.0
    """
    return (workers - 1) / workers * size


def all_gather_bytes(size: float, workers: int) -> float:
    """W - 1 times the part that a worker starts with, of `size` bytes.

    >>> all_gather_bytes(100, 4)
    300
    """
    return (workers - 1) * size
