"""Keys and values that every query sees besides those of its own row: a trained prefix.

They lie beside the weights of an attention, `blocks/attention/prefix/k` and `.../v`, stacked as all
of a block is, and belong to no position: nothing turns them, no window and no document hides them,
and no place of a row or a cache is taken. What trains them, or computes them from a prompt, is for
`train.prompts` to say.

Shapes: B batch, T queries, S keys, P prefix, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from model.attention import Attention, Visibility, dot_product_attention, visible
from model.dropout import Dropout, dropped
from model.linear import at_least_float32

KEY = "prefix"
"""Name of the keys and values among the weights of an attention."""


def attend_with_prefix(
    attention: Attention,
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    visibility: Visibility,
    dropout: Dropout | None,
    prefix: Mapping[str, jax.Array],
) -> jax.Array:
    """softmax(q [p, k]' / sqrt(K)) [r, v] for a prefix of keys p and values r, seen by all queries.

    Args:
      attention: that of the model; only the plain one has room for a prefix.
      q_BTHK, k_BSGK, v_BSGK, visibility, dropout: see `model.attention.dot_product_attention`.
      prefix: "k" and "v", [P, G, K].

    Returns:
      [B, T, H, K].

    Raises:
      ValueError: the model has an attention of its own.

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> prefix = {"k": jnp.ones((5, 2, 4)), "v": jnp.zeros((5, 2, 4))}
    >>> y = attend_with_prefix(dot_product_attention, x, x, x, Visibility(), None, prefix)
    >>> [round(float(a), 3) for a in y[0, :, 0, 0]]  # 1 / 6, 2 / 7, 3 / 8
    [0.167, 0.286, 0.375]
    """
    if getattr(attention, "func", attention) is not dot_product_attention:
        raise ValueError(
            "these parameters have a trained prefix, which goes with the plain attention alone; "
            "leave the mesh axis context out, or give no other attention"
        )
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    P = prefix["k"].shape[0]

    def before(prefix_PGK: jax.Array, own_BSGK: jax.Array) -> jax.Array:
        shared = jnp.broadcast_to(prefix_PGK.astype(own_BSGK.dtype)[None], (B, P, G, K))
        return jnp.concatenate([shared, own_BSGK], axis=1).transpose(0, 2, 1, 3)

    k_BGSK, v_BGSK = before(prefix["k"], k_BSGK), before(prefix["v"], v_BSGK)
    q_BGRTK = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    dtype = at_least_float32(q_BTHK.dtype)
    scores = jnp.einsum(
        "bgrtk,bgsk->bgrts", q_BGRTK * K**-0.5, k_BGSK, preferred_element_type=dtype
    )
    own_BTS = visible(visibility, T, S)
    all_BTP = jnp.ones((*own_BTS.shape[:2], P), bool)
    mask = jnp.concatenate([all_BTP, own_BTS], axis=-1)[:, None, None]
    scores = jnp.where(mask, scores, jnp.finfo(dtype).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v_BGSK.dtype)
    probabilities = dropped(probabilities, dropout)
    out_BGRTK = jnp.einsum("bgrts,bgsk->bgrtk", probabilities, v_BGSK)
    return out_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)
