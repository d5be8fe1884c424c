"""Finds the passages of a corpus that a question asks for: BM25, by the library bm25s.

    python -m experiments.retrieval --squad squad/dev-v1.1.json.zip --k 1 5 20 100

    index = build_index(passages)
    index.search(["who wrote it?"], k=5)

BM25 (Robertson & Zaragoza 2009) weighs the words that a passage shares with a question by how rare
they are in the corpus and how often they stand in the passage, without any training. It needs the
extra `retrieval`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from experiments.cli import run_main
from model.extras import from_extra
from train.tasks.rows import said_of
from train.tasks.squad_files import read_squad

WORDS = r"(?u)\b\w+\b"
"""Words of passages and questions: single digits and letters count too."""


class Hits(NamedTuple):
    """Passages found for Q questions, the best first.

    Attributes:
      passages: int [Q, k], numbers of passages; -1 where a passage shares no word with the
        question.
      scores: float32 [Q, k], 0 there.
    """

    passages: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Index:
    """Passages, ready to be searched.

    Attributes:
      passages: the texts.
      engine: of bm25s.
    """

    passages: tuple[str, ...]
    engine: Any

    def search(self, questions: Sequence[str], k: int = 10) -> Hits:
        """Returns the k best passages of each question, fewer columns where there are fewer.

        Of passages with one score the first is first, so that a search has one result.

        Raises:
          ValueError: k below 1.
        """
        if k < 1:
            raise ValueError(f"k is {k}; ask for at least 1 passage")
        k = min(k, len(self.passages))
        found = np.full((len(questions), k), -1, np.int64)
        scores = np.zeros((len(questions), k), np.float32)
        for row, words in enumerate(_tokens(questions)):
            known = [word for word in words if word in self.engine.vocab_dict]
            if not known:
                continue
            all_scores = np.asarray(self.engine.get_scores(known))
            best = np.lexsort((np.arange(len(all_scores)), -all_scores))[:k]
            shares = all_scores[best] > 0
            found[row], scores[row] = (
                np.where(shares, best, -1),
                np.where(shares, all_scores[best], 0),
            )
        return Hits(found, scores)


def build_index(passages: Sequence[str], *, k1: float = 1.5, b: float = 0.75) -> Index:
    """Indexes passages.

    Args:
      passages: texts; equal ones stay apart.
      k1: how soon more of one word stops counting.
      b: how far long passages are held back, 0 to 1.

    Raises:
      ValueError: no passages, none with a word, or k1 and b out of range.
      ImportError: bm25s is not installed.
    """
    if not passages:
        raise ValueError("there are no passages to index")
    if not k1 >= 0 or not 0 <= b <= 1:
        raise ValueError(f"k1 is {k1} and b {b}; they must be at least 0, and from 0 to 1")
    bm25s = from_extra("bm25s", "retrieval", "retrieval needs the library bm25s")
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG
    words = _tokens(passages)
    if not any(words):
        raise ValueError("none of the passages has a word in it")
    engine = bm25s.BM25(k1=k1, b=b)
    engine.index(words, show_progress=False)
    return Index(tuple(passages), engine)


def recall_at(hits: Hits, relevant: Sequence[set[int]], ks: Sequence[int]) -> dict[int, float]:
    """Returns the share of questions with a relevant passage among their first k, for each k.

    Args:
      hits: of Q questions.
      relevant: Q sets of passage numbers.
      ks: each at most as many as were found.

    Raises:
      ValueError: other numbers of questions, none at all, or a k beyond what was searched for.

    >>> hits = Hits(np.array([[3, 1], [0, -1]]), np.zeros((2, 2), np.float32))
    >>> recall_at(hits, [{1}, {2}], [1, 2])
    {1: 0.0, 2: 0.5}
    """
    Q, most = hits.passages.shape
    if len(relevant) != Q or not Q:
        raise ValueError(f"{Q} questions were searched for and {len(relevant)} have answers")
    if wrong := [k for k in ks if not 1 <= k <= most]:
        raise ValueError(f"k {wrong} is not among the 1 to {most} passages that were searched for")
    ranks = [
        next((r for r, p in enumerate(row) if int(p) in wanted), most)
        for row, wanted in zip(hits.passages, relevant, strict=True)
    ]
    return {k: float(np.mean([rank < k for rank in ranks])) for k in ks}


def holding(passages: Sequence[str], answers: Sequence[str]) -> set[int]:
    """Returns the passages that hold one of the answers, in any case.

    >>> holding(["In Paris.", "In Rome."], ["paris"])
    {0}
    """
    lowered = [answer.casefold() for answer in answers if answer.strip()]
    return {n for n, text in enumerate(passages) if any(a in text.casefold() for a in lowered)}


def _tokens(texts: Sequence[str]) -> list[list[str]]:
    import bm25s

    found = bm25s.tokenize(
        [text.casefold() for text in texts],
        token_pattern=WORDS,
        stopwords=None,
        return_ids=False,
        show_progress=False,
    )
    return [list(words) for words in found]


@dataclass(frozen=True)
class Retrieval:
    """What to search in.

    Attributes:
      squad: file of SQuAD (see `train.tasks.squad_files`); the paragraphs that it asks about are
        the corpus, its questions are asked.
      k: passages to look among.
      most: questions asked, the first ones; None for all.
    """

    squad: str
    k: tuple[int, ...] = (1, 5, 20, 100)
    most: int | None = None


def run_command(command: Retrieval) -> list[str]:
    """Indexes, searches; returns lines with recall at k by paragraph and by answer.

    Raises:
      ValueError: no file of SQuAD, or one without questions.
    """
    everything, bad = read_squad(command.squad)
    passages = list(dict.fromkeys(question.paragraph for question in everything))
    asked = everything[: command.most]
    if not asked:
        raise ValueError(
            f"{command.squad} asks no questions" + (f"; {said_of(bad)}" if bad else "")
        )
    index = build_index(passages)
    ks = sorted({min(k, len(passages)) for k in command.k})
    hits = index.search([question.text for question in asked], max(ks))
    numbers = {passage: number for number, passage in enumerate(passages)}
    own = recall_at(hits, [{numbers[question.paragraph]} for question in asked], ks)
    answers = [[answer.text for answer in question.answers] for question in asked]
    any_of_them = [
        {int(p) for p in row if p >= 0 and holding([passages[int(p)]], wanted)}
        for row, wanted in zip(hits.passages, answers, strict=True)
    ]
    held = recall_at(hits, any_of_them, ks)
    lines = [f"{len(asked):,} questions, {len(passages):,} passages"]
    if bad:
        lines.append(said_of(bad))
    lines.append(f"{'k':>6}{'own paragraph':>16}{'with the answer':>18}")
    return lines + [f"{k:>6}{own[k]:>15.1%} {held[k]:>16.1%}" for k in ks]


def main() -> None:
    """Parses the command line, searches, prints."""
    import tyro

    print("\n".join(run_command(tyro.cli(Retrieval, description=__doc__))))


if __name__ == "__main__":
    run_main(main)
