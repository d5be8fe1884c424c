"""Where each piece of a text lies in it, in bytes of its UTF-8, and spans of pieces for stretches.

A stretch of the text is told by pieces where one begins at its start and one ends at its end, white
space at either side aside: pieces take the space before a word with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from train.tokenizers.tokenizer import Tokenizer


class Pieces(NamedTuple):
    """A text in pieces.

    Attributes:
      text: UTF-8.
      ids: int32 [n].
      ends: int32 [n], the byte behind each piece; it begins where the one before ends.
    """

    text: bytes
    ids: np.ndarray
    ends: np.ndarray

    def span_of(self, start: int, end: int) -> tuple[int, int]:
        """Returns (first, last) of the pieces that cover the bytes from `start` up to `end`."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        return first, int(np.searchsorted(self.ends, end, side="left"))

    def text_of(self, first: int, last: int) -> str:
        """Returns the text of pieces first .. last without white space at its ends.

        Where a piece is a part of a character, the whole character is taken.
        """
        begin = int(self.ends[first - 1]) if first else 0
        end = int(self.ends[last])
        while begin and self.text[begin] & 0xC0 == 0x80:
            begin -= 1
        while end < len(self.text) and self.text[end] & 0xC0 == 0x80:
            end += 1
        return self.text[begin:end].decode().strip()


def pieces_of(texts: Sequence[str], tokenizer: Tokenizer) -> list[Pieces]:
    """Returns each text in pieces.

    Raises:
      ValueError: the tokenizer does not give a text back as it was.

    >>> from train.tokenizers.tokenizer import load_tokenizer
    >>> pieces = pieces_of(["in 1066."], load_tokenizer("bytes"))[0]
    >>> pieces.span_of(3, 7), pieces.text_of(2, 6)
    ((3, 6), '1066')
    """
    table: dict[int, bytes] = {}
    # Behind another piece: some tokenizers take a space off the first one.
    anchor = tokenizer.encode("a").tolist()
    alone = len(tokenizer.decode_bytes(anchor))
    found = []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        for piece in set(ids.tolist()) - set(table):
            table[piece] = tokenizer.decode_bytes([*anchor, piece])[alone:]
        data, parts = text.encode(), [table[piece] for piece in ids.tolist()]
        whole = b"".join(parts)
        before = len(whole) - len(data)  # the space that some put before a text
        if whole != b" " * before + data:
            raise ValueError(
                f"the tokenizer does not give {text[:40]!r}... back as it was, so its pieces do "
                "not say where an answer lies; take one that keeps text as it is"
            )
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64) - before
        found.append(Pieces(data, ids, np.maximum(ends, 0).astype(np.int32)))
    return found
