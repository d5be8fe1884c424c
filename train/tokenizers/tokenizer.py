"""Tokenizers: raw bytes, SentencePiece, GPT-2's byte-level BPE, any ``tokenizer.json``.

``load_tokenizer`` opens one by a short text, ``train_sentencepiece`` makes one from documents, and
``save`` writes the folder that a run carries along. ``Tokenizer`` is what the rest of the code
relies on; any object with these methods will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from train.tokenizers.bpe import open_gpt2, open_tokenizer_json
from train.tokenizers.llama2c import open_llama2c
from train.tokenizers.pieces import RECORD, bytes_tokenizer, read_saved
from train.tokenizers.sentencepiece import MODEL, open_sentencepiece, train_sentencepiece

__all__ = ["LOADERS", "Tokenizer", "load_tokenizer", "train_sentencepiece"]


class Tokenizer(Protocol):
    """Text to ids and back. Every id is below ``vocabulary_size``."""

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, special ones included."""

    @property
    def end_of_document(self) -> int:
        """The id placed between documents; ValueError where the tokenizer names none."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text, int32 [n], no special ids added; ValueError at a lone surrogate."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, on all cores by the library's own native threads."""

    def decode(self, ids: Any) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""

    def decode_bytes(self, ids: Any) -> bytes:
        """Exact bytes of the ids; a special id gives none."""

    def fingerprint(self) -> str:
        """Sha256 of the pieces and of what changes encoding; the same after save and load."""

    def save(self, folder: Path) -> None:
        """Write a self-contained folder that ``load_tokenizer`` reads."""


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Open a tokenizer by its name, its file or its folder.

    Args:
        spec: ``bytes``; ``gpt2:FOLDER`` with ``vocab.json`` + ``merges.txt`` or ``encoder.json`` +
            ``vocab.bpe``; the path of a ``tokenizer.json``, of a SentencePiece ``.model`` or of a
            llama2.c ``.bin``; or a folder that holds one of the first two or that ``save`` wrote.

    Raises:
        ValueError: nothing of the kind is there (the message lists what is possible), or what is
            there is damaged.
        ImportError: ``tokenizers`` is needed and not installed.

    >>> load_tokenizer("bytes").encode("abc").tolist()
    [97, 98, 99]
    """
    name, _, argument = str(spec).partition(":")
    if isinstance(spec, str) and name in LOADERS and (argument or spec == "bytes"):
        return LOADERS[name](argument)
    path = Path(spec).expanduser()
    if path.is_dir():
        for loader, layouts in FOLDERS.items():
            if any(all((path / file).is_file() for file in layout) for layout in layouts):
                return LOADERS[loader](str(path))
    elif path.is_file() and path.suffix in SUFFIXES:
        return LOADERS[SUFFIXES[path.suffix]](str(path))
    found = "a folder without them" if path.is_dir() else "there" if path.exists() else "not there"
    layouts_text = "; ".join(
        " + ".join(layout) for layouts in FOLDERS.values() for layout in layouts
    )
    raise ValueError(
        f"no tokenizer {str(spec)!r} (as a path it is {found}). Possible are: bytes;"
        " gpt2:FOLDER; sentencepiece:N (trained on the corpus, where a corpus is given); a"
        " tokenizer.json, SentencePiece .model or llama2.c .bin file; a folder with"
        f" {layouts_text}"
    )


def _load_bytes(argument: str) -> Tokenizer:
    if argument:
        raise ValueError(f"the tokenizer 'bytes' takes no argument, but was given {argument!r}")
    return bytes_tokenizer()


def _load_gpt2(argument: str) -> Tokenizer:
    folder = Path(argument).expanduser()
    for vocabulary, merges in FOLDERS["gpt2"]:
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            return open_gpt2(folder / vocabulary, folder / merges)
    wanted = " or ".join(" + ".join(layout) for layout in FOLDERS["gpt2"])
    raise ValueError(f"gpt2:FOLDER needs a folder with {wanted}; {argument!r} has neither")


def _load_sentencepiece(argument: str) -> Tokenizer:
    if argument.isdecimal():
        raise ValueError(
            f"sentencepiece:{argument} means {argument} pieces trained on a corpus, and there is"
            " none here: use train_sentencepiece(texts, vocabulary_size), or give a .model file"
        )
    return _open(argument, MODEL, open_sentencepiece)


def _load_tokenizer_json(argument: str) -> Tokenizer:
    return _open(argument, "tokenizer.json", open_tokenizer_json)


def _load_llama2c(argument: str) -> Tokenizer:
    return _open(argument, "tokenizer.bin", open_llama2c)


def _load_saved(argument: str) -> Tokenizer:
    folder = Path(argument).expanduser()
    kind, files = read_saved(folder)
    if kind not in SAVED:
        raise ValueError(f"{folder / RECORD} has kind {kind!r}; known are {', '.join(SAVED)}")
    try:
        return SAVED[kind](*files.values())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from None


def _open(argument: str, name: str, read: Callable[[bytes], Tokenizer]) -> Tokenizer:
    path = Path(argument).expanduser()
    path = path / name if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} is not there: give a {name} file, or a folder that holds one")
    try:
        return read(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# Loader by name; each takes what follows the colon (a name without one is a path, except bytes),
# and a path goes to one of them by the two tables below.
LOADERS: dict[str, Callable[[str], Tokenizer]] = {
    "bytes": _load_bytes,
    "saved": _load_saved,
    "tokenizer.json": _load_tokenizer_json,
    "sentencepiece": _load_sentencepiece,
    "llama2c": _load_llama2c,
    "gpt2": _load_gpt2,
}
# Files by which a folder is known, first match wins. A tokenizer.json goes before vocab.json +
# merges.txt, which some folders hold beside it and which do not tell how words are split.
FOLDERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "saved": ((RECORD,),),
    "tokenizer.json": (("tokenizer.json",),),
    "sentencepiece": ((MODEL,),),
    "gpt2": (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")),
}
SUFFIXES = {".json": "tokenizer.json", ".model": "sentencepiece", ".bin": "llama2c"}
# What opens the files of a saved folder, by its record's kind.
SAVED: dict[str, Callable[..., Tokenizer]] = {
    "bytes": bytes_tokenizer,
    "tokenizer.json": open_tokenizer_json,
    "sentencepiece": open_sentencepiece,
}
