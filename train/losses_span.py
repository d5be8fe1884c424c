"""The loss of a span: where it starts and where it ends among the places of a passage.

    loss = (-log softmax_P(s)[start] - log softmax_P(e)[end]) / 2

over the places P of the passage alone (Seo et al. 2017, arXiv:1611.01603, equation 5; Devlin et al.
2019, arXiv:1810.04805, section 4.2), to which the separator before the passage belongs: it stands
for "not in this window", so that scores of different windows can be compared.

Batch: `lengths` int32 [B], real tokens of each row; `first` int32 [B], place of the passage's first
token, the separator before it; `starts`, `ends` int32 [B], places of the right span.

Shapes: B rows, T time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from train.losses_tasks import row_count
from train.plugs import Batch, Context, LossTerm, View

SpanLogits = Callable[[View, Batch, Context], jax.Array]
"""`(view, batch, context) -> [B, T, 2]`: how well a span starts, and ends, at each place."""


def places_of(batch: Batch) -> jax.Array:
    """Returns the place of each token in its row, [B, T], whatever order the tokens are in."""
    tokens = batch["tokens"]
    return batch.get("positions", jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape))


def span_log_probabilities(logits_BT2: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probabilities of starts and of ends, [B, T] each, very low off the passage.

    >>> batch = {"tokens": jnp.zeros((1, 4)), "first": jnp.array([2]), "lengths": jnp.array([4])}
    >>> start_BT, _ = span_log_probabilities(jnp.zeros((1, 4, 2)), batch)
    >>> jnp.exp(start_BT).round(4).tolist()  # the separator and two places
    [[0.0, 0.33329999446868896, 0.33329999446868896, 0.33329999446868896]]
    """
    places_BT = places_of(batch)
    on_BT = (places_BT >= batch["first"][:, None] - 1) & (places_BT < batch["lengths"][:, None])
    low = jnp.finfo(logits_BT2.dtype).min
    masked_BT2 = jnp.where(on_BT[..., None], logits_BT2, low)
    log_p_BT2 = jax.nn.log_softmax(masked_BT2, axis=1)
    return log_p_BT2[..., 0], log_p_BT2[..., 1]


def span_losses(logits_BT2: jax.Array, batch: Batch, label_smoothing: float = 0.0) -> jax.Array:
    """Returns the loss of each row, [B]; 0 for a row of padding.

    With label smoothing e the right place has 1 - e of the target, and e is spread evenly over the
    places of the passage.
    """
    places_BT = places_of(batch)
    on_BT = (places_BT >= batch["first"][:, None] - 1) & (places_BT < batch["lengths"][:, None])
    total_B = jnp.zeros(logits_BT2.shape[0], logits_BT2.dtype)
    count_B = jnp.maximum(on_BT.sum(axis=1), 1).astype(logits_BT2.dtype)
    start_BT, end_BT = span_log_probabilities(logits_BT2, batch)
    for log_p_BT, right in ((start_BT, "starts"), (end_BT, "ends")):
        loss_B = -jnp.where(places_BT == batch[right][:, None], log_p_BT, 0).sum(axis=1)
        if label_smoothing:
            even_B = -jnp.where(on_BT, log_p_BT, 0).sum(axis=1) / count_B
            loss_B = (1 - label_smoothing) * loss_B + label_smoothing * even_B
        total_B += loss_B / 2
    return jnp.where(batch["lengths"] > 0, total_B, jnp.zeros_like(total_B))


def span_cross_entropy(
    span_logits: SpanLogits, label_smoothing: float = 0.0, *, weight: Any = 1.0
) -> LossTerm:
    """The loss of the module's head, a row.

    Args:
      span_logits: what the logits are.
      label_smoothing: see `span_losses`.
      weight: a number or a function of the step.

    Raises:
      ValueError: smoothing out of [0, 1).

    >>> term = span_cross_entropy(lambda view, batch, context: jnp.zeros((1, 5, 2)))
    >>> batch = {"tokens": jnp.zeros((1, 5)), "first": jnp.array([2]), "lengths": jnp.array([5])}
    >>> batch |= {"starts": jnp.array([2]), "ends": jnp.array([3])}
    >>> round(float(term.total(None, batch, None)), 4)  # log 4
    1.3863
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 1")

    def total(view: View, batch: Batch, context: Context) -> jax.Array:
        return span_losses(span_logits(view, batch, context), batch, label_smoothing).sum()

    return LossTerm("span", total, row_count, weight, over="features")


def best_spans(
    start_BT: jax.Array, end_BT: jax.Array, batch: Batch, longest: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns first and last place of the best span of each row, and its score, [B] each.

    The best is the greatest `start[i] + end[j]`, `first <= i <= j < min(i + longest, lengths)`.
    Tokens have to be in order. Where the batch has `sentences`, int32 [B, T], both lie in one.

    Args:
      start_BT, end_BT: log-probabilities or logits.
      batch: with `first` and `lengths`.
      longest: tokens of a span at most.

    >>> batch = {"first": jnp.array([1]), "lengths": jnp.array([4])}
    >>> start_BT, end_BT = jnp.array([[9.0, 0, 1, 0]]), jnp.array([[9.0, 3, 0, 1]])
    >>> [float(array[0]) for array in best_spans(start_BT, end_BT, batch, 2)]
    [1.0, 1.0, 3.0]
    """
    B, T = start_BT.shape
    places_T = jnp.arange(T)
    low = jnp.finfo(start_BT.dtype).min / 4  # twice of it is still a number
    on_BT = (places_T[None] >= batch["first"][:, None]) & (
        places_T[None] < batch["lengths"][:, None]
    )
    start_BT, end_BT = (jnp.where(on_BT, score_BT, low) for score_BT in (start_BT, end_BT))
    sentences_BT = batch.get("sentences")

    def longer(best, extra):
        """Spans of `extra` more tokens than one: end scores shifted to where the span starts."""
        score_BT, extra_BT = best
        fits_BT = jnp.broadcast_to(places_T[None] + extra < T, (B, T))
        if sentences_BT is not None:
            fits_BT &= jnp.roll(sentences_BT, -extra, axis=1) == sentences_BT
        ends_BT = jnp.where(fits_BT, jnp.roll(end_BT, -extra, axis=1), jnp.full_like(end_BT, low))
        found_BT = start_BT + ends_BT
        better_BT = found_BT > score_BT
        chosen = (
            jnp.where(better_BT, found_BT, score_BT),
            jnp.where(better_BT, extra, extra_BT),
        )
        return chosen, None

    none = (start_BT + end_BT, jnp.zeros((B, T), jnp.int32))
    extras = jnp.arange(1, min(longest, T), dtype=jnp.int32)
    (score_BT, extra_BT), _ = jax.lax.scan(longer, none, extras)
    first_B = score_BT.argmax(axis=1)
    rows_B = jnp.arange(B)
    last_B = first_B + extra_BT[rows_B, first_B]
    return first_B.astype(jnp.int32), last_B.astype(jnp.int32), score_BT[rows_B, first_B]
