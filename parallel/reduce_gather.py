"""Sum of sparse codes: every worker gathers the codes of all and adds them up.

Codes that cannot be added as they are (each worker picks other entries) go around whole, so the
bytes grow with the number of workers: it pays where a code is a small part of the gradient. What a
worker did not send it keeps and adds to its next gradient (error feedback, Karimireddy et al. 2019,
arXiv:1901.09847; with memory for sparse gradients, Stich et al. 2018, arXiv:1809.07599).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from model.rules import is_stacked, path_of
from parallel.reduce import Carry, Reduce, all_gather_bytes, spread_error, zero_error

PyTree = Any


class TensorCodec(Protocol):
    """An encoder of one tensor, as `compress.gradients` makes them."""

    def encode(self, x: jax.Array, key: jax.Array) -> PyTree:
        """Returns the code of x [n]."""

    def decode(self, code: PyTree, size: int) -> jax.Array:
        """Returns [n] in the type that was encoded."""

    def code_bytes(self, size: int, itemsize: int) -> int:
        """Bytes of the code of n values of `itemsize` bytes."""


def gather_reduce(codec: TensorCodec, axis: str = "data") -> Reduce:
    """Returns the reduce that gathers codes; each layer of a stacked leaf is a tensor of its own.

    Args:
      codec: encodes and decodes a tensor laid flat.
      axis: the mesh axis of the workers.
    """

    def init(params: PyTree, workers: int) -> Carry:
        return Carry(zero_error(params), {})

    def apply(grads: PyTree, carry: Carry, key: jax.Array) -> tuple[PyTree, Carry]:
        mine = jax.random.fold_in(key, lax.axis_index(axis))

        def each(number: int, path: str, grad: jax.Array, error: jax.Array):
            x_Ln = (grad.astype(error.dtype) + error).reshape(layers_of(path, grad), -1)
            size = x_Ln.shape[1]
            decode = jax.vmap(lambda code: codec.decode(code, size))
            keys = jax.random.split(jax.random.fold_in(mine, number), x_Ln.shape[0])
            code = jax.vmap(codec.encode)(x_Ln, keys)
            gathered = jax.tree.map(lambda a: lax.all_gather(a, axis, to="invarying"), code)

            # One after the other, in the same order everywhere, so that all get the same bits.
            def add(total: jax.Array, code: PyTree) -> tuple[jax.Array, None]:
                return total + decode(code), None

            total, _ = lax.scan(add, jnp.zeros(x_Ln.shape, x_Ln.dtype), gathered)
            left = x_Ln - decode(code)
            return total.reshape(grad.shape).astype(grad.dtype), left.reshape(grad.shape)

        total, error = map_leaves(each, grads, carry.worker)
        return total, Carry(error, {})

    def bytes_sent(shapes: PyTree, workers: int) -> float:
        total = 0.0
        for key_path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
            layers = layers_of(path_of(key_path), leaf)
            itemsize = max(4, jnp.dtype(leaf.dtype).itemsize)
            code = codec.code_bytes(math.prod(leaf.shape) // layers, itemsize)
            total += all_gather_bytes(layers * code, workers)
        return total

    return Reduce(axis, init, apply, spread_error, bytes_sent)


def layers_of(path: str, leaf: Any) -> int:
    """Returns the length of the layer axis of a leaf, or 1 outside of the stack.

    >>> layers_of("blocks/up/bias", jnp.ones((3, 8))), layers_of("head/kernel", jnp.ones((4, 8)))
    (3, 1)
    """
    return leaf.shape[0] if is_stacked(path) else 1


def map_leaves(each: Callable[..., tuple], tree: PyTree, *rest: PyTree) -> tuple[PyTree, ...]:
    """Returns the trees of what `each(number, path, leaf, *leaves of the rest)` gives.

    The rest may have deeper structure below the leaves of the tree.

    >>> map_leaves(lambda number, path, a: (number, path), {"x": 5.0, "y": 6.0})
    ({'x': 0, 'y': 1}, {'x': 'x', 'y': 'y'})
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    structure: Any = jax.tree.structure(tree)
    others = [structure.flatten_up_to(other) for other in rest]
    results = [
        each(number, path_of(key_path), leaf, *other)
        for number, ((key_path, leaf), *other) in enumerate(zip(leaves, *others, strict=True))
    ]
    return tuple(structure.unflatten(column) for column in zip(*results, strict=True))
