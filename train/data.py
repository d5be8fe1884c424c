"""Batches: batch number `step` is a pure function of (seed, step), whatever reads it.

Windows of T + 1 tokens that overlap by one are cut from a split, shuffled anew each epoch, mixed
by weight, and dealt out in order: step i takes windows start(i) to start(i) + n(i), start being the
running sum of the batch sizes before it. Resuming is a step number.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from train.corpus import Split

Batch = dict[str, np.ndarray]
Boundaries = Literal["ignore", "mask"]


def windows_in(split: Split, sequence_length: int) -> int:
    """Returns the number of whole windows, at least 1.

    Raises:
      ValueError: the split is shorter than one window.

    >>> windows_in(Split(np.arange(9), np.array([0]), 9), 4)
    2
    """
    count = (len(split.tokens) - 1) // sequence_length
    if count < 1:
        raise ValueError(
            f"a window takes {sequence_length} tokens and their successor; the split has "
            f"{len(split.tokens)}: shorten sequence_length or give more text"
        )
    return count


def batches(
    splits: Sequence[tuple[Split, float]],
    *,
    seed: int,
    sequence_length: int,
    batch_size: int | Callable[[int], int],
    window_length: int | None = None,
    document_boundaries: Boundaries = "ignore",
    rows: slice | None = None,
) -> Any:
    """Returns a `grain.MapDataset` whose item `step` is the batch of that step.

    A batch holds `tokens`, `targets` int32 [B, T], `weights` float32 [B, T], and with "mask" also
    `segments` and `positions` int32 [B, T].

    Args:
      splits: (split, weight) pairs; weights are relative.
      seed: of the order.
      sequence_length: T.
      batch_size: rows B, or a function of the step.
      window_length: length that windows are shuffled at, a multiple of T, T by default: a phase of
        shorter sequences reads the same windows, each cut into several rows.
      document_boundaries: with "mask", positions start anew with each document and the first token
        of a document is not predicted from the one before.
      rows: those of the global batch that this process reads.

    Raises:
      ValueError: sizes that do not fit each other or the splits.

    >>> split = Split(np.arange(100, dtype=np.uint16), np.array([0]), 100)
    >>> data = batches([(split, 1.0)], seed=0, sequence_length=8, batch_size=2)
    >>> data[0]["tokens"].shape, bool((data[3]["tokens"] + 1 == data[3]["targets"]).all())
    ((2, 8), True)
    """
    import grain

    length = sequence_length if window_length is None else window_length
    if sequence_length < 1 or length % sequence_length:
        raise ValueError(f"sequence_length {sequence_length} must divide window_length {length}")
    cut = length // sequence_length
    if not splits:
        raise ValueError("no data: give at least one split")
    mixed = _order(grain, splits, seed, length)
    first_row = _first_row(batch_size)

    def batch(step: int) -> Batch:
        start, end = first_row(step), first_row(step + 1)
        if end - start < 1:
            raise ValueError(f"batch_size of step {step} is {end - start}; it must be at least 1")
        wanted = range(start, end)[rows] if rows is not None else range(start, end)
        found = []
        for row in wanted:
            which, window = mixed[row // cut]
            begin = window * length + (row % cut) * sequence_length
            found.append(_row(splits[which][0], begin, sequence_length, document_boundaries))
        return {name: np.stack([each[name] for each in found]) for name in found[0]}

    # Steps have no end: an item is made from its number alone.
    return grain.MapDataset.range(_MANY).map(batch)


_MANY = 1 << 40  # more steps than any run has, and still an index that Grain takes


def prefetched(data: Any, start: int, stop: int) -> Iterator[Batch]:
    """Yields the batches of steps start to stop - 1 in order, read ahead by two threads.

    >>> split = Split(np.arange(100, dtype=np.uint16), np.array([0]), 100)
    >>> data = batches([(split, 1.0)], seed=0, sequence_length=8, batch_size=2)
    >>> len(list(prefetched(data, 5, 8)))
    3
    """
    import grain

    # Batches are small beside a step: two threads and a few batches ahead hide the reading.
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    yield from data[start:stop].to_iter_dataset(options)


def evaluation_batches(
    split: Split, *, sequence_length: int, batch_size: int, stride: int | None = None
) -> Iterator[Batch]:
    """Yields a split from end to end: every token but the very first is predicted exactly once.

    All batches have one shape; what pads the last ones has weight 0.

    Args:
      split: the tokens.
      sequence_length: T.
      batch_size: B.
      stride: tokens by which windows advance: each reads T - stride tokens of context again, which
        carry no weight. None for T, windows side by side.

    Raises:
      ValueError: a stride outside 1 to T, or a split of fewer than two tokens.

    >>> split = Split(np.arange(10), np.array([0]), 10)
    >>> found = list(evaluation_batches(split, sequence_length=4, batch_size=2))
    >>> float(sum(batch["weights"].sum() for batch in found))
    9.0
    """
    T = sequence_length
    stride = T if stride is None else stride
    if not 1 <= stride <= T:
        raise ValueError(f"stride is {stride}; it must lie between 1 and sequence_length {T}")
    predicted = len(split.tokens) - 1
    if predicted < 1:
        raise ValueError(f"a split of {len(split.tokens)} tokens leaves nothing to predict")
    # The first window predicts T tokens, each later one the `stride` that follow.
    starts = range(0, max(predicted - T, 0) + stride, stride)
    for at in range(0, len(starts), batch_size):
        batch = {
            "tokens": np.zeros((batch_size, T), np.int32),
            "targets": np.zeros((batch_size, T), np.int32),
            "weights": np.zeros((batch_size, T), np.float32),
        }
        for row, start in enumerate(starts[at : at + batch_size]):
            window = np.asarray(split.tokens[start : start + T + 1], np.int32)
            fresh = 0 if start == 0 else T - stride
            batch["tokens"][row, : len(window) - 1] = window[:-1]
            batch["targets"][row, : len(window) - 1] = window[1:]
            batch["weights"][row, fresh : len(window) - 1] = 1
        yield batch


def _order(grain: Any, splits: Sequence[tuple[Split, float]], seed: int, length: int) -> Any:
    """Returns the endless order of (split, window) pairs."""
    parts = []
    for which, (split, _) in enumerate(splits):
        count = windows_in(split, length)
        order = grain.MapDataset.range(count).seed(seed + which).shuffle().repeat()
        parts.append(order.map(lambda window, which=which: (which, int(window))))
    if len(parts) == 1:
        return parts[0]
    total = sum(weight for _, weight in splits)
    return grain.MapDataset.mix(parts, weights=[weight / total for _, weight in splits])


def _first_row(batch_size: int | Callable[[int], int]) -> Callable[[int], int]:
    """Returns start(step), the rows before a step; sums of a schedule are remembered."""
    if not callable(batch_size):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        return lambda step: step * batch_size
    sums, lock = [0], threading.Lock()  # threads read ahead

    def start(step: int) -> int:
        with lock:
            while len(sums) <= step:
                sums.append(sums[-1] + batch_size(len(sums) - 1))
        return sums[step]

    return start


def _row(split: Split, begin: int, length: int, boundaries: Boundaries) -> Batch:
    window = np.asarray(split.tokens[begin : begin + length + 1], np.int32)
    row = {
        "tokens": window[:-1],
        "targets": window[1:],
        "weights": np.ones(length, np.float32),
    }
    if boundaries == "ignore":
        return row
    # Documents that start inside the window, as places in it.
    first = bisect.bisect_right(split.starts, begin)
    last = bisect.bisect_right(split.starts, begin + length)
    starts = np.asarray(split.starts[first:last]) - begin
    places = np.arange(length)
    segments = np.searchsorted(starts, places, side="right")
    origins = np.concatenate([[0], starts])[segments]
    row["weights"] = np.where(np.isin(places + 1, starts), 0, 1).astype(np.float32)
    row["segments"] = segments.astype(np.int32)
    row["positions"] = (places - origins).astype(np.int32)
    return row
