"""A classifier's labels and its task, each from the other, for folders of Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from train.tasks.classification import Classification, Regression, template_for

PLAIN = "{text}"
"""What a row is to a classifier of transformers: the text, without ends of documents."""


def labels_of(task: Any) -> tuple[str, ...] | None:
    """Returns the labels that the head of a task has, one for a regression; None without a head.

    Raises:
      ValueError: its head reads what transformers' does not: the mean of all features.

    >>> labels_of(Classification(labels=("bad", "good")))
    ('bad', 'good')
    """
    if isinstance(task, Classification) and task.by == "head":
        labels = task.labels
    elif isinstance(task, Regression):
        labels = ("value",)
    else:
        return None
    if task.pool != "last":
        raise ValueError(
            f"the head of this {task.name} reads the {task.pool} of all features, and that of "
            "transformers those of the last token; train with --task.pool last"
        )
    return labels


def template_of(task: Classification | Regression) -> str:
    """Returns what a row is to a task.

    >>> from train.tasks.task import TaskFiles
    >>> from train.tasks.rows import RowFormat
    >>> pairs = TaskFiles(form=RowFormat(columns=(("text2", "hypothesis"),)))
    >>> template_of(Classification(files=pairs)), template_of(Classification())
    ('{end}{text}{end}{text2}{end}', '{end}{text}{end}')
    """
    return template_for(task)


def task_of(labels: Sequence[str]) -> Classification | Regression:
    """Returns the task of a classifier that transformers trained.

    >>> task_of(["bad", "good"]).template, task_of(["value"]).name
    ('{text}', 'regression')
    """
    if len(labels) == 1:
        return Regression(template=PLAIN, mean=0.0, scale=1.0)
    return Classification(template=PLAIN, labels=tuple(labels))
