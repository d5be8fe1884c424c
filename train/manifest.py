"""Folders that can be trusted: a manifest of every file, names given in one piece, a lock.

Storage formats notice a truncated file and let a flipped bit through: the array loads, with a wrong
number in it. So whatever this project stores for later is hashed when it is written, and checked
before it is read. The manifest carries its own hash, so that an edited one is noticed as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class DamagedError(ValueError):
    """A stored folder is not what was written; the message names the file."""


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_file(path: Path, *, durable: bool = False) -> dict[str, Any]:
    with open(path, "rb") as file:
        if (
            durable
        ):  # so that a power cut cannot leave the manifest without the bytes it vouches for
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Hash every file under `folder` and write `folder/manifest.json`, in one piece or not at all.

    Args:
      folder: holds the finished files; they are flushed to the disk.
      content: JSON values to keep beside the hashes; the key `files` is taken.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name:
    ...     folder = Path(name)
    ...     _ = (folder / "weights").write_bytes(b"abc")
    ...     write_manifest(folder, {"step": 3})
    ...     print(read_manifest(folder)["step"])
    ...     _ = (folder / "weights").write_bytes(b"abd")
    ...     try:
    ...         verify_files(folder, read_manifest(folder))
    ...     except DamagedError as error:
    ...         print(error)
    3
    weights has changed since it was written (sha256 differs)
    """
    files = {
        path.relative_to(folder).as_posix(): _hash_file(path, durable=True)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    # Through JSON once, so that what is hashed is what a reader will parse (tuples, integer keys).
    body = json.loads(json.dumps({**content, "files": files}, allow_nan=False))
    temporary = folder / (MANIFEST + ".writing")
    with open(temporary, "w") as file:
        json.dump({"sha256": _digest(body), "content": body}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of `folder/manifest.json` and the key `files`; reads nothing else.

    Raises:
      DamagedError: it is missing, is not what was written, or cannot be read.
    """
    path = folder / MANIFEST
    try:
        whole = json.loads(path.read_text())
        body, recorded = whole["content"], whole["sha256"]
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({error})") from error
    if not isinstance(body, dict) or _digest(body) != recorded:
        raise DamagedError(f"{MANIFEST} has changed since it was written (sha256 differs)")
    return body


def verify_files(folder: Path, manifest: dict[str, Any], inside: str | None = None) -> None:
    """Check the files that `manifest` lists: present, as long as they were, same sha256.

    Args:
      folder: where they are; files that the manifest does not list are nobody's business.
      manifest: from `read_manifest`.
      inside: check only this sub-folder and the files at the top; None checks all.

    Raises:
      DamagedError: names the first file that is missing, cut or changed.
    """
    for name, recorded in manifest["files"].items():
        if inside is not None and "/" in name and not name.startswith(inside + "/"):
            continue
        try:
            size = (folder / name).stat().st_size
            if size != recorded["bytes"]:
                raise DamagedError(f"{name} has {size} bytes, {recorded['bytes']} were written")
            found = _hash_file(folder / name)
        except FileNotFoundError:
            raise DamagedError(f"{name} is missing") from None
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror})") from error
        if found != recorded:
            raise DamagedError(f"{name} has changed since it was written (sha256 differs)")


def publish(temporary: Path, final: Path) -> None:
    """Give a finished folder its name, in place of what had it: a reader sees the old or the new.

    Args:
      temporary: a finished folder with its manifest, in the parent folder of `final`.
      final: its name from now on. A folder of that name is set aside as `NAME.replaced` until the
        new one is there, so a kill in between loses neither (`recover` puts it back).
    """
    aside = final.with_name(final.name + ".replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except OSError:
        if aside.exists():
            os.rename(aside, final)
        raise
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the new name itself survives a power cut
    finally:
        os.close(descriptor)
    shutil.rmtree(aside, ignore_errors=True)


def withdraw(final: Path) -> None:
    """Delete a published folder; a kill half-way leaves `NAME.deleted`, never half of NAME."""
    aside = final.with_name(final.name + ".deleted")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(final, aside)
    shutil.rmtree(aside, ignore_errors=True)  # what is left goes at the next start (`recover`)


def recover(parent: Path) -> None:
    """Tidy up after a kill: drop `N.writing*` and `N.deleted`, put back an orphaned `N.replaced`.

    Only names that start with a number and one of these endings are touched.
    """
    for path in parent.iterdir():
        name, _, ending = path.name.partition(".")
        if not name.isdigit():
            continue
        if ending == "replaced" and not (parent / name).exists():
            os.rename(path, parent / name)
        elif ending in ("replaced", "deleted") or ending.startswith("writing"):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the file `path` against other holders; the kernel lets go of it when the process ends.

    Raises:
      BlockingIOError: somebody holds it; the message names the process and the machine.
    """
    import fcntl

    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().decode() or "another process"
            raise BlockingIOError(
                error.errno,
                f"{path.parent} is being written by {holder}: wait for it, stop it, "
                "or use another folder",
            ) from None
        with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def as_json(info: dict[str, Any]) -> dict[str, Any]:
    """A copy of the info, as reading it back will give it.

    Raises:
      ValueError: an entry that JSON does not know, by its name.

    >>> as_json({"phase": 0, "at": (1, 2)})
    {'phase': 0, 'at': [1, 2]}
    """
    found = {}
    for name, value in info.items():
        try:
            found[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the info of a checkpoint is JSON, and its entry {name!r} is not ({error}); give "
                "numbers as int(...) or float(...), and arrays as part of the state"
            ) from error
    return found
