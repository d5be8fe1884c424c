"""Causal attention. `Transformer(config, attention=fn)` takes any function of this signature.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from model.linear import at_least_float32


class Visibility(NamedTuple):
    """Which keys a query may see: those at or before it, of its own segment, inside its window.

    "Before" goes by place in the sequence, not by position id, so that packed documents whose
    positions start anew stay causal.

    Attributes:
      first: int32 [B], place of the first query among the keys (the filled length of a cache), or
        None for 0.
      segments: int32 [B, T] document of each token, or None for one document. Only where queries
        and keys are the same tokens.
      window: how many keys a query sees at most, itself included (a scalar, maybe traced), or None.
    """

    first: jax.Array | None = None
    segments: jax.Array | None = None
    window: jax.Array | int | None = None


class Dropout(NamedTuple):
    """Rate and key of the dropout on attention probabilities."""

    rate: float
    key: jax.Array


class Attention(Protocol):
    """What `Transformer(config, attention=...)` calls once a layer."""

    def __call__(
        self,
        q_BTHK: jax.Array,
        k_BSGK: jax.Array,
        v_BSGK: jax.Array,
        visibility: Visibility,
        dropout: Dropout | None,
    ) -> jax.Array:
        """Returns [B, T, H, K]."""


def visible(visibility: Visibility, queries: int, keys: int) -> jax.Array:
    """Returns bool [B or 1, T, S]: True where query t may see key s.

    >>> visible(Visibility(window=2), 3, 3)[0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    place_BT = jnp.arange(queries)[None]
    if visibility.first is not None:
        place_BT = place_BT + visibility.first[:, None]
    distance_BTS = place_BT[:, :, None] - jnp.arange(keys)[None, None]
    mask_BTS = distance_BTS >= 0
    if visibility.window is not None:
        mask_BTS &= distance_BTS < visibility.window
    if visibility.segments is not None:
        mask_BTS &= visibility.segments[:, :, None] == visibility.segments[:, None, :]
    return mask_BTS


def dot_product_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    visibility: Visibility = Visibility(),  # noqa: B008 (an immutable tuple)
    dropout: Dropout | None = None,
) -> jax.Array:
    """softmax(q k' / sqrt(K)) v over the visible keys (Vaswani et al. 2017, arXiv:1706.03762).

    Query head h reads key/value head `h // (H / G)`. Scores and their softmax are at least
    float32.

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> dot_product_attention(x, x, x).shape
    (1, 3, 2, 4)
    """
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    # Heads before time: XLA:CPU copies batched products of the other layout, at twice the time.
    q_BGRTK = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    k_BGSK, v_BGSK = (a.transpose(0, 2, 1, 3) for a in (k_BSGK, v_BSGK))
    dtype = at_least_float32(q_BTHK.dtype)
    scores = jnp.einsum(
        "bgrtk,bgsk->bgrts", q_BGRTK * K**-0.5, k_BGSK, preferred_element_type=dtype
    )
    mask = visible(visibility, T, S)[:, None, None]
    # The most negative finite number, not -inf: a row without visible keys stays finite.
    scores = jnp.where(mask, scores, jnp.finfo(dtype).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v_BSGK.dtype)
    if dropout is not None:
        keep = jax.random.bernoulli(dropout.key, 1 - dropout.rate, probabilities.shape)
        probabilities = jnp.where(keep, probabilities / (1 - dropout.rate), 0)
    out_BGRTK = jnp.einsum("bgrts,bgsk->bgrtk", probabilities, v_BGSK)
    return out_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)
