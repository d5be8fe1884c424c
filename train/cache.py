"""A folder that is made once and read by many: whole or not there, however many processes make it.

A build writes into a temporary folder beside the final one and renames it at the end. Two processes
that build at once both finish, and the slower uses what the faster made. What a killed build leaves
is never read, and a later build removes it.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

BUILDING = ".building-"
LOCK = "lock"
GRACE = 60.0  # seconds in which a new folder may not yet hold its lock


def default_cache() -> Path:
    """$ACCELERANDO_CACHE, or ~/.cache/accelerando."""
    given = os.environ.get("ACCELERANDO_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "accelerando"


def build_once(target: Path, read: Callable[[Path], T], write: Callable[[Path], None]) -> T:
    """Read the folder `target`; where it is missing or damaged, write it first.

    Args:
        target: the folder; those beside it are left alone.
        read: opens a finished folder; ValueError where it is damaged (a warning tells).
        write: fills an empty folder. What it raises passes through, and nothing is left.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name:
    ...     read = lambda folder: (folder / "a").read_text()
    ...     write = lambda folder: print("written", (folder / "a").write_text("content"))
    ...     [build_once(Path(name) / "key", read, write) for _ in range(2)]
    written 7
    ['content', 'content']
    """
    if target.is_dir():
        try:
            return read(target)
        except ValueError as error:
            warnings.warn(f"{error}; it is built anew", RuntimeWarning, stacklevel=3)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target.parent)
    with _temporary(target.parent) as temporary:
        write(temporary)
        return _install(temporary, target, read)


@contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    """A folder to build in. Its lock ends with the process, however that ends."""
    import fcntl

    path = _new_folder(parent)
    try:
        with open(path / LOCK, "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # not there any more if it was given its name


def _new_folder(parent: Path) -> Path:
    path = parent / f"{BUILDING}{uuid.uuid4().hex}"
    path.mkdir()  # not mkdtemp, whose 0700 would shut other users out of a shared cache
    return path


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of killed builds: old enough to be locked, and locked by nobody."""
    import fcntl

    for path in parent.glob(f"{BUILDING}*"):
        with suppress(OSError):  # its builder holds the lock, or another process removes it too
            if time.time() - path.stat().st_mtime < GRACE:
                continue
            if (path / LOCK).exists():
                with open(path / LOCK, "rb+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)


def _install(temporary: Path, target: Path, read: Callable[[Path], T]) -> T:
    """Give a finished folder its name, unless another process was first with an intact one."""
    for _ in range(100):  # a turn that fails is another process's success
        try:
            os.rename(temporary, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        with suppress(FileNotFoundError):
            try:
                return read(target)
            except ValueError:  # the damaged one is still there
                aside = _new_folder(target.parent)
                os.rename(target, aside / "damaged")
                shutil.rmtree(aside)
    raise OSError(f"{target} keeps changing: another process seems to remove it again and again")
