"""An embedding of each token together with the one before it, looked up by a hash of the two.

    x_t += table[hash(token_{t-1}, token_t) mod rows] @ kernel

A model finds out what a pair of tokens says only once its first blocks have learned to look at the
token before; the table says it from the first steps on. Rows are few, so that rare pairs share
them, and narrow, so that an optimizer has little to do. The table starts at zero and changes
nothing at first. The first token of a row or document has a row of its own.

Sources: Jordan et al., modded-nanogpt, record 62 (pull request 201); n-grams hashed into buckets
from Joulin et al. 2017, arXiv:1607.01759.

Shapes: B batch, T time, S cache slots, N rows of the table, W their width, D width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.cache import Cache, write
from model.config import TransformerConfig
from model.linear import linear, take, weight
from model.lookup import Form

NONE = -1
"""Stands before a first token."""
_MULTIPLIER = 0x9E3779B1  # 2^32 over the golden ratio, odd: Knuth's multiplicative hashing


def mixed(hashed: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the hash, uint32, of a sequence by that of all but its last ids.

    Args:
      hashed: uint32, of what comes before; 0 of nothing.
      ids: of the same shape, at least -1.

    >>> first = mixed(jnp.zeros(2, jnp.uint32), jnp.array([5, 6]))
    >>> int(first[0]) == int(first[1])
    False
    """
    product = (hashed ^ (ids.astype(jnp.uint32) + jnp.uint32(1))) * jnp.uint32(_MULTIPLIER)
    return product ^ (product >> jnp.uint32(15))  # the upper bits are mixed best


def tokens_before(
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Returns the token before each, int32 [B, T], `NONE` before the first of a row or document.

    Args:
      tokens_BT: ids.
      positions_BT: where they are given, only the token of the position before counts.
      segments_BT: where they are given, only a token of the same document does.

    >>> tokens_before(jnp.array([[5, 6, 7, 8]]), segments_BT=jnp.array([[1, 1, 2, 2]])).tolist()
    [[-1, 5, -1, 7]]
    """
    before_BT = jnp.roll(tokens_BT, 1, axis=1)
    follows_BT = jnp.arange(tokens_BT.shape[1])[None] > 0
    if positions_BT is not None:
        follows_BT = follows_BT & (positions_BT == jnp.roll(positions_BT, 1, axis=1) + 1)
    if segments_BT is not None:
        follows_BT = follows_BT & (segments_BT == jnp.roll(segments_BT, 1, axis=1))
    return jnp.where(follows_BT, before_BT, NONE)


def tokens_before_cached(tokens_BT: jax.Array, cache: Cache) -> tuple[jax.Array, jax.Array]:
    """Returns the token before each new one, and the ids of the cache [B, S] with the new ones.

    Args:
      tokens_BT: new ids, which follow what the cache holds.
      cache: with `tokens` and `length`.
    """
    ids_BS = write(cache["tokens"], tokens_BT, cache["length"])
    at_BT = cache["length"][:, None] + jnp.arange(tokens_BT.shape[1])[None] - 1
    found_BT = jnp.take_along_axis(ids_BS, jnp.clip(at_BT, 0, ids_BS.shape[1] - 1), axis=1)
    return jnp.where(at_BT >= 0, found_BT, NONE), ids_BS


def rows_of(tokens_BT: jax.Array, before_BT: jax.Array, rows: int) -> jax.Array:
    """Returns the row of each pair, int32 of the shape of both: a hash, so that pairs share rows.

    >>> rows_of(jnp.array([5, 6]), jnp.array([6, 5]), 1000).tolist()
    [426, 545]
    """
    hashed_BT = jnp.zeros(tokens_BT.shape, jnp.uint32)
    for ids_BT in (before_BT, tokens_BT, jnp.zeros_like(tokens_BT)):  # the last one mixes once more
        hashed_BT = mixed(hashed_BT, ids_BT)
    return (hashed_BT % jnp.uint32(rows)).astype(jnp.int32)


class BigramTable(nn.Module):
    """The table [N, W] and the kernel [W, D] that brings its rows to the width of the stream.

    Outside the blocks, so that optimizers of matrices leave it alone as they do the embeddings.
    """

    config: TransformerConfig
    lookup: Form | None = None

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, before_BT: jax.Array) -> jax.Array:
        """Returns what is added to the embeddings, [B, T, D]."""
        c = self.config
        assert c.bigram_rows is not None
        W, dtype = c.bigram_width, jnp.dtype(c.parameter_dtype)
        zeros, normal = nn.initializers.zeros_init(), nn.initializers.normal(W**-0.5)
        table = weight(self, "embedding", zeros, (c.bigram_rows, W), dtype)
        kernel = weight(self, "kernel", normal, (W, c.width), dtype)
        row_BT = rows_of(tokens_BT, before_BT, c.bigram_rows)
        rows_BTW = take(table, row_BT, jnp.dtype(c.dtype), self.lookup)
        return linear(rows_BTW, kernel)
