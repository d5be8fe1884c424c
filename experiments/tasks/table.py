"""The tasks that a run may be given, by name, and what is reported of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.tasks.instruction_metrics import instruction_metrics, instruction_predictions
from experiments.tasks.metrics import (
    class_metrics,
    class_predictions,
    number_metrics,
    number_predictions,
    scikit_metrics,
)
from experiments.tasks.squad_metrics import official, span_metrics, span_predictions
from experiments.tasks.translation_metrics import (
    sacrebleu_metrics,
    translation_metrics,
    translation_notes,
    translation_predictions,
)
from train.tasks.chat import Instructions
from train.tasks.classification import Classification
from train.tasks.regression import Regression
from train.tasks.squad import Squad
from train.tasks.task import Examples
from train.tasks.translation import Translation
from train.tokenizers.tokenizer import Tokenizer

Outputs = Mapping[str, np.ndarray]


class Report(NamedTuple):
    """What is made of the outputs of a task.

    Attributes:
      metrics: (task, examples, outputs, tokenizer) -> figures, "loss" among them.
      predictions: the same -> what is written of each row, with its inputs, as JSON values.
      notes: task -> what stands beside the figures, such as how they were counted.
      whole: predictions of a split -> what others read them as, one JSON value; or None.
      needs: raises ImportError without the library that the figures come from.
    """

    metrics: Callable[[Any, Examples, Outputs, Tokenizer], dict[str, float]]
    predictions: Callable[[Any, Examples, Outputs, Tokenizer], Iterator[dict[str, Any]]]
    notes: Callable[[Any], dict[str, str]] = lambda task: {}
    whole: Callable[[Iterable[dict[str, Any]]], Any] | None = None
    needs: Callable[[], Any] = lambda: None


TASKS: dict[str, type[Any]] = {
    task.name: task for task in (Classification, Regression, Squad, Translation, Instructions)
}
REPORTS: dict[str, Report] = {
    Classification.name: Report(class_metrics, class_predictions, needs=scikit_metrics),
    Regression.name: Report(number_metrics, number_predictions, needs=scikit_metrics),
    Squad.name: Report(span_metrics, span_predictions, whole=official),
    Translation.name: Report(
        translation_metrics, translation_predictions, translation_notes, needs=sacrebleu_metrics
    ),
    Instructions.name: Report(instruction_metrics, instruction_predictions),
}
