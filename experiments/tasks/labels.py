"""A classifier's labels and its task, each from the other, for folders of Hugging Face."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from model.heads import SCORE
from train.tasks.classification import Classification
from train.tasks.regression import Regression
from train.tasks.rowwise import template_for
from train.tasks.text import columns_of

PLAIN = "{text}"
"""What a row is to a classifier of transformers: the text, without ends of documents."""

MEAN = "label_mean"
"""Where the folder of a regression has the mean of its numbers, which its head has no place for."""

ROWS = "row_template"
"""Where a folder of ours says how its rows are written."""


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


def task_of(
    labels: Sequence[str], mean: float = 0.0, template: str = PLAIN
) -> Classification | Regression:
    """Returns the task of a classifier that lies in a folder of transformers.

    Args:
      labels: of its classes; one alone is a regression.
      mean: of a regression, see `in_own_units`.
      template: of its rows; a folder that we did not write says nothing of it.

    >>> task_of(["bad", "good"]).template, task_of(["value"]).name
    ('{text}', 'regression')
    """
    if len(labels) == 1:
        return Regression(template=template, mean=mean, scale=1.0)
    return Classification(template=template, labels=tuple(labels))


def in_own_units(task: Regression, params: Mapping[str, Any]) -> tuple[dict[str, Any], float, str]:
    """Returns the parameters of a regression with a head in units of its numbers.

    What was trained are standard deviations from the mean. The scale goes into the head, which has
    no bias for the mean: that stands in `config.json`, under `MEAN`.

    Returns:
      Parameters, mean, and a line to print.

    >>> import jax.numpy as jnp
    >>> params = {"score": {"kernel": jnp.ones((1, 1))}}
    >>> in_own_units(Regression(mean=3.0, scale=2.0), params)[0]["score"]["kernel"].tolist()
    [[2.0]]
    """
    mean, scale = task.mean or 0.0, 1.0 if task.scale is None else task.scale
    kernel = params[SCORE]["kernel"]
    scaled = {**params, SCORE: {"kernel": (kernel * scale).astype(kernel.dtype)}}
    return scaled, mean, f"             numbers are scores plus {mean:g} ({MEAN} in config.json)"


def as_its_head_reads(task: Any, theirs: Any) -> Any:
    """Returns a task with what the head of a start was trained to read and say.

    Where that head fits: for the same labels, the template of its rows if none was given; for a
    regression also its units.

    Args:
      task: ours.
      theirs: of the start, or None.

    >>> ours, theirs = Classification(labels=("a", "b")), task_of(("a", "b"))
    >>> as_its_head_reads(ours, theirs).template
    '{text}'
    """
    changes: dict[str, Any] = {}
    if isinstance(task, Regression) and isinstance(theirs, Regression):
        changes = {"mean": theirs.mean, "scale": theirs.scale}
    elif not _same_classes(task, theirs):
        return task
    read = template_for(theirs)
    if task.template is None and columns_of(read) == columns_of(template_for(task)):
        changes["template"] = read
    return dataclasses.replace(task, **changes)


def _same_classes(task: Any, theirs: Any) -> bool:
    both = isinstance(task, Classification) and isinstance(theirs, Classification)
    return both and (task.labels, task.by) == (theirs.labels, theirs.by)
