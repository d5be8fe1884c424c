"""TF-IDF and logistic regression by scikit-learn: what a classification is measured against."""

from __future__ import annotations

from collections import Counter
from typing import Any

from model.extras import from_extra
from train.tasks.classification import Classification
from train.tasks.rows import Row
from train.tasks.rowwise import LABEL, template_for
from train.tasks.task import SPLITS, TEST, TRAIN, VALID
from train.tasks.text import columns_of

BASELINE = "TF-IDF and logistic regression"
PENALTIES = (1, 3, 10, 30)  # inverse, as scikit-learn has it


def baseline(task: Classification) -> dict[str, Any]:
    """Fits logistic regression to TF-IDF of words, and of pairs of them.

    The inverse penalty and whether pairs count are those that are best on the validation split.

    Returns:
      `accuracy` on the test split, `train` and `valid` on the others, `commonest` that of the
      commonest test label, `labels`, `rows` of each split, and the hashes of the files, `sha256`.

    Raises:
      ImportError: scikit-learn is not installed.
    """
    from_extra("sklearn", "tasks", "the linear model needs scikit-learn")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    names = columns_of(template_for(task))

    def text(row: Row) -> str:
        return "\n".join(row.columns[name] for name in names)

    found = {}
    for split in SPLITS:
        rows, _ = task.rows(split)
        found[split] = ([text(row) for row in rows], [row.columns[LABEL] for row in rows])
    models = [
        make_pipeline(
            TfidfVectorizer(ngram_range=(1, words)), LogisticRegression(C=C, max_iter=1000)
        ).fit(*found[TRAIN])
        for words in (1, 2)
        for C in PENALTIES
    ]
    best = max(models, key=lambda model: model.score(*found[VALID]))
    labels = found[TEST][1]
    return {
        "accuracy": float(best.score(*found[TEST])),
        "train": float(best.score(*found[TRAIN])),
        "valid": float(best.score(*found[VALID])),
        "commonest": max(Counter(labels).values()) / len(labels),
        "labels": len(task.labels),
        "rows": {split: len(texts) for split, (texts, _) in found.items()},
        "sha256": list(task.files.sha256),
    }
