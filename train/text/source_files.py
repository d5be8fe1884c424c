"""Readers of one file: text, JSON lines, Parquet, token shards, and the first three in gzip.

Each reader streams *pieces*: whole documents, or, for a long document, its parts in order. A piece
is at most a mebibyte (a longer record of a .jsonl or .parquet is itself held once), so that a file
larger than memory is read in bounded memory, and one long document still keeps all cores busy.
"""

from __future__ import annotations

import gzip
import io
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from model.extras import from_extra

if TYPE_CHECKING:
    from train.tokenizers.tokenizer import Tokenizer

# Small enough that a batch of pieces, with what tokenizers keep per token (about 100 bytes), is
# nothing to a machine's memory; large enough that few words stand at a cut.
PIECE_BYTES = 1 << 20
PIECE_TOKENS = 1 << 19
SHARD_READ = 8 * PIECE_TOKENS  # a multiple of the piece: where pieces end must not depend on it
PARQUET_ROWS = 256
LLMC_MAGIC, LLMC_HEADER = 20240520, 256  # llm.c: 256 int32, of which magic, version, token count
LLMC_MAGIC_UINT32 = 20240801  # the same with uint32 tokens
WHITESPACE = b" \t\n\r\v\f"


class Piece(NamedTuple):
    """A document, or a part of a long one.

    Attributes:
        content: text, or ids (uint16 [n]) from a file that holds tokens.
        ends_document: whether the next piece begins another document.
        read: bytes of the file consumed since the piece before; for progress, nothing else.
    """

    content: str | np.ndarray
    ends_document: bool
    read: int


class FileKind(NamedTuple):
    """How files of a kind are read: its name, whether it has fields, and the reader."""

    name: str
    has_field: bool
    read: Callable[[Path, str, Tokenizer | None], Iterator[Piece]]


def file_kind(path: Path) -> FileKind:
    """Kind of a file by its suffix (one before .gz counts); what is unknown is read as text.

    >>> file_kind(Path("a/b.jsonl.gz")).name, file_kind(Path("README")).name
    ('jsonl', 'text')
    """
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if path.suffix == ".gz" and suffix == ".bin":
        raise ValueError(f"{path}: token shards are memory-mapped; unpack it first (gunzip)")
    return FILE_KINDS.get(suffix, FILE_KINDS[".txt"])


def cut_position(data: bytes, limit: int) -> int:
    """Where to cut `data`, which is longer than `limit`: the last good place not after `limit`.

    Good is after a line's end between two characters that are not white space: there byte-level
    BPE gives the same tokens with and without the cut. Where there is none, between characters.

    >>> cut_position(b"one\\n two\\nthree", 12), cut_position("éé".encode(), 3)
    (9, 2)
    """
    at = limit
    while (at := data.rfind(b"\n", 1, at)) > 0:
        if data[at - 1] not in WHITESPACE and data[at + 1] not in WHITESPACE:
            return at + 1
    at = limit
    while at > limit - 4 and data[at] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        at -= 1
    return at


def _decode(data: bytes, where: str, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at = error.start
        raise ValueError(
            f"{where} is not UTF-8 text: byte 0x{data[at]:02x} at offset {offset + at}"
            f" ({error.reason}). Convert it first, for example with iconv -t utf-8"
        ) from None


def _cut_stream(read: Callable[[int], bytes], where: str) -> Iterator[tuple[str, bool]]:
    """Parts of one document read as bytes, and whether each is the last; nothing if it is empty."""
    data, offset, ended = b"", 0, False
    while True:
        while not ended and len(data) <= PIECE_BYTES:
            more = read(PIECE_BYTES)
            data, ended = data + more, not more
        if len(data) <= PIECE_BYTES:
            break
        at = cut_position(data, PIECE_BYTES)
        yield _decode(data[:at], where, offset), False
        data, offset = data[at:], offset + at
    if data:
        yield _decode(data, where, offset), True


def cut_text(text: Any, where: str) -> Iterator[tuple[str, bool]]:
    """Parts of one document, and whether each is the last; nothing if it is empty.

    Args:
        text: str, or bytes in UTF-8.
        where: what an error names.
    """
    if isinstance(text, str):
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where} holds a lone surrogate (character {error.start}), which is not text"
            ) from None
    elif isinstance(text, bytes):
        data = text
    else:
        raise ValueError(f"{where} is {type(text).__name__}, not text")
    yield from _cut_stream(io.BytesIO(data).read, where)


