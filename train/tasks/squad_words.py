"""Words of English questions and paragraphs, and those that a paragraph has of its question."""

from __future__ import annotations

import re
from typing import NamedTuple

_WORD = re.compile(r"\w+(?:[-'’.,]\w+)*%?|[^\w\s]")  # noqa: RUF001 (a typographic apostrophe)
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


def shared_words(question: str, paragraph: str) -> list[Word]:
    """Returns the words of a paragraph that the question has, too, function words left out.

    >>> [word.text for word in shared_words("Where did William win?", "In 1066, William won.")]
    ['william']
    """
    asked = {word.text for word in words_of(question) if word.spoken} - FUNCTION_WORDS
    return [word for word in words_of(paragraph) if word.text in asked]
