"""Attention of one chunk of queries to one chunk of keys, a tile of keys at a time.

The forward pass adds a chunk to an online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867);
the backward pass computes the probabilities again from the log-sum-exp (Dao et al. 2022,
arXiv:2205.14135). Neither holds more than [B, H, C, tile] scores.

Shapes: B batch, H query heads, G key/value heads, R = H / G, C queries, S keys, K head width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Marks(NamedTuple):
    """What decides who sees whom: true places int32 [C], and segments int32 [B, C] or None."""

    place: jax.Array
    segment: jax.Array | None


class Keys(NamedTuple):
    """Keys and values [B, G, S, K], and their marks."""

    k: jax.Array
    v: jax.Array
    marks: Marks


class Sums(NamedTuple):
    """An online softmax: weighted values [B, G, R, C, K]; running maximum and sum [B, G, R, C]."""

    value: jax.Array
    maximum: jax.Array
    total: jax.Array


class Queries(NamedTuple):
    """Queries [B, G, R, C, K], already divided by sqrt(K), and their marks."""

    q: jax.Array
    marks: Marks


class Saved(NamedTuple):
    """What the backward pass knows of the queries.

    Attributes:
      d: [B, G, R, C, K], the cotangent of the output.
      delta: [B, G, R, C], the sum of `d * output` over K.
      log_sum: [B, G, R, C], the log-sum-exp of the scores.
    """

    d: jax.Array
    delta: jax.Array
    log_sum: jax.Array


def mask_of(queries: Marks, keys: Marks, window: jax.Array | None) -> jax.Array:
    """Returns bool [B or 1, C, S], by the rule of `model.attention.visible` on true places.

    >>> mask_of(Marks(jnp.array([0, 5]), None), Marks(jnp.array([0, 4]), None), None).tolist()
    [[[True, False], [True, True]]]
    """
    distance = (queries.place[:, None] - keys.place[None, :])[None]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if queries.segment is not None and keys.segment is not None:
        mask &= queries.segment[:, :, None] == keys.segment[:, None, :]
    return mask


def attend(sums: Sums, queries: Queries, keys: Keys, window: jax.Array | None, tile: int) -> Sums:
    """Adds what the queries see of the keys to their sums.

    Args:
      sums: of the same queries.
      queries: C of them.
      keys: S of them, a multiple of the tile.
      window: scalar or None.
      tile: keys at a time.
    """

    def add(sums: Sums, keys: Keys) -> tuple[Sums, None]:
        scores, mask = _scores(queries, keys, window, sums.total.dtype)
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        maximum = jnp.maximum(sums.maximum, scores.max(axis=-1))
        old = jnp.exp(sums.maximum - maximum)
        # A row that sees nothing here has exp(min - min) = 1 everywhere: masked once more.
        p = jnp.where(mask, jnp.exp(scores - maximum[..., None]), 0)
        value = jnp.einsum(
            "bgrcs,bgsk->bgrck", p.astype(keys.v.dtype), keys.v, preferred_element_type=p.dtype
        )
        total = sums.total * old + p.sum(axis=-1)
        return Sums(sums.value * old[..., None] + value, maximum, total), None

    return lax.scan(add, sums, _tiles(keys, tile))[0]


def attend_backward(
    d_q: jax.Array,
    queries: Queries,
    saved: Saved,
    keys: Keys,
    window: jax.Array | None,
    tile: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Adds to the gradient of the (scaled) queries; returns it and those of the keys and values.

    Args:
      d_q: [B, G, R, C, K], what other keys gave.
      queries: as in `attend`.
      saved: see `Saved`.
      keys: as in `attend`.
      window: as in `attend`.
      tile: as in `attend`.

    Returns:
      `d_q`, and `(d_k, d_v)`, both [B, G, S, K], all in the type of `d_q`.
    """
    dtype = d_q.dtype

    def add(d_q: jax.Array, keys: Keys):
        scores, mask = _scores(queries, keys, window, dtype)
        p = jnp.where(mask, jnp.exp(scores - saved.log_sum[..., None]), 0)
        d_p = jnp.einsum("bgrck,bgsk->bgrcs", saved.d, keys.v, preferred_element_type=dtype)
        d_scores = p * (d_p - saved.delta[..., None])
        p, d_scores = p.astype(saved.d.dtype), d_scores.astype(keys.k.dtype)
        d_v = jnp.einsum("bgrcs,bgrck->bgsk", p, saved.d, preferred_element_type=dtype)
        d_k = jnp.einsum("bgrcs,bgrck->bgsk", d_scores, queries.q, preferred_element_type=dtype)
        new = jnp.einsum("bgrcs,bgsk->bgrck", d_scores, keys.k, preferred_element_type=dtype)
        return d_q + new, (d_k, d_v)

    d_q, d_keys = lax.scan(add, d_q, _tiles(keys, tile))
    # [tiles, B, G, tile, K] -> [B, G, S, K]
    joined = (jnp.moveaxis(a, 0, 2).reshape(keys.k.shape) for a in d_keys)
    d_k, d_v = joined
    return d_q, (d_k, d_v)


def tile_of(keys: int, limit: int) -> int:
    """Returns the largest divisor of the number of keys that is at most `limit`.

    >>> tile_of(96, 64), tile_of(96, 512)
    (48, 96)
    """
    return next(size for size in range(min(keys, limit), 0, -1) if keys % size == 0)


def accumulator(dtype) -> jnp.dtype:
    """Returns the type that sums are kept in: at least float32.

    Not `jnp.promote_types`, which strict promotion forbids for two types.

    >>> accumulator(jnp.bfloat16), accumulator(jnp.float64)
    (dtype('float32'), dtype('float64'))
    """
    return jnp.dtype(dtype if jnp.finfo(dtype).bits > 32 else jnp.float32)


def _scores(
    queries: Queries, keys: Keys, window: jax.Array | None, dtype
) -> tuple[jax.Array, jax.Array]:
    scores = jnp.einsum("bgrck,bgsk->bgrcs", queries.q, keys.k, preferred_element_type=dtype)
    return scores, mask_of(queries.marks, keys.marks, window)[:, None, None]


def _tiles(keys: Keys, tile: int) -> Keys:
    """Puts a leading axis of tiles before everything."""

    def cut(a: jax.Array, axis: int) -> jax.Array:
        shape = (*a.shape[:axis], a.shape[axis] // tile, tile, *a.shape[axis + 1 :])
        return jnp.moveaxis(a.reshape(shape), axis, 0)

    segment = keys.marks.segment
    marks = Marks(cut(keys.marks.place, 0), None if segment is None else cut(segment, 1))
    return Keys(cut(keys.k, 2), cut(keys.v, 2), marks)
