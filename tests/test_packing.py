"""Packing: nothing is lost, nothing overflows, little is padding."""

import numpy as np
import pytest

from train.packing import fill, pack


def test_every_example_is_in_one_row_and_rows_hold_what_they_have_room_for():
    draw = np.random.default_rng(3)
    sizes = [tuple(pair) for pair in draw.integers(1, 30, (500, 2)).tolist()]
    rows = pack(sizes, 64)
    assert sorted(n for row in rows for n in row) == list(range(500))
    filled = np.array([np.sum([sizes[n] for n in row], axis=0) for row in rows])
    assert filled.max() <= 64
    assert filled.sum() / (len(rows) * 2 * 64) > 0.85
    assert pack(sizes, 64) == rows


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="example 1 takes 9 places, and a row has 8"):
        pack([(2, 2), (3, 9)], 8)


def test_filled_rows_give_the_sequences_back():
    sequences = [np.arange(1, n + 1) for n in (3, 5, 2)]
    rows = [[2, 0], [1]]
    laid = fill(rows, sequences, 6)
    for at, row in enumerate(rows):
        for segment, number in enumerate(row, start=1):
            here = laid["segments"][at] == segment
            np.testing.assert_array_equal(laid["tokens"][at, here], sequences[number])
            np.testing.assert_array_equal(laid["positions"][at, here], sequences[number] - 1)
    assert (laid["tokens"] > 0).sum() == 10
