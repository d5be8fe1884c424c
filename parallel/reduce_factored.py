"""Sum of low-rank factors by two small all-reduces: PowerSGD.

A factor is linear in the gradient, so the factors of all workers can be added on the way (Vogels
et al. 2019, arXiv:1905.13727):

    P = all-reduce(M Q),   P = orthogonalise(P),   Q = all-reduce(M' P),   M ~ P Q'

with M = gradient + error of each worker and Q the factor of the step before (the warm start, one
step of a power iteration). Each worker keeps M - P (M' P)', the part of its own that the result
lacks, for its next gradient.

Shapes: L layers, [N, M] a matrix, R rank.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
from jax import lax

from model.rules import is_stacked, leaf_paths, match
from parallel.reduce import (
    Carry,
    Reduce,
    accumulator,
    all_reduce_bytes,
    nbytes,
    spread_error,
    zero_error,
)
from parallel.reduce_gather import layers_of, map_leaves

PyTree = Any


class Factors(Protocol):
    """What a low-rank scheme decides, as `compress.gradients_lowrank` makes it."""

    @property
    def rank(self) -> int:
        """R."""

    def start(self, number: int, layers: int, columns: int, dtype: Any) -> jax.Array:
        """Returns the first Q [L, M, R] of leaf `number`."""

    def orthogonalise(self, p_LNR: jax.Array) -> jax.Array:
        """Returns [L, N, R] with orthonormal columns that span those of P."""


def factored_reduce(factors: Factors, axis: str = "data", matrices: str = ".*") -> Reduce:
    """Returns the reduce that sends two factors of each matrix; all else is summed exactly.

    A matrix is a leaf of two dimensions (in each layer) that are both at least the rank. Matrix
    products run in the accumulator type.

    Args:
      factors: rank, warm start and orthogonalisation.
      axis: the mesh axis of the workers.
      matrices: regex over parameter paths (`model.rules`) of those that are factored;
        `blocks/.*/kernel` leaves embedding and head alone, whose gradients have the highest rank.

    Raises:
      ValueError: when called, if the regex matches no parameter, or only some layers of a stack.
    """

    def factored(tree: PyTree) -> PyTree:
        """Whether each leaf is sent as factors."""
        chosen = match([(matrices, True)], tree, default=False)
        leaves, form = jax.tree.flatten(tree)
        found = zip(leaf_paths(tree), leaves, jax.tree.leaves(chosen), strict=True)
        return jax.tree.unflatten(form, [pick and is_matrix(p, leaf) for p, leaf, pick in found])

    def is_matrix(path: str, leaf: Any) -> bool:
        shape = leaf.shape[1:] if is_stacked(path) else leaf.shape
        return len(shape) == 2 and min(shape) >= factors.rank

    def init(params: PyTree, workers: int) -> Carry:
        def each(number: int, path: str, leaf: jax.Array, has_factors: bool):
            if not has_factors:
                return ((), ())
            layers, dtype = layers_of(path, leaf), accumulator(leaf.dtype)
            return zero_error(leaf), factors.start(number, layers, leaf.shape[-1], dtype)

        return Carry(*map_leaves(each, params, factored(params)))

    def apply(grads: PyTree, carry: Carry, key: jax.Array) -> tuple[PyTree, Carry]:
        def each(number: int, path: str, grad: jax.Array, has_factors: bool, error, q_LMR):
            if not has_factors:
                return lax.psum(grad, axis), (), ()
            m_LNM = (grad.astype(error.dtype) + error).reshape(-1, *grad.shape[-2:])
            p_LNR = factors.orthogonalise(lax.psum(m_LNM @ q_LMR, axis))
            own_LMR = m_LNM.mT @ p_LNR
            q_LMR = lax.psum(own_LMR, axis)
            total = (p_LNR @ q_LMR.mT).reshape(grad.shape).astype(grad.dtype)
            left = (m_LNM - p_LNR @ own_LMR.mT).reshape(grad.shape)
            return total, left, q_LMR

        total, error, start = map_leaves(each, grads, factored(grads), carry.worker, carry.shared)
        return total, Carry(error, start)

    def bytes_sent(shapes: PyTree, workers: int) -> float:
        def each(number: int, path: str, leaf: Any, has_factors: bool) -> tuple[float]:
            size = nbytes(leaf)
            if has_factors:
                layers, (N, M) = layers_of(path, leaf), leaf.shape[-2:]
                size = layers * (N + M) * factors.rank * accumulator(leaf.dtype).itemsize
            return (all_reduce_bytes(size, workers),)

        return sum(jax.tree.leaves(map_leaves(each, shapes, factored(shapes))))

    return Reduce(axis, init, apply, spread_error, bytes_sent)
