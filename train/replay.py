"""Replay: old text beside the rows of a task, so that the model keeps what it could do.

    loss = task + weight * (-log p of the old text, the mean over its tokens)

Rehearsal of old examples (Robins 1995), with the language model's own loss as LAMOL has it (Sun et
al. 2020, arXiv:1909.03329). Each row of a batch has old text beside it, `replay_tokens` and
`replay_targets` int32 [B, R], `replay_weights` float32 [B, R], so that what divides a batch
divides the old text with it. The model reads it in a pass of its own, with the same weights.

Shapes: B rows, R tokens of old text, N positions (B * R), D width.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from model.transformer import Transformer, features, head
from train.corpus import Split
from train.data import batches
from train.losses import cross_entropy
from train.plugs import Batch, Context, LossTerm, View

if TYPE_CHECKING:
    import grain

NAME = "replay"
ORDER = 1  # beside the seed, for the order of the old text
FIELDS = ("tokens", "targets", "weights")
DROPOUT_STREAM = 0x01D7  # folded into the step's key: apart from what the task draws from it


def with_old_text(
    dataset: grain.MapDataset,
    old: Split,
    *,
    seed: int,
    length: int,
    batch_size: int,
    rows: slice | None = None,
) -> grain.MapDataset:
    """Returns the dataset with old text beside the batch of each step, a function of (seed, step).

    Args:
      dataset: has the batch of a step under its number.
      old: text, in windows of R = `length`, shuffled anew in each epoch of its own.
      seed: of that order.
      length: R.
      batch_size: B.
      rows: those of the B rows that this process reads; all by default.

    Raises:
      ValueError: the text is shorter than a window, or a size is not positive.
    """
    import grain

    # Apart from the order of the rows, which is drawn from (seed, 0) too: with as many windows as
    # rows each would meet the same one in every epoch.
    own_seed = int(np.random.SeedSequence((seed, ORDER)).generate_state(1)[0])
    beside = batches(
        [(old, 1.0)], seed=own_seed, sequence_length=length, batch_size=batch_size, rows=rows
    )

    def batch_at(step: int) -> dict[str, Any]:
        text = beside[step]
        return dataset[step] | {f"{NAME}_{name}": text[name] for name in FIELDS}

    return grain.MapDataset.range(sys.maxsize).map(batch_at)


def replay(model: Transformer, weight: Any = 1.0) -> LossTerm:
    """The cross-entropy of the old text that lies beside a batch; all its logits at once.

    Args:
      model: that trains.
      weight: a number or a function of the step.
    """
    inner = cross_entropy()

    def text_of(batch: Batch) -> Batch:
        return {name: batch[f"{NAME}_{name}"] for name in FIELDS}

    def total(view: View, batch: Batch, context: Context) -> jax.Array:
        text = text_of(batch)
        key = context.rng if model.config.random else None
        if key is not None:
            key = jax.random.fold_in(key, DROPOUT_STREAM)
        final_BRD = features(model, view.weights, text["tokens"], dropout_key=key).final
        flat = {name: array.reshape(-1) for name, array in text.items()}
        final_ND = final_BRD.reshape(-1, final_BRD.shape[-1])
        logits_NV = head(model, view.weights, final_ND, padded=inner.padded)
        return inner.total(View(logits_NV, None, view.weights), flat, context)

    def count(batch: Batch) -> jax.Array:
        return inner.count(text_of(batch))

    return LossTerm(NAME, total, count, weight, over="features", reads_head=True)
