"""A corpus: a source tokenised once, split by document, kept on disk and memory-mapped.

The cache is a folder per content and tokenizer, safe against processes that build it at once and
against a kill in the middle (``train.cache``).

* Each document goes to train (90 %), validation (5 %) or test (5 %) by a hash of its text alone, of
  its first mebibyte if it is longer. Copies of a document are never split up, and the split is the
  same for every tokenizer.
* A source of fewer than 20 documents (or one of whose documents none happens to be held out) gives
  its last tenth by bytes as validation, cut between two characters, and has no test split.
* The end-of-document id follows each document. Token shards are taken as they are: they are split
  into documents after that id, and nothing is added.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from train.byte_progress import Progress, progress_bar
from train.cache import build_once, default_cache
from train.text.source_files import Piece
from train.text.sources import Source

if TYPE_CHECKING:
    from train.tokenizers.tokenizer import Tokenizer

FORMAT = 1  # part of the key: a change of the layout or of the rule of the split raises it
SPLITS = ("train", "validation", "test")
FEW_DOCUMENTS = 20  # below this, one in twenty is likely none
BATCH_BYTES = 1 << 23  # text tokenised at a time: enough for every core, small beside any memory
BATCH_PIECES = 1 << 13


@dataclass(frozen=True, eq=False)
class Split:
    """Tokens of one split.

    Attributes:
        tokens: uint16 or uint32 [n] (by the vocabulary's size), memory-mapped, read-only.
        starts: int64 [documents], where documents start, ascending from 0; memory-mapped.
        bytes: UTF-8 bytes of the text (separators count none), for bits per byte.
    """

    tokens: np.ndarray
    starts: np.ndarray
    bytes: int


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenised source.

    Attributes:
        path: its folder in the cache.
        name: of the source, for people.
        fingerprint: of the source's content.
        tokenizer: fingerprint of the tokenizer.
        vocabulary_size: ids are below it.
        end_of_document: the id after each document.
        splits: those that hold something, by name.
        missing: why the others do not.
    """

    path: Path
    name: str
    fingerprint: str
    tokenizer: str
    vocabulary_size: int
    end_of_document: int
    splits: Mapping[str, Split]
    missing: str

    def split(self, name: str) -> Split:
        """The split "train", "validation" or "test"; ValueError that says why where it has none."""
        if name not in SPLITS:
            raise ValueError(f"unknown split {name!r}; splits are {', '.join(SPLITS)}")
        if name not in self.splits:
            raise ValueError(f"{self.name} has no {name} split: {self.missing}")
        return self.splits[name]


def build_corpus(
    source: Source,
    tokenizer: Tokenizer,
    cache: Path | None = None,
    *,
    progress: Progress = progress_bar,
) -> Corpus:
    """Tokenise a source into the cache, or open what is there.

    Args:
        source: read in a stream; memory does not grow with it.
        tokenizer: ``encode_batch`` gets 8 MiB of text at a time.
        cache: a folder that processes may share; by default ``default_cache()``.
        progress: ``progress(description, total)`` gives a context in which ``advance(bytes)`` is
            called.

    Raises:
        ValueError: the source holds no text or cannot be read (the message names the place), it
            changed while it was read, or the tokenizer gives ids outside its vocabulary.

    >>> import tempfile
    >>> from train.text.sources import open_source
    >>> from train.tokenizers.tokenizer import load_tokenizer
    >>> with tempfile.TemporaryDirectory() as name:
    ...     _ = (Path(name) / "a.txt").write_text("0123456789")
    ...     source, folder = open_source(f"{name}/a.txt"), Path(name) / "cache"
    ...     corpus = build_corpus(source, load_tokenizer("bytes"), folder)
    ...     corpus.split("train").tokens.tobytes().decode("utf-16-le"), corpus.split("train").bytes
    ('012345678', 9)
    """
    cache = default_cache() if cache is None else Path(cache)
    stamps = _stamps(source)
    identity = {
        "format": FORMAT,
        "vocabulary_size": tokenizer.vocabulary_size,
        "end_of_document": tokenizer.end_of_document,
        "tokenizer": tokenizer.fingerprint(),
        "source": source.fingerprint(cache / "fingerprints"),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]

    def write(folder: Path) -> None:
        with progress(f"tokenizing {source.name}", source.size) as advance:
            facts = _write(source, tokenizer, folder, advance)
        if _stamps(source) != stamps:
            raise ValueError(f"{source.name} changed while it was read: start again when it rests")
        with open(folder / "metadata.json", "w") as file:
            json.dump({**identity, "name": source.name, **facts}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    return build_once(cache / "corpora" / key, _open, write)


def _stamps(source: Source) -> list[tuple[int, int]]:
    """What a file's change would change."""
    stats = (path.stat() for _, path in source.files)
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


# Writing


@dataclass
class _Output:
    """One split while it is written."""

    tokens_file: IO[bytes]
    starts_file: IO[bytes]
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    size: int = 0  # bytes of text, or ids: what the held-out tenth is a tenth of
    pending: list[np.ndarray] = field(default_factory=list)
    pending_tokens: int = 0
    starts: array[int] = field(default_factory=lambda: array("q"))

    def append(self, ids: np.ndarray, starts_document: bool) -> None:
        if starts_document or not self.documents:
            self.starts.append(self.tokens + self.pending_tokens)
            self.documents += 1
        self.pending.append(ids)
        self.pending_tokens += len(ids)

    def flush(self, vocabulary_size: int) -> None:
        if not self.pending:
            return
        ids = np.concatenate(self.pending)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary_size:
            raise ValueError(
                f"the tokenizer gave ids from {ids.min()} to {ids.max()}, which are not all in"
                f" [0, {vocabulary_size})"
            )
        ids.astype(_dtype(vocabulary_size)).tofile(self.tokens_file)
        np.array(self.starts, "<i8").tofile(self.starts_file)
        self.tokens += len(ids)
        self.pending, self.pending_tokens, self.starts = [], 0, array("q")

    def sync(self) -> None:
        for file in (self.tokens_file, self.starts_file):
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name without the content


def _dtype(vocabulary_size: int) -> np.dtype:
    return np.dtype("<u2" if vocabulary_size <= 1 << 16 else "<u4")


def _write(
    source: Source, tokenizer: Tokenizer, folder: Path, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Write the splits' files; returns their facts for the metadata."""
    documents, size = _survey(source, tokenizer)
    cut = None if documents == FEW_DOCUMENTS else size * 9 // 10
    facts = _write_splits(source, tokenizer, folder, cut, advance)
    if cut is not None:
        missing = f"it has fewer than {FEW_DOCUMENTS} documents, so"
    else:
        documents = sum(split["documents"] for split in facts.values())
        missing = f"by the hash of their text none of its {documents} documents fell to it"
        if not (facts["train"]["tokens"] and facts["validation"]["tokens"]):
            # Few documents, or copies of few: by chance none is held out, or all are.
            cut = sum(split["size"] for split in facts.values()) * 9 // 10
            facts = _write_splits(source, tokenizer, folder, cut, lambda read: None)
            missing = f"its {documents} documents cannot be split by the hash of their text, so"
    if cut is not None:
        missing += " its last tenth is its validation split and there is no test split"
        if not (facts["train"]["tokens"] and facts["validation"]["tokens"]):
            size = sum(split["size"] for split in facts.values())
            raise ValueError(f"{source.name} is too short to hold out a tenth: its size is {size}")
    missing += ". Give more documents, or evaluate on a source of its own"
    return {"splits": facts, "missing": missing}


def _survey(source: Source, tokenizer: Tokenizer) -> tuple[int, int]:
    """Number of documents (counted up to 20) and their size (of all, where they are fewer)."""
    documents = size = 0
    for piece in source.pieces(tokenizer):
        documents += piece.ends_document
        size += len(_data(piece.content))
        if documents == FEW_DOCUMENTS:
            break
    return documents, size


def _data(content: str | np.ndarray) -> bytes | np.ndarray:
    """What is measured and cut: the bytes of a text, or ids."""
    return content.encode() if isinstance(content, str) else content


def _write_splits(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    cut: int | None,
    advance: Callable[[int], None],
) -> dict[str, dict[str, int]]:
    """Write the splits' files: by document hash, or from the position `cut` as validation."""
    end = np.array([tokenizer.end_of_document], np.int32)
    lengths: np.ndarray | None = None  # bytes per id; asked for by token shards alone
    starts_document = True
    with ExitStack() as stack:
        outputs = {
            name: _Output(
                stack.enter_context(open(tokens, "wb")), stack.enter_context(open(starts, "wb"))
            )
            for name in SPLITS
            for tokens, starts in [_paths(folder, name)]
        }
        for batch in _batched(_assigned(source.pieces(tokenizer), cut)):
            contents = [piece.content for _, piece in batch]
            for (name, piece), ids in zip(batch, _encode(contents, tokenizer), strict=True):
                output, size = outputs[name], len(_data(piece.content))
                output.append(ids, starts_document)
                output.size += size
                if isinstance(piece.content, str):
                    output.bytes += size
                    if piece.ends_document:
                        output.append(end, False)
                else:
                    lengths = _byte_lengths(tokenizer) if lengths is None else lengths
                    output.bytes += int(lengths[ids].sum())
                starts_document = piece.ends_document
            for output in outputs.values():
                output.flush(tokenizer.vocabulary_size)
            advance(sum(piece.read for _, piece in batch))
        for output in outputs.values():
            output.sync()
    keys = ("tokens", "documents", "bytes", "size")
    return {name: {key: getattr(out, key) for key in keys} for name, out in outputs.items()}


def _encode(contents: Sequence[str | np.ndarray], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Ids of each text, on all cores; ids as they are."""
    texts = [content for content in contents if isinstance(content, str)]
    encoded = iter(tokenizer.encode_batch(texts) if texts else [])
    for content in contents:
        yield next(encoded) if isinstance(content, str) else content


def _batched(assigned: Iterator[tuple[str, Piece]]) -> Iterator[list[tuple[str, Piece]]]:
    """Lists of about BATCH_BYTES."""
    batch: list[tuple[str, Piece]] = []
    size = 0
    for name, piece in assigned:
        batch.append((name, piece))
        size += len(piece.content)
        if size >= BATCH_BYTES or len(batch) >= BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _assigned(pieces: Iterator[Piece], cut: int | None) -> Iterator[tuple[str, Piece]]:
    """Each piece with the split it belongs to; the one that lies across `cut` in two."""
    position, name = 0, ""
    for piece in pieces:
        data = _data(piece.content)
        if cut is None:
            # The first piece decides for the whole document.
            name = name or _split_of(data)
            yield name, piece
            name = "" if piece.ends_document else name
            continue
        at = min(max(cut - position, 0), len(data))
        position += len(data)
        if isinstance(data, bytes):
            while 0 < at < len(data) and data[at] & 0xC0 == 0x80:  # inside a character
                at -= 1
            parts: tuple[Any, Any] = data[:at].decode(), data[at:].decode()
        else:
            parts = data[:at], data[at:]
        left, right = parts
        if len(left):
            yield "train", Piece(left, piece.ends_document and not len(right), piece.read)
        if len(right):
            yield "validation", Piece(right, piece.ends_document, 0 if len(left) else piece.read)


def _split_of(data: bytes | np.ndarray) -> str:
    twentieth = int.from_bytes(hashlib.sha256(bytes(data)).digest()[:8], "big") % 20
    return {0: "validation", 1: "test"}.get(twentieth, "train")


def _byte_lengths(tokenizer: Any) -> np.ndarray:
    """UTF-8 bytes of each id: what a shard of tokens would be as text."""
    ids = range(tokenizer.vocabulary_size)
    return np.array([len(tokenizer.decode_bytes([index])) for index in ids], np.int64)


# The folder


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.tokens", folder / f"{name}.starts"


def _open(folder: Path) -> Corpus:
    """Open a finished corpus; ValueError where it is damaged."""
    try:
        facts = json.loads((folder / "metadata.json").read_text())
        dtype = _dtype(facts["vocabulary_size"])
        splits = {}
        for name, split in facts["splits"].items():
            sizes = (split["tokens"] * dtype.itemsize, split["documents"] * 8)
            for path, size in zip(_paths(folder, name), sizes, strict=True):
                if path.stat().st_size != size:
                    raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {size}")
            if split["tokens"]:
                tokens, starts = _paths(folder, name)
                splits[name] = Split(
                    np.memmap(tokens, dtype, "r"), np.memmap(starts, "<i8", "r"), split["bytes"]
                )
        return Corpus(
            folder,
            facts["name"],
            facts["source"],
            facts["tokenizer"],
            facts["vocabulary_size"],
            facts["end_of_document"],
            splits,
            facts["missing"],
        )
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ValueError(f"the cached corpus {folder} is damaged ({error})") from None
