"""Words of English questions and paragraphs, and what a paragraph has of its question.

Sentences are ranked by what they share with a question: with n sentences, n_w of them with the stem
w, and pairs of neighbouring words in both,

    score = sum_w log(1 + n / n_w) + pairs / 2        over stems w in both, function words left out

Of SQuAD's development set the answer lies in the first in four of five questions. One sentence is
what most of its answers need (Min et al. 2018, arXiv:1805.08092, who learn to select it).
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import Counter
from typing import NamedTuple

_WORD = re.compile(r"\w+(?:[-'’.,]\w+)*%?|[^\w\s]")  # noqa: RUF001 (a typographic apostrophe)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=\W*[A-Z0-9])")
_ENDINGS = ("ing", "ed", "es", "s", "ly", "e")
SHORTEST_STEM = 3
_FUNCTION_WORDS = (
    "a about after all also although among an and any are as at be because been before being "
    "between both but by can could did do does during each either for from had has have he her "
    "him his how i if in into is it its may might more most must neither no nor not of on one "
    "or other our over shall she should so some such than that the their them then there these "
    "they this those through to under up upon very was we were what when where which while who "
    "whom whose why will with within would you"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


class Word(NamedTuple):
    """A word in lower case and where it stands; punctuation is a word of its own."""

    text: str
    start: int
    end: int

    @property
    def spoken(self) -> bool:
        """Whether it is no punctuation."""
        return self.text[0].isalnum()


def words_of(text: str) -> list[Word]:
    """Returns the words of a text.

    >>> [word.text for word in words_of("In 1066, William won.")]
    ['in', '1066', ',', 'william', 'won', '.']
    """
    return [Word(m.group().lower(), m.start(), m.end()) for m in _WORD.finditer(text)]


def stem_of(word: str) -> str:
    """Returns a word without what inflects it, roughly; the same for forms of one word.

    >>> [stem_of(word) for word in ("invaded", "invades", "invading", "cities", "city", "1066")]
    ['invad', 'invad', 'invad', 'citi', 'citi', '1066']
    """
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= SHORTEST_STEM:
            word = word[: -len(ending)]
            break
    return word[:-1] + "i" if word.endswith("y") and len(word) > SHORTEST_STEM else word


def shared_words(text: str, other: str) -> list[Word]:
    """Returns the words of a text whose stems the other has, too, function words left out.

    >>> [word.text for word in shared_words("In 1066, William won.", "Which wins had William?")]
    ['william']
    """
    stems = _told(other)
    return [
        word
        for word in words_of(text)
        if word.spoken and word.text not in FUNCTION_WORDS and stem_of(word.text) in stems
    ]


def sentences_of(text: str) -> list[tuple[int, int]]:
    """Returns (first character, behind the last) of each sentence; white space goes with the first.

    >>> sentences_of("It rained. We left.")
    [(0, 11), (11, 19)]
    """
    cuts = [0, *(match.end() for match in _SENTENCE.finditer(text)), len(text)]
    return list(itertools.pairwise(cuts))


def ranked_sentences(question: str, paragraph: str) -> list[int]:
    """Returns the sentences of a paragraph by the module's score, the best first.

    >>> ranked_sentences("Who sold the mill?", "Ann won in 1901. Bob sold the mill in 1902.")
    [1, 0]
    """
    asked = [stem_of(word.text) for word in words_of(question) if word.spoken]
    told, pairs = _told(question), set(itertools.pairwise(asked))
    found = _stems_by_sentence(paragraph)
    count = Counter(stem for stems in found for stem in set(stems))
    scores = [
        sum(math.log(1 + len(found) / count[stem]) for stem in sorted(told.intersection(stems)))
        + len(pairs.intersection(itertools.pairwise(stems))) / 2
        for stems in found
    ]
    return sorted(range(len(scores)), key=lambda number: -scores[number])


def _told(text: str) -> frozenset[str]:
    words = {word.text for word in words_of(text) if word.spoken}
    return frozenset(map(stem_of, words - FUNCTION_WORDS))


@functools.lru_cache(maxsize=4096)  # a paragraph has several questions
def _stems_by_sentence(paragraph: str) -> tuple[tuple[str, ...], ...]:
    return tuple(
        tuple(stem_of(word.text) for word in words_of(paragraph[a:b]) if word.spoken)
        for a, b in sentences_of(paragraph)
    )
