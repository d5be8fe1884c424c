"""Encoders of gradients: int8 with stochastic rounding, and the largest entries.

Pure functions that a reduce takes as an argument: `int8` for `parallel.reduce_exchange`, `top_k`
for `parallel.reduce_gather`, and `power_sgd` of `compress.gradients_lowrank` for
`parallel.reduce_factored`. What a code loses is kept by the reduce and added to the next gradient
(error feedback).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

LEVELS = 127  # int8 without -128, so that the grid is symmetric

# The scale is this much too large, so that its rounding to float32 never puts the largest entry
# beyond the last level, where clipping it would bias it.
_HEADROOM = 1 + 2**-20


class VectorCodec(NamedTuple):
    """Encodes vectors of one length and decodes them.

    Attributes:
      encode: `(x [n], key) -> code`, a pytree of arrays.
      decode: `code -> [n]`, float32.
      code_bytes: `n -> bytes of the code`.
      multiple: what n must be a multiple of.
    """

    encode: Callable
    decode: Callable
    code_bytes: Callable[[int], int]
    multiple: int


class TensorCodec(NamedTuple):
    """Encodes a tensor laid flat.

    Attributes:
      encode: `(x [n], key) -> code`, a pytree of arrays.
      decode: `(code, n) -> [n]`, in the type that was encoded.
      code_bytes: `(n, bytes of a value) -> bytes of the code`.
    """

    encode: Callable
    decode: Callable
    code_bytes: Callable[[int, int], int]


class Int8Code(NamedTuple):
    """Levels int8 [blocks, block] and one scale float32 [blocks] for each block."""

    levels: jax.Array
    scale: jax.Array


class SparseCode(NamedTuple):
    """Values [k] and where they belong, int32 [k]."""

    values: jax.Array
    indices: jax.Array


def int8(block: int = 256) -> VectorCodec:
    """8 bits a value, rounded up or down at random so that the expectation is exact.

    `level = floor(x / scale + u)`, u uniform in [0, 1), `scale = max |x| / 127` over a block
    (stochastic rounding as in QSGD, Alistarh et al. 2017, arXiv:1610.02132). With one float32 scale
    for 256 values a code has 25.4 % of the bytes of float32.

    Args:
      block: values that share a scale.

    Raises:
      ValueError: for a block below 1.

    >>> codec = int8(block=2)
    >>> code = codec.encode(jnp.array([0.5, -1.0]), jax.random.key(0))
    >>> code.levels.dtype, code.levels[0, 1].item()
    (dtype('int8'), -127)
    >>> codec.code_bytes(512), int8().code_bytes(512)
    (1536, 520)
    """
    if block < 1:
        raise ValueError(f"the block is {block} values; it must be at least 1")

    def encode(x: jax.Array, key: jax.Array) -> Int8Code:
        x = x.astype(jnp.float32).reshape(-1, block)
        scale = jnp.abs(x).max(axis=1) * (_HEADROOM / LEVELS)
        # A block of zeros has scale 0: it is divided by 1 and stays 0.
        by = jnp.where(scale > 0, scale, 1)[:, None]
        levels = jnp.floor(x / by + jax.random.uniform(key, x.shape, x.dtype))
        return Int8Code(jnp.clip(levels, -LEVELS, LEVELS).astype(jnp.int8), scale)

    def decode(code: Int8Code) -> jax.Array:
        return (code.levels.astype(jnp.float32) * code.scale[:, None]).reshape(-1)

    def code_bytes(size: int) -> int:
        return size + 4 * (size // block)

    return VectorCodec(encode, decode, code_bytes, block)


def top_k(density: float) -> TensorCodec:
    """The k entries of largest magnitude, k = max(1, round(density * n)) of a tensor's n.

    Args:
      density: part of the entries that is sent, in (0, 1].

    Raises:
      ValueError: for a density outside (0, 1].

    >>> codec = top_k(0.5)
    >>> code = codec.encode(jnp.array([0.5, -1.0, 0.25, 2.0]), jax.random.key(0))
    >>> codec.decode(code, 4).tolist(), codec.code_bytes(4, 4)
    ([0.0, -1.0, 0.0, 2.0], 16)
    """
    if not 0 < density <= 1:
        raise ValueError(f"the density is {density}; it must be above 0 and at most 1")

    def count(size: int) -> int:
        return max(1, round(density * size))

    def encode(x: jax.Array, key: jax.Array) -> SparseCode:
        _, indices = jax.lax.top_k(jnp.abs(x), count(x.size))
        return SparseCode(x[indices], indices.astype(jnp.int32))

    def decode(code: SparseCode, size: int) -> jax.Array:
        zeros = jnp.zeros(size, code.values.dtype)
        return zeros.at[code.indices].set(code.values, unique_indices=True)

    def code_bytes(size: int, itemsize: int) -> int:
        return count(size) * (itemsize + 4)

    return TensorCodec(encode, decode, code_bytes)
