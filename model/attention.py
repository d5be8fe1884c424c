"""Causal attention. `Transformer(config, attention=fn)` takes any function of this signature.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from model.dropout import Dropout, dropped
from model.linear import at_least_float32, cpu_forms, gpu_forms

BLOCK = 64  # queries that XLA:CPU attends with at a time; with 128 a step took 1.1 times as long
MOST_BLOCKS = 8  # they are unrolled and take their time to compile; nine sixteenths of the square
WIDEST_HEAD = 128  # that cuDNN attends with on every GPU that it knows

Form = Literal["plain", "blocks", "cudnn"]


class Visibility(NamedTuple):
    """Which keys a query may see: those at or before it, of its own segment, inside its window.

    "Before" goes by place in the sequence, not by position id, so that packed documents whose
    positions start anew stay causal. Keys of a prefix are seen from everywhere in the row (Raffel
    et al. 2020, arXiv:1910.10683, section 3.2.1), as far as they are of the query's segment.

    Attributes:
      first: int32 [B], place of the first query among the keys (the filled length of a cache), or
        None for 0.
      segments: int32 [B, T] document of each query, and of each key where they are the same tokens;
        None for one document.
      window: how many keys a query sees at most, itself included (a scalar, maybe traced), or None.
      prefix: int32 [B], how many keys at the start of a row all its queries see, or bool [B, S],
        which keys, as rows packed with several documents need; None for none.
      key_segments: int32 [B, S] document of each key, where keys are other tokens than queries.
    """

    first: jax.Array | None = None
    segments: jax.Array | None = None
    window: jax.Array | int | None = None
    prefix: jax.Array | None = None
    key_segments: jax.Array | None = None


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
    if visibility.prefix is not None:
        prefix = visibility.prefix
        counted = prefix.ndim == 1
        of_prefix_BS = jnp.arange(keys)[None] < prefix[:, None] if counted else prefix
        mask_BTS |= of_prefix_BS[:, None]
    if visibility.segments is not None:
        of_keys = (
            visibility.segments if visibility.key_segments is None else visibility.key_segments
        )
        mask_BTS &= visibility.segments[:, :, None] == of_keys[:, None, :]
    return mask_BTS


def across(segments_BT: jax.Array, key_segments_BS: jax.Array) -> Visibility:
    """Returns what queries see of another sequence: all its keys of their own segment.

    To causal attention they stand before every key, and all keys are a prefix.

    >>> seen = across(jnp.array([[1, 2]]), jnp.array([[1, 1, 2, 0]]))
    >>> visible(seen, 2, 4)[0].astype(int).tolist()
    [[1, 1, 0, 0], [0, 0, 1, 0]]
    """
    (B, T), S = segments_BT.shape, key_segments_BS.shape[1]
    first_B, prefix_B = jnp.full((B,), -T, jnp.int32), jnp.full((B,), S, jnp.int32)
    return Visibility(first_B, segments_BT, None, prefix_B, key_segments_BS)


def dot_product_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    visibility: Visibility = Visibility(),  # noqa: B008 (an immutable tuple)
    dropout: Dropout | None = None,
    platform: str | None = None,
    form: Form | None = None,
) -> jax.Array:
    """softmax(q k' / sqrt(K)) v over the visible keys (Vaswani et al. 2017, arXiv:1706.03762).

    Query head h reads key/value head `h // (H / G)`. Scores and their softmax are at least
    float32.

    Args:
      q_BTHK: queries.
      k_BSGK: keys.
      v_BSGK: values.
      visibility: which keys a query may see.
      dropout: of the probabilities.
      platform: what the program is for; see `form_for`.
      form: how to compute it, by default what `form_for` says: "plain" holds all scores, "blocks"
        (for XLA:CPU) takes queries in blocks, each against the keys up to its end, and "cudnn" is
        cuDNN's fused kernel, which holds no scores (Dao et al. 2022, arXiv:2205.14135).

    Raises:
      ValueError: a form that cannot compute this; what keeps it from doing so is said.

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> dot_product_attention(x, x, x).shape
    (1, 3, 2, 4)
    """
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    if form is None:
        form = form_for(q_BTHK, k_BSGK, visibility, dropout, platform)
    elif why := keeps_from(form, q_BTHK, k_BSGK, visibility, dropout):
        raise ValueError(f"attention in the form {form!r} cannot have {why}; take 'plain'")
    if form == "blocks":
        return _causal_blocks(q_BTHK, k_BSGK, v_BSGK, visibility)
    if form == "cudnn":
        return _cudnn(q_BTHK, k_BSGK, v_BSGK, visibility)
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
    probabilities = dropped(probabilities, dropout)
    out_BGRTK = jnp.einsum("bgrts,bgsk->bgrtk", probabilities, v_BGSK)
    return out_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def form_for(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    visibility: Visibility,
    dropout: Dropout | None,
    platform: str | None = None,
) -> Form:
    """Returns the fastest form that can compute this attention on a platform.

    Args:
      q_BTHK: queries.
      k_BSGK: keys.
      visibility: which keys a query may see.
      dropout: of the probabilities.
      platform: what the program is for ("cpu", "gpu", "tpu"); by default that of the mesh it is
        traced under, or the backend: see `model.linear.cpu_forms` and `gpu_forms`.

    >>> q = jnp.ones((1, 64, 2, 16), jnp.bfloat16)
    >>> [form_for(q, q, Visibility(), None, platform) for platform in ("cpu", "tpu")]
    ['blocks', 'plain']
    """
    wanted: Form = "plain"
    if cpu_forms(platform):
        wanted = "blocks"
    elif gpu_forms(platform):
        wanted = "cudnn"
    kept = keeps_from(wanted, q_BTHK, k_BSGK, visibility, dropout)
    return "plain" if kept else wanted


def keeps_from(
    form: Form,
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    visibility: Visibility,
    dropout: Dropout | None,
) -> str | None:
    """Returns what keeps a form from computing this attention, or None where nothing does.

    cuDNN could take documents as offsets of packed rows, but they differ by row of the batch and
    their number has to be known when the program is made; they are left to the plain form.

    >>> q = jnp.ones((1, 64, 2, 16), jnp.bfloat16)
    >>> keeps_from("cudnn", q, q, Visibility(segments=jnp.ones((1, 64), jnp.int32)), None)
    'documents of a packed row'
    """
    T, S, K = q_BTHK.shape[1], k_BSGK.shape[1], q_BTHK.shape[3]
    if form == "plain":
        return None
    if visibility.first is not None:
        return "a cache"
    if dropout is not None:
        return "dropout"
    if T != S or S == 1:
        return f"{T} queries of {S} keys"
    if form == "blocks":
        return None
    if q_BTHK.dtype not in (jnp.bfloat16, jnp.float16):
        return f"operands in {q_BTHK.dtype.name}"
    if K > WIDEST_HEAD or K % 8:
        return f"heads of width {K}, which is no multiple of 8 up to {WIDEST_HEAD}"
    if T % 2:
        return f"a row of {T} tokens, an odd number"
    if visibility.segments is not None:
        return "documents of a packed row"
    if visibility.prefix is not None or visibility.key_segments is not None:
        return "a prefix or keys of other tokens"
    if visibility.window is not None and not isinstance(visibility.window, int):
        return "a window that differs by layer under a scan"
    return None


def _cudnn(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visibility: Visibility
) -> jax.Array:
    """The same by cuDNN's fused kernel. No mask array: it would cost the kernel and the memory."""
    window = visibility.window
    if window is not None and window >= q_BTHK.shape[1]:
        window = None  # every key that is not behind the query
    return jax.nn.dot_product_attention(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        is_causal=True,
        local_window_size=None if window is None else (int(window) - 1, 0),
        implementation="cudnn",
    )


def _causal_blocks(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visibility: Visibility
) -> jax.Array:
    """The same in blocks of queries, unrolled: a block never meets the keys behind its end.

    With a prefix, which may be the whole row, it meets them all.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BGRTK = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4) * K**-0.5
    k_BGSK, v_BGSK = (a.transpose(0, 2, 1, 3) for a in (k_BSGK, v_BSGK))
    mask_BTS = visible(visibility, T, T)
    out_BGRTK = _blocks(visibility.prefix is not None, q_BGRTK, k_BGSK, v_BGSK, mask_BTS)
    return out_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(whole, q_BGRTK, k_BGSK, v_BGSK, mask_BTS):
    return _blocks_forward(whole, q_BGRTK, k_BGSK, v_BGSK, mask_BTS)[0]


def _blocks_forward(whole, q_BGRTK, k_BGSK, v_BGSK, mask_BTS):
    """Keeps e = exp(score - max) and 1 / sum(e) of every row: the softmax is their product."""
    dtype = at_least_float32(q_BGRTK.dtype)
    k_BGKS = _turned(k_BGSK)
    outs, kept = [], []
    for first, end, keys in _cuts(q_BGRTK.shape[3], whole):
        q_BGNK = _rows(q_BGRTK, first, end)
        scores = jnp.einsum(
            "bgnk,bgks->bgns", q_BGNK, k_BGKS[..., :keys], preferred_element_type=dtype
        )
        shape = (*scores.shape[:2], -1, end - first, keys)
        seen = mask_BTS[:, None, None, first:end, :keys]
        scores = jnp.where(seen, scores.reshape(shape), jnp.finfo(dtype).min).reshape(scores.shape)
        e_BGNS = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        share_BGN1 = 1 / e_BGNS.sum(axis=-1, keepdims=True)
        e_BGNS = e_BGNS.astype(v_BGSK.dtype)
        out = jnp.einsum("bgns,bgsk->bgnk", e_BGNS, v_BGSK[:, :, :keys])
        outs.append(_heads(out * share_BGN1.astype(out.dtype), q_BGRTK, first, end))
        kept.append((e_BGNS, share_BGN1))
    out_BGRTK = jnp.concatenate(outs, axis=3)
    return out_BGRTK, (q_BGRTK, k_BGSK, v_BGSK, kept, out_BGRTK)


def _blocks_backward(whole, saved, dout_BGRTK):
    """With d = dout / sum(e): ds = e (d v' - d . out), dq = ds k, dk = ds' q, dv = e' d.

    dk and dv are made turned, [K, S]: then the large operand of no product is transposed.
    """
    q_BGRTK, k_BGSK, v_BGSK, kept, out_BGRTK = saved
    S, dtype = k_BGSK.shape[2], at_least_float32(q_BGRTK.dtype)
    v_BGKS = _turned(v_BGSK)
    dq, dk, dv = [], [], []
    for (first, end, keys), (e_BGNS, share_BGN1) in zip(_cuts(S, whole), kept, strict=True):
        d_BGNK = _rows(dout_BGRTK, first, end).astype(dtype) * share_BGN1
        along_BGN1 = (d_BGNK * _rows(out_BGRTK, first, end).astype(dtype)).sum(-1, keepdims=True)
        d_BGNK = d_BGNK.astype(v_BGSK.dtype)
        dp_BGNS = jnp.einsum(
            "bgnk,bgks->bgns", d_BGNK, v_BGKS[..., :keys], preferred_element_type=dtype
        )
        ds_BGNS = (e_BGNS.astype(dtype) * (dp_BGNS - along_BGN1)).astype(q_BGRTK.dtype)
        dq_BGNK = jnp.einsum("bgns,bgsk->bgnk", ds_BGNS, k_BGSK[:, :, :keys])
        dq.append(_heads(dq_BGNK, q_BGRTK, first, end))
        q_BGKN = _turned(_rows(q_BGRTK, first, end))
        rest = [(0, 0)] * 3 + [(0, S - keys)]
        dk.append(jnp.pad(jnp.einsum("bgkn,bgns->bgks", q_BGKN, ds_BGNS), rest))
        dv.append(jnp.pad(jnp.einsum("bgkn,bgns->bgks", _turned(d_BGNK), e_BGNS), rest))
    dk_BGKS, dv_BGKS = (functools.reduce(jnp.add, parts) for parts in (dk, dv))
    return jnp.concatenate(dq, axis=3), _turned(dk_BGKS), _turned(dv_BGKS), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _cuts(length: int, whole: bool) -> list[tuple[int, int, int]]:
    """Returns (first query, last query + 1, keys that they meet) of every block."""
    size = max(BLOCK, -(-length // MOST_BLOCKS))
    ends = [(first, min(first + size, length)) for first in range(0, length, size)]
    return [(first, end, length if whole else end) for first, end in ends]


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
