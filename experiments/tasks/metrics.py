"""Figures of classifications and regressions, most of them by scikit-learn; and predictions.

Shapes: N examples, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from model.extras import from_extra
from train.tasks.classification import Classification
from train.tasks.regression import Regression
from train.tasks.task import Examples
from train.tokenizers.tokenizer import Tokenizer

BINS = 15  # of confidence, as in Guo et al. 2017


def class_metrics(
    task: Classification, examples: Examples, outputs: Mapping[str, np.ndarray], _: Tokenizer
) -> dict[str, float]:
    """Returns loss, accuracy, F1, Matthews correlation and calibration error.

    F1 is that of the last label where there are two, the mean over all labels otherwise.

    Args:
      task: with its labels.
      examples: with `labels`.
      outputs: `logits` [N, C].
    """
    metrics = scikit_metrics()
    labels_N, p_NC = examples.arrays["labels"], probabilities(outputs["logits"])
    guesses_N = p_NC.argmax(axis=1)
    classes = np.arange(p_NC.shape[1])
    # The mean over all labels is over those, too, that no row has and no guess names.
    which: dict[str, Any] = {"average": "macro", "labels": classes}
    if len(classes) == 2:
        which = {"average": "binary"}
    return {
        "loss": float(metrics.log_loss(labels_N, p_NC, labels=classes)),
        "accuracy": float(metrics.accuracy_score(labels_N, guesses_N)),
        "f1": float(metrics.f1_score(labels_N, guesses_N, zero_division=0, **which)),
        "matthews": _matthews(labels_N, guesses_N),
        "calibration_error": calibration_error(labels_N, p_NC),
    }


def _matthews(labels_N: np.ndarray, guesses_N: np.ndarray) -> float:
    with warnings.catch_warnings():  # of rows that all have one label, at every evaluation
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)
        return float(scikit_metrics().matthews_corrcoef(labels_N, guesses_N))


def number_metrics(
    task: Regression, examples: Examples, outputs: Mapping[str, np.ndarray], _: Tokenizer
) -> dict[str, float]:
    """Returns loss (squared error in variances of the training file), errors and correlations.

    Args:
      task: with mean and scale.
      examples: with `values`.
      outputs: `logits` [N, 1], in standard deviations.
    """
    from scipy.stats import pearsonr, spearmanr

    metrics = scikit_metrics()
    right_N = examples.arrays["values"].astype(np.float64)
    guess_N = outputs["logits"][:, 0].astype(np.float64)
    varied = min(len(right_N), 2) == 2 and right_N.std() > 0 and guess_N.std() > 0
    scale = task.scale or 1.0
    return {
        "loss": float(metrics.mean_squared_error(right_N, guess_N)),
        "root_mean_squared_error": scale * float(metrics.root_mean_squared_error(right_N, guess_N)),
        "mean_absolute_error": scale * float(metrics.mean_absolute_error(right_N, guess_N)),
        "pearson": float(pearsonr(right_N, guess_N).statistic) if varied else float("nan"),
        "spearman": float(spearmanr(right_N, guess_N).statistic) if varied else float("nan"),
    }


def class_predictions(
    task: Classification, examples: Examples, outputs: Mapping[str, np.ndarray], _: Tokenizer
) -> Iterator[dict[str, Any]]:
    """Yields the inputs of each row, its label, the guess, and the probability of every label."""
    for row, p_C in zip(examples.rows, probabilities(outputs["logits"]), strict=True):
        yield {
            "line": row.line,
            **row.columns,
            "prediction": task.labels[int(p_C.argmax())],
            "probabilities": dict(zip(task.labels, (round(float(p), 6) for p in p_C), strict=True)),
        }


def number_predictions(
    task: Regression, examples: Examples, outputs: Mapping[str, np.ndarray], _: Tokenizer
) -> Iterator[dict[str, Any]]:
    """Yields the inputs of each row, its number, and the guess."""
    for row, guess in zip(examples.rows, outputs["logits"][:, 0], strict=True):
        number = (task.mean or 0.0) + (task.scale or 1.0) * float(guess)
        yield {"line": row.line, **row.columns, "prediction": number}


def probabilities(logits_NC: np.ndarray) -> np.ndarray:
    """Returns the softmax in float64.

    >>> probabilities(np.zeros((1, 2))).tolist()
    [[0.5, 0.5]]
    """
    shifted_NC = logits_NC.astype(np.float64) - logits_NC.max(axis=1, keepdims=True)
    p_NC = np.exp(shifted_NC)
    return p_NC / p_NC.sum(axis=1, keepdims=True)


def calibration_error(labels_N: np.ndarray, p_NC: np.ndarray, bins: int = BINS) -> float:
    """Returns the expected calibration error (Guo et al. 2017, arXiv:1706.04599).

    Rows are sorted into bins of equal width by the probability p of their guess:
    `sum_b n_b / N * |share that is right in b - mean p in b|`.

    >>> right = calibration_error(np.array([0, 1]), np.array([[0.75, 0.25], [0.75, 0.25]]))
    >>> round(right, 6)  # half are right, 0.75 were promised
    0.25
    """
    confidence_N = p_NC.max(axis=1)
    right_N = p_NC.argmax(axis=1) == labels_N
    bin_N = np.minimum((confidence_N * bins).astype(int), bins - 1)
    surplus_b = np.bincount(bin_N, right_N - confidence_N, minlength=bins)
    return float(np.abs(surplus_b).sum() / len(labels_N))


def scikit_metrics() -> Any:
    """Returns `sklearn.metrics`; ImportError says what to install."""
    return from_extra("sklearn.metrics", "tasks", "the figures of a task need scikit-learn")
