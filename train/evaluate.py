"""Evaluation on a whole held-out split: every token counts once and alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

from train.plugs import PyTree, State

Sums = dict[str, dict[str, jax.Array]]


def evaluate(
    step: Callable[[State, PyTree, Any], Sums],
    state: State,
    frozen: PyTree,
    batches: Iterable[dict[str, Any]],
    text_bytes: int | None = None,
) -> dict[str, float]:
    """Returns the mean of each loss term, "loss" for the cross-entropy, and bits per byte.

    Args:
      step: compiled, from `train.step.make_evaluation_step`.
      state: with the parameters.
      frozen: what does not train.
      batches: of one shape; positions with weight 0 do not count.
      text_bytes: UTF-8 bytes of the text that the tokens stand for.

    Raises:
      ValueError: there was no batch, or no term is the cross-entropy.
    """
    totals: dict[str, list[float]] = {}
    waiting: list[Sums] = []

    def add(sums: Sums) -> None:
        for name, pair in jax.device_get(sums).items():
            entry = totals.setdefault(name, [0.0, 0.0])
            entry[0] += float(pair["total"])
            entry[1] += float(pair["count"])

    for batch in batches:
        if len(waiting) == 2:  # as in the loop: a bounded number in flight
            add(waiting.pop(0))
        waiting.append(step(state, frozen, batch))
    for sums in waiting:
        add(sums)
    if "cross_entropy" not in totals:
        found = f"the terms are {', '.join(totals)}" if totals else "there was no batch"
        raise ValueError(f"evaluation reports the mean cross-entropy, but {found}")
    means = {name: total / max(count, 1.0) for name, (total, count) in totals.items()}
    nats, count = totals["cross_entropy"]
    means = {"loss": means["cross_entropy"], "tokens": count, **means}
    if text_bytes:
        means["bits_per_byte"] = nats / math.log(2) / text_bytes
    return means
