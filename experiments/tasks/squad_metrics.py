"""Exact match and F1 by SQuAD's rules, and the answers of a model in words.

Texts are compared in lower case, without punctuation, articles and white space but between words;
a prediction counts by the best of its references (Rajpurkar et al. 2016, arXiv:1606.05250, section
6.1). F1 is that of the bags of words. Both are in percent, means over questions.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from train.tasks.squad import Squad
from train.tasks.task import Examples
from train.tokenizers.piece_offsets import pieces_of
from train.tokenizers.tokenizer import Tokenizer

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Returns a text as it is compared.

    >>> normalized("The  Denver Broncos!")
    'denver broncos'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """Returns 1 where both are the same, normalized, and else 0.

    >>> exact_match("the Broncos", "Broncos."), exact_match("Broncos", "Denver Broncos")
    (1.0, 0.0)
    """
    return float(normalized(prediction) == normalized(reference))


def word_f1(prediction: str, reference: str) -> float:
    """Returns the harmonic mean of precision and recall over words, 0 without a common one.

    Two texts of which nothing is left, as of "the", are the same: the script of SQuAD 2.0 counts
    them 1, that of 1.1 counted them 0 although they match exactly.

    >>> round(word_f1("the Denver Broncos", "Broncos"), 4)
    0.6667
    """
    words, wanted = normalized(prediction).split(), normalized(reference).split()
    if not words or not wanted:
        return float(words == wanted)
    common = (Counter(words) & Counter(wanted)).total()
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def best_of(
    score: Callable[[str, str], float], prediction: str, references: Sequence[str]
) -> float:
    """Returns the score against the reference that it is highest for."""
    return max(score(prediction, reference) for reference in references)


def squad_scores(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Returns exact match and F1 in percent; a question without a prediction counts 0.

    Args:
      predictions: answer by the question's id, as SQuAD's prediction files have them.
      references: by id.

    Raises:
      ValueError: no question, or a prediction for none of them.

    >>> squad_scores({"a": "The Broncos"}, {"a": ["Broncos"], "b": ["1066"]})
    {'exact_match': 50.0, 'f1': 50.0}
    """
    if not references:
        raise ValueError("there is no question to score")
    if unknown := [name for name in predictions if name not in references]:
        raise ValueError(f"{len(unknown)} predictions answer no question, as {unknown[0]!r}")
    pairs = [
        (predictions[name], wanted) for name, wanted in references.items() if name in predictions
    ]
    figures = {"exact_match": exact_match, "f1": word_f1}
    return {
        name: 100 * sum(best_of(score, *pair) for pair in pairs) / len(references)
        for name, score in figures.items()
    }


def span_metrics(
    task: Squad, examples: Examples, outputs: Mapping[str, np.ndarray], tokenizer: Tokenizer
) -> dict[str, float]:
    """Returns loss (a window), exact match, F1, and what share of answers pieces can give back.

    Args:
      task: the settings.
      examples: of a split.
      outputs: `start`, `stop`, `score`, `loss` [N].
      tokenizer: of the run.
    """
    answers = answers_of(examples, outputs, tokenizer)
    ids = [row.columns["id"] for row in examples.rows]
    texts = dict(zip(ids, (text for text, _ in answers), strict=True))
    wanted = {row.columns["id"]: json.loads(row.columns["answers"]) for row in examples.rows}
    exact = np.unique(examples.arrays["row"][examples.arrays["exact"] > 0])
    return {
        "loss": float(np.mean(outputs["loss"], dtype=np.float64)),
        **squad_scores(texts, wanted),
        "representable": 100 * len(exact) / len(examples.rows),
    }


def span_predictions(
    task: Squad, examples: Examples, outputs: Mapping[str, np.ndarray], tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    """Yields each question with its paragraph, references, the answer and its log-probability."""
    for row, (text, score) in zip(
        examples.rows, answers_of(examples, outputs, tokenizer), strict=True
    ):
        references = json.loads(row.columns["answers"])
        given = {**row.columns, "answers": references}
        yield {"line": row.line, **given, "prediction": text, "score": round(score, 6)}


def answers_of(
    examples: Examples, outputs: Mapping[str, np.ndarray], tokenizer: Tokenizer
) -> list[tuple[str, float]]:
    """Returns the answer to each question, in words, and its score: the best of all its windows."""
    arrays = examples.arrays
    best: dict[int, int] = {}
    for window, row in enumerate(arrays["row"].tolist()):
        if row not in best or outputs["score"][window] > outputs["score"][best[row]]:
            best[row] = window
    paragraphs = list(dict.fromkeys(row.columns["paragraph"] for row in examples.rows))
    pieces = dict(zip(paragraphs, pieces_of(paragraphs, tokenizer), strict=True))
    found = []
    for row, question in enumerate(examples.rows):
        window = best[row]
        first, last = (
            int(arrays["pieces"][window, outputs[name][window]]) for name in ("start", "stop")
        )
        text = pieces[question.columns["paragraph"]].text_of(first, last)
        found.append((text, float(outputs["score"][window])))
    return found


def official(predictions: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Returns predictions as SQuAD's own file has them: answer by id.

    >>> official([{"id": "a", "prediction": "1066", "score": -0.1}])
    {'a': '1066'}
    """
    return {str(line["id"]): str(line["prediction"]) for line in predictions}
