"""What tasks of one answer a row share: the template, reading, rows in arrays, a head's scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from model.config import EncoderDecoderConfig
from model.heads import POOLS, Pool, pool, scores
from model.transformer import Transformer, features
from train.losses import cross_entropy
from train.losses_tasks import dropped_features
from train.plugs import Batch, Context, LossTerm, PyTree, View
from train.tasks.grams import gram_scores
from train.tasks.rows import BadRow, Row, keep_good, read_rows
from train.tasks.task import (
    Outputs,
    TaskFiles,
    pad_rows,
    rows_of_split,
)
from train.tasks.text import columns_of, cut_parts, encode_parts, written
from train.tokenizers.tokenizer import Tokenizer

LABEL = "label"
ONE, TWO = "{end}{text}{end}", "{end}{text}{end}{text2}{end}"
PROMPT = "{end}{text}\nlabel:"


class Rowwise(Protocol):
    """Settings of a task with one answer a row: a class or a number."""

    @property
    def files(self) -> TaskFiles: ...
    @property
    def template(self) -> str | None: ...
    @property
    def pool(self) -> Pool: ...
    @property
    def dropout(self) -> float: ...
    @property
    def language_weight(self) -> float: ...


def check_rowwise(task: Rowwise) -> None:
    """Raises ValueError for settings that make no sense."""
    if task.pool not in POOLS:
        raise ValueError(f"pool is {task.pool!r}; choose one of {', '.join(POOLS)}")
    if not 0 <= task.dropout < 1:
        raise ValueError(f"dropout is {task.dropout}; it must be at least 0 and below 1")
    if not task.language_weight >= 0:
        raise ValueError(f"language_weight is {task.language_weight}; it must be at least 0")
    if task.template is not None and LABEL in columns_of(task.template):
        raise ValueError("the template shows the label, which is what is asked for")


def refuse_two_sides(name: str, model: Any) -> None:
    """Raises ValueError for a model that reads rows in two parts."""
    if isinstance(model.config, EncoderDecoderConfig):
        raise ValueError(
            f"a {name} reads a row as one text, and an encoder-decoder wants a source and a "
            "target; give a decoder-only model as --start or --model"
        )


def template_for(task: Rowwise) -> str:
    """Returns the template of a task, its own or the one that suits its columns."""
    if task.template is not None:
        return task.template
    if getattr(task, "by", "head") == "words":
        return PROMPT
    form = task.files.form
    return TWO if "text2" in dict(form.columns) or "text2" in form.names else ONE


def read_split(
    task: Rowwise, split: str, parse: Callable[[Row], Row]
) -> tuple[list[Row], list[BadRow]]:
    """Returns the rows of a split with their labels, as `parse` makes them, and what was left out.

    Raises:
      ValueError: bad rows, unless they are to be skipped.
    """
    texts = columns_of(template_for(task))

    def checked(row: Row) -> Row:
        return parse(_with_text(row, texts))

    path, form = Path(task.files.path(split)), task.files.form
    found = keep_good(path, read_rows(path, form, (*texts, LABEL)), form, checked)
    return rows_of_split(found, task.files, split, texts)


def unlabelled_rows(task: Rowwise, path: Path) -> tuple[list[Row], list[BadRow]]:
    """Returns the rows of a file whose labels are not known, and what was left out.

    Raises:
      ValueError: bad rows, unless they are to be skipped.
    """
    texts, form = columns_of(template_for(task)), task.files.form
    rows = read_rows(Path(path), form, texts)
    return keep_good(Path(path), rows, form, lambda row: _with_text(row, texts))


def _with_text(row: Row, texts: Sequence[str]) -> Row:
    if empty := [name for name in texts if not row.columns[name].strip()]:
        raise ValueError(f"{', '.join(empty)} is empty")
    return row


def texts_of(rows: list[Row], template: str) -> Iterator[str]:
    """Yields what a template has between ends, row by row: the texts that are encoded, as they are.

    >>> list(texts_of([Row(1, {"text": "ab", "text2": "c"})], "{end} {text}{end}or {text2}{end}"))
    [' ab', 'or c']
    """
    for row in rows:
        yield from (text for text in written(row, template) if text is not None)


def padded(
    task: Rowwise, rows: list[Row], tokenizer: Tokenizer, length: int
) -> tuple[dict[str, np.ndarray], int]:
    """Returns rows in arrays, and how many were cut."""
    parts = encode_parts(rows, template_for(task), tokenizer)
    too_long = sum(sum(map(len, row)) > length for row in parts)
    return pad_rows([cut_parts(row, length) for row in parts], length), too_long


def scores_of(task: Rowwise) -> Callable[[View, Batch, Context], jax.Array]:
    """Returns `(view, batch, context) -> scores` [B, C] of the head, with its dropout."""

    def row_scores(view: View, batch: Batch, context: Context) -> jax.Array:
        assert view.features is not None
        final_BTD = view.features.final
        pooled_BD = pool(final_BTD, batch["lengths"], task.pool, batch.get("positions"))
        return _scores(
            task, view.weights, dropped_features(pooled_BD, task.dropout, context), batch
        )

    return row_scores


def row_outputs(task: Rowwise, model: Transformer) -> Outputs:
    """Returns `(weights, batch) -> {"logits": [B, C]}` of the head."""

    def apply(weights: PyTree, batch: Batch) -> dict[str, Any]:
        out = features(model, weights, batch["tokens"], batch.get("positions"))
        pooled_BD = pool(out.final, batch["lengths"], task.pool, batch.get("positions"))
        return {"logits": _scores(task, weights, pooled_BD, batch)}

    return apply


def _scores(task: Rowwise, weights: PyTree, pooled_BD: jax.Array, batch: Batch) -> jax.Array:
    """[B, C]: what the features say, and n-grams beside them."""
    scores_BC = scores(weights, pooled_BD)
    order = getattr(task, "grams", 0)
    return scores_BC + gram_scores(weights, batch, order) if order else scores_BC


def language_term(weight: float) -> tuple[LossTerm, ...]:
    """Returns the cross-entropy of the rows' own text, or nothing for a weight of 0."""
    return (cross_entropy(weight=weight),) if weight else ()
