"""Word vectors from elsewhere as the start of an embedding: word2vec and GloVe files.

A piece of the tokenizer whose text is a word of the file (without the space before it, and in lower
case where only that is there) begins as that word's vector, brought to the model's width and to the
scale at which the embedding was drawn; the others stay as they were drawn.

Formats (each may be gzipped, `.gz`):

    GloVe           word v_1 ... v_d                       a word a line (Pennington et al. 2014)
    word2vec text   the same after a line "words d"        (Mikolov et al. 2013, arXiv:1301.3781)
    word2vec binary a line "words d", then of each word its name, a space, d little-endian float32,
                    and maybe a line feed

Files are read once, from beginning to end; only vectors that a piece asks for are kept.
"""

from __future__ import annotations

import gzip
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from train.plugs import PyTree
from train.tokenizers.tokenizer import Tokenizer

LONGEST_WORD = 4096  # bytes; a binary file whose word goes on longer is none


class Coverage(NamedTuple):
    """What of a vocabulary word vectors cover.

    Attributes:
      pieces: of the tokenizer.
      covered: of these, with a vector.
      lower: of these, found in lower case alone.
      words: in the file.
      width: of the vectors in the file.
    """

    pieces: int
    covered: int
    lower: int
    words: int
    width: int

    def __str__(self) -> str:
        return (
            f"word vectors: {self.covered:,} of {self.pieces:,} pieces "
            f"({self.covered / self.pieces:.1%}) begin as one of {self.words:,} vectors of width "
            f"{self.width} ({self.lower:,} found in lower case alone)"
        )


def start_with_vectors(
    params: PyTree, tokenizer: Tokenizer, path: str | Path, key: jax.Array
) -> tuple[PyTree, Coverage]:
    """Returns the parameters with the embedding of covered pieces replaced, and the coverage.

    Args:
      params: of the model, as they were drawn; `token_embedding/embedding` is [V, D] or has more
        rows for padding.
      tokenizer: its tokenizer.
      path: see above.
      key: of the projection where vectors are narrower than the model.

    Raises:
      ValueError: the file is in none of the formats, or damaged (with the line or word at which);
        none of its words is a piece.
    """
    table = np.asarray(params["token_embedding"]["embedding"])
    texts = [tokenizer.decode([piece]).strip() for piece in range(tokenizer.vocabulary_size)]
    wanted = {text for text in texts if text and "\ufffd" not in text}
    wanted |= {text.lower() for text in wanted}
    words, width, found = read_vectors(Path(path), wanted)
    chosen = [t if t in found else t.lower() if t.lower() in found else None for t in texts]
    rows = [n for n, word in enumerate(chosen) if word is not None]
    if not rows:
        raise ValueError(
            f"none of the {words:,} words of {path} is a piece of the tokenizer; take vectors of "
            "the language of the text, or a tokenizer with whole words"
        )
    vectors = np.stack([found[cast(str, chosen[n])] for n in rows])
    fitted = to_width(vectors, table.shape[1], key)
    root_mean_square = np.sqrt(np.square(table[: len(texts)].astype(np.float64)).mean())
    scale = np.sqrt(np.square(fitted).mean())
    new = table.copy()
    new[rows] = (fitted * (root_mean_square / max(scale, 1e-30))).astype(table.dtype)
    lower = sum(chosen[n] != texts[n] for n in rows)
    embedding = {**params["token_embedding"], "embedding": jnp.asarray(new)}
    covered = Coverage(len(texts), len(rows), lower, words, width)
    return {**params, "token_embedding": embedding}, covered


def to_width(vectors_ND: np.ndarray, width: int, key: jax.Array) -> np.ndarray:
    """Returns vectors [N, d] as [N, width], about their mean.

    Wider ones lose all but their principal components; narrower ones are spread by a matrix of
    orthonormal rows drawn at random, which keeps all distances; others stay.

    >>> vectors = np.array([[3.0, 0.0, 0.1], [-3.0, 0.0, -0.1]])
    >>> np.abs(to_width(vectors, 1, jax.random.key(0))).round(3).tolist()
    [[3.002], [3.002]]
    """
    centred = vectors_ND.astype(np.float64) - vectors_ND.mean(axis=0, dtype=np.float64)
    d = centred.shape[1]
    if d > width:
        _, axes = np.linalg.eigh(centred.T @ centred)  # ascending
        axes = axes[:, ::-1][:, :width]
        # An axis has no sign of its own: its largest entry is made positive.
        largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)
        return np.asarray(centred @ (axes * np.sign(largest)))
    if d < width:
        drawn = np.asarray(jax.random.normal(key, (width, d)), np.float64)
        return np.asarray(centred @ np.linalg.qr(drawn)[0].T)
    return centred


