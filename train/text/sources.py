"""Where text comes from: the standard library's source, files, token shards, TFDS, mixtures.

A source is named by a short text:

* ``stdlib``: the source of this machine's Python standard library, tests left out, at most 8 MB;
* a file: text (one document), ``.jsonl`` or ``.parquet`` (``PATH#FIELD``, by default the field
  "text"), any of them with ``.gz``; or a ``.bin`` of uint16 tokens as nanoGPT or llm.c write them;
* a folder (all files of these kinds in it, sorted) or a glob (``data/**/*.jsonl#content``);
* ``tfds:NAME[/CONFIG][:VERSION][@DATA_DIR][#[SPLIT/]FIELD]``: a TFDS dataset prepared as
  array_record, by default its split "train" and its field "text".
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import math
import os
import re
import sysconfig
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train.text.source_files import FILE_KINDS, Piece, file_kind

if TYPE_CHECKING:
    from train.tokenizers.tokenizer import Tokenizer

STDLIB_BYTES = 8_000_000  # a corpus that tokenizes in seconds, and outlasts a demo's few epochs
# Folders that are tests, or not the library's own code.
STDLIB_LEFT_OUT = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__")
)
MEMO_BYTES = 1 << 24  # files below this are hashed in 10 ms: not worth an entry
MEMO_AGE = 2.0  # seconds: a file as young may change again within one tick of its clock


@dataclass(frozen=True)
class Source:
    """Documents in a fixed order.

    Attributes:
        name: short, for people.
        files: what it is read from, each with a word on how it is read.
        read: ``read(tokenizer)`` gives its pieces; the tokenizer matters to token shards alone.
    """

    name: str
    files: tuple[tuple[str, Path], ...]
    read: Callable[[Tokenizer | None], Iterator[Piece]]

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for _, path in self.files)

    def pieces(self, tokenizer: Tokenizer | None = None) -> Iterator[Piece]:
        """Documents, the long ones in parts; documents without a character are left out.

        Args:
            tokenizer: for token shards: where their documents end, and how many ids there are.

        Raises:
            ValueError: there is no text at all, or something that cannot be read; the message
                names the file and the byte, line or row.
        """
        pieces = self.read(tokenizer)
        first = next(pieces, None)
        if first is None:
            raise ValueError(f"{self.name} holds no text: all its documents are empty")
        yield from itertools.chain([first], pieces)

    def documents(self) -> Iterator[str]:
        """Whole documents, one at a time; ValueError where there are only tokens."""
        parts: list[str] = []
        for piece in self.pieces():
            parts.append(str(piece.content))
            if piece.ends_document:
                yield "".join(parts)
                parts = []

    def fingerprint(self, memo: Path | None = None) -> str:
        """Sha256 (hex) of the content and of how it is read; names and places do not count.

        Args:
            memo: folder that keeps the hashes of large files by path, size and modification time,
                so that a large corpus is not hashed at every start; None hashes everything.
        """
        digest = hashlib.sha256()
        for kind, path in self.files:
            digest.update(f"{kind} {_hash_file(path, memo)}\n".encode())
        return digest.hexdigest()


def open_source(spec: str) -> Source:
    """Open a source by name; the module's text lists the forms.

    Raises:
        ValueError: nothing is there, it is empty or of an unknown kind; the message says what
            would fit. What can be told only by reading is told by ``Source.pieces``.

    >>> open_source("stdlib").name
    'stdlib'
    """
    kind, _, rest = spec.partition(":")
    return SOURCES[kind](rest) if kind in SOURCES else open_files(spec)


def parse_mixture(specs: Sequence[str]) -> list[tuple[str, float]]:
    """Read ``SPEC`` or ``WEIGHT*SPEC`` (weight 1 where none is given); weights sum to 1.

    A glob that begins with a number is written ``./2*.txt``.

    >>> parse_mixture(["3*stdlib", "notes.txt"])
    [('stdlib', 0.75), ('notes.txt', 0.25)]
    """
    pairs: list[tuple[str, float]] = []
    for text in specs:
        match = re.fullmatch(r"\s*([-+]?[\d.][\w.+-]*|[-+]?(?:nan|inf))\*(.*)", text, re.DOTALL)
        weight, spec = (match[1], match[2]) if match else ("1", text)
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise ValueError(f"{text!r}: the weight {weight} is not a positive finite number")
        if not spec.strip():
            raise ValueError(f"{text!r} names no source; write SPEC or WEIGHT*SPEC")
        pairs.append((spec.strip(), value))
    if not pairs:
        raise ValueError("a mixture of no sources: give at least one, for example 'stdlib'")
    total = math.fsum(value for _, value in pairs)
    return [(spec, value / total) for spec, value in pairs]


def open_files(spec: str) -> Source:
    """A file, a folder or a glob, with ``#FIELD`` where the files have fields."""
    name, field = spec, "text"
    if not os.path.exists(os.path.expanduser(spec)) and "#" in spec:
        name, _, field = spec.rpartition("#")
    path = Path(name).expanduser()
    if path.is_file():
        files = [path]
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty")
    elif path.is_dir():
        files = _files_in(path)
    elif glob.has_magic(name):
        files = sorted(Path(found) for found in glob.glob(str(path), recursive=True))
        files = [file for file in files if file.is_file()]
        if not files:
            raise ValueError(f"no file matches {name!r} (from the folder {Path.cwd()})")
    else:
        near = path.parent
        there = sorted(entry.name for entry in near.iterdir())[:20] if near.is_dir() else []
        raise ValueError(
            f"no source {spec!r}: there is no such file or folder"
            + (f"; {near} holds {', '.join(there) or 'nothing'}" if near.is_dir() else "")
            + f". A source is a file, a folder, a glob, or one of {', '.join(SOURCES)}"
        )
    kinds = {file: file_kind(file) for file in files}
    names = {kind.name for kind in kinds.values()}
    if "tokens" in names and len(names) > 1:
        raise ValueError(f"{spec!r} has files of tokens (.bin) and of text: give them apart")
    if name != spec and not any(kind.has_field for kind in kinds.values()):
        raise ValueError(f"{spec!r} asks for the field {field!r}, but none of its files has fields")

    def described(file: Path) -> str:
        kind = kinds[file]
        packed = ".gz" if file.suffix == ".gz" else ""
        return f"{kind.name}{packed}#{field}" if kind.has_field else f"{kind.name}{packed}"

    def read(tokenizer: Tokenizer | None) -> Iterator[Piece]:
        for file in files:
            yield from kinds[file].read(file, field, tokenizer)

    return Source(path.name or str(path), tuple((described(file), file) for file in files), read)


