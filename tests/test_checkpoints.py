"""Checkpoints: the same bits come back, or a sentence says which file is why not."""

import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from train import checkpoints as module
from train import tree_store
from train.checkpoints import (
    Checkpoints,
    CheckpointSettings,
    load_tree,
    save_tree,
    tree_hash,
)
from train.manifest import MANIFEST, read_manifest, write_manifest
from train.tree_store import leaves_by_path

ROOT = Path(__file__).parents[1]


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    optimizer: tuple
    rng: jax.Array
    extra: dict


@jax.tree_util.register_pytree_node_class
class Packed:
    """A node without keys of its own: two codes in a byte, and a static shape."""

    def __init__(self, codes, scale, shape):
        self.codes, self.scale, self.shape = codes, scale, shape

    def tree_flatten(self):
        return (self.codes, self.scale), self.shape

    @classmethod
    def tree_unflatten(cls, shape, children):
        codes, scale = children
        return cls(codes, scale, shape)


@jax.tree_util.register_pytree_with_keys_class
class Twins:
    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey("x")
        return ((key, jnp.ones(1)), (key, jnp.ones(2))), None

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls()


class Pair(NamedTuple):
    first: jax.Array
    second: tuple


def realistic(seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    params = {
        "embedding": jax.random.normal(next(keys), (7, 4)),
        "blocks": {
            "attention": {"q": {"kernel": jax.random.normal(next(keys), (2, 4, 4))}},
            "norm": {"scale": jax.random.normal(next(keys), (2, 4), jnp.bfloat16)},
        },
    }
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.adamw(1e-3), {"embedding": True, "blocks": False}),
        optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 9)),
    )
    extra = {
        "mask": jax.random.bernoulli(next(keys), 0.5, (3, 5)),
        "packed": Packed(jnp.arange(6, dtype=jnp.uint8), jnp.float16(0.25), (3, 4)),
        "nothing yet": jnp.zeros((0, 4)),
        "odd/name.[0]%é": Pair(jnp.int8(-3), (jnp.full((2,), 1.5), None, ())),
        "metrics": {"empty": {}},
        "keys": jax.random.split(next(keys), 3),
        "other": jax.random.key(1, impl="rbg"),
    }
    return State(jnp.int32(7), params, tx.init(params), next(keys), extra)


def bits(leaf):
    key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes()


def weak(leaf):
    return getattr(leaf, "weak_type", False)  # a typed key has none


def assert_same(a, b):
    one: object = jax.tree.structure(a)
    assert one == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype, weak(x)) == (y.shape, y.dtype, weak(y))
        assert bits(x) == bits(y)


def abstract(tree, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree
    )


def small(value):
    return {"params": {"w": jnp.full((64,), value, jnp.float32)}, "step": jnp.int32(value)}


def fill(folder, steps=(1, 2, 3), **settings):
    with Checkpoints(folder, CheckpointSettings(**{"keep_last": 9, **settings})) as checkpoints:
        for step in steps:
            checkpoints.save(step, small(step), {"phase": step})


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


def mesh(*shape):
    axes = tuple("ab"[: len(shape)])
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(
        shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(shape), devices=devices
    )


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


def largest(folder, part=""):
    files = [p for p in (folder / part).rglob("*") if p.is_file() and p.name != MANIFEST]
    return max(files, key=lambda p: p.stat().st_size)


def flip_a_bit(folder):
    path = largest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path.name


def cut(folder):
    path = largest(folder)
    os.truncate(path, path.stat().st_size - 1)
    return path.name


def delete(folder):
    path = largest(folder)
    path.unlink()
    return path.name


def garble_orbax_metadata(folder):
    (folder / "_CHECKPOINT_METADATA").write_text("{")
    return "_CHECKPOINT_METADATA"


def delete_manifest(folder):
    (folder / MANIFEST).unlink()
    return MANIFEST


