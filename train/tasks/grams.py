"""Hashed n-grams of pieces beside the features of a head: a linear model of short phrases.

    scores += 1 / sqrt(|G|)  sum_{g in G} table[hash(g) mod buckets]

G being all stretches of 1 to `order` pieces of a row, its ends included. From a few thousand rows a
model of features learns what words say, and hardly what two of them say together; a table of
n-grams knows them apart. Neighbours that share a bucket are told apart by the others of their row.

Sources: n-grams of a classifier in hashed buckets from Joulin et al. 2017, "Bag of Tricks for
Efficient Text Classification" (arXiv:1607.01759), the hashing from Weinberger et al. 2009
(arXiv:0902.2206), a linear part beside a deep one from Cheng et al. 2016 (arXiv:1606.07792).

Shapes: B rows, T time, G n-grams of a row (orders one after another, T each), C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from model.bigrams import mixed
from model.heads import SCORE
from model.linear import at_least_float32, take

GRAMS = "grams"  # under `score`
MOST = 8


def check_grams(order: int, buckets: int) -> None:
    """Raises ValueError for n-grams or buckets out of range."""
    if not 0 <= order <= MOST:
        raise ValueError(f"grams is {order}; give the longest n-gram, 1 to {MOST}, or 0 for none")
    if not 1 <= buckets < 2**31:
        raise ValueError(f"buckets is {buckets}; it must be at least 1 and below 2**31")


def init_grams(buckets: int, outputs: int, dtype: Any) -> dict[str, jax.Array]:
    """Returns {"embedding": [buckets, C]} of zeros: at first n-grams say nothing.

    >>> init_grams(8, 2, jnp.float32)["embedding"].shape
    (8, 2)
    """
    return {"embedding": jnp.zeros((buckets, outputs), dtype)}


def grams_of(
    tokens_BT: jax.Array, lengths_B: jax.Array, order: int, buckets: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the bucket of each n-gram, int32 [B, G], and whether it lies in its row.

    Args:
      tokens_BT: int32 ids, in the order of the text.
      lengths_B: int32, real tokens of each row, which come first.
      order: pieces of the longest n-gram.
      buckets: of the table.

    >>> buckets, real = grams_of(jnp.array([[5, 6, 5, 6, 0]]), jnp.array([4]), 2, 1000)
    >>> bool(buckets[0, 5] == buckets[0, 7]), bool(buckets[0, 5] == buckets[0, 6])  # 5 6, 6 5
    (True, False)
    >>> real[0].astype(int).tolist()
    [1, 1, 1, 1, 0, 1, 1, 1, 0, 0]
    """
    T = tokens_BT.shape[1]
    places_T = jnp.arange(T)
    hashed_BT = jnp.zeros(tokens_BT.shape, jnp.uint32)
    found, real = [], []
    for further in range(order):
        hashed_BT = mixed(hashed_BT, jnp.roll(tokens_BT, -further, axis=1))
        found.append((hashed_BT % jnp.uint32(buckets)).astype(jnp.int32))
        real.append(places_T[None] + further < lengths_B[:, None])
    return jnp.concatenate(found, axis=1), jnp.concatenate(real, axis=1)


def gram_scores(params: Mapping[str, Any], batch: Mapping[str, Any], order: int) -> jax.Array:
    """Returns [B, C], at least float32, by the table under `score/grams`.

    Args:
      params: with the head.
      batch: `tokens` [B, T], `lengths` [B], and `positions` where the rows are in another order.
      order: pieces of the longest n-gram.
    """
    table_NC = params[SCORE][GRAMS]["embedding"]
    tokens_BT = batch["tokens"]
    if (positions_BT := batch.get("positions")) is not None:
        tokens_BT = jnp.take_along_axis(tokens_BT, jnp.argsort(positions_BT, axis=1), axis=1)
    buckets_BG, real_BG = grams_of(tokens_BT, batch["lengths"], order, table_NC.shape[0])
    dtype = at_least_float32(table_NC.dtype)
    said_BGC = take(table_NC, buckets_BG, dtype)
    weights_BG = real_BG.astype(dtype)
    count_B = jnp.maximum(weights_BG.sum(axis=1), 1)
    sum_BC = jnp.einsum("bgc,bg->bc", said_BGC, weights_BG)
    return sum_BC / jnp.sqrt(count_B)[:, None]
