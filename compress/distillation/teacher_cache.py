"""What a teacher said, on disk: written once, memory-mapped, and found by the tokens it was asked.

    folder/manifest.json   teacher, data, how it was kept; name, shape, type and hash of every array
    folder/keys.npy        16 bytes a row: what the teacher read
    folder/ids.bin         uint16 (int32 for more than 65,536 tokens) [rows, T, k]
    folder/*.bin           float16 [rows, T, ...]

A row is found by a hash of all that the teacher saw of it (tokens, segments, positions), so what
is read for a batch is a pure function of the batch: whatever the order, epoch, batch size or seed.
Text that the teacher has not read is an error.

Shapes: B rows of a batch, T time, k kept tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Batch = Mapping[str, Any]
Arrays = dict[str, np.ndarray]

READ = ("tokens", "segments", "positions")  # what a model sees of a batch
KEY_BYTES = 16
MANIFEST = "manifest.json"


class TeacherCache(NamedTuple):
    """A cache, opened.

    Attributes:
      identity: what it was written for.
      arrays: name -> [rows, T, ...], memory-mapped.
      rows: key -> row.
    """

    identity: dict[str, Any]
    arrays: Arrays
    rows: dict[bytes, int]


def write_teacher_cache(
    folder: str | os.PathLike[str],
    batches: Iterable[Batch],
    targets: Callable[[Batch], Mapping[str, Any]],
    identity: Mapping[str, Any],
    vocabulary_size: int,
) -> TeacherCache:
    """Asks the teacher about each batch and keeps the answers, in one piece or not at all.

    Args:
      folder: must not exist.
      batches: each "tokens" [B, T], and "segments" and "positions" if the teacher sees them; all of
        one T. A row that comes again is kept once.
      targets: `batch -> arrays [B, T, ...]`; "ids" are token ids, all others floating point.
      identity: JSON values that say what this is: hash of the teacher, fingerprint of the data,
        length of the windows, k, temperature. They are compared when it is opened.
      vocabulary_size: V, which says how wide an id is.

    Returns:
      The cache.

    Raises:
      ValueError: the folder exists, there is no batch, or rows differ in length.

    >>> import tempfile
    >>> batch = {"tokens": np.arange(8).reshape(2, 4)}
    >>> say = lambda batch: {"ids": batch["tokens"][..., None] + 1}
    >>> folder = Path(tempfile.mkdtemp()) / "cache"
    >>> cache = write_teacher_cache(folder, [batch], say, {"teacher": "a"}, 100)
    >>> look_up(cache, {"tokens": batch["tokens"][::-1]})["ids"][0, :, 0].tolist()
    [5, 6, 7, 8]
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} is there already; open it, or give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{folder.name}.writing-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        shapes, keys = _write_rows(temporary, batches, targets, vocabulary_size)
        packed = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
        np.save(temporary / "keys.npy", packed)
        arrays = {
            name: {"shape": [len(keys), *shape], "dtype": dtype.str}
            for name, (shape, dtype) in shapes.items()
        }
        hashes = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        manifest = {"identity": dict(identity), "arrays": arrays, "files": hashes}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return open_teacher_cache(folder, identity)


def open_teacher_cache(folder: str | os.PathLike[str], identity: Mapping[str, Any]) -> TeacherCache:
    """Opens a cache, every file checked first.

    Args:
      folder: from `write_teacher_cache`.
      identity: what it must have been written for.

    Raises:
      FileNotFoundError: no cache there.
      ValueError: it was written for something else (the fields are named), or is damaged.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        raise FileNotFoundError(f"no teacher cache at {folder}")
    manifest = json.loads((folder / MANIFEST).read_text())
    found, wanted = manifest["identity"], json.loads(json.dumps(dict(identity)))
    if differ := sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name)):
        lines = (f"{name}: {found.get(name)}, not {wanted.get(name)}" for name in differ)
        raise ValueError(
            f"the teacher cache {folder} was written for something else; write another one:\n  "
            + "\n  ".join(lines)
        )
    for name, digest in manifest["files"].items():
        if not (folder / name).exists() or _sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} is damaged; remove the cache and write it again")
    keys = np.load(folder / "keys.npy")
    arrays: Arrays = {
        name: np.memmap(folder / f"{name}.bin", entry["dtype"], "r", shape=tuple(entry["shape"]))
        for name, entry in manifest["arrays"].items()
    }
    return TeacherCache(found, arrays, {key.tobytes(): row for row, key in enumerate(keys)})


def look_up(cache: TeacherCache, batch: Batch) -> Arrays:
    """Returns what the teacher said about the rows of a batch, [B, T, ...]: int32 and float32.

    Args:
      cache: opened.
      batch: as those that it was written for.

    Raises:
      ValueError: a row that the teacher has not read.
    """
    keys = row_keys(batch)
    if missing := [row for row, key in enumerate(keys) if key not in cache.rows]:
        raise ValueError(
            f"the teacher cache does not hold row {missing[0]} of the batch (and "
            f"{len(missing) - 1} more): it was written for other text, other windows, or other "
            "document boundaries; write one for these"
        )
    rows = np.array([cache.rows[key] for key in keys])
    kinds = {name: np.int32 if name == "ids" else np.float32 for name in cache.arrays}
    return {name: array[rows].astype(kinds[name]) for name, array in cache.arrays.items()}


def row_keys(batch: Batch) -> list[bytes]:
    """Returns a hash of each row of what a model sees of a batch.

    >>> keys = row_keys({"tokens": np.array([[1, 2], [3, 4], [1, 2]]), "weights": np.ones((3, 2))})
    >>> keys[0] == keys[2], keys[0] == keys[1]
    (True, False)
    """
    seen = {name: np.asarray(batch[name], np.int32) for name in READ if name in batch}
    keys = []
    for row in range(len(seen["tokens"])):
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        for name, array in seen.items():
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(array[row]).data)
        keys.append(digest.digest())
    return keys


def _write_rows(
    folder: Path,
    batches: Iterable[Batch],
    targets: Callable[[Batch], Mapping[str, Any]],
    vocabulary_size: int,
) -> tuple[dict[str, tuple[tuple[int, ...], np.dtype]], list[bytes]]:
    """Appends the rows that are new; returns shape and type of a row by array, and all keys."""
    wide = np.dtype(np.int32 if vocabulary_size > 2**16 else np.uint16)
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    keys: dict[bytes, None] = {}
    for batch in batches:
        new = []
        for row, key in enumerate(row_keys(batch)):
            if key not in keys:
                keys[key] = None
                new.append(row)
        if not new:
            continue
        for name, value in targets(batch).items():
            array = np.asarray(value)[new]
            array = array.astype(wide if name == "ids" else np.float16)
            shape = shapes.setdefault(name, (array.shape[1:], array.dtype))[0]
            if array.shape[1:] != shape:
                raise ValueError(
                    f"rows of {name} have the shapes {shape} and {array.shape[1:]}; give batches "
                    "of one length"
                )
            with open(folder / f"{name}.bin", "ab") as file:
                file.write(np.ascontiguousarray(array).data)
    if not keys:
        raise ValueError("there was no batch to ask the teacher about")
    return shapes, list(keys)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
