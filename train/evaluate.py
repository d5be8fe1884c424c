"""Evaluation on a whole held-out split: every token counts once and alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

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


def gather(
    step: Callable[[State, PyTree, Any], dict[str, jax.Array]],
    state: State,
    frozen: PyTree,
    batches: Iterable[dict[str, Any]],
    count: int,
) -> dict[str, np.ndarray]:
    """Returns what comes out of each row, by name, in order.

    Args:
      step: compiled, from `train.step.make_output_step`.
      state: with the parameters.
      frozen: what does not train.
      batches: of one shape.
      count: rows that are no padding; those after them are left out.

    Raises:
      ValueError: there are fewer rows.
    """
    found: list[dict[str, np.ndarray]] = []
    waiting: list[dict[str, jax.Array]] = []
    for batch in batches:
        if len(waiting) == 2:  # as in the loop: a bounded number in flight
            found.append(jax.device_get(waiting.pop(0)))
        waiting.append(step(state, frozen, batch))
    found += jax.device_get(waiting)
    rows = sum(len(next(iter(part.values()))) for part in found)
    if rows < count:
        raise ValueError(f"{count} rows were expected, and {rows} came out")
    names = found[0] if found else {}
    return {name: np.concatenate([part[name] for part in found])[:count] for name in names}
