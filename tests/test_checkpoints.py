"""Checkpoints: the same bits come back, or a sentence says which file is why not."""

import json
import logging
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.checkpoint_cases import (
    Twins,
    abstract,
    assert_same,
    fill,
    flip_a_bit,
    largest,
    mesh,
    realistic,
    small,
)
from train import checkpoints as module
from train.checkpoints import (
    Checkpoints,
    CheckpointSettings,
    load_tree,
    save_tree,
)
from train.manifest import MANIFEST, read_manifest, write_manifest
from train.tree_store import leaves_by_path


def test_every_leaf_and_node_comes_back_bit_for_bit(tmp_path):
    state = realistic()
    info = {"phase": 1, "position": 12, "frozen": "ab", "best": None, "nested": {"a": [1, 2.5]}}
    with Checkpoints(tmp_path / "new" / "checkpoints") as checkpoints:
        checkpoints.save(7, state, info, loss=jnp.float32(1.5), wait=True)
        found = checkpoints.restore(abstract(state))
        assert_same(found.state, state)
        assert (found.step, found.info, found.skipped) == (7, info, [])
        assert checkpoints.info(7) == info
        assert checkpoints.best_step() == 7
    # another process would see no more than this: a reader, and shapes without shardings
    reader = Checkpoints(tmp_path / "new" / "checkpoints", mode="read")
    assert_same(reader.restore(jax.eval_shape(realistic)).state, state)


@pytest.mark.parametrize("state", [{}, (), {"extra": {}, "z": jnp.zeros((0,))}, jnp.arange(3.0)])
def test_a_state_may_be_empty_or_one_leaf(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, {}, wait=True)
        assert_same(checkpoints.restore(state).state, state)


@pytest.mark.parametrize("spec", [None, P("a"), P()])
def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path, spec):
    # 16 MB: the write is under way for a long time after save has returned
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 3 + 1, s), donate_argnums=0)
    state: dict = {"a": jnp.arange(2.0**21), "b": [jnp.arange(2**21, dtype=jnp.int32)]}
    if spec is not None:
        state = jax.device_put(state, NamedSharding(mesh(8), spec))
    expected = jax.tree.map(lambda x: np.array(x) * x.dtype.type(3) + x.dtype.type(1), state)
    with Checkpoints(tmp_path) as checkpoints:
        state = step(state)
        for number in range(5):  # on a busy machine a write may be over before we look
            checkpoints.save(number, state, {})
            if under_way := number not in checkpoints.steps():
                break
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        assert under_way
        found = checkpoints.restore(abstract(state)).state
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_numpy_leaves_are_copied(tmp_path):
    room = np.ones((1064,), np.float32)
    start = -room.ctypes.data % 256 // 4  # aligned, so that JAX on CPU would share it if it may
    mine = room[start : start + 1000]
    [leaf] = leaves_by_path(mine, "state").values()
    mine[:] = 5
    assert float(leaf.sum()) == 1000
    mine[:] = 1
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"mine": mine}, {})
        mine[:] = 5
        assert float(checkpoints.restore({"mine": mine}).state["mine"].sum()) == 1000


@pytest.mark.parametrize("saved_on", [None, (4,)])
@pytest.mark.parametrize("restored_on", [(2, 2), (8,)])
def test_a_state_moves_to_another_mesh(tmp_path, saved_on, restored_on):
    state = {
        "w": jnp.arange(8 * 16.0).reshape(8, 16).astype(jnp.bfloat16),
        "keys": jax.random.split(jax.random.key(3), 8),
        "zero": jnp.zeros((8, 0)),
        "weak": jnp.asarray(2.5),
        "step": jnp.int32(4),
    }
    specs = {"w": P("a"), "keys": P("a"), "zero": P("a"), "weak": P(), "step": P()}
    if saved_on:
        state = {
            k: jax.device_put(v, NamedSharding(mesh(*saved_on), specs[k])) for k, v in state.items()
        }
    if len(restored_on) == 2:
        specs["w"] = P("b", "a")
    target = {
        k: jax.ShapeDtypeStruct(
            v.shape, v.dtype, sharding=NamedSharding(mesh(*restored_on), specs[k])
        )
        for k, v in state.items()
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state, {})
        found = checkpoints.restore(target).state
    assert_same(found, state)
    for name, leaf in found.items():
        assert leaf.sharding.is_equivalent_to(target[name].sharding, leaf.ndim), name


