"""A folder built once: whole or not there, with several builders, after kills, after damage."""

import os
import signal
import subprocess
import sys
import time

import pytest

from train import cache
from train.cache import build_once, default_cache


def read(folder):
    text = (folder / "a").read_text()
    if text != "whole":
        raise ValueError(f"{folder.name} holds {text!r}")
    return text


def write(folder):
    (folder / "a").write_text("whole")


def never(folder):
    raise AssertionError("written twice")


def test_it_is_written_once(tmp_path):
    assert build_once(tmp_path / "x/key", read, write) == "whole"
    assert build_once(tmp_path / "x/key", read, never) == "whole"
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["key"]


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "a").write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(tmp_path / "key", read, fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["damaged", None])
def test_a_damaged_one_is_replaced_with_a_warning(tmp_path, content):
    def read_all(folder):
        try:
            return read(folder)
        except FileNotFoundError as error:
            raise ValueError(f"gone: {error}") from None

    build_once(tmp_path / "key", read_all, write)
    (tmp_path / "key/a").unlink()
    if content:
        (tmp_path / "key/a").write_text(content)
    with pytest.warns(RuntimeWarning, match="built anew"):
        assert build_once(tmp_path / "key", read_all, write) == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_the_slower_of_two_uses_what_the_faster_made(tmp_path):
    def write_slowly(folder):
        build_once(tmp_path / "key", read, write)
        (tmp_path / "key/mark").touch()
        write(folder)

    assert build_once(tmp_path / "key", read, write_slowly) == "whole"
    assert (tmp_path / "key/mark").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_the_slower_of_two_replaces_a_damaged_one(tmp_path):
    def write_slowly(folder):
        (tmp_path / "key").mkdir()
        (tmp_path / "key/a").write_text("damaged")
        write(folder)

    assert build_once(tmp_path / "key", read, write_slowly) == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def builder(folder):
    """A process that has half-written and waits."""
    code = (
        "import sys, time; from pathlib import Path; from train.cache import build_once\n"
        "def write(folder):\n"
        "    (folder / 'a').write_text('ha')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "build_once(Path(sys.argv[1]) / 'key', lambda folder: None, write)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    return process


def test_what_a_killed_build_leaves(tmp_path, monkeypatch):
    """It is never mistaken for the folder; it goes once it is old, and not before its builder."""
    with builder(tmp_path) as process:
        (left,) = tmp_path.iterdir()
        old = time.time() - 2 * cache.GRACE
        os.utime(left, (old, old))
        build_once(tmp_path / "other", read, write)
        assert left.exists()  # old, but its builder lives
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "key").exists()
    monkeypatch.setattr(cache, "GRACE", 1e9)
    assert build_once(tmp_path / "key", read, write) == "whole"
    assert left.exists()  # too young to tell
    monkeypatch.undo()
    build_once(tmp_path / "third", read, write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "other", "third"]


def test_default_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("ACCELERANDO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache/accelerando"
