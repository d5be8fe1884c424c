"""Classification and regression of one or two sentences, by a head or as next-token labels.

By a head: the features of the last real token (or their mean) times `score/kernel`. As words: the
label is written after the text, the model is trained to predict it, and a row belongs to the label
whose word is the most probable one there.

Shapes: N examples, B rows, T time, D width, C classes, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from model.config import TransformerConfig
from model.heads import POOLS, SCORE, Pool, init_head, pool, scores
from model.transformer import Transformer, features, head
from train.losses import cross_entropy
from train.losses_tasks import dropped, row_cross_entropy, row_squared_error
from train.plugs import Batch, Context, LossTerm, PyTree, View
from train.tasks.rows import BadRow, Row, keep_good, read_rows
from train.tasks.task import (
    TRAIN,
    Examples,
    Outputs,
    TaskFiles,
    pad_rows,
    resolved,
    rows_of_split,
    rows_used,
)
from train.tasks.text import columns_of, cut_ids, encode_rows
from train.tokenizers.tokenizer import Tokenizer

LABEL = "label"
ONE, TWO = "{end}{text}{end}", "{end}{text}{end}{text2}{end}"
PROMPT = "{end}{text}\nlabel:"


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
      words: (label, word) pairs for "words"; by default each label is its own word.
      labels: in the order of the classes; by default those of the training file, sorted.
    """

    name: ClassVar[str] = "classification"
    watch: ClassVar[str] = "-accuracy"
    files: TaskFiles = TaskFiles()  # noqa: RUF009 (frozen)
    template: str | None = None
    by: Literal["head", "words"] = "head"
    pool: Pool = "last"
    dropout: float = 0.0
    language_weight: float = 0.0
    words: tuple[tuple[str, str], ...] = ()
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self)
        if self.by not in ("head", "words"):
            raise ValueError(f"by is {self.by!r}; it is 'head' or 'words'")
        if self.by == "words" and (self.dropout or self.language_weight or self.pool != "last"):
            raise ValueError("pool, dropout and language_weight are for a head, not for words")
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
        if lost := sorted({label for label, _ in self.words} - set(labels)):
            raise ValueError(f"words has {', '.join(lost)}; the labels are {', '.join(labels)}")
        return dataclasses.replace(self, files=files, labels=labels)

    def head(self, key: Any, config: TransformerConfig) -> PyTree:
        """Returns a matrix [D, C], or nothing for words."""
        if self.by == "words":
            return {}
        dtype = jnp.dtype(config.parameter_dtype)
        return {SCORE: init_head(key, config.width, len(self.labels), dtype)}

    def terms(self, model: Transformer, label_smoothing: float) -> tuple[LossTerm, ...]:
        """Returns the cross-entropy of the labels, and of the text where asked for."""
        if self.by == "words":
            return (cross_entropy(label_smoothing),)
        found = (row_cross_entropy(_scores_of(self), label_smoothing),)
        return (*found, *_language(self.language_weight))

    def texts(self) -> Iterator[str]:
        """Yields the training texts, labels left out."""
        rows, _ = self.rows(TRAIN)
        return _texts(rows, template_for(self))

    def examples(self, split: str, tokenizer: Tokenizer, length: int) -> Examples:
        """Returns a split in arrays, with `labels` int32 [N].

        For words also `candidates` int32 [N, C]: the piece of each label that tells it from the
        others, which the position `lengths - 1` predicts.
        """
        rows, bad = self.rows(split)
        rows = rows_used(rows, self.files, split)
        ids = encode_rows(rows, template_for(self), tokenizer)
        labels = np.array([self.labels.index(row.columns[LABEL]) for row in rows], np.int32)
        if self.by == "head":
            arrays, cut = _padded(ids, template_for(self), length)
            return Examples({**arrays, "labels": labels}, rows, bad, cut)
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
            return _row_outputs(self, model)

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
            if self.labels and label not in self.labels:
                raise ValueError(
                    f"the label {label!r} is not among those of the training file "
                    f"({', '.join(self.labels)})"
                )
            return Row(row.line, {**row.columns, LABEL: label})

        return _read(self, split, parse)

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


