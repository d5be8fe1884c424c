"""Batches of tokens: batch number `step` is a pure function of (seed, step).

A split is cut into windows of T + 1 tokens that overlap by one, so that every token but the first
is a target once; what does not fill a window at the end is left out. The windows are shuffled anew
in each epoch, the splits of a mixture are interleaved by their weights, and the batches are taken
from that endless row one after another. Nothing is kept in memory but the batch: the order is
computed (Grain's index shuffle), and the tokens are read from the memory-mapped split.

B: rows, T: tokens in a row.
"""

from __future__ import annotations

import sys
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from train.corpus import Split

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]
Boundaries = Literal["ignore", "mask"]

MAX_WINDOWS = 2**32  # Grain's index shuffle counts in 32 bits
# A batch takes well under a millisecond to make: one thread is ahead of any model, two also
# while a page of the memory map is fetched from the disk.
PREFETCH_THREADS, PREFETCH_BATCHES = 2, 4


def windows_per_epoch(splits: Sequence[tuple[Split, float]], window_length: int) -> int:
    """Windows until the first of the splits has been read once (for one split: its windows).

    Args:
        splits: with their weights, as for ``batches``.
        window_length: predicted tokens in a window.
    """
    weights = _check_splits(splits, window_length)
    counts = [(len(split.tokens) - 1) // window_length for split, _ in splits]
    return int(min(count / weight for count, weight in zip(counts, weights, strict=True)))


def batches(
    splits: Sequence[tuple[Split, float]],
    *,
    seed: int,
    sequence_length: int,
    batch_size: int | Callable[[int], int],
    document_boundaries: Boundaries = "ignore",
    window_length: int | None = None,
    rows: slice | None = None,
) -> grain.MapDataset:
    """The endless dataset whose element `step` is the batch of that step.

    Args:
        splits: what to draw from, each with a positive weight: its share of the windows.
        seed: of the order, any integer >= 0.
        sequence_length: T.
        batch_size: windows of a batch, or a cheap pure function step -> windows; batch `step` takes
            those that follow the windows of all steps before it.
        document_boundaries: "ignore": rows run on over the ends of documents. "mask": the batch
            also has `segments`, from 1 in each row, and `positions`, from 0 in each segment; a
            document's first token has weight 0, for nothing before it is seen.
        window_length: a multiple of T: each window is cut into rows of T (B = windows times their
            quotient), so that with shorter rows the same tokens arrive in the same order. By
            default T.
        rows: the part of the B rows that this process reads, with a length that divides B. It is
            meant for the batch of step 0: of a larger batch it is the same share.

    Returns:
        A dataset of dicts: `tokens`, `targets` int32 [B, T], `weights` float32 [B, T] (0: no loss),
        and with "mask" `segments`, `positions` int32 [B, T].

    Raises:
        ValueError: a size is not positive, a split is shorter than a window, a weight is not
            positive, T does not divide the window, `rows` does not divide the batch.

    >>> split = Split(np.arange(9, dtype=np.uint16), np.array([0]), 9)
    >>> batch = batches([(split, 1.0)], seed=0, sequence_length=4, batch_size=2)[0]
    >>> sorted(zip(batch["tokens"][:, 0].tolist(), batch["targets"][:, -1].tolist()))
    [(0, 4), (4, 8)]
    """
    import grain

    window = sequence_length if window_length is None else window_length
    _check_positive(sequence_length=sequence_length, window_length=window)
    if window % sequence_length:
        raise ValueError(
            f"window_length {window} is not a multiple of sequence_length {sequence_length}:"
            f" windows are cut into whole rows"
        )
    if seed < 0:
        raise ValueError(f"the seed must be >= 0, not {seed}")
    weights = _check_splits(splits, window)
    _check_boundaries(document_boundaries)
    rows_per_window = window // sequence_length
    windows_of = _running_windows(batch_size)
    part = _part_of(rows, windows_of(0)[1] * rows_per_window)
    part(windows_of(0)[1] * rows_per_window)

    def windows(index: int) -> grain.MapDataset:
        count = (len(splits[index][0].tokens) - 1) // window
        # Grain shuffles epoch e with this seed + e: drawn apart for every (seed, split), or seed
        # s + 1 would begin with the second epoch of seed s.
        own_seed = int(np.random.SeedSequence((seed, index)).generate_state(1)[0])
        order = grain.MapDataset.range(count).shuffle(seed=own_seed).repeat()
        return order.map(lambda number: (index, number % count))

    order = grain.MapDataset.mix([windows(index) for index in range(len(splits))], weights)

    def batch_at(step: int) -> Batch:
        start, count = windows_of(step)
        taken = []
        for row in part(count * rows_per_window):
            index, number = order[start + row // rows_per_window]
            offset = number * window + row % rows_per_window * sequence_length
            taken.append((splits[index][0], offset))
        return _batch(taken, sequence_length, len(taken), document_boundaries)

    return grain.MapDataset.range(sys.maxsize).map(batch_at)


def prefetched(dataset: grain.MapDataset, start: int, stop: int) -> Iterator[Batch]:
    """Batches of steps `start` to `stop` in order, made ahead of use in threads.

    Closing the iterator (or leaving it to be collected) ends the threads.

    Raises:
        ValueError: not 0 <= start <= stop.
    """
    import grain

    if not 0 <= start <= stop:
        raise ValueError(f"steps from {start} to {stop}: needed are 0 <= start <= stop")
    options = grain.ReadOptions(num_threads=PREFETCH_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)

    def iterate() -> Iterator[Batch]:
        iterator = iter(dataset[start:stop].to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()

    return iterate()


def evaluation_batches(
    split: Split,
    *,
    sequence_length: int,
    batch_size: int,
    stride: int | None = None,
    document_boundaries: Boundaries = "ignore",
    rows: slice | None = None,
) -> Iterator[Batch]:
    """The whole split in order, every token but the first predicted exactly once.

    Args:
        split: at least two tokens.
        sequence_length: T.
        batch_size: B; what is missing in the last batch is padded with weight 0.
        stride: None: windows side by side. N <= T: windows T long begin N apart, and predict only
            what the one before has not: all but the first re-read T - N tokens of context (the
            sliding-window protocol).
        document_boundaries: as for ``batches``; with "mask", documents' first tokens have weight 0.
        rows: those of the B rows that this process reads; all by default.

    Raises:
        ValueError: a size is not positive, the stride exceeds T, the split has nothing to predict.

    >>> split = Split(np.arange(6, dtype=np.uint16), np.array([0]), 6)
    >>> for batch in evaluation_batches(split, sequence_length=3, batch_size=2, stride=1):
    ...     print(batch["targets"].tolist(), batch["weights"].tolist())
    [[1, 2, 3], [2, 3, 4]] [[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]
    [[3, 4, 5], [0, 0, 0]] [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    step = sequence_length if stride is None else stride
    _check_positive(sequence_length=sequence_length, batch_size=batch_size, stride=step)
    _check_boundaries(document_boundaries)
    if step > sequence_length:
        raise ValueError(
            f"stride {step} is more than sequence_length {sequence_length}: tokens between windows"
            " would never be predicted"
        )
    targets = len(split.tokens) - 1
    if targets < 1:
        raise ValueError(f"a split of {len(split.tokens)} tokens has nothing to predict: give 2")
    count = 1 + -(-max(targets - sequence_length, 0) // step)

    def iterate() -> Iterator[Batch]:
        for first in range(0, count, batch_size):
            own = range(first, first + batch_size)[rows or slice(None)]
            windows = range(own.start, max(own.start, min(own.stop, count)))
            taken = [(split, window * step) for window in windows]
            batch = _batch(taken, sequence_length, len(own), document_boundaries)
            for row, window in enumerate(windows):
                if window:  # context, predicted by the window before
                    batch["weights"][row, : sequence_length - step] = 0
            yield batch

    return iterate()


def _batch(
    taken: Sequence[tuple[Split, int]], length: int, size: int, boundaries: Boundaries
) -> Batch:
    """Rows of `length` tokens from offsets of splits, padded to `size` rows with weight 0."""
    block = np.zeros((size, length + 1), np.int32)
    weights = np.zeros((size, length), np.float32)
    segments = np.zeros((size, length + 1), np.int32)  # 0 is padding
    positions = np.zeros((size, length + 1), np.int32)
    for row, (split, offset) in enumerate(taken):
        window = np.asarray(split.tokens)[offset : offset + length + 1]
        block[row, : len(window)] = window
        weights[row, : len(window) - 1] = 1
        if boundaries == "mask":
            first, last = np.searchsorted(split.starts, (offset + 1, offset + len(window)))
            starts = np.asarray(split.starts)[first:last] - offset  # those after the row's first
            begins = np.zeros(len(window), np.int32)
            begins[starts] = 1
            segments[row, : len(window)] = 1 + np.cumsum(begins)
            begins[starts] = starts
            here = np.arange(len(window)) - np.maximum.accumulate(begins)
            positions[row, : len(window)] = here
            weights[row, starts - 1] = 0
    batch = {
        "tokens": np.ascontiguousarray(block[:, :-1]),
        "targets": np.ascontiguousarray(block[:, 1:]),
        "weights": weights,
    }
    if boundaries == "mask":
        batch["segments"] = np.ascontiguousarray(segments[:, :-1])
        batch["positions"] = np.ascontiguousarray(positions[:, :-1])
    return batch


def _running_windows(batch_size: int | Callable[[int], int]) -> Callable[[int], tuple[int, int]]:
    """step -> (windows of all steps before it, windows of the step)."""
    if not callable(batch_size):
        fixed = batch_size
        _check_positive(batch_size=fixed)
        return lambda step: (step * fixed, fixed)
    schedule = batch_size
    starts = array("q", [0])  # the running sum as far as it was asked for: 8 bytes per step
    lock = threading.Lock()  # prefetch asks from several threads

    def start_and_count(step: int) -> tuple[int, int]:
        with lock:
            while len(starts) < step + 2:
                at = len(starts) - 1
                count = schedule(at)
                if int(count) != count or count < 1:
                    raise ValueError(
                        f"the batch schedule gives {count!r} at step {at}: it must give a positive"
                        " whole number of windows"
                    )
                starts.append(starts[-1] + int(count))
            return starts[step], starts[step + 1] - starts[step]

    return start_and_count


def _part_of(rows: slice | None, first: int) -> Callable[[int], range]:
    """Rows of this process in a batch, by the batch's rows; `first` is those of step 0."""
    if rows is None:
        return range
    start, stop, stride = rows.indices(first)
    own = stop - start
    reaches = rows.stop is not None and rows.stop > first
    if stride != 1 or own < 1 or reaches or first % own or start % own:
        raise ValueError(
            f"rows {rows} of a batch of {first}: it must be one of its equal parts, such as"
            f" slice(0, {first // 2 or 1})"
        )

    def part(size: int) -> range:
        if size * own % first:
            raise ValueError(
                f"rows {rows} are {own}/{first} of the batch of step 0, but a batch of {size} rows"
                f" cannot be divided so: batches must be multiples of {first // own} rows"
            )
        return range(size * start // first, size * stop // first)

    return part


def _check_positive(**sizes: Any) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name} must be a positive whole number, not {size!r}")


def _check_boundaries(boundaries: str) -> None:
    if boundaries not in ("ignore", "mask"):
        raise ValueError(f"document_boundaries must be 'ignore' or 'mask', not {boundaries!r}")


def _check_splits(splits: Sequence[tuple[Split, float]], window: int) -> list[float]:
    """The weights, normalised."""
    _check_positive(window_length=window)
    if not splits:
        raise ValueError("a mixture of no splits: give at least one, with its weight")
    for number, (split, weight) in enumerate(splits):
        tokens = len(split.tokens)
        if not 0 < weight < float("inf"):
            raise ValueError(f"split {number} has weight {weight}: it must be positive and finite")
        if tokens < window + 1:
            raise ValueError(
                f"split {number} has {tokens} tokens, fewer than one window of {window} + 1:"
                " choose a shorter sequence or give more text"
            )
        if (tokens - 1) // window >= MAX_WINDOWS:
            raise ValueError(
                f"split {number} has {(tokens - 1) // window} windows; {MAX_WINDOWS} and more"
                " cannot be shuffled: choose longer windows"
            )
    total = sum(weight for _, weight in splits)
    return [weight / total for _, weight in splits]