@contextmanager
def _open(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The file's content, and the file itself, whose position tells the progress."""
    with open(path, "rb") as raw:
        if path.suffix != ".gz":
            yield raw, raw
            return
        try:
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream, raw  # type: ignore[misc]
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not an intact gzip file: {error}") from None


def _read_text(path: Path, field: str, tokenizer: Tokenizer | None) -> Iterator[Piece]:
    """One document."""
    with _open(path) as (stream, raw):
        before = 0
        for text, last in _cut_stream(stream.read, str(path)):
            yield Piece(text, last, raw.tell() - before)
            before = raw.tell()


def _read_jsonl(path: Path, field: str, tokenizer: Tokenizer | None) -> Iterator[Piece]:
    """A document per line, blank lines passed over."""
    with _open(path) as (stream, raw):
        before = offset = 0
        for number, line in enumerate(stream, 1):
            where = f"{path}, line {number}"
            text = _decode(line, str(path), offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where} is {type(record).__name__}, not an object with fields")
            _check_field(field, list(record), where)
            for part, last in cut_text(record[field], f"{where}, field {field!r}"):
                yield Piece(part, last, raw.tell() - before)
                before = raw.tell()


def _read_parquet(path: Path, field: str, tokenizer: Tokenizer | None) -> Iterator[Piece]:
    """A document per row."""
    pyarrow = from_extra("pyarrow", "parquet", f"{path}: reading Parquet needs pyarrow")
    from_extra("pyarrow.parquet", "parquet")
    with _open(path) as (stream, _), tempfile.TemporaryFile() as unpacked:
        if path.suffix == ".gz":  # Parquet is read from its end: in a gzip that needs all of it
            while block := stream.read(PIECE_BYTES):
                unpacked.write(block)
            stream = unpacked
        try:
            table = pyarrow.parquet.ParquetFile(stream)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not an intact Parquet file: {error}") from None
        _check_field(field, table.schema_arrow.names, str(path))
        size, rows, row, before = path.stat().st_size, table.metadata.num_rows, 0, 0
        for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[field]):
            for text in batch.column(0).to_pylist():
                row += 1
                for part, last in cut_text(text, f"{path}, row {row}, field {field!r}"):
                    yield Piece(part, last, size * row // rows - before)
                    before = size * row // rows


def _check_field(field: str, fields: list[str], where: str) -> None:
    if field not in fields:
        known = ", ".join(map(repr, fields)) or "none"
        raise ValueError(
            f"{where} has no field {field!r}; its fields are {known}. Choose one with PATH#FIELD"
        )


def _open_shard(path: Path) -> np.ndarray:
    """The tokens of nanoGPT's raw uint16 or of llm.c's format, memory-mapped."""
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", count=LLMC_HEADER)
    magic, version = (int(header[0]), int(header[1])) if header.size > 1 else (0, 0)
    if magic == LLMC_MAGIC_UINT32 or (magic == LLMC_MAGIC and version != 1):
        raise ValueError(
            f"{path} is a token shard of llm.c with magic {magic}, version {version}; read are"
            f" those of uint16 tokens, magic {LLMC_MAGIC}, version 1"
        )
    offset, count = 0, size // 2
    if magic == LLMC_MAGIC and header.size == LLMC_HEADER:
        offset, count = header.nbytes, int(header[2])
    if size != offset + 2 * count:
        raise ValueError(
            f"{path} has {size} bytes where {offset + 2 * count} were expected"
            f" ({count} tokens of 2 bytes after a header of {offset}): it is damaged or of another"
            " format"
        )
    if not count:
        raise ValueError(f"{path} holds no tokens")
    return np.memmap(path, "<u2", "r", offset=offset, shape=(count,))


def _read_shard(path: Path, field: str, tokenizer: Tokenizer | None) -> Iterator[Piece]:
    """Documents as the end-of-document id ends them; the file's end ends one too."""
    if tokenizer is None:
        raise ValueError(f"{path} holds tokens: it has no text to read without their tokenizer")
    tokens = _open_shard(path)
    start = 0
    while start < len(tokens):
        chunk = np.array(tokens[start : start + SHARD_READ])
        if chunk.max() >= tokenizer.vocabulary_size:
            at = int(np.argmax(chunk >= tokenizer.vocabulary_size))
            raise ValueError(
                f"{path}: token {start + at} has id {chunk[at]}, but the tokenizer has"
                f" {tokenizer.vocabulary_size} ids: the shard was made with another tokenizer"
            )
        ends = (np.flatnonzero(chunk == tokenizer.end_of_document) + 1).tolist()
        at_end = start + len(chunk) == len(tokens)
        if at_end and (not ends or ends[-1] < len(chunk)):
            ends.append(len(chunk))
        begin = 0
        for end in ends:
            yield from _cut_tokens(chunk[begin:end], ends_document=True)
            begin = end
        if not ends:  # a document longer than the chunk goes on in the next
            yield from _cut_tokens(chunk, ends_document=False)
            begin = len(chunk)
        start += begin


def _cut_tokens(tokens: np.ndarray, ends_document: bool) -> Iterator[Piece]:
    for begin in range(0, len(tokens), PIECE_TOKENS):
        part = tokens[begin : begin + PIECE_TOKENS]
        last = begin + len(part) == len(tokens)
        yield Piece(part, last and ends_document, part.nbytes)


_TEXT = FileKind("text", False, _read_text)
FILE_KINDS: dict[str, FileKind] = {
    ".jsonl": FileKind("jsonl", True, _read_jsonl),
    ".parquet": FileKind("parquet", True, _read_parquet),
    ".bin": FileKind("tokens", False, _read_shard),
    **dict.fromkeys((".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".py"), _TEXT),
}
