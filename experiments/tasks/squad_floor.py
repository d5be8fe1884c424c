"""The floor of SQuAD: the sliding window, which counts words and learns nothing.

Candidates are stretches of up to `longest` words of one sentence that hold no word of the question,
cross no punctuation, and neither begin nor end with a function word; Rajpurkar et al. 2016
(arXiv:1606.05250, section 5) take constituents of a parser. Of them those are kept whose sentence,
the candidate left out, has the most words and pairs of words in common with the question, and the
best by Richardson et al. 2013 (EMNLP, section 4.1) is the answer: with S the words of the question
and the candidate, and P those of the sentence,

    max_j sum_{i < |S|} [P_{j+i} in S] log(1 + 1 / count(P_{j+i})) - distance

where count is over the paragraph, and distance that of the candidate to the nearest word of the
question, as a share of the sentence.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from experiments.tasks.squad_metrics import squad_scores
from train.tasks.squad_files import Question
from train.tasks.squad_words import FUNCTION_WORDS, Word, sentences_of, words_of

LONGEST = 2  # words; of 1 to 6 it has the best F1 on the articles that train


def sliding_window(paragraph: str, question: str, longest: int = LONGEST) -> str:
    """Returns the answer of the module's rule; "" where there is no candidate.

    >>> sliding_window("Ann won in 1901. Bob sold the mill in 1902.", "Who sold the mill?")
    'Bob'
    """
    asked = [word.text for word in words_of(question) if word.spoken]
    pairs = set(itertools.pairwise(asked))
    counts = Counter(word.text for word in words_of(paragraph))
    best, answer = (-math.inf, -math.inf), ""
    for offset, behind in sentences_of(paragraph):
        words = words_of(paragraph[offset:behind])
        for first, last in _candidates(words, frozenset(asked), longest):
            rest = [word.text for word in (*words[:first], *words[last + 1 :])]
            shared = len(set(rest) & set(asked)) + len(pairs.intersection(itertools.pairwise(rest)))
            if shared < best[0]:
                continue
            score = (float(shared), _score(words, first, last, asked, counts))
            if score > best:
                best = score
                answer = paragraph[offset + words[first].start : offset + words[last].end]
    return answer


def floor_scores(questions: Sequence[Question], longest: int = LONGEST) -> dict[str, float]:
    """Returns exact match and F1 of the sliding window, in percent."""
    texts = {q.id: sliding_window(q.paragraph, q.text, longest) for q in questions}
    return squad_scores(texts, {q.id: [answer.text for answer in q.answers] for q in questions})


def _candidates(
    words: Sequence[Word], asked: frozenset[str], longest: int
) -> list[tuple[int, int]]:
    """(first, last) word of every candidate."""
    found = []
    for first, word in enumerate(words):
        if word.text in FUNCTION_WORDS:
            continue
        for last in range(first, min(first + longest, len(words))):
            if not words[last].spoken or words[last].text in asked:
                break
            if words[last].text not in FUNCTION_WORDS:
                found.append((first, last))
    return found


def _score(
    words: Sequence[Word], first: int, last: int, asked: Sequence[str], counts: Mapping[str, int]
) -> float:
    wanted = {*asked, *(word.text for word in words[first : last + 1])}
    values = [
        math.log(1 + 1 / counts[word.text]) if word.text in wanted and word.spoken else 0.0
        for word in words
    ]
    size = len(wanted)
    window = max(sum(values[at : at + size]) for at in range(max(1, len(words) - size + 1)))
    told = {word for word in asked if word not in FUNCTION_WORDS}
    places = [at for at, word in enumerate(words) if word.text in told]
    near = min((min(abs(at - first), abs(at - last)) for at in places), default=None)
    return window - (1.0 if near is None or len(words) < 2 else near / (len(words) - 1))
