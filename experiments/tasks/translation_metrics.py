"""BLEU and chrF of translations, by sacrebleu with its signature, and what was translated how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from model.extras import from_extra
from train.tasks.task import Examples
from train.tasks.translation import Translation
from train.text.parallel_text import SOURCE, TARGET
from train.tokenizers.tokenizer import Tokenizer


def translation_metrics(
    task: Translation, examples: Examples, outputs: Mapping[str, np.ndarray], tokenizer: Tokenizer
) -> dict[str, float]:
    """Returns loss and perplexity of the reference, BLEU, chrF, and length over the reference's.

    Args:
      task: of the run.
      examples: a row for each pair.
      outputs: see `Translation.outputs`.
      tokenizer: of the run.
    """
    loss = float(outputs["nats"].sum() / max(outputs["count"].sum(), 1))
    found = texts_of(outputs, tokenizer)
    references = [row.columns[TARGET] for row in examples.rows]
    return {
        "loss": loss,
        "perplexity": float(np.exp(min(loss, 700.0))),
        **scored(found, references),
    }


def scored(found: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Returns BLEU (Post 2018, arXiv:1804.08771), chrF, and the length over the reference's.

    >>> scored(["the cat sat on the mat"], ["the cat sat on the mat"])["bleu"] > 99.9
    True
    """
    bleu, chrf = sacrebleu_metrics()
    score = bleu.corpus_score(list(found), [list(references)])
    return {
        "bleu": float(score.score),
        "chrf": float(chrf.corpus_score(list(found), [list(references)]).score),
        "length_ratio": float(score.sys_len / max(score.ref_len, 1)),
    }


def signatures() -> dict[str, str]:
    """Returns what says how BLEU and chrF were counted.

    >>> sorted(signatures())
    ['bleu', 'chrf']
    """
    bleu, chrf = sacrebleu_metrics()
    for metric in (bleu, chrf):
        metric.corpus_score(["a"], [["a"]])  # the number of references is part of it
    return {"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())}


def translation_notes(task: Translation) -> dict[str, str]:
    """Returns the signatures."""
    return signatures()


def translation_predictions(
    task: Translation, examples: Examples, outputs: Mapping[str, np.ndarray], tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    """Yields source, reference, translation and score of each pair."""
    texts = texts_of(outputs, tokenizer)
    for row, text, score in zip(examples.rows, texts, outputs["score"], strict=True):
        yield {
            "line": row.line,
            "source": row.columns[SOURCE],
            "reference": row.columns[TARGET],
            "translation": text,
            "score": float(score),
        }


def texts_of(outputs: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> list[str]:
    """Returns the translations as text, each on one line."""
    lengths = outputs["translation_lengths"]
    rows = zip(outputs["translation"], lengths, strict=True)
    return [" ".join(tokenizer.decode(ids[:length]).split()) for ids, length in rows]


def sacrebleu_metrics() -> tuple[Any, Any]:
    """Returns BLEU and chrF of sacrebleu; ImportError says what to install."""
    what = "translations are scored by sacrebleu, which is not installed"
    metrics = from_extra("sacrebleu.metrics", "tasks", what)
    return metrics.BLEU(), metrics.CHRF()