def edit_manifest(folder):
    text = (folder / MANIFEST).read_text()
    changed = text.replace('"phase": 3', '"phase": 4')
    assert changed != text
    (folder / MANIFEST).write_text(changed)
    return MANIFEST


def empty_manifest(folder):
    (folder / MANIFEST).write_text("")
    return MANIFEST


DAMAGES = [
    flip_a_bit,
    cut,
    delete,
    garble_orbax_metadata,
    delete_manifest,
    edit_manifest,
    empty_manifest,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_and_stepped_over(tmp_path, damage):
    fill(tmp_path)
    name = damage(tmp_path / "3")
    with Checkpoints(tmp_path, CheckpointSettings(keep_last=2)) as checkpoints:
        found = checkpoints.restore(small(0))
        assert_same(found.state, small(2))
        assert (found.step, found.info) == (2, {"phase": 2})
        [(step, reason)] = found.skipped
        assert step == 3
        assert name in reason
        with pytest.raises(ValueError, match=name):
            checkpoints.restore(small(0), 3)
        # The run goes on from 2: the damaged one neither stands in the way nor counts as kept.
        checkpoints.save(2, small(20), {}, wait=True)
        assert (tmp_path / "3").is_dir()  # newer than what is kept: left for whoever wants to look
        assert_same(checkpoints.restore(small(0)).state, small(20))
        checkpoints.save(3, small(30), {}, wait=True)
        assert_same(checkpoints.restore(small(0)).state, small(30))
        assert checkpoints.steps() == [2, 3]


def test_damaged_checkpoints_go_with_the_old_ones(tmp_path):
    fill(tmp_path)
    delete_manifest(tmp_path / "1")
    flip_a_bit(tmp_path / "2")
    with Checkpoints(tmp_path, CheckpointSettings(keep_last=1)) as checkpoints:
        checkpoints.save(4, small(4), {}, wait=True)
    assert sorted(os.listdir(tmp_path)) == ["4", "lock"]


def test_nothing_there_and_nothing_intact_differ(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        Checkpoints(tmp_path / "none", mode="read").restore(small(0))
    fill(tmp_path, (1, 2))
    reader = Checkpoints(tmp_path, mode="read")
    with pytest.raises(FileNotFoundError, match=r"step 5.*\[1, 2\]"):
        reader.restore(small(0), 5)
    with pytest.raises(FileNotFoundError):
        reader.info(5)
    name = flip_a_bit(tmp_path / "1")
    delete_manifest(tmp_path / "2")
    with pytest.raises(ValueError, match=f"step 2: {MANIFEST} is missing; step 1: .*{name}"):
        reader.restore(small(0))
    with pytest.raises(ValueError, match=f"{MANIFEST} is missing"):
        reader.info(2)
    assert reader.steps() == [1]


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
        with pytest.raises(TypeError):
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


def check_full_disk(folder, limited, capfd):
    """Save, fail while `limited` holds, and go on."""
    big = {"params": {"w": jnp.arange(2.0**21)}, "step": jnp.int32(2)}  # 8 MB
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, small(1), {}, wait=True)
        with limited():
            checkpoints.save(2, big, {})
            with pytest.raises(OSError, match=r"step 2 .*could not be written") as full:
                checkpoints.wait()
        assert checkpoints.restore(small(0)).step == 1
        with limited():
            checkpoints.save(2, big, {})
            assert checkpoints._pending.exception() is not None  # type: ignore[union-attr]
        with pytest.raises(OSError, match="step 2 "):
            checkpoints.save(3, small(3), {})
        checkpoints.save(3, small(3), {}, wait=True)  # raised once; the caller decided to go on
        assert checkpoints.steps() == [1, 3]
    assert sorted(os.listdir(folder)) == ["1", "3", "lock"]
    assert capfd.readouterr().err == ""
    return str(full.value)


# Orbax leaves writes behind that report to an event loop which is gone
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_is_full(tmp_path, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting needs more rights; the test of the file size limit runs instead")
    try:
        text = check_full_disk(disk / "run", contextlib.nullcontext, capfd)
        assert "the disk is full. Whatever was there before is intact" in text
        with pytest.raises(OSError, match=r"tree .*frozen could not be written: the disk is full"):
            save_tree(disk / "frozen", {"w": jnp.arange(2.0**21)})
        assert os.listdir(disk) == ["run"]
        filler = disk / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with Checkpoints(disk / "run") as checkpoints:  # opening needs no space
            assert checkpoints.restore(small(0)).step == 3
            with pytest.raises(OSError, match="the disk is full"):
                checkpoints.save(4, small(4), {}, wait=True)
            filler.unlink()
            checkpoints.save(4, small(4), {}, wait=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Orbax leaves writes behind that report to an event loop which is gone
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_file_that_may_not_grow(tmp_path, capfd):
    @contextlib.contextmanager
    def limited():  # the kernel refuses the bytes, as a quota would
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, old[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    check_full_disk(tmp_path, limited, capfd)


SAVE_AND_HANG = """
import sys, time
from pathlib import Path
import jax.numpy as jnp
from train import checkpoints as module
folder, hang = Path(sys.argv[1]), sys.argv[2] == "hang"
if hang:
    module.write_manifest = lambda *_: time.sleep(60)
with module.Checkpoints(folder) as checkpoints:
    print("ready", flush=True)
    checkpoints.save(2, {"params": {"w": jnp.zeros((2**24,))}, "step": jnp.int32(2)}, {})
    print("returned", flush=True)
"""


def child(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("moment", ["while Orbax writes", "before the manifest"])
def test_kill_9_during_a_save(tmp_path, moment):
    fill(tmp_path, (1,))
    hang = moment == "before the manifest"
    process = child(SAVE_AND_HANG, tmp_path, "hang" if hang else "go")
    sign = "2.writing-????????" + ("" if hang else ".orbax-checkpoint-tmp")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(sign)) and time.monotonic() < deadline:
        if process.poll() is not None:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()
    left = sorted(os.listdir(tmp_path))
    assert any(name.startswith("2.writing") for name in left), left
    assert Checkpoints(tmp_path, mode="read").restore(small(0)).step == 1  # a reader clears nothing
    assert sorted(os.listdir(tmp_path)) == left
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(small(0))
        assert (found.step, found.skipped) == (1, [])
        assert sorted(os.listdir(tmp_path)) == ["1", "lock"]
        checkpoints.save(2, small(2), {}, wait=True)
        assert checkpoints.steps() == [1, 2]


OPEN_TWICE = """
import sys
import train.checkpoints
assert not any(name.startswith("orbax") for name in sys.modules), "imported too early"
try:
    train.checkpoints.Checkpoints(sys.argv[1])
except BlockingIOError as error:
    print(error)
print(train.checkpoints.Checkpoints(sys.argv[1], mode="read").steps())
"""


def test_one_writer_at_a_time_and_any_number_of_readers(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {}, wait=True)
        with pytest.raises(BlockingIOError):
            Checkpoints(tmp_path)
        out, err = child(OPEN_TWICE, tmp_path).communicate(timeout=60)
        assert f"{tmp_path} is being written by process {os.getpid()} on " in out, err
        assert out.endswith("[1]\n")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
    checkpoints.close()  # twice is harmless


def test_only_orbax_is_silenced_and_only_meanwhile(tmp_path, caplog):
    fill(tmp_path, (1,))
    logger = logging.getLogger("absl")
    before = list(logger.filters)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(small(0)).step == 1
        logger.error("mine")
    assert [record.getMessage() for record in caplog.records] == ["mine"]
    assert logger.filters == before


def test_a_tree_is_stored_once_and_comes_back(tmp_path):
    tree = {
        "base": {"a/b": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), "c": jnp.uint8(3)},
        "key": jax.random.key(2),
        "empty": jnp.zeros((2, 0)),
    }
    folder = tmp_path / "frozen"
    digest = save_tree(folder, tree)
    assert digest == tree_hash(tree)
    assert_same(load_tree(folder), tree)
    assert_same(load_tree(folder, abstract(tree)), tree)
    written = (folder / MANIFEST).stat().st_mtime_ns
    assert save_tree(folder, tree) == digest
    assert (folder / MANIFEST).stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="holds another tree"):
        save_tree(folder, {**tree, "key": jax.random.key(3)})
    with pytest.raises(ValueError, match=r"key key<fry>.* is in it but not asked for"):
        load_tree(folder, {k: v for k, v in tree.items() if k != "key"})
    assert os.listdir(tmp_path) == ["frozen"]
    name = flip_a_bit(folder)
    for call in (lambda: load_tree(folder), lambda: save_tree(folder, tree)):
        with pytest.raises(ValueError, match=name):
            call()
    with pytest.raises(FileNotFoundError, match="none"):
        load_tree(tmp_path / "none")


def test_trees_of_other_shapes(tmp_path):
    nodes = Pair(jnp.ones(2), (jnp.int32(1), {}))
    save_tree(tmp_path / "nodes", nodes)
    assert_same(load_tree(tmp_path / "nodes", nodes), nodes)
    assert_same(
        load_tree(tmp_path / "nodes"), {"first": jnp.ones(2), "second": {"0": jnp.int32(1)}}
    )
    for name, tree in {"empty": {}, "leaf": jnp.arange(3)}.items():
        save_tree(tmp_path / name, tree)
        assert_same(load_tree(tmp_path / name), tree)


def test_a_stale_half_of_a_tree_is_cleared(tmp_path, monkeypatch):
    stale = tmp_path / "frozen.writing" / "tree-0.orbax-checkpoint-tmp"
    stale.mkdir(parents=True)

    def start_write(folder, leaves, start=tree_store.start_write):
        assert not stale.exists()  # its space is free before new space is taken
        return start(folder, leaves)

    monkeypatch.setattr(tree_store, "start_write", start_write)
    save_tree(tmp_path / "frozen", small(1))
    assert os.listdir(tmp_path) == ["frozen"]


def test_a_tree_that_another_process_finishes_first_stays(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def lock(path, lock=tree_store.lock):
        monkeypatch.undo()
        save_tree(path.parent.with_suffix(""), small(2))
        path.parent.mkdir()
        with lock(path):
            yield

    monkeypatch.setattr(tree_store, "lock", lock)
    with pytest.raises(ValueError, match="holds another tree"):
        save_tree(tmp_path / "frozen", small(1))
    assert_same(load_tree(tmp_path / "frozen"), small(2))


def test_the_hash_sees_values_names_types_and_shapes_but_not_places(strict):
    x = jnp.arange(8.0)
    spread = jax.device_put(x, NamedSharding(mesh(8), P("a")))
    assert tree_hash({"x": x}) == tree_hash({"x": spread}) == tree_hash({"x": np.asarray(x)})
    assert tree_hash({"x": x, "y": x}) == tree_hash({"y": x, "x": x})
    key, rbg = jax.random.key(0), jax.random.key(0, impl="rbg")
    others = [
        {"x": x.at[3].set(3.5)},
        {"x": -x},
        {"z": x},
        {"x": {"y": x}},
        {"x": x.reshape(2, 4)},
        {"x": x.astype(jnp.int32)},
        {"x": x, "empty": jnp.zeros(0)},
        {"x": x, "empty": jnp.zeros((0, 1))},
        {"x": key},
        {"x": rbg},
        {"x": jax.random.key_data(key)},
        {"a/b": x},
        {"a": {"b": x}},
    ]
    assert len({tree_hash(tree) for tree in [{"x": x}, *others]}) == len(others) + 1


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
