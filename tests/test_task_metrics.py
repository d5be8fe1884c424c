"""Figures of tasks against their definitions, and the rows that are written."""

import numpy as np
import pytest

from experiments.tasks.metrics import (
    calibration_error,
    class_metrics,
    class_predictions,
    number_metrics,
    number_predictions,
)
from train.tasks.classification import Classification
from train.tasks.regression import Regression
from train.tasks.rows import Row
from train.tasks.task import Examples

pytest.importorskip("sklearn")


def examples(**arrays):
    size = len(next(iter(arrays.values())))
    rows = [Row(n + 1, {"text": f"t{n}", "label": "x"}) for n in range(size)]
    return Examples(arrays, rows, [], 0)


def test_figures_of_two_classes():
    task = Classification(labels=("no", "yes"))
    labels = np.array([1, 1, 0, 0, 1])
    logits = np.array([[0.0, 2.0], [1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 4.0]])
    found = class_metrics(task, examples(labels=labels), {"logits": logits}, None)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    # 2 true and 1 false positive, 1 true and 1 false negative.
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))
    assert found["loss"] == pytest.approx(-np.log(p[np.arange(5), labels]).mean())
    rows = list(class_predictions(task, examples(labels=labels), {"logits": logits}, None))
    assert [row["prediction"] for row in rows] == ["yes", "no", "no", "yes", "yes"]
    assert rows[2]["line"] == 3
    assert rows[2]["text"] == "t2"
    assert rows[2]["probabilities"]["no"] == pytest.approx(p[2, 0], abs=1e-6)


def test_a_class_that_is_missing_from_a_split_is_no_error():
    task = Classification(labels=("a", "b", "c"))
    labels, logits = np.array([0, 1]), np.eye(3)[:2]
    found = class_metrics(task, examples(labels=labels), {"logits": logits}, None)
    assert found["accuracy"] == 1
    assert np.isfinite(list(found.values())).all()


def test_macro_f1_is_over_all_labels():
    """Also over one that no row has and no guess names."""
    task = Classification(labels=("a", "b", "c"))
    examples = Examples({"labels": np.array([0, 1])}, [], [], 0)
    found = class_metrics(task, examples, {"logits": np.eye(3)[:2]}, None)
    assert found["f1"] == pytest.approx(2 / 3)


def test_calibration_error_is_the_gap_between_promise_and_truth():
    draw = np.random.default_rng(0)
    p = draw.uniform(0.5, 1, 20_000)
    right = draw.uniform(size=20_000) < p
    p_NC = np.stack([p, 1 - p], axis=1)
    labels = np.where(right, 0, 1)
    assert calibration_error(labels, p_NC) < 0.02  # drawn as promised
    sure = np.tile([1.0, 0.0], (20_000, 1))
    assert calibration_error(labels, sure) == pytest.approx(1 - right.mean())


def test_figures_of_numbers():
    task = Regression(mean=3.0, scale=2.0)
    values, guesses = np.array([-1.0, 0.0, 1.0, 0.5]), np.array([[-0.5], [0.1], [0.4], [1.0]])
    found = number_metrics(task, examples(values=values), {"logits": guesses}, None)
    gap = guesses[:, 0] - values
    assert found["loss"] == pytest.approx((gap**2).mean())
    assert found["root_mean_squared_error"] == pytest.approx(2 * np.sqrt((gap**2).mean()))
    assert found["mean_absolute_error"] == pytest.approx(2 * np.abs(gap).mean())
    assert found["pearson"] == pytest.approx(np.corrcoef(values, guesses[:, 0])[0, 1])
    ranks = [np.argsort(np.argsort(a)) for a in (values, guesses[:, 0])]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    still = number_metrics(task, examples(values=values), {"logits": np.zeros((4, 1))}, None)
    assert np.isnan(still["pearson"])  # no correlation with what never changes
    rows = list(number_predictions(task, examples(values=values), {"logits": guesses}, None))
    assert rows[3]["prediction"] == pytest.approx(5.0)
