"""What a server writes to disk before it says that an update is done: a log, and a snapshot.

    append   header, payload, fsync: only then may the update be acknowledged
    compact  snapshot to a file beside, fsync, rename over the old one, fsync of the folder; then
             the log is emptied. Dying anywhere in between leaves records that the snapshot has
             already: they carry their number, and are passed over.

A record is a header (what follows, and a checksum of both) and arrays as `.npz` bytes, no pickle. A
record that was being written when the process died is dropped: nobody was told of it. Damage
anywhere else is an error, never a silent loss.
"""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Arrays = dict[str, Any]  # NumPy arrays and scalars

_MAGIC = b"ALOG"
_BODY = struct.Struct("<4sQI")  # magic, bytes of the payload, its checksum
_CHECK = struct.Struct("<I")  # checksum of the above
_HEADER = _BODY.size + _CHECK.size


class Disk:
    """The operations that change a disk, in one place so that a test can die in any of them."""

    def write(self, file: BinaryIO, content: bytes) -> None:
        """Writes at the file's position."""
        file.write(content)

    def sync(self, file: BinaryIO) -> None:
        """Returns once the disk has what was written."""
        file.flush()
        os.fsync(file.fileno())

    def truncate(self, file: BinaryIO, size: int) -> None:
        """Cuts the file and goes to its end."""
        file.truncate(size)
        file.seek(size)

    def replace(self, source: Path, target: Path) -> None:
        """Renames over what is there, in one stroke, for good."""
        os.replace(source, target)
        self.sync_folder(target.parent)

    def sync_folder(self, folder: Path) -> None:
        """Makes the names in a folder durable."""
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Log:
    """Records on disk, in order.

    Args:
      folder: of the log and the snapshot, made if it is not there; of one server alone.
      disk: what writes.
    """

    def __init__(self, folder: Path, disk: Disk | None = None) -> None:
        self.folder, self.disk = Path(folder), disk or Disk()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO | None = None

    def snapshot(self) -> Arrays | None:
        """Returns the arrays of the last snapshot, None before the first.

        Raises:
          ValueError: it is damaged.
        """
        path = self.folder / "snapshot"
        if not path.exists():
            return None
        content = path.read_bytes()
        payload, _ = next(_records(content, path, tail=False))
        return unpack(payload)

    def open(self, patience: float = 10.0) -> list[Arrays]:
        """Returns the records of the log and makes it ready for more; cuts off a torn last one.

        From here to `close` the log is this process's alone: two that appended to one file would
        write over what the other has acknowledged. The lock ends with the process that has it.

        Args:
          patience: seconds in which another process, which may be about to die, has to let go.

        Raises:
          ValueError: a record before the last is damaged, or another process has the log.
        """
        path = self.folder / "log"
        file = path.open("r+b" if path.exists() else "w+b")
        try:
            _lock(file, path, patience)
            content = path.read_bytes()
            found = list(_records(content, path, tail=True))
            end = found[-1][1] if found else 0
            self.disk.truncate(file, end)
            self.disk.sync(file)
            self.disk.sync_folder(self.folder)
        except BaseException:
            file.close()
            raise
        self._file = file
        return [unpack(payload) for payload, _ in found]

    def append(self, arrays: Arrays) -> None:
        """Returns once the record is on disk.

        Raises:
          OSError: it could not be written; the log is closed then, since nobody knows what the disk
            has of it, and must be opened anew.
          ValueError: the log is not open.
        """
        file = self._open_file()
        self._file = None
        try:
            self.disk.write(file, frame(pack(arrays)))
            self.disk.sync(file)
        except BaseException:
            file.close()
            raise
        self._file = file

    def compact(self, arrays: Arrays) -> None:
        """Replaces snapshot and log by a snapshot that has all of both.

        Raises:
          OSError, ValueError: as `append`.
        """
        file = self._open_file()
        self._file = None
        try:
            beside = self.folder / "snapshot.new"
            with beside.open("wb") as new:
                self.disk.write(new, frame(pack(arrays)))
                self.disk.sync(new)
            self.disk.replace(beside, self.folder / "snapshot")
            self.disk.truncate(file, 0)
            self.disk.sync(file)
        except BaseException:
            file.close()
            raise
        self._file = file

    def close(self) -> None:
        """Lets go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open_file(self) -> BinaryIO:
        if self._file is None:
            raise ValueError(f"the log in {self.folder} is not open; open a new one, which replays")
        return self._file


def _lock(file: BinaryIO, path: Path, patience: float) -> None:
    """Takes the file for this process alone (`flock`), which closing it undoes."""
    import fcntl  # of Unix; the rest of the module runs anywhere

    end = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= end:
                raise ValueError(
                    f"{path} is in use by another server, which did not let go of it in "
                    f"{patience:g} s; stop that one, or give this one a folder of its own"
                ) from error
            time.sleep(0.05)


def pack(arrays: Arrays) -> bytes:
    """Returns arrays as `.npz` bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def unpack(payload: bytes) -> Arrays:
    """Returns the arrays of `.npz` bytes.

    >>> unpack(pack({"a": np.arange(3)}))["a"].tolist()
    [0, 1, 2]
    """
    with np.load(io.BytesIO(payload), allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


def frame(payload: bytes) -> bytes:
    """Returns a payload behind its header.

    >>> len(frame(b"abc")) - len(b"abc")
    20
    """
    body = _BODY.pack(_MAGIC, len(payload), zlib.crc32(payload))
    return body + _CHECK.pack(zlib.crc32(body)) + payload


def _records(content: bytes, path: Path, *, tail: bool) -> Iterator[tuple[bytes, int]]:
    """Payloads and where they end; with `tail`, up to a last one that was never finished."""
    start = 0
    while start < len(content) or not tail:
        header, rest = content[start : start + _HEADER], content[start + _HEADER :]
        # What was never written may lack, or be zeros, as the file grew before its content came.
        unfinished = len(header) < _HEADER or not any(rest)
        whole = not unfinished and _CHECK.unpack(header[_BODY.size :])[0] == zlib.crc32(
            header[: _BODY.size]
        )
        if whole:
            _, size, check = _BODY.unpack(header[: _BODY.size])
            end = start + _HEADER + size
            payload = content[start + _HEADER : end]
            if len(payload) == size and zlib.crc32(payload) == check:
                yield payload, end
                start = end
                continue
            unfinished = end >= len(content)
        if unfinished and tail:
            return
        raise ValueError(
            f"{path} is damaged at byte {start} of {len(content)}, where no write was under way; "
            "updates that were acknowledged would be lost: bring the file back from a copy"
        )
