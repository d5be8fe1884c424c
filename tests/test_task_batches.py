"""Batches of a task: a function of seed and step, and of parts that processes read."""

import numpy as np
import pytest

from train.tasks.task import pad_rows, task_batches, task_evaluation_batches


def test_a_batch_is_a_function_of_seed_and_step():
    arrays = {"tokens": np.arange(10)[:, None], "labels": np.arange(10) % 2}
    one, two = (task_batches(arrays, seed=3, batch_size=4) for _ in range(2))
    for step in (7, 0, 3):  # in any order
        for name in arrays:
            np.testing.assert_array_equal(one[step][name], two[step][name])
    seen = np.concatenate([one[step]["tokens"][:, 0] for step in range(5)])
    for epoch in (seen[:10], seen[10:]):  # batches run on over the end of an epoch
        assert sorted(epoch) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
    other = task_batches(arrays, seed=4, batch_size=4)
    assert any(list(other[s]["tokens"][:, 0]) != list(one[s]["tokens"][:, 0]) for s in range(2))
    np.testing.assert_array_equal(one[1]["labels"], one[1]["tokens"][:, 0] % 2)


def test_processes_read_parts_of_the_same_batch():
    arrays = {"tokens": np.arange(10)[:, None]}
    whole = task_batches(arrays, seed=0, batch_size=4)[5]["tokens"]
    parts = [
        task_batches(arrays, seed=0, batch_size=4, rows=slice(n, n + 2))[5]["tokens"]
        for n in (0, 2)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    for rows, size in ((slice(0, 2), 2), (None, 4)):
        batches = list(task_evaluation_batches(arrays, batch_size=4, rows=rows))
        assert [len(batch["tokens"]) for batch in batches] == [size] * 3
    assert batches[-1]["tokens"][:, 0].tolist() == [8, 9, 0, 0]


def test_nothing_to_draw_from_is_refused():
    for arrays in ({"tokens": np.zeros((0, 4))}, {"tokens": np.zeros(3), "labels": np.zeros(2)}):
        with pytest.raises(ValueError, match="as many examples"):
            task_batches(arrays, seed=0, batch_size=2)
    with pytest.raises(ValueError, match="1 to 2 fit"):
        pad_rows([[1, 2, 3]], 2)


# Rows
