"""Several examples in one row, apart from each other: less padding.

A row has examples one after another, with `segments` from 1, 0 being padding, and positions that
start anew in each. Which examples share a row is a pure function of their sizes.

Shapes: N rows, T length of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

OPEN_ROWS = (
    64  # rows that are looked through for room; with 64 more of them fill less than 1 % more
)


def pack(sizes: Sequence[tuple[int, ...]], capacity: int) -> list[list[int]]:
    """Returns rows of examples, by number: each goes where the least room is left that holds it.

    Args:
      sizes: of each example, one number for each sequence that it has (source and target, say);
        each sequence has a row of its own, filled in step with the others.
      capacity: of a row.

    Raises:
      ValueError: an example that does not fit into a row.

    >>> sorted(sorted(row) for row in pack([(3,), (2,), (2,), (1,)], 4))
    [[0, 3], [1, 2]]
    """
    sizes_NK = np.array(sizes, np.int64).reshape(len(sizes), -1)
    if len(sizes) and (widest := sizes_NK.max(axis=1)).max() > capacity:
        number = int(widest.argmax())
        raise ValueError(
            f"example {number} takes {widest[number]} places, and a row has {capacity}"
        )
    rows: list[list[int]] = []
    of_open: list[int] = []  # numbers of the open rows
    no_room = 1 + capacity * sizes_NK.shape[1]
    room_OK = np.zeros((OPEN_ROWS, sizes_NK.shape[1]), np.int64)  # of rows not yet open: none
    # Drawn once: long examples must not come together.
    for number in np.random.default_rng(0).permutation(len(sizes)).tolist():
        size_K = sizes_NK[number]
        fits_O = (room_OK >= size_K).all(axis=1)
        at = int(np.where(fits_O, room_OK.sum(axis=1), no_room).argmin())
        if not fits_O[at]:
            if len(of_open) < OPEN_ROWS:
                at = len(of_open)
                of_open.append(len(rows))
            else:  # the fullest closes
                at = int(room_OK.min(axis=1).argmin())
                of_open[at] = len(rows)
            room_OK[at] = capacity
            rows.append([])
        rows[of_open[at]].append(number)
        room_OK[at] -= size_K
    return rows


def fill(
    rows: Sequence[Sequence[int]], sequences: Sequence[np.ndarray], length: int
) -> dict[str, np.ndarray]:
    """Returns packed sequences as `tokens`, `segments` and `positions`, int32 [N, T].

    Args:
      rows: from `pack`.
      sequences: ids of each example.
      length: T.

    >>> fill([[1, 0]], [np.array([7]), np.array([5, 6])], 4)["segments"].tolist()
    [[1, 1, 2, 0]]
    """
    arrays = {
        name: np.zeros((len(rows), length), np.int32)
        for name in ("tokens", "segments", "positions")
    }
    for at, row in enumerate(rows):
        start = 0
        for segment, number in enumerate(row, start=1):
            ids = sequences[number]
            place = slice(start, start + len(ids))
            arrays["tokens"][at, place] = ids
            arrays["segments"][at, place] = segment
            arrays["positions"][at, place] = np.arange(len(ids))
            start += len(ids)
    return arrays


def alone(sequences: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Returns the same with one sequence a row.

    >>> alone([np.array([7]), np.array([5, 6])], 2)["tokens"].tolist()
    [[7, 0], [5, 6]]
    """
    return fill([[number] for number in range(len(sequences))], sequences, length)
