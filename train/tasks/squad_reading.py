"""How a question and its paragraph are read: what is marked, and in which order.

    {end} question {end} paragraph

A mark is a token in front of what it marks, as DrQA's exact-match feature is a number beside it
(Chen et al. 2017, arXiv:1704.00051, section 3.2), and needs no parameter of its own: control
characters, which no text has. With `mark` words that question and paragraph share (by their stems,
function words left out) stand behind one, on both sides. By `order="shared"` the sentences of the
paragraph come by what they share with the question (see `train.tasks.squad_words`), each behind a
mark that says whether it is the first, the second, the third or a later one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from train.tasks.squad_files import Question
from train.tasks.squad_words import Word, ranked_sentences, sentences_of, shared_words
from train.tokenizers.piece_offsets import Pieces
from train.tokenizers.tokenizer import Tokenizer

Order = Literal["text", "shared"]
ORDERS: tuple[Order, ...] = ("text", "shared")
_MARKS = "\x01\x02\x03\x04\x05"  # of words; of the first, second, third sentence, and of later ones


class Reading(NamedTuple):
    """A text as it is read, n tokens.

    Attributes:
      ids: int32 [n].
      pieces: int32 [n], which piece of the text each is; a mark is that behind it.
      sentences: int32 [n], the rank of the sentence that each lies in, from 1; all 1 in the order
        of the text.
    """

    ids: np.ndarray
    pieces: np.ndarray
    sentences: np.ndarray

    def place_of(self, piece: int) -> int:
        """Returns where a piece is read."""
        return int(np.flatnonzero(self.pieces == piece)[-1])


def mark_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Returns the ids of the marks: of words, of the first, second, third and later sentences.

    Raises:
      ValueError: the tokenizer has no piece of its own for control characters.

    >>> from train.tokenizers.tokenizer import load_tokenizer
    >>> mark_ids(load_tokenizer("bytes")).tolist()
    [1, 2, 3, 4, 5]
    """
    ids = [int(tokenizer.encode(f"a{mark}")[-1]) for mark in _MARKS]
    if len(set(ids)) != len(ids) or tokenizer.decode_bytes(ids) != _MARKS.encode():
        raise ValueError(
            "the tokenizer has no pieces for control characters, which stand for marks here; take "
            "one that falls back on bytes, or read without marks in the order of the text"
        )
    return np.array(ids, np.int32)


def read_question(question: Question, pieces: Pieces, marks: np.ndarray | None) -> np.ndarray:
    """Returns the ids of a question, with marks before the words that its paragraph has.

    Args:
      question: with its paragraph.
      pieces: of the question.
      marks: of `mark_ids`, or None for none.
    """
    if marks is None:
        return pieces.ids
    shared = shared_words(question.text, question.paragraph)
    return np.insert(pieces.ids, _begins(shared, question.text, pieces), marks[0])


def read_paragraph(
    question: Question,
    pieces: Pieces,
    marks: np.ndarray | None,
    order: Order = "text",
    ranks: np.ndarray | None = None,
) -> Reading:
    """Returns the paragraph of a question as it is read.

    Args:
      question: with its paragraph.
      pieces: of the paragraph.
      marks: of words, see `mark_ids`; None for none.
      order: see the module.
      ranks: `mark_ids` for sentences, needed where they are ordered.
    """
    text, count = question.paragraph, len(pieces.ids)
    ids, at = pieces.ids, np.arange(count, dtype=np.int32)
    if marks is not None:
        shared = _begins(shared_words(text, question.text), text, pieces)
        ids, at = np.insert(ids, shared, marks[0]), np.insert(at, shared, shared)
    if order == "text" or not count:
        return Reading(ids, at, np.ones(len(ids), np.int32))
    assert ranks is not None
    # A piece lies in the sentence of its last byte: the space before a word is of that before.
    begins = [len(text[:start].encode()) for start, _ in sentences_of(text)]
    of_piece = np.searchsorted(begins, pieces.ends - 1, side="right") - 1
    parts: list[Reading] = []
    for sentence in ranked_sentences(question.text, text):
        here = np.flatnonzero(of_piece[at] == sentence)
        if not len(here):
            continue
        rank = len(parts) + 1
        mark = ranks[min(rank, len(ranks) - 1)]
        read = np.concatenate([[mark], ids[here]])
        where = np.concatenate([at[here[:1]], at[here]])
        parts.append(Reading(read, where, np.full(len(read), rank)))
    whole = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Reading(*(array.astype(np.int32) for array in whole))


def _begins(words: list[Word], text: str, pieces: Pieces) -> list[int]:
    """The pieces with which words begin."""
    begins = (len(text[: word.start].encode()) for word in words)
    return sorted({pieces.span_of(begin, begin + 1)[0] for begin in begins})
