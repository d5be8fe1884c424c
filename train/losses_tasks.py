"""Losses of tasks: one value a row, from what a head makes of its features.

A row of padding has no tokens (`lengths` 0) and counts nothing.

Shapes: B rows, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model.dropout import Dropout, dropped
from train.plugs import Batch, Context, LossTerm, View

RowScores = Callable[[View, Batch, Context], jax.Array]
"""`(view, batch, context) -> [B, C]`, from the features of the batch."""

DROPOUT_STREAM = 0x7A5C  # folded into the step's key: apart from what the model draws from it


def row_count(batch: Batch) -> jax.Array:
    """The number of rows that are no padding.

    >>> float(row_count({"lengths": jnp.array([3, 1, 0])}))
    2.0
    """
    return (batch["lengths"] > 0).astype(jnp.float32).sum()


def row_cross_entropy(
    row_scores: RowScores, label_smoothing: float = 0.0, *, weight: Any = 1.0
) -> LossTerm:
    """-log softmax(scores)[label], a row; with label smoothing as in `train.losses.cross_entropy`.

    Args:
      row_scores: what the scores are.
      label_smoothing: e, the share of the target that all classes have alike.
      weight: a number or a function of the step.

    Raises:
      ValueError: smoothing out of [0, 1).

    >>> term = row_cross_entropy(lambda view, batch, context: jnp.zeros((1, 4)))
    >>> batch = {"labels": jnp.array([2]), "lengths": jnp.array([5])}
    >>> round(float(term.total(None, batch, None)), 4)  # log 4
    1.3863
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 1")

    def total(view: View, batch: Batch, context: Context) -> jax.Array:
        log_p_BC = jax.nn.log_softmax(row_scores(view, batch, context))
        right_BC = jax.nn.one_hot(batch["labels"], log_p_BC.shape[-1], dtype=log_p_BC.dtype)
        loss_B = -(right_BC * log_p_BC).sum(axis=-1)
        if label_smoothing:
            loss_B = (1 - label_smoothing) * loss_B - label_smoothing * log_p_BC.mean(axis=-1)
        return _over_rows(loss_B, batch)

    return LossTerm("classification", total, row_count, weight, over="features")


def row_squared_error(row_scores: RowScores, *, weight: Any = 1.0) -> LossTerm:
    """(score - value)^2, a row, for scores [B, 1] and `values` float32 [B].

    >>> term = row_squared_error(lambda view, batch, context: jnp.array([[3.0]]))
    >>> batch = {"values": jnp.array([1.0]), "lengths": jnp.array([5])}
    >>> float(term.total(None, batch, None))
    4.0
    """

    def total(view: View, batch: Batch, context: Context) -> jax.Array:
        scores_B = row_scores(view, batch, context)[:, 0]
        return _over_rows(jnp.square(scores_B - batch["values"].astype(scores_B.dtype)), batch)

    return LossTerm("regression", total, row_count, weight, over="features")


def dropped_features(x_BD: jax.Array, rate: float, context: Context) -> jax.Array:
    """Returns features with a share `rate` of them dropped, in training; see `model.dropout`.

    >>> dropped_features(jnp.ones((1, 2)), 0.5, Context(jnp.int32(0), None, {}, {}, {})).tolist()
    [[1.0, 1.0]]
    """
    if not rate or context.rng is None:
        return x_BD
    key = jax.random.fold_in(context.rng, DROPOUT_STREAM)
    return dropped(x_BD, Dropout(rate, key))


def _over_rows(loss_B: jax.Array, batch: Batch) -> jax.Array:
    """The sum over rows that are no padding, whatever the others hold."""
    return jnp.where(batch["lengths"] > 0, loss_B, jnp.zeros_like(loss_B)).sum()
