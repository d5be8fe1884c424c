"""Distillation of what tokens see of each other: attention maps, and relations of q, k and v.

Each loss compares one layer of the student with one of the teacher and returns a sum over
positions, `sum_bt w_bt * loss_bt`. The maps over T x T tokens are made of captured q, k and v for a
chunk of queries at a time, and again in the backward pass.

Shapes: B batch, T time, H heads, G key/value heads, K head width, R relation heads, C queries of a
chunk.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from model.linear import at_least_float32

CHUNK = 128  # queries whose maps exist at a time


def attention_kl(
    student: dict[str, jax.Array],
    teacher: dict[str, jax.Array],
    weights_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    chunk: int = CHUNK,
) -> jax.Array:
    """`sum w mean_H KL(teacher's attention || student's)` of the causal maps, head by head.

    (Zagoruyko & Komodakis 2016, arXiv:1612.03928; the divergence of MiniLM, Wang et al. 2020,
    arXiv:2002.10957.)

    Args:
      student: "q" [B, T, H, K] and "k" [B, T, G, K] as attended with.
      teacher: the same of as many heads H; head width and G may differ.
      weights_BT: of the queries.
      segments_BT: tokens see their own segment only.
      chunk: queries whose maps exist at a time.

    Raises:
      ValueError: another number of heads.

    >>> q = jax.random.normal(jax.random.key(0), (1, 4, 2, 3))
    >>> float(attention_kl({"q": q, "k": q}, {"q": q, "k": q}, jnp.ones((1, 4))))
    0.0
    """
    heads = student["q"].shape[2], teacher["q"].shape[2]
    if heads[0] != heads[1]:
        raise ValueError(
            f"the student has {heads[0]} heads and the teacher {heads[1]}, and attention is "
            "compared head by head; match relations instead"
        )

    def to_all_heads(x: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return x["q"], jnp.repeat(x["k"], x["q"].shape[2] // x["k"].shape[2], axis=2)

    return _maps_kl(to_all_heads(student), to_all_heads(teacher), weights_BT, segments_BT, chunk)


def relation_kl(
    student: dict[str, jax.Array],
    teacher: dict[str, jax.Array],
    weights_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    heads: int,
    chunk: int = CHUNK,
) -> jax.Array:
    """`sum w mean KL(teacher's relations || student's)` of q-q, k-k and v-v, over R heads.

    A relation of x is `softmax(x x' / sqrt(d))` of all its heads side by side, cut anew into R
    relation heads of width d: the models may differ in heads and widths (MiniLMv2, Wang et al.
    2020, arXiv:2012.15828). Here a token relates to those before it, as it attends.

    Args:
      student: "q", "k" and "v", each [B, T, heads, K].
      teacher: the same.
      weights_BT: of the tokens.
      segments_BT: tokens relate to their own segment only.
      heads: R; divides the whole width of q, k and v of both.
      chunk: tokens whose relations exist at a time.

    Raises:
      ValueError: a width that R does not divide.

    >>> x = jax.random.normal(jax.random.key(0), (1, 4, 2, 6))
    >>> same = {"q": x, "k": x, "v": x}
    >>> float(relation_kl(same, same, jnp.ones((1, 4)), heads=3))
    0.0
    """
    losses = []
    for name in ("q", "k", "v"):
        s, t = (_relation_heads(x[name], heads, name) for x in (student, teacher))
        losses.append(_maps_kl((s, s), (t, t), weights_BT, segments_BT, chunk))
    return sum(losses[1:], losses[0]) / 3


def _relation_heads(x_BTHK: jax.Array, heads: int, name: str) -> jax.Array:
    B, T, H, K = x_BTHK.shape
    if heads < 1 or H * K % heads:
        raise ValueError(
            f"{name} is {H * K} wide ({H} heads of {K}), which does not divide into {heads} "
            "relation heads; choose a number that divides the widths of both models"
        )
    return x_BTHK.reshape(B, T, heads, H * K // heads)


def _maps_kl(
    student: tuple[jax.Array, jax.Array],
    teacher: tuple[jax.Array, jax.Array],
    weights_BT: jax.Array,
    segments_BT: jax.Array | None,
    chunk: int,
) -> jax.Array:
    """The divergence of softmax(a b' / sqrt(K)) of two pairs (a, b), each [B, T, H, K]."""
    B, T = weights_BT.shape
    dtype = at_least_float32(student[0].dtype)
    if segments_BT is None:
        segments_BT = jnp.zeros((B, T), jnp.int32)
    chunk = min(chunk, T)
    count = -(-T // chunk)

    def split(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [chunks, B, C, ...], padded with zeros."""
        padded = jnp.pad(x, [(0, 0), (0, count * chunk - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, count, chunk, *x.shape[2:]), 1, 0)

    def log_map(a_BCHK: jax.Array, b_BTHK: jax.Array, mask_B1CT: jax.Array) -> jax.Array:
        scaled = a_BCHK * a_BCHK.shape[-1] ** -0.5
        scores = jnp.einsum("bchk,bthk->bhct", scaled, b_BTHK, preferred_element_type=dtype)
        return jax.nn.log_softmax(jnp.where(mask_B1CT, scores, jnp.finfo(dtype).min), axis=-1)

    @jax.checkpoint
    def body(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
        start, s_BCHK, t_BCHK, w_BC, segments_BC = part
        ahead_CT = (start + jnp.arange(chunk))[:, None] - jnp.arange(T)[None]
        seen_BCT = segments_BC[:, :, None] == segments_BT[:, None, :]
        mask_B1CT = (seen_BCT & (ahead_CT >= 0)[None])[:, None]
        # A query without weight may stand in the padding, where it sees nothing of its segment.
        live_BC = w_BC > 0
        p, q = log_map(t_BCHK, teacher[1], mask_B1CT), log_map(s_BCHK, student[1], mask_B1CT)
        terms = jnp.where(mask_B1CT, jnp.exp(p) * (p - q), 0).sum(axis=-1).mean(axis=1)
        return total + (jnp.where(live_BC, terms, 0) * w_BC.astype(dtype)).sum(), None

    parts = (
        jnp.arange(count) * chunk,
        split(student[0]),
        split(teacher[0]),
        split(weights_BT),
        split(segments_BT),
    )
    return jax.lax.scan(body, jnp.zeros((), dtype), parts)[0]
