"""Regression of one or two sentences: a number a row, under the mean squared error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from model.config import TransformerConfig
from model.heads import SCORE, Pool, init_head
from model.transformer import Transformer
from train.losses_tasks import row_squared_error
from train.plugs import LossTerm, PyTree
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
    resolved,
    rows_used,
)
from train.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Regression:
    """Gives rows a number, under the mean squared error.

    Attributes:
      files: of the splits; the column `label` holds the number.
      template: see `train.tasks.classification.Classification`.
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
        check_rowwise(self)

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
        """Returns the squared error, and the cross-entropy of the text where asked for.

        Raises:
          ValueError: label smoothing, or a model that reads rows in two parts.
        """
        refuse_two_sides(self.name, model)
        if label_smoothing:
            raise ValueError("label_smoothing is for classes; a regression has none")
        return (row_squared_error(scores_of(self)), *language_term(self.language_weight))

    def texts(self) -> Iterator[str]:
        """Yields the training texts."""
        rows, _ = self.rows(TRAIN)
        return texts_of(rows, template_for(self))

    def examples(self, split: str, tokenizer: Tokenizer, length: int) -> Examples:
        """Returns a split in arrays, with `values` float32 [N], in standard deviations."""
        rows, bad = self.rows(split)
        return self.encoded(rows_used(rows, self.files, split), bad, tokenizer, length)

    def encoded(
        self, rows: list[Row], bad: list[BadRow], tokenizer: Tokenizer, length: int
    ) -> Examples:
        """Returns rows in arrays, as `examples`; one without a number has 0."""
        arrays, cut = padded(self, rows, tokenizer, length)
        numbers = np.array([float(row.columns.get(LABEL, 0.0)) for row in rows])
        values = ((numbers - (self.mean or 0.0)) / (self.scale or 1.0)).astype(np.float32)
        return Examples({**arrays, "values": values}, rows, bad, cut)

    def outputs(self, model: Transformer) -> Outputs:
        """Returns `logits` [B, 1], in standard deviations."""
        return row_outputs(self, model)

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

        return read_split(self, split, parse)