def _files_in(folder: Path) -> list[Path]:
    """Files of the known suffixes below a folder, sorted by path; hidden ones left out."""
    found = [
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]
    files = [
        path
        for path in found
        if (Path(path.stem).suffix if path.suffix == ".gz" else path.suffix) in FILE_KINDS
    ]
    if not files:
        there = ", ".join(sorted({path.suffix or path.name for path in found})[:20]) or "no files"
        raise ValueError(
            f"the folder {folder} has no file of a known suffix ({', '.join(FILE_KINDS)}, also with"
            f" .gz); it has {there}. A glob reads any suffix as text"
        )
    return _sorted_below(folder, files)


def _sorted_below(folder: Path, files: Iterable[Path]) -> list[Path]:
    """By path within the folder, alike on every system."""
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def open_standard_library(rest: str = "") -> Source:
    """``*.py`` of the standard library in sorted order, as many as make at most 8 MB."""
    if rest:
        raise ValueError(f"the source 'stdlib' takes no argument, but was given {rest!r}")
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - STDLIB_LEFT_OUT  # not even looked into: many files
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    files: list[Path] = []
    size = 0
    for path in _sorted_below(root, found):
        if path.name.startswith("_sysconfigdata"):  # how this machine built Python, paths and all
            continue
        size += path.stat().st_size
        if size > STDLIB_BYTES:
            break
        files.append(path)
    if not files:
        raise ValueError(
            f"this Python comes without the source of its library (no *.py in {root}):"
            " give a file or a folder of text instead"
        )

    def read(tokenizer: Tokenizer | None) -> Iterator[Piece]:
        for path in files:
            yield from file_kind(path).read(path, "", tokenizer)

    return Source("stdlib", tuple(("text", path) for path in files), read)


def open_tfds(rest: str) -> Source:
    """``NAME[/CONFIG][:VERSION][@DATA_DIR][#[SPLIT/]FIELD]``, prepared as array_record."""
    from train.text.source_tfds import open_examples, parse_tfds, read_examples

    spec = parse_tfds(rest)
    examples, paths = open_examples(spec)
    files = tuple((f"array_record#{spec.field}", path) for path in paths)
    size = sum(path.stat().st_size for path in paths)
    return Source(f"tfds:{spec.name}", files, lambda tokenizer: read_examples(examples, spec, size))


# Source by the word before the colon; what is none of these is a path.
SOURCES: dict[str, Callable[[str], Source]] = {
    "stdlib": open_standard_library,
    "tfds": open_tfds,
}


def _hash_file(path: Path, memo: Path | None) -> str:
    """Sha256 of a file; that of a large one is kept under `memo`."""
    stat = path.stat()
    entry = None
    if memo is not None and stat.st_size >= MEMO_BYTES:
        key = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}"
        entry = memo / hashlib.sha256(key.encode()).hexdigest()
        known = entry.read_text() if entry.is_file() else ""
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if entry is not None and time.time() - stat.st_mtime > MEMO_AGE:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = entry.with_suffix(f".{uuid.uuid4().hex}")
        temporary.write_text(digest)
        os.replace(temporary, entry)
    return digest