def test_another_structure_is_an_error_that_names_the_leaves(tmp_path):
    state = {
        "params": {"a": jnp.ones((2, 3)), "b": jnp.ones(4), "c": jnp.ones(5)},
        "step": jnp.int32(1),
    }
    other = {
        "params": {"a": jnp.ones((3, 2)), "c": jnp.ones(5, jnp.bfloat16), "d": jnp.ones(1)},
        "step": jnp.int32(1),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, wait=True)
        for call in (
            lambda: checkpoints.restore(other),
            lambda: checkpoints.restore_part("params", other["params"]),
        ):
            with pytest.raises(ValueError) as error:
                call()
            text = str(error.value)
            assert "params/a is float32[2, 3] in it, float32[3, 2] is asked for" in text
            assert "params/b float32[4] is in it but not asked for" in text
            assert "params/c is float32[5] in it, bfloat16[5] is asked for" in text
            assert "params/d float32[1] is not in it" in text
            assert "step" not in text.split("structure:")[1]


@pytest.mark.parametrize(
    ("settings", "losses", "kept", "best"),
    [
        ({"keep_last": 2, "keep_best": 1}, [3.0, 1.0, 2.0, 4.0, 5.0], [2, 4, 5], 2),
        ({"keep_last": 1, "keep_best": 0}, [3.0, 1.0, 2.0], [3], 3),
        ({"keep_last": 1, "keep_best": 2}, [3.0, 1.0, 2.0, 1.5, None], [2, 4, 5], 2),
        ({"keep_last": 1, "keep_best": 1}, [3.0, 1.0, float("nan"), -float("inf"), 9.0], [2, 5], 2),
        ({"keep_last": 2, "keep_best": 1}, [None] * 4, [3, 4], None),
        ({"keep_last": 1, "keep_best": 1}, [1.0, 1.0, 2.0], [1, 3], 1),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, settings, losses, kept, best):
    with Checkpoints(tmp_path, CheckpointSettings(**settings)) as checkpoints:
        for step, loss in enumerate(losses, 1):
            checkpoints.save(step, small(step), {}, loss=loss)
        checkpoints.wait()
        assert checkpoints.steps() == kept
        assert checkpoints.best_step() == best
        for step in kept:
            assert_same(checkpoints.restore(small(0), step).state, small(step))
    assert sorted(os.listdir(tmp_path)) == sorted([*map(str, kept), "lock"])


def test_what_is_kept_survives_a_restart(tmp_path):
    for step, loss in [(9, 1.0), (10, 2.0), (100, 3.0)]:
        with Checkpoints(tmp_path, CheckpointSettings(keep_last=1)) as checkpoints:
            checkpoints.save(step, small(step), {}, loss=loss)
    reader = Checkpoints(tmp_path, mode="read")
    assert reader.steps() == [9, 100]
    assert reader.restore(small(0)).step == 100


def test_a_part_is_restored_without_the_rest(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            state = realistic(step)
            checkpoints.save(step, state, {"phase": step})
        checkpoints.wait()
        os.unlink(largest(tmp_path / "2", "part.optimizer"))
        found = checkpoints.restore_part("params", abstract(state.params))
        assert_same(found.state, state.params)
        assert (found.step, found.info) == (2, {"phase": 2})
        assert_same(checkpoints.restore_part("rng", abstract(state.rng), 2).state, state.rng)
        assert_same(
            checkpoints.restore_part("params", abstract(state.params), 1).state, realistic(1).params
        )
        with pytest.raises(ValueError, match=r"part\.optimizer"):
            checkpoints.restore(abstract(state), 2)
        flip_a_bit(tmp_path / "2" / "part.params")
        found = checkpoints.restore_part("params", abstract(state.params))
        assert (found.step, found.skipped[0][0]) == (1, 2)
        with pytest.raises(ValueError, match=r"parameters/w float32\[2\] is not in it"):
            checkpoints.restore_part("parameters", {"w": jnp.ones(2)})


def test_saving_a_step_again_replaces_it_in_one_piece(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {"try": 1}, wait=True)

        def fails(folder, content):
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(module, "write_manifest", fails)
            checkpoints.save(1, small(2), {"try": 2})
            with pytest.raises(OSError, match=r"step 1 .*could not be written.*Input/output error"):
                checkpoints.wait()
        assert checkpoints.info(1) == {"try": 1}
        assert_same(checkpoints.restore(small(0)).state, small(1))

        def refuses(source, target, rename=os.rename):
            if (
                ".writing-" in str(source)
                and Path(target).parent == tmp_path
                and Path(target).name == "1"
            ):
                assert not (tmp_path / "1").exists()  # the old one is aside, not gone
                assert read_manifest(tmp_path / "1.replaced")["info"] == {"try": 1}
                raise OSError(5, "Input/output error")
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", refuses)
            checkpoints.save(1, small(2), {"try": 2})
            with pytest.raises(OSError, match="Input/output error"):
                checkpoints.wait()
        assert_same(checkpoints.restore(small(0)).state, small(1))
        checkpoints.save(1, small(3), {"try": 3}, wait=True)
        assert_same(checkpoints.restore(small(0)).state, small(3))
    assert sorted(os.listdir(tmp_path)) == ["1", "lock"]


@pytest.mark.parametrize("gone", [False, True])
def test_a_kill_while_replacing_leaves_the_old_or_the_new(tmp_path, gone):
    fill(tmp_path, (1,))
    shutil.copytree(tmp_path / "1", tmp_path / "1.replaced")
    (tmp_path / "1.deleted").mkdir()
    (tmp_path / "notes.writing").mkdir()  # not ours
    if gone:
        shutil.rmtree(tmp_path / "1")
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(small(0)).state, small(1))
    assert sorted(os.listdir(tmp_path)) == ["1", "lock", "notes.writing"]


def test_what_save_refuses(tmp_path):
    fill(tmp_path, (5,))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"cannot save step 4.*steps \[5\].*new run"):
            checkpoints.save(4, small(4), {})
        with pytest.raises(ValueError, match="state leaf params/rate is a float"):
            checkpoints.save(6, {"params": {"rate": 0.1}}, {})
        with pytest.raises(ValueError, match="state leaf n is int64"):
            checkpoints.save(6, {"n": np.arange(3)}, {})
        with pytest.raises(ValueError, match="state leaf n is a ShapeDtypeStruct"):
            checkpoints.save(6, {"n": jax.ShapeDtypeStruct((), jnp.float32)}, {})
        donated = jnp.ones(2)
        donated.delete()
        with pytest.raises(ValueError, match="state leaf n has been donated"):
            checkpoints.save(6, {"n": donated}, {})
        with pytest.raises(ValueError, match="two leaves called x"):
            checkpoints.save(6, Twins(), {})
        with pytest.raises(ValueError):
            checkpoints.save(6, small(6), {"loss": float("nan")})
        with pytest.raises(ValueError, match="its entry 'array' is not"):
            checkpoints.save(6, small(6), {"array": jnp.ones(1)})
        checkpoints.save(6, small(6), {}, wait=True)
    assert checkpoints.steps() == [5, 6]
    for closed in (checkpoints, Checkpoints(tmp_path, mode="read")):
        with pytest.raises(ValueError, match="closed or was opened for reading"):
            closed.save(7, small(7), {})
    with pytest.raises(ValueError, match="mode is 'append'"):
        Checkpoints(tmp_path, mode="append")  # type: ignore[arg-type]
    for wrong in ({"every": 0}, {"keep_last": 0}, {"keep_best": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CheckpointSettings(**wrong)


def test_an_error_in_the_run_is_not_hidden_by_one_in_the_last_save(tmp_path, monkeypatch):
    def fails(folder, content):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "write_manifest", fails)

    def interrupted():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, small(1), {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        interrupted()
    assert "could not be written" in stopped.value.__notes__[0]
    with pytest.raises(OSError, match="could not be written"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {})
    with Checkpoints(tmp_path) as checkpoints:  # the lock was let go both times
        assert checkpoints.steps() == []


def test_only_orbax_is_silenced_and_only_meanwhile(tmp_path, caplog):
    fill(tmp_path, (1,))
    logger = logging.getLogger("absl")
    before = list(logger.filters)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(small(0)).step == 1
        logger.error("mine")
    assert [record.getMessage() for record in caplog.records] == ["mine"]
    assert logger.filters == before


def test_the_manifest_itself(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "file").write_bytes(b"12")
    content = {"tuple": (1, 2.5), "numbered": {3: None}}
    write_manifest(tmp_path, content)
    write_manifest(tmp_path, content)  # again: it does not list itself
    manifest = read_manifest(tmp_path)
    assert (manifest["tuple"], manifest["numbered"]) == ([1, 2.5], {"3": None})
    assert list(manifest["files"]) == ["inside/file"]
    assert json.loads((tmp_path / MANIFEST).read_text())["content"] == manifest
    assert sorted(os.listdir(tmp_path)) == ["inside", MANIFEST]


def test_a_relative_folder_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {"params": jnp.arange(3.0)}
    with Checkpoints(Path("runs/a")) as checkpoints:
        checkpoints.save(1, state, {}, wait=True)
    assert checkpoints.steps() == [1]
    save_tree(Path("runs/frozen"), state)
    np.testing.assert_array_equal(load_tree(Path("runs/frozen"))["params"], state["params"])
    with Checkpoints(Path("runs/a"), mode="read") as checkpoints:
        assert checkpoints.restore(state).step == 1