@dataclass(frozen=True)
class Regression:
    """Gives rows a number, under the mean squared error.

    Attributes:
      files: of the splits; the column `label` holds the number.
      template: see `Classification`.
      pool: see there.
      dropout: see there.
      language_weight: see there.
      mean: of the numbers of the training file; what is predicted is (number - mean) / scale.
        Filled in at the start of the run, as is `scale`.
      scale: their standard deviation.
    """

    name: ClassVar[str] = "regression"
    watch: ClassVar[str] = "loss"
    files: TaskFiles = TaskFiles()  # noqa: RUF009 (frozen)
    template: str | None = None
    pool: Pool = "last"
    dropout: float = 0.0
    language_weight: float = 0.0
    mean: float | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        _check(self)

    def resolve(self) -> Regression:
        """Returns the settings with mean and scale, and the hashes of the files.

        Raises:
          ValueError: a file is missing or has changed, a row does not parse, one number alone.
        """
        files = resolved(self.files)
        if self.mean is not None and self.scale is not None:
            return dataclasses.replace(self, files=files)
        rows, _ = dataclasses.replace(self, files=files).rows(TRAIN)
        values = np.array([float(row.columns[LABEL]) for row in rows])
        if not values.std() > 0:
            raise ValueError(f"{self.files.path(TRAIN)} has one number alone: {values[0]}")
        return dataclasses.replace(
            self, files=files, mean=float(values.mean()), scale=float(values.std())
        )

    def head(self, key: Any, config: TransformerConfig) -> PyTree:
        """Returns a matrix [D, 1]."""
        return {SCORE: init_head(key, config.width, 1, jnp.dtype(config.parameter_dtype))}

    def terms(self, model: Transformer, label_smoothing: float) -> tuple[LossTerm, ...]:
        """Returns the squared error, and the cross-entropy of the text where asked for."""
        if label_smoothing:
            raise ValueError("label_smoothing is for classes; a regression has none")
        return (row_squared_error(_scores_of(self)), *_language(self.language_weight))

    def texts(self) -> Iterator[str]:
        """Yields the training texts."""
        rows, _ = self.rows(TRAIN)
        return _texts(rows, template_for(self))

    def examples(self, split: str, tokenizer: Tokenizer, length: int) -> Examples:
        """Returns a split in arrays, with `values` float32 [N], in standard deviations."""
        rows, bad = self.rows(split)
        rows = rows_used(rows, self.files, split)
        ids = encode_rows(rows, template_for(self), tokenizer)
        arrays, cut = _padded(ids, template_for(self), length)
        numbers = np.array([float(row.columns[LABEL]) for row in rows])
        values = ((numbers - (self.mean or 0.0)) / (self.scale or 1.0)).astype(np.float32)
        return Examples({**arrays, "values": values}, rows, bad, cut)

    def outputs(self, model: Transformer) -> Outputs:
        """Returns `logits` [B, 1], in standard deviations."""
        return _row_outputs(self, model)

    def rows(self, split: str) -> tuple[list[Row], list[BadRow]]:
        """Returns the rows of a split, and what was left out.

        Raises:
          ValueError: bad rows, unless they are to be skipped.
        """

        def parse(row: Row) -> Row:
            try:
                number = float(row.columns[LABEL])
            except ValueError:
                number = math.nan
            if not math.isfinite(number):
                raise ValueError(f"{row.columns[LABEL]!r} is no finite number")
            return row

        return _read(self, split, parse)


Rowwise = Classification | Regression


def _check(task: Rowwise) -> None:
    if task.pool not in POOLS:
        raise ValueError(f"pool is {task.pool!r}; choose one of {', '.join(POOLS)}")
    if not 0 <= task.dropout < 1:
        raise ValueError(f"dropout is {task.dropout}; it must be at least 0 and below 1")
    if not task.language_weight >= 0:
        raise ValueError(f"language_weight is {task.language_weight}; it must be at least 0")
    if task.template is not None and LABEL in columns_of(task.template):
        raise ValueError("the template shows the label, which is what is asked for")


def template_for(task: Rowwise) -> str:
    """Returns the template of a task, its own or the one that suits its columns."""
    if task.template is not None:
        return task.template
    if isinstance(task, Classification) and task.by == "words":
        return PROMPT
    form = task.files.form
    return TWO if "text2" in dict(form.columns) or "text2" in form.names else ONE


def _read(task: Rowwise, split: str, parse: Callable[[Row], Row]) -> tuple[list[Row], list[BadRow]]:
    path, form = Path(task.files.path(split)), task.files.form
    texts = columns_of(template_for(task))

    def checked(row: Row) -> Row:
        if empty := [name for name in texts if not row.columns[name].strip()]:
            raise ValueError(f"{', '.join(empty)} is empty")
        return parse(row)

    found = keep_good(path, read_rows(path, form, (*texts, LABEL)), form, checked)
    return rows_of_split(found, task.files, split, texts)


def _texts(rows: list[Row], template: str) -> Iterator[str]:
    for row in rows:
        for name in columns_of(template):
            yield row.columns[name]


def _padded(ids: list[np.ndarray], template: str, length: int) -> tuple[dict[str, np.ndarray], int]:
    """Rows in arrays, and how many were cut; the end that closes a template stays."""
    last = 1 if template.endswith("{end}") else 0
    if length < last + 1:
        raise ValueError(f"rows of {length} token hold no text; make them longer")
    cut = [cut_ids(row, length, keep_last=last) for row in ids]
    return pad_rows(cut, length), sum(len(row) > length for row in ids)


def _scores_of(task: Rowwise) -> Callable[[View, Batch, Context], jax.Array]:
    def row_scores(view: View, batch: Batch, context: Context) -> jax.Array:
        assert view.features is not None
        final_BTD = view.features.final
        pooled_BD = pool(final_BTD, batch["lengths"], task.pool, batch.get("positions"))
        return scores(view.weights, dropped(pooled_BD, task.dropout, context))

    return row_scores


def _row_outputs(task: Rowwise, model: Transformer) -> Outputs:
    def apply(weights: PyTree, batch: Batch) -> dict[str, Any]:
        out = features(model, weights, batch["tokens"], batch.get("positions"))
        pooled_BD = pool(out.final, batch["lengths"], task.pool, batch.get("positions"))
        return {"logits": scores(weights, pooled_BD)}

    return apply


def _language(weight: float) -> tuple[LossTerm, ...]:
    return (cross_entropy(weight=weight),) if weight else ()


def _in_order(label: str) -> tuple[float, str]:
    """Numbers by their size, before other labels by the alphabet."""
    return (float(label), label) if label.isdecimal() else (math.inf, label)
