"""Batches: a pure function of (seed, step); windows once an epoch, tokens evaluated once."""

import threading
import time
from collections import Counter

import numpy as np
import pytest

from train.corpus import Split
from train.data import batches, evaluation_batches, prefetched, windows_per_epoch


def split_of(count, first=0, starts=(0,)):
    tokens = np.arange(first, first + count).astype(np.uint32)
    return Split(tokens, np.asarray(starts, np.int64), count)


def rows(dataset, steps):
    return np.concatenate([dataset[step]["tokens"] for step in steps])


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def make(split=None, *, seed=0, length=4, size=8, **options):
    splits = [(split if split is not None else split_of(1001), 1.0)]
    return batches(splits, seed=seed, sequence_length=length, batch_size=size, **options)


# Order


def test_a_batch_depends_on_seed_and_step_alone():
    one, two = make(seed=7), make(seed=7)
    forwards = [one[step] for step in range(40)]
    backwards = [two[step] for step in reversed(range(40))][::-1]
    ahead = list(prefetched(make(seed=7), 0, 40))
    later = list(prefetched(one, 25, 40))
    assert all(map(same, forwards, backwards))
    assert all(map(same, forwards, ahead))
    assert len(later) == 15
    assert all(map(same, forwards[25:], later))


def test_the_order_is_the_same_in_every_version():
    """A resumed run relies on it: a change here is a change of what runs are."""
    assert make(seed=3)[0]["tokens"][:, 0].tolist() == [832, 652, 332, 140, 368, 292, 472, 804]
    assert make(seed=3)[40]["tokens"][:, 0].tolist() == [76, 800, 836, 844, 132, 944, 136, 896]


def test_batches_have_the_interface_of_the_model():
    batch = make(document_boundaries="mask")[0]
    types = {key: (array.shape, array.dtype.name) for key, array in batch.items()}
    assert types == {
        "tokens": ((8, 4), "int32"),
        "targets": ((8, 4), "int32"),
        "weights": ((8, 4), "float32"),
        "segments": ((8, 4), "int32"),
        "positions": ((8, 4), "int32"),
    }
    assert all(array.flags.c_contiguous for array in batch.values())
    assert make()[0].keys() == {"tokens", "targets", "weights"}
    assert np.array_equal(batch["targets"], batch["tokens"] + 1)


