"""Causal attention. `Transformer(config, attention=fn)` takes any function of this signature.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from model.linear import at_least_float32, cpu_forms

BLOCK = 64  # queries that XLA:CPU attends with at a time; with 128 a step took 1.1 times as long
MOST_BLOCKS = 8  # they are unrolled and take their time to compile; nine sixteenths of the square


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
    platform: str | None = None,
) -> jax.Array:
    """softmax(q k' / sqrt(K)) v over the visible keys (Vaswani et al. 2017, arXiv:1706.03762).

    Query head h reads key/value head `h // (H / G)`. Scores and their softmax are at least
    float32. On CPU (see `model.linear.cpu_forms`), without a cache and dropout, queries are taken
    in blocks, each against the keys up to its end.

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> dot_product_attention(x, x, x).shape
    (1, 3, 2, 4)
    """
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    if cpu_forms(platform) and visibility.first is None and dropout is None and T == S > 1:
        return _causal_blocks(q_BTHK, k_BSGK, v_BSGK, visibility)
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


def _causal_blocks(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visibility: Visibility
) -> jax.Array:
    """The same in blocks of queries, unrolled: a block never meets the keys behind its end."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BGRTK = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4) * K**-0.5
    k_BGSK, v_BGSK = (a.transpose(0, 2, 1, 3) for a in (k_BSGK, v_BSGK))
    mask_BTS = visible(visibility, T, T)
    out_BGRTK = _blocks(q_BGRTK, k_BGSK, v_BGSK, mask_BTS)
    return out_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


@jax.custom_vjp
def _blocks(q_BGRTK, k_BGSK, v_BGSK, mask_BTS):
    return _blocks_forward(q_BGRTK, k_BGSK, v_BGSK, mask_BTS)[0]


def _blocks_forward(q_BGRTK, k_BGSK, v_BGSK, mask_BTS):
    """Keeps e = exp(score - max) and 1 / sum(e) of every row: the softmax is their product."""
    dtype = at_least_float32(q_BGRTK.dtype)
    k_BGKS = _turned(k_BGSK)
    outs, kept = [], []
    for first, end in _cuts(q_BGRTK.shape[3]):
        q_BGNK = _rows(q_BGRTK, first, end)
        scores = jnp.einsum(
            "bgnk,bgks->bgns", q_BGNK, k_BGKS[..., :end], preferred_element_type=dtype
        )
        shape = (*scores.shape[:2], -1, end - first, end)
        seen = mask_BTS[:, None, None, first:end, :end]
        scores = jnp.where(seen, scores.reshape(shape), jnp.finfo(dtype).min).reshape(scores.shape)
        e_BGNS = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        share_BGN1 = 1 / e_BGNS.sum(axis=-1, keepdims=True)
        e_BGNS = e_BGNS.astype(v_BGSK.dtype)
        out = jnp.einsum("bgns,bgsk->bgnk", e_BGNS, v_BGSK[:, :, :end])
        outs.append(_heads(out * share_BGN1.astype(out.dtype), q_BGRTK, first, end))
        kept.append((e_BGNS, share_BGN1))
    out_BGRTK = jnp.concatenate(outs, axis=3)
    return out_BGRTK, (q_BGRTK, k_BGSK, v_BGSK, kept, out_BGRTK)


def _blocks_backward(saved, dout_BGRTK):
    """With d = dout / sum(e): ds = e (d v' - d . out), dq = ds k, dk = ds' q, dv = e' d.

    dk and dv are made turned, [K, S]: then the large operand of no product is transposed.
    """
    q_BGRTK, k_BGSK, v_BGSK, kept, out_BGRTK = saved
    S, dtype = k_BGSK.shape[2], at_least_float32(q_BGRTK.dtype)
    v_BGKS = _turned(v_BGSK)
    dq, dk, dv = [], [], []
    for (first, end), (e_BGNS, share_BGN1) in zip(_cuts(S), kept, strict=True):
        d_BGNK = _rows(dout_BGRTK, first, end).astype(dtype) * share_BGN1
        along_BGN1 = (d_BGNK * _rows(out_BGRTK, first, end).astype(dtype)).sum(-1, keepdims=True)
        d_BGNK = d_BGNK.astype(v_BGSK.dtype)
        dp_BGNS = jnp.einsum(
            "bgnk,bgks->bgns", d_BGNK, v_BGKS[..., :end], preferred_element_type=dtype
        )
        ds_BGNS = (e_BGNS.astype(dtype) * (dp_BGNS - along_BGN1)).astype(q_BGRTK.dtype)
        dq_BGNK = jnp.einsum("bgns,bgsk->bgnk", ds_BGNS, k_BGSK[:, :, :end])
        dq.append(_heads(dq_BGNK, q_BGRTK, first, end))
        q_BGKN = _turned(_rows(q_BGRTK, first, end))
        rest = [(0, 0)] * 3 + [(0, S - end)]
        dk.append(jnp.pad(jnp.einsum("bgkn,bgns->bgks", q_BGKN, ds_BGNS), rest))
        dv.append(jnp.pad(jnp.einsum("bgkn,bgns->bgks", _turned(d_BGNK), e_BGNS), rest))
    dk_BGKS, dv_BGKS = (functools.reduce(jnp.add, parts) for parts in (dk, dv))
    return jnp.concatenate(dq, axis=3), _turned(dk_BGKS), _turned(dv_BGKS), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _cuts(length: int) -> list[tuple[int, int]]:
    size = max(BLOCK, -(-length // MOST_BLOCKS))
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _rows(x_BGRTK: jax.Array, first: int, end: int) -> jax.Array:
    """Returns [B, G, N, K], the queries first to end of all R heads that share keys."""
    B, G, _, _, K = x_BGRTK.shape
    return x_BGRTK[:, :, :, first:end].reshape(B, G, -1, K)


def _heads(x_BGNK: jax.Array, like_BGRTK: jax.Array, first: int, end: int) -> jax.Array:
    """The inverse of `_rows`."""
    B, G, R, _, K = like_BGRTK.shape
    return x_BGNK.reshape(B, G, R, end - first, K)


def _turned(x: jax.Array) -> jax.Array:
    return x.swapaxes(-1, -2)
