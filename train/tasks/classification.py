"""Classification of one or two sentences, by a head or as next-token labels.

By a head: the features of the last real token (or their mean) times `score/kernel`, and beside them
what hashed n-grams of pieces say, where asked for (`train.tasks.grams`). As words: the
label is written after the text, the model is trained to predict it, and a row belongs to the label
whose word is the most probable one there.

Shapes: N examples, B rows, T time, D width, C classes, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from model.config import TransformerConfig
from model.heads import SCORE, Pool, init_head, pool
from model.transformer import Transformer, features, head
from train.losses import cross_entropy
from train.losses_tasks import row_cross_entropy
from train.plugs import Batch, LossTerm, PyTree
from train.tasks.grams import GRAMS, check_grams, init_grams
from train.tasks.rows import BadRow, Row
from train.tasks.rowwise import (
    LABEL,
    check_rowwise,
    language_term,
    padded,
    read_split,
    refuse_two_sides,
    row_outputs,
    scores_of,
    template_for,
    texts_of,
)
from train.tasks.task import (
    TRAIN,
    Examples,
    Outputs,
    TaskFiles,
    pad_rows,
    resolved,
    rows_used,
)
from train.tasks.text import encode_rows
from train.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Classification:
    """Sorts rows into classes.

    Attributes:
      files: of the splits.
      template: what a row is to the model: text, {columns} and {end}s; by default a sentence
        `text`, or a pair `text`, `text2` where --columns or --column-names has `text2`.
      by: "head", or "words": the label is the next word of the text.
      pool: features that the head reads: those of the "last" token, or the "mean" of all.
      dropout: of the features that the head reads.
      language_weight: of the cross-entropy of the text itself, beside the task's.
      grams: pieces of the longest n-grams whose own scores the head adds; 0 for none.
      buckets: that n-grams are hashed into, all told apart as long as there are many more buckets
        than n-grams: about `grams` times the tokens of the training rows.
      words: (label, word) pairs for "words"; by default each label is its own word.
      labels: in the order of the classes; by default those of the training file, sorted.
      rename: (label of the files, what it is called here) pairs, such as ("1", "POSITIVE") for the
        head of a classifier from elsewhere.
    """

    name: ClassVar[str] = "classification"
    watch: ClassVar[str] = "-accuracy"
    files: TaskFiles = TaskFiles()  # noqa: RUF009 (frozen)
    template: str | None = None
    by: Literal["head", "words"] = "head"
    pool: Pool = "last"
    dropout: float = 0.0
    language_weight: float = 0.0
    grams: int = 0
    buckets: int = 2**19
    words: tuple[tuple[str, str], ...] = ()
    labels: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        check_rowwise(self)
        check_grams(self.grams, self.buckets)
        if self.by not in ("head", "words"):
            raise ValueError(f"by is {self.by!r}; it is 'head' or 'words'")
        of_a_head = (self.dropout, self.language_weight, self.grams, self.pool != "last")
        if self.by == "words" and any(of_a_head):
            raise ValueError(
                "pool, dropout, language_weight and grams are for a head, not for words"
            )
        if len(dict(self.rename)) < len(self.rename):
            raise ValueError("rename has a label twice; give each label of the files one name")
        if self.by == "head" and self.words:
            raise ValueError("words are for labels as next tokens; give --task.by words too")

    def resolve(self) -> Classification:
        """Returns the settings with the labels and the hashes of the files.

        Raises:
          ValueError: a file is missing or has changed, a row does not parse, one label alone.
        """
        files = resolved(self.files)
        labels = self.labels
        if not labels:  # of one file that serves all splits, those of all its rows
            whole = dataclasses.replace(files, shares=())
            rows, _ = dataclasses.replace(self, files=whole).rows(TRAIN)
            labels = tuple(sorted({row.columns[LABEL] for row in rows}, key=_in_order))
        if len(labels) < 2:
            raise ValueError(
                f"{self.files.path(TRAIN)} has the label {', '.join(labels)} alone; a "
                "classification needs two"
            )
        if lost := sorted({name for _, name in self.rename} - set(labels)):
            raise ValueError(f"rename gives {', '.join(lost)}; the labels are {', '.join(labels)}")
        if lost := sorted({label for label, _ in self.words} - set(labels)):
            raise ValueError(f"words has {', '.join(lost)}; the labels are {', '.join(labels)}")
        return dataclasses.replace(self, files=files, labels=labels)

    def head(self, key: Any, config: TransformerConfig) -> PyTree:
        """Returns a matrix [D, C], and a table [buckets, C] of n-grams, or nothing for words."""
        if self.by == "words":
            return {}
        dtype, classes = jnp.dtype(config.parameter_dtype), len(self.labels)
        made: dict[str, Any] = init_head(key, config.width, classes, dtype)
        if self.grams:
            made[GRAMS] = init_grams(self.buckets, classes, dtype)
        return {SCORE: made}

    def terms(self, model: Transformer, label_smoothing: float) -> tuple[LossTerm, ...]:
        """Returns the cross-entropy of the labels, and of the text where asked for.

        Raises:
          ValueError: the model reads rows in two parts.
        """
        refuse_two_sides(self.name, model)
        if self.by == "words":
            return (cross_entropy(label_smoothing),)
        found = (row_cross_entropy(scores_of(self), label_smoothing),)
        return (*found, *language_term(self.language_weight))

    def texts(self) -> Iterator[str]:
        """Yields the training texts as they are encoded, labels left out."""
        rows, _ = self.rows(TRAIN)
        return texts_of(rows, template_for(self))

    def examples(self, split: str, tokenizer: Tokenizer, length: int) -> Examples:
        """Returns a split in arrays, with `labels` int32 [N].

        For words also `candidates` int32 [N, C]: the piece of each label that tells it from the
        others, which the position `lengths - 1` predicts.
        """
        rows, bad = self.rows(split)
        return self.encoded(rows_used(rows, self.files, split), bad, tokenizer, length)

    def encoded(
        self, rows: list[Row], bad: list[BadRow], tokenizer: Tokenizer, length: int
    ) -> Examples:
        """Returns rows in arrays, as `examples`; one without a label has the first."""
        first = self.labels[0]
        labels = np.array([self.labels.index(r.columns.get(LABEL, first)) for r in rows], np.int32)
        if self.by == "head":
            arrays, cut = padded(self, rows, tokenizer, length)
            return Examples({**arrays, "labels": labels}, rows, bad, cut)
        ids = encode_rows(rows, template_for(self), tokenizer)
        words, shared = self._words(tokenizer)
        room = length - max(map(len, words))
        if room < 2:
            raise ValueError(f"rows of {length} tokens have no room for the labels; lengthen them")
        # The end of a prompt says what is asked for, so its beginning goes.
        prompts = [row[-room:] for row in ids]
        whole = [np.concatenate([p, words[c]]) for p, c in zip(prompts, labels, strict=True)]
        scored = [slice(len(p), None) for p in prompts]
        arrays = pad_rows(whole, length, scored)
        arrays["lengths"] = np.array([len(p) + shared for p in prompts], np.int32)
        telling = np.array([word[shared] for word in words], np.int32)
        arrays |= {"labels": labels, "candidates": np.tile(telling, (len(rows), 1))}
        return Examples(arrays, rows, bad, sum(len(row) > room for row in ids))

    def outputs(self, model: Transformer) -> Outputs:
        """Returns `logits` [B, C]."""
        if self.by == "head":
            return row_outputs(self, model)

        def apply(weights: PyTree, batch: Batch) -> dict[str, Any]:
            out = features(model, weights, batch["tokens"], batch.get("positions"))
            last_BD = pool(out.final, batch["lengths"], "last", batch.get("positions"))
            logits_BV = head(model, weights, last_BD)
            return {"logits": jnp.take_along_axis(logits_BV, batch["candidates"], axis=1)}

        return apply

    def rows(self, split: str) -> tuple[list[Row], list[BadRow]]:
        """Returns the rows of a split, and what was left out.

        Raises:
          ValueError: bad rows, unless they are to be skipped.
        """

        def parse(row: Row) -> Row:
            label = row.columns[LABEL].strip()
            if not label:
                raise ValueError("no label")
            label = dict(self.rename).get(label, label)
            if self.labels and label not in self.labels:
                raise ValueError(
                    f"the label {label!r} is not among those of the training file "
                    f"({', '.join(self.labels)})"
                )
            return Row(row.line, {**row.columns, LABEL: label})

        return read_split(self, split, parse)

    def _words(self, tokenizer: Tokenizer) -> tuple[list[np.ndarray], int]:
        """The pieces of each label's word, and how many of them all share at their beginning."""
        given = dict(self.words)
        words = [tokenizer.encode(f" {given.get(label, label)}") for label in self.labels]
        columns = zip(*(word.tolist() for word in words), strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda ids: len(set(ids)) == 1, columns))
        telling = [word[shared] if len(word) > shared else None for word in words]
        if None in telling or len(set(telling)) < len(words):
            texts = (f"{label} = {given.get(label, label)!r}" for label in self.labels)
            raise ValueError(
                f"the words {', '.join(texts)} are not told apart by one piece of the tokenizer; "
                "give others: --task.words LABEL WORD ..."
            )
        return words, shared


def _in_order(label: str) -> tuple[float, str]:
    """Numbers by their size, before other labels by the alphabet."""
    return (float(label), label) if label.isdecimal() else (math.inf, label)
