"""The key/value cache in 8 bits: an int8 array with a scale for every head of every position.

    x ~ scale * n,   scale = max_K |x| / 127,   n = round(x / scale) in -127 .. 127

so that no number is off by more than half a scale, and one position with outliers takes nothing
from the others (per-token scales, as KVQuant, Hooper et al. 2024, arXiv:2401.18079, and KIVI, Liu
et al. 2024, arXiv:2402.02750, have them for values; here for keys as well, which 8 bits allow).

    generate(model, params, prompts, cache=int8_cache, ...)

It takes the place of the float cache, holds (K + 4) / 4K of its float32 bytes, and is turned into
floats a layer at a time as attention reads it.

Shapes: L layers, B batch, S cache slots, T new tokens, G key/value heads, K head width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from model.cache import WHOLE, Cache, init_cache, write
from model.config import TransformerConfig


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["dtype_name"]
)
@dataclass(frozen=True)
class Int8Slots:
    """Keys or values, [..., B, S, G, K], as int8 with scales.

    Attributes:
      values: int8 [..., B, S, G, K].
      scales: float32 [..., B, S, G].
      dtype_name: what the model computes in, and what is written was.

    >>> slots = Int8Slots(jnp.zeros((1, 4, 2, 8), jnp.int8), jnp.zeros((1, 4, 2)), "float32")
    >>> new = slots.write(jnp.full((1, 1, 2, 8), 2.0), jnp.array([3]))
    >>> new.astype(jnp.float32)[0, :, 0, 0].round(4).tolist(), new.nbytes
    ([0.0, 0.0, 0.0, 2.0], 96)
    """

    values: Any
    scales: Any
    dtype_name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it stands for."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """Of what it stands for."""
        return jnp.dtype(self.dtype_name)

    @property
    def nbytes(self) -> int:
        """Bytes that are stored."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in (self.values, self.scales))

    def write(self, new_BTGK: jax.Array, length_B: jax.Array) -> Int8Slots:
        """Returns the slots of one layer with `new` from each row's length on, rounded."""
        values, scales = quantize_slots(new_BTGK)
        return Int8Slots(
            write(self.values, values, length_B),
            write(self.scales, scales, length_B),
            self.dtype_name,
        )

    def astype(self, dtype: Any) -> jax.Array:
        """Returns the floats that it stands for."""
        return (self.values.astype(jnp.float32) * self.scales[..., None]).astype(dtype)


def quantize_slots(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns int8 numbers like x and float32 scales of its last axis, x being about their product.

    Args:
      x: [..., K].

    >>> numbers, scales = quantize_slots(jnp.array([-1.0, 0.5, 2.0]))
    >>> numbers.tolist(), round(float(scales), 5)
    ([-64, 32, 127], 0.01575)
    """
    wide = x.astype(jnp.float32)
    scales = jnp.abs(wide).max(axis=-1) / 127
    safe = jnp.where(scales == 0, jnp.ones_like(scales), scales)
    return jnp.round(wide / safe[..., None]).astype(jnp.int8), scales


def int8_cache(config: TransformerConfig, batch: int, slots: int) -> Cache:
    """Returns an empty cache in 8 bits, for `model.generate.generate(..., cache=int8_cache)`.

    Args:
      config: of the model.
      batch: rows.
      slots: tokens that a row may hold.

    Raises:
      ValueError: as `model.cache.init_cache`.

    >>> from model.presets import gpt2_tiny
    >>> cache_bytes(int8_cache(gpt2_tiny(), 1, 8)), cache_bytes(init_cache(gpt2_tiny(), 1, 8))
    (1540, 4100)
    """
    plain = jax.eval_shape(lambda: init_cache(config, batch, slots))

    def empty(leaf: Any) -> Int8Slots:
        scales = jnp.zeros(leaf.shape[:-1], jnp.float32)
        return Int8Slots(jnp.zeros(leaf.shape, jnp.int8), scales, leaf.dtype.name)

    whole = {n: jnp.zeros(plain[n].shape, plain[n].dtype) for n in WHOLE if n in plain}
    return {"k": empty(plain["k"]), "v": empty(plain["v"]), **whole}


def cache_bytes(cache: Cache) -> int:
    """Returns the bytes of all arrays of a cache, of either kind."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


CACHES = {"float": init_cache, "int8": int8_cache}
"""Name -> `(config, batch, slots) -> cache`."""
