"""What processes tell each other, as far as one process can show it; tests/test_multi_process.py
has real ones."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallel import agreement
from parallel.agreement import (
    by_main,
    check_same,
    gather_texts,
    highest,
    local_rows,
    spread,
    together,
    wait_until_seen,
    whole_array,
)
from parallel.mesh import make_mesh
from parallel.placement import place_batch
from train.manifest import DamagedError


def talk(monkeypatch, texts, index=0):
    """Makes this process number `index` of several; the texts of all others are given."""

    def gather(text):
        everyone = list(texts)
        everyone[index] = text
        return everyone

    monkeypatch.setattr(jax, "process_count", lambda: len(texts))
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(agreement, "gather_texts", gather)


def told(error):
    def work():
        raise error

    return agreement._attempt(work, json.dumps)[0]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ValueError("step 3 is there"), ValueError, r"step 3 is there \(in process 0\)"),
        (DamagedError("a file is cut"), ValueError, "a file is cut"),
        (FileNotFoundError("no checkpoint"), FileNotFoundError, "no checkpoint"),
        (BlockingIOError(11, "written by process 7"), BlockingIOError, "written by process 7"),
        (OSError(28, "no space left", "a/b"), OSError, "no space left"),
        (b"\xff".decode, UnicodeDecodeError, "invalid"),
        (jax.errors.JaxRuntimeError("boom"), RuntimeError, "boom"),
    ],
)
def test_an_error_of_process_0_is_raised_in_the_others(monkeypatch, error, kind, words):
    if callable(error):
        with pytest.raises(UnicodeDecodeError) as found:
            error()
        error, kind = found.value, ValueError
    talk(monkeypatch, [told(error), None], index=1)
    with pytest.raises(kind, match=words):
        by_main(lambda: pytest.fail("only process 0 works"))


def test_what_process_0_found_is_returned_in_all(monkeypatch):
    talk(monkeypatch, ['{"value": {"step": 3}}', None], index=1)
    assert by_main(lambda: None) == {"step": 3}
    talk(monkeypatch, [None, ""], index=0)
    assert by_main(lambda: (1, [2])) == [1, [2]]
    with pytest.raises(KeyError):
        by_main(lambda: {}["a"])


def test_together_fails_in_all_where_it_fails_in_one(monkeypatch):
    fine = '{"value": null}'
    talk(monkeypatch, [fine, fine, told(OSError(28, "disk full"))])
    with pytest.raises(OSError, match=r"disk full \(in process 2\)") as found:
        together(lambda: 1)
    assert found.value.errno == 28
    talk(monkeypatch, [fine, fine, fine])
    assert together(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError, match=r"by zero$"):
        together(lambda: 1 // 0)


def test_settings_that_differ_are_named(monkeypatch):
    theirs = json.dumps({"batch": 8, "seed": 1}, sort_keys=True)
    talk(monkeypatch, ["", json.dumps({"batch": 8, "seed": 0}, sort_keys=True), theirs])

    def explain(ours, theirs):
        return [f"{name}: {ours[name]}, {theirs[name]}" for name in ours if ours != theirs]

    with pytest.raises(ValueError, match=r"process 2 of 3 differ.*\n  .*\n  seed: 0, 1"):
        check_same({"seed": 0, "batch": 8}, "settings", explain)


def test_alone_each_is_the_plain_thing():
    assert gather_texts("é") == ["é"]
    assert by_main(lambda: (1, 2)) == (1, 2)
    with pytest.raises(ValueError, match=r"^as it was$"):
        together(lambda: (_ for _ in ()).throw(ValueError("as it was")))


def test_a_file_that_does_not_appear(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "SEEN_WITHIN", 0.2)
    (tmp_path / "lock").write_text("process 1 on another machine")
    wait_until_seen(tmp_path / "lock")
    with pytest.raises(FileNotFoundError, match="a file system that all processes share"):
        wait_until_seen(tmp_path / "lock", "process 2 on the first machine")
    with pytest.raises(FileNotFoundError, match="does not appear here"):
        wait_until_seen(tmp_path / "data.json")


def test_the_highest_number_reaches_all_devices():
    agree = highest(make_mesh(data=2, fsdp=2, tensor=2))
    assert [int(agree(n)) for n in (0, 15, 0, 2)] == [0, 15, 0, 2]
    assert agree(1).sharding.is_fully_replicated


def test_rows_that_a_process_reads_land_where_the_whole_batch_would_put_them():
    """As if this process had the devices of the middle half of the rows."""
    mesh = make_mesh(data=4, tensor=2)
    batch = {"tokens": np.arange(24).reshape(8, 3)}
    whole = place_batch(mesh, batch)["tokens"]
    np.testing.assert_array_equal(whole, batch["tokens"])
    half = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    assert local_rows(half, 4) == [0, 1, 2, 3]
    shards = {}

    def remember(shape, sharding, part):
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            if index[0].start in (2, 4):
                shards[device] = part(index)
        return shards

    cut = {"tokens": batch["tokens"][2:6]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "make_array_from_callback", remember)
        place_batch(mesh, cut, first=2, rows=8)
    assert len(shards) == 4
    for shard in whole.addressable_shards:
        if shard.device in shards:
            np.testing.assert_array_equal(shards[shard.device], shard.data)


def test_spread_and_back():
    sharding = NamedSharding(make_mesh(data=4, tensor=2), P("data", "tensor"))
    array = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    placed = spread({"a": array}, {"a": sharding})["a"]
    assert placed.sharding == sharding
    np.testing.assert_array_equal(whole_array(placed), array)