def read_vectors(path: Path, wanted: Collection[str]) -> tuple[int, int, dict[str, np.ndarray]]:
    """Returns (words in the file, width, vectors of the wanted words as float32 [d]).

    Of a word that occurs twice the first counts.

    Raises:
      ValueError: see `start_with_vectors`.
    """
    if not path.is_file():
        what = f"{path} is a folder; name the file in it" if path.is_dir() else f"no file {path}"
        raise ValueError(f"there is no file of word vectors: {what}")
    with _opened(path) as file:
        try:
            first = file.readline(1 << 20)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} is no whole gzip file: {error}") from None
        header = _header(first)
        if header is None:
            d = len(first.split()) - 1
            if d < 2 or not _is_text(first, d):
                raise _none_of_these(path, first)
            rows = _text_rows(path, file, d, first, 1)
            count = None
        else:
            count, d = header
            second = file.readline(1 << 20)
            if _is_text(second, d):
                rows = _text_rows(path, file, d, second, 2)
            else:
                rows = _binary_rows(path, file, second, count, d)
        found: dict[str, np.ndarray] = {}
        words = 0
        for word, values in rows:
            words += 1
            if word in wanted and word not in found:
                found[word] = values()
    if count is not None and words != count:
        raise ValueError(
            f"{path} says that it holds {count} words and holds {words}; it was cut off, or is "
            "another file's beginning: get it again"
        )
    return words, d, found


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _none_of_these(path: Path, first: bytes) -> ValueError:
    """Says what a file begins with, what it might be, and what is read here."""
    known = {
        b"PK": "a zip archive: unpack it, and name one of its files",
        b"\x1f\x8b": "gzip: call it .gz",
        b"\xba\x16\x4f\x2f": "a model of fastText: take its .vec file",
        b"\x80": "a Python pickle, which is not opened: save the vectors in the format of word2vec",
    }
    about = [said for magic, said in known.items() if first.startswith(magic)]
    begins = f"begins with {first[:40]!r}" if first else "is empty"
    return ValueError(
        f"{path} line 1 is neither 'words width' (word2vec, text or binary) nor a word with the "
        f"numbers of its vector (GloVe); it {begins}" + "".join(f", {said}" for said in about)
    )


def _header(line: bytes) -> tuple[int, int] | None:
    fields = line.split()
    if len(fields) != 2 or not all(field.isdigit() for field in fields):
        return None
    return int(fields[0]), int(fields[1])


def _is_text(line: bytes, d: int) -> bool:
    fields = line.split()
    if len(fields) <= d:
        return False
    try:
        [float(field) for field in fields[-d:]]
        line.decode()
    except ValueError:
        return False
    return True


def _text_rows(
    path: Path, file: BinaryIO, d: int, line: bytes, number: int
) -> Iterator[tuple[str, Any]]:
    while line:
        fields = line.rstrip().split(b" ")
        # A word of GloVe may have spaces in it: what is not of the vector is the word.
        if len(fields) < d + 1:
            raise ValueError(
                f"{path} line {number} has {len(fields) - 1} numbers, and the vectors are of {d}"
            )
        word = b" ".join(fields[:-d]).decode(errors="replace")
        yield word, lambda: _numbers(path, number, fields, d)  # noqa: B023 (called at once)
        line, number = file.readline(), number + 1


def _numbers(path: Path, number: int, fields: list[bytes], d: int) -> np.ndarray:
    try:
        values = np.array([float(field) for field in fields[-d:]], np.float32)
    except ValueError as error:
        raise ValueError(f"{path} line {number}: {error}") from None
    return _finite(path, f"line {number}", values)


def _binary_rows(
    path: Path, file: BinaryIO, start: bytes, count: int, d: int
) -> Iterator[tuple[str, Any]]:
    if not 0 < d <= 1 << 16:
        raise ValueError(f"{path} line 1 says that vectors are of width {d}")
    buffer, at = start, 0

    def ahead(size: int) -> bytes:
        """The next bytes, fewer at the end; they are not taken yet."""
        nonlocal buffer, at
        if len(buffer) - at < size:
            buffer, at = buffer[at:] + file.read(max(size, 1 << 20)), 0
        return buffer[at : at + size]

    for number in range(1, count + 1):
        word, space, _ = ahead(LONGEST_WORD).partition(b" ")
        if not space:
            if not word.strip():
                return  # too few words: for the caller to say
            raise ValueError(f"{path} word {number}: no end of the word; this is no word2vec file")
        at += len(word) + 1
        raw = ahead(4 * d)
        if len(raw) < 4 * d:
            raise ValueError(
                f"{path} word {number} has {len(raw)} of {4 * d} bytes; it was cut off"
            )
        at += 4 * d
        name, values = word.lstrip(b"\n").decode(errors="replace"), np.frombuffer(raw, "<f4")
        yield name, lambda: _finite(path, f"word {number}", values.copy())  # noqa: B023
    if ahead(2).strip():
        raise ValueError(f"{path} goes on after its {count} words; its first line is wrong")


def _finite(path: Path, where: str, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError(f"{path} {where} has a number that is not finite")
    return values
