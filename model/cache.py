"""The key/value cache of decoding: a plain pytree that goes in with a call and comes back with it.

Every row of the batch has its own length, so prompts of different lengths share one cache: keys of
padding are written past a row's length and overwritten before any query can see them.

Shapes: L layers, B batch, S cache slots, T new tokens, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from model.config import TransformerConfig

Cache = dict[str, Any]
WHOLE = ("length", "tokens", "source_segments")
"""Parts of a cache that are not by layer: their first axis is the batch."""


def init_cache(config: TransformerConfig, batch: int, slots: int) -> Cache:
    """Returns an empty cache: k and v [L, B, S, G, K], length int32 [B] (tokens seen so far).

    A model that looks pairs of tokens up has their ids in it, too: tokens int32 [B, S].

    Raises:
      ValueError: if learned positions end before the cache does.

    >>> from model.presets import gpt2_tiny
    >>> init_cache(gpt2_tiny(), batch=3, slots=8)["k"].shape
    (2, 3, 8, 4, 8)
    """
    if config.positions == "learned" and slots > config.max_length:
        raise ValueError(
            f"a cache of {slots} slots is longer than the {config.max_length} learned positions"
        )
    shape = (config.layers, batch, slots, config.kv_heads_, config.head_width_)
    dtype = jnp.dtype(config.dtype)
    tokens = {} if config.bigram_rows is None else {"tokens": jnp.zeros((batch, slots), jnp.int32)}
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        "length": jnp.zeros((batch,), jnp.int32),
        **tokens,
    }


def write(cache_BSGK: Any, new_BTGK: jax.Array, length_B: jax.Array) -> Any:
    """Returns one layer's cache with `new` in the T slots from each row's length on.

    Slots past the end are dropped, never wrapped or clamped onto earlier ones. A cache that is no
    plain array (in 8 bits, say) knows `write(new, length)` and `astype(dtype)` itself.
    """
    if not isinstance(cache_BSGK, jax.Array):
        return cache_BSGK.write(new_BTGK, length_B)
    B, T = new_BTGK.shape[:2]
    slots_BT = length_B[:, None] + jnp.arange(T)[None]
    return cache_BSGK.at[jnp.arange(B)[:, None], slots_BT].set(
        new_BTGK.astype(cache_BSGK.dtype), mode="drop"
    )
