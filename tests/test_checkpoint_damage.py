"""Checkpoints that are damaged, half written, or written by two: stepped over, never hidden."""

import contextlib
import os
import resource
import signal
import subprocess
import time

import jax.numpy as jnp
import pytest

from tests.checkpoint_cases import (
    assert_same,
    child,
    fill,
    flip_a_bit,
    largest,
    small,
)
from train.checkpoints import (
    Checkpoints,
    CheckpointSettings,
    save_tree,
)
from train.manifest import MANIFEST


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