@pytest.mark.parametrize("size", [1, 8, 7])  # 250 windows: batches that do and do not fit
def test_every_window_once_an_epoch_and_every_target_once(size):
    dataset = make(size=size)
    stream = rows(dataset, range(-(-500 // size)))[:500, 0]
    for epoch in (stream[:250], stream[250:]):
        assert sorted(epoch) == list(range(0, 1000, 4))
    assert not np.array_equal(stream[:250], stream[250:])
    targets = np.concatenate([dataset[step]["targets"].ravel() for step in range(250 // size)])
    assert len(set(targets.tolist())) == len(targets)


def test_the_tail_that_fills_no_window_is_left_out():
    assert windows_per_epoch([(split_of(1000), 1.0)], 4) == 249
    assert set(rows(make(split_of(1000), size=249), [0])[:, 0]) == set(range(0, 996, 4))


def test_seeds_differ_in_every_epoch():
    """Grain shuffles epoch e with seed + e: seed 1 must not begin with seed 0's second epoch."""
    orders = [rows(make(seed=seed, size=250), [e])[:, 0] for seed in range(4) for e in range(4)]
    agreement = [np.mean(a == b) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreement) < 0.1  # of 250 places about 1 agrees by chance


def test_a_big_seed_is_a_seed():
    assert not same(make(seed=2**40)[0], make(seed=0)[0])


def test_the_shuffle_spreads_neighbours():
    first = rows(make(split_of(40_001), size=1000), range(10))[:, 0] // 4
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.05  # five times 1/sqrt(10,000)
    assert np.all(np.abs(first.reshape(10, 1000).mean(1) / 4999.5 - 1) < 0.1)


# Mixtures


def test_mixtures_approach_their_weights_and_each_split_has_its_epochs():
    parts = [(split_of(401), 3.0), (split_of(4001, first=10_000), 1.0)]
    dataset = batches(parts, seed=0, sequence_length=4, batch_size=16)
    first = rows(dataset, range(50))[:, 0]
    own = first[first < 10_000]
    assert abs(len(own) / len(first) - 0.75) < 0.005
    for epoch in range(6):  # 600 windows of its 100
        assert sorted(own[100 * epoch : 100 * (epoch + 1)]) == list(range(0, 400, 4))
    others = Counter(first[first >= 10_000].tolist())
    assert max(others.values()) == 1
    per_batch = [np.mean(dataset[step]["tokens"][:, 0] < 10_000) for step in range(50)]
    assert np.ptp(per_batch) <= 1 / 8


def test_the_same_split_twice_is_drawn_in_two_orders():
    twice = batches([(split_of(401), 1.0)] * 2, seed=0, sequence_length=4, batch_size=200)
    first = rows(twice, [0])[:, 0]
    assert sorted(first) == sorted([*range(0, 400, 4)] * 2)
    assert not np.array_equal(first[::2], first[1::2])


def test_an_epoch_of_a_mixture():
    parts = [(split_of(401), 3.0), (split_of(4001), 1.0)]
    assert windows_per_epoch(parts, 4) == 133  # three quarters of which are the first split's 100


# Batch schedules and shorter rows


def test_a_schedule_takes_the_windows_that_follow():
    sizes = [2, 2, 5, 1, 8, 8]
    dataset = make(size=lambda step: sizes[min(step, 5)])
    fixed = rows(make(size=1), range(26))
    assert [len(dataset[step]["tokens"]) for step in range(6)] == sizes
    assert np.array_equal(rows(dataset, range(6)), fixed)
    again = make(size=lambda step: sizes[min(step, 5)])
    assert same(again[5], dataset[5])  # without those before it


def test_a_far_step_is_cheap():
    calls = []

    def schedule(step):
        calls.append(step)
        return 1 + step // 10_000

    dataset = make(size=schedule)
    dataset[30_000]
    dataset[29_999]
    assert max(Counter(calls).values()) <= 1
    make(size=3)[10**15]  # at a fixed size, no sum at all


def test_shorter_rows_are_the_same_tokens_in_the_same_order():
    long, short = make(length=12, size=5), make(length=4, size=5, window_length=12)
    for step in (0, 1, 33):
        for key in ("tokens", "targets"):
            assert np.array_equal(long[step][key].reshape(-1), short[step][key].reshape(-1))
        assert short[step]["tokens"].shape == (15, 4)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_processes_read_the_rows_of_one_batch(parts):
    size = lambda step: 4 if step < 3 else 8
    whole = make(size=size, length=2, window_length=4)
    own = 8 // parts
    split_rows = [
        make(size=size, length=2, window_length=4, rows=slice(own * i, own * (i + 1)))
        for i in range(parts)
    ]
    for step in (0, 2, 3, 9):
        together = [part[step] for part in split_rows]
        for key, array in whole[step].items():
            assert np.array_equal(array, np.concatenate([batch[key] for batch in together]))


# Document boundaries


def test_boundaries_are_masked_row_by_row():
    """Against a count token by token."""
    starts = [0, 1, 4, 9, 10, 11, 30, 32, 64, 100]
    split = split_of(129, starts=starts)
    batch = make(split, length=16, size=8, document_boundaries="mask")[0]
    for row in range(8):
        segment, position = 1, 0
        for column in range(16):
            token, target = batch["tokens"][row, column], batch["targets"][row, column]
            if column and token in starts:
                segment, position = segment + 1, 0
            assert batch["segments"][row, column] == segment
            assert batch["positions"][row, column] == position
            assert batch["weights"][row, column] == (target not in starts)
            position += 1
    plain = make(split, length=16, size=8)[0]
    assert np.array_equal(plain["tokens"], batch["tokens"])
    assert plain["weights"].all()


# Evaluation


@pytest.mark.parametrize("stride", [None, 1, 3, 8])
@pytest.mark.parametrize("count", [2, 8, 9, 10, 17, 100])
def test_evaluation_predicts_every_token_but_the_first_once(count, stride):
    split = split_of(count, first=1000)
    seen = Counter()
    for batch in evaluation_batches(split, sequence_length=8, batch_size=3, stride=stride):
        assert {array.shape for array in batch.values()} == {(3, 8)}
        here = batch["weights"] > 0
        assert set(np.unique(batch["weights"])) <= {0.0, 1.0}
        assert np.array_equal(batch["targets"][here], batch["tokens"][here] + 1)
        seen.update(batch["targets"][here].tolist())
        # What is predicted stands behind all of its context: nothing before it is padding.
        rows_, columns = np.nonzero(here)
        assert np.array_equal(batch["tokens"][rows_, columns] - columns, batch["tokens"][rows_, 0])
    assert seen == Counter(range(1001, 1000 + count))


def test_sliding_windows_give_at_least_the_context_of_the_protocol():
    split = split_of(100)
    for number, batch in enumerate(
        evaluation_batches(split, sequence_length=8, batch_size=1, stride=2)
    ):
        columns = np.nonzero(batch["weights"][0])[0]
        assert number == 0 or columns.min() == 6  # T - N tokens of context, then N
        assert batch["tokens"][0, 0] == 2 * number


def test_evaluation_masks_boundaries_when_asked():
    split = split_of(20, starts=[0, 5, 13])
    (batch,) = evaluation_batches(
        split, sequence_length=8, batch_size=3, document_boundaries="mask"
    )
    predicted = batch["targets"][batch["weights"] > 0].tolist()
    assert predicted == [t for t in range(1, 20) if t not in (5, 13)]
    assert batch["segments"][2].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


# Prefetch


def test_prefetch_ends_its_threads():
    before = set(threading.enumerate())
    iterator = prefetched(make(), 0, 10**9)
    next(iterator)
    iterator.close()
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before
    assert list(prefetched(make(), 5, 5)) == []


def test_an_error_in_a_thread_reaches_the_reader():
    bad = make(size=lambda step: 4 if step < 3 else 0)
    with pytest.raises(ValueError, match="gives 0 at step 3"):
        list(prefetched(bad, 0, 10))


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": split_of(4)}, "4 tokens, fewer than one window of 4 [+] 1"),
        ({"length": 0}, "sequence_length must be a positive whole number, not 0"),
        ({"length": 2.0}, "sequence_length must be a positive whole number, not 2.0"),
        ({"size": 0}, "batch_size must be a positive whole number, not 0"),
        ({"size": lambda step: 1.5}, "gives 1.5 at step 0"),
        ({"window_length": 6}, "window_length 6 is not a multiple of sequence_length 4"),
        ({"window_length": 2}, "window_length 2 is not a multiple of sequence_length 4"),
        ({"seed": -1}, "seed must be >= 0, not -1"),
        ({"document_boundaries": "cut"}, "'ignore' or 'mask', not 'cut'"),
        ({"rows": slice(0, 3)}, "of a batch of 8: it must be one of its equal parts"),
        ({"rows": slice(2, 6)}, "equal parts"),
        ({"rows": slice(8, 16)}, "equal parts"),
        ({"rows": slice(0, 16)}, "equal parts"),
        ({"rows": slice(0, 8, 2)}, "equal parts"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_schedule_that_the_processes_cannot_share():
    dataset = make(size=lambda step: 4 + step, rows=slice(0, 2))
    dataset[0]
    with pytest.raises(ValueError, match=r"batch of 5 rows cannot be divided so.*multiples of 2"):
        dataset[1]


def test_bad_mixtures():
    for splits, message in [
        ([], "at least one"),
        ([(split_of(99), 0.0)], "weight 0"),
        ([(split_of(99), float("nan"))], "weight nan"),
        ([(split_of(99), 1.0), (split_of(3), 1.0)], "split 1 has 3 tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            batches(splits, seed=0, sequence_length=4, batch_size=2)
        with pytest.raises(ValueError, match=message):
            windows_per_epoch(splits, 4)


def test_bad_evaluations():
    for options, message in [
        ({"split": split_of(1)}, "nothing to predict"),
        ({"stride": 9}, "stride 9 is more than sequence_length 8"),
        ({"stride": 0}, "stride must be a positive"),
        ({"batch_size": 0}, "batch_size must be a positive"),
    ]:
        given = {"split": split_of(99), "sequence_length": 8, "batch_size": 2, **options}
        with pytest.raises(ValueError, match=message):
            evaluation_batches(given.pop("split"), **given)
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        prefetched(make(), 3, 2)
