"""What all tokenizers share: pieces of bytes, native threads, exact joining, saved folders.

A tokenizer here is a table of byte strings plus a native function that turns texts into ids. All
kinds go through the one class below, so that none of them differs in what it refuses, in how it
spreads a long text over the cores, or in what it writes to a run folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RECORD = "kind.json"  # written last: a folder that has it is complete
FORMAT = 1

# Texts go to the native threads in parts of about this many characters: small enough that one long
# document keeps all cores busy, large enough that the cost per call does not show.
PART = 1 << 16
# Characters per native call: bounds the memory that a huge document takes while it is encoded
# (25 bytes a character in `tokenizers`, so about 100 MB), with parts enough for 64 cores.
CHARACTERS_PER_CALL = 1 << 22
_CUT = re.compile(r"(?<=\S) ")


@dataclass(frozen=True, eq=False)
class PieceTokenizer:
    """A tokenizer made of a native encoder and a function that joins ids into bytes.

    Attributes:
        kind: which loader reads what ``save`` wrote.
        vocabulary_size: number of ids, holes included: every id is below it.
        encode_parts: texts -> one int32 [n] array each, on the library's own threads.
        join: list of ids, all in range -> bytes.
        digest: sha256 of the pieces and of everything that changes encoding.
        end: the id between documents, None where the file names none.
        cuttable: whether no piece ever spans a non-space followed by a space, so that a text cut
            there gives the same ids.
        files: name -> content of what ``save`` writes beside its record.
    """

    kind: str
    vocabulary_size: int
    encode_parts: Callable[[list[str]], list[np.ndarray]] = field(repr=False)
    join: Callable[[list[int]], bytes] = field(repr=False)
    digest: str
    end: int | None
    cuttable: bool
    files: Mapping[str, bytes] = field(repr=False, default_factory=dict)

    @property
    def end_of_document(self) -> int:
        """The id placed between documents; ValueError where the tokenizer names none."""
        if self.end is None:
            raise ValueError(
                f"this {self.kind} tokenizer names no end-of-document token: add one to its special"
                " tokens (such as <|endoftext|> or </s>)"
            )
        return self.end

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text, int32 [n], with no special id added; see ``encode_batch``."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [n]; a long text is spread over the cores like many short ones.

        Raises:
            ValueError: a text holds a lone surrogate (the message gives its position).
            TypeError: something else than texts was given.
        """
        if isinstance(texts, str):
            raise TypeError("encode_batch takes a sequence of texts; for one text use encode")
        for index, text in enumerate(texts):
            require_unicode(text, where=f"text {index}" if len(texts) > 1 else "the text")
        owners: list[int] = []
        parts: list[str] = []
        ids: list[np.ndarray] = []
        waiting = 0
        for owner, text in enumerate(texts):
            for part in self._parts(text):
                owners.append(owner)
                parts.append(part)
                waiting += len(part)
                if waiting >= CHARACTERS_PER_CALL:
                    ids += self.encode_parts(parts)
                    parts, waiting = [], 0
        if parts:
            ids += self.encode_parts(parts)
        gathered: list[list[np.ndarray]] = [[] for _ in texts]
        for owner, array in zip(owners, ids, strict=True):
            gathered[owner].append(array)
        return [arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for arrays in gathered]

    def decode(self, ids: Any) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Any) -> bytes:
        """Exact bytes of the ids, integers of any shape; a special id gives none.

        Raises:
            ValueError: an id is not an integer in 0 .. vocabulary_size - 1.
        """
        flat = np.asarray(ids).ravel()
        if flat.size == 0:
            return b""
        if not np.issubdtype(flat.dtype, np.integer):
            raise ValueError(f"ids must be integers, not {flat.dtype}")
        if (low := int(flat.min())) < 0 or (high := int(flat.max())) >= self.vocabulary_size:
            raise ValueError(
                f"id {low if low < 0 else high} is outside this tokenizer's 0 .."
                f" {self.vocabulary_size - 1}; mask the logits of padded vocabulary entries"
            )
        return self.join(flat.tolist())

    def fingerprint(self) -> str:
        """Sha256 of the pieces and of what changes encoding; the same after save and load."""
        return self.digest

    def save(self, folder: Path | str) -> None:
        """Write a folder that ``load_tokenizer`` reads, wherever it is moved to.

        Each file is written under a temporary name and renamed, the record last, so a kill leaves
        either no record or a complete folder. Saving the same tokenizer again changes nothing.

        Raises:
            ValueError: the folder holds another tokenizer.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "format": FORMAT,
            "kind": self.kind,
            "vocabulary_size": self.vocabulary_size,
            "fingerprint": self.digest,
            "files": {name: sha256(content) for name, content in self.files.items()},
        }
        contents = {**self.files, RECORD: (json.dumps(record, indent=2) + "\n").encode()}
        if _recorded_fingerprint(folder) != self.digest:
            for name, content in contents.items():
                if (folder / name).exists() and (folder / name).read_bytes() != content:
                    raise ValueError(
                        f"{folder / name} belongs to another tokenizer: save into a folder without"
                        " one, or delete that one first"
                    )
        for name, content in contents.items():
            _write(folder / name, content)

    def _parts(self, text: str) -> Iterator[str]:
        start = 0
        while self.cuttable and len(text) - start > PART:
            cut = _CUT.search(text, start + PART)
            if cut is None:
                break
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:]


def bytes_tokenizer() -> PieceTokenizer:
    """Raw UTF-8 bytes, ids 0-255, and 256 between documents.

    >>> tokenizer = bytes_tokenizer()
    >>> tokenizer.encode("hé").tolist(), tokenizer.end_of_document
    ([104, 195, 169], 256)
    >>> tokenizer.decode([104, 195, 169, 256]), tokenizer.decode([195])
    ('hé', '\ufffd')
    """
    return PieceTokenizer(
        kind="bytes",
        vocabulary_size=257,
        encode_parts=lambda parts: [
            np.frombuffer(part.encode(), np.uint8).astype(np.int32) for part in parts
        ],
        join=table_join([bytes([value]) for value in range(256)] + [b""]),
        digest=sha256(b"bytes"),
        end=256,
        cuttable=True,
    )


def table_join(
    table: Sequence[bytes], *, stripped_prefix: bytes = b""
) -> Callable[[list[int]], bytes]:
    """Join ids through a table; ``stripped_prefix`` is taken off the start, once, where present."""
    return lambda ids: b"".join([table[index] for index in ids]).removeprefix(stripped_prefix)


def require_unicode(text: str, *, where: str = "the text", offset: int = 0) -> None:
    """Refuse what UTF-8 cannot hold: lone surrogates.

    Args:
        text: what to look at.
        where: how the message names it.
        offset: characters before ``text`` in it, added to the position in the message.

    Raises:
        ValueError: with the position of the first lone surrogate.
        TypeError: not a string.
    """
    if not isinstance(text, str):
        raise TypeError(f"{where} is {type(text).__name__}, not str: decode it first")
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has the lone surrogate U+{ord(text[error.start]):04X} at character"
            f" {offset + error.start}, which is not valid Unicode: read the source with"
            " errors='replace', or mend it"
        ) from None


def read_saved(folder: Path) -> tuple[str, dict[str, bytes]]:
    """Kind and files of a folder that ``save`` wrote, each checked against its sha256.

    Raises:
        ValueError: the record or a file is damaged, missing, or of a newer format.
    """
    try:
        record = json.loads((folder / RECORD).read_bytes())
        version, kind, sums = record["format"], record["kind"], dict(record["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / RECORD} is not a tokenizer's record: {error!r}") from None
    if version != FORMAT:
        raise ValueError(f"{folder / RECORD} has format {version}; this version reads {FORMAT}")
    files = {}
    for name, expected in sums.items():
        if Path(name).name != name:  # a record must not point outside its own folder
            raise ValueError(f"{folder / RECORD} names the file {name!r}, outside its folder")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: copy the whole folder again")
        files[name] = (folder / name).read_bytes()
        if sha256(files[name]) != expected:
            raise ValueError(f"{folder / name} was changed or damaged: its sha256 differs")
    return kind, files


def sha256(content: bytes) -> str:
    """Hex digest of the content."""
    return hashlib.sha256(content).hexdigest()


def _recorded_fingerprint(folder: Path) -> str | None:
    try:
        return json.loads((folder / RECORD).read_bytes())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
