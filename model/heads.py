"""Heads of tasks: small matrices beside the model's parameters that read its features.

A classifier or regressor reads the features of one position of each row, or their mean:

    scores = pool(features) W,   W under `score/kernel`, [D, C]

as `GPT2ForSequenceClassification` has it, without a bias. Parameters of heads lie at the top of
the tree under the names in `HEADS`; the Transformer itself does not look at them.

Shapes: B batch, T time, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from model.linear import at_least_float32, linear

SCORE, SPAN = "score", "span"
HEADS = (SCORE, SPAN)
Pool = Literal["last", "mean"]
POOLS = ("last", "mean")
INIT_STD = 0.02  # as GPT-2 and its classifiers draw theirs


def init_head(key: jax.Array, width: int, outputs: int, dtype: Any) -> dict[str, jax.Array]:
    """Returns {"kernel": [D, C]}, drawn from a normal distribution.

    >>> init_head(jax.random.key(0), 8, 2, jnp.float32)["kernel"].shape
    (8, 2)
    """
    return {"kernel": INIT_STD * jax.random.normal(key, (width, outputs), dtype)}


def pool(
    final_BTD: jax.Array, lengths_B: jax.Array, how: Pool, positions_BT: jax.Array | None = None
) -> jax.Array:
    """Returns [B, D]: the features of each row's last real token, or the mean over its tokens.

    Args:
      final_BTD: features.
      lengths_B: int32, real tokens of each row, which come first; a row of none gives zeros.
      how: "last" or "mean".
      positions_BT: place of each token in its row where the rows are in another order.

    Raises:
      ValueError: an unknown way.

    >>> pool(jnp.arange(3.0).reshape(1, 3, 1), jnp.array([2]), "last").tolist()
    [[1.0]]
    """
    if how not in POOLS:
        raise ValueError(f"features are pooled by one of {', '.join(POOLS)}, not {how!r}")
    places_BT = jnp.arange(final_BTD.shape[1])[None] if positions_BT is None else positions_BT
    if how == "last":
        chosen_BT = places_BT == lengths_B[:, None] - 1
    else:
        chosen_BT = places_BT < lengths_B[:, None]
    # A product, not a gather: its gradient is no scatter, and time may lie over devices.
    sum_BD = jnp.einsum("btd,bt->bd", final_BTD, chosen_BT.astype(final_BTD.dtype))
    if how == "last":
        return sum_BD
    return sum_BD / jnp.maximum(lengths_B, 1)[:, None].astype(final_BTD.dtype)


def scores(params: Mapping[str, Any], pooled_BD: jax.Array) -> jax.Array:
    """Returns [B, C], at least float32, by the head under `score`."""
    scores_BC = linear(pooled_BD, params[SCORE]["kernel"])
    return scores_BC.astype(at_least_float32(scores_BC.dtype))


def heads_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the heads among the parameters."""
    return {name: tree for name, tree in params.items() if name in HEADS}


def without_heads(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of the language model alone.

    >>> without_heads({"score": 1, "blocks": 2})
    {'blocks': 2}
    """
    return {name: tree for name, tree in params.items() if name not in HEADS}
