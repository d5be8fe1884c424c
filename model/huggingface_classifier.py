"""Classifiers in from and out to Hugging Face folders: `GPT2ForSequenceClassification` and alike.

Such a model has no head for tokens but one for classes, `score.weight`, which reads the features of
the last token of each row that is not padding: `model.heads.pool(..., "last")` of ours. Which token
is padding stands in `config.json` as `pad_token_id`; transformers looks for the last token of
another id, so it must be one that no row ends with. Without one, it takes a single row at a time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from model import huggingface
from model.config import TransformerConfig
from model.heads import SCORE
from model.huggingface_files import CONFIG, read_json


class Classifier(NamedTuple):
    """A classifier, opened.

    Attributes:
      config: of the model, its head for tokens tied: a classifier has none of its own.
      params: the model's, and `score/kernel` [D, C].
      labels: names of the C classes; one alone is a regression.
      pad_token: id that fills rows up, or None.
    """

    config: TransformerConfig
    params: dict[str, Any]
    labels: tuple[str, ...]
    pad_token: int | None


def is_classifier(directory: str | os.PathLike[str]) -> bool:
    """Whether a folder's `config.json` says that it holds a classifier."""
    path = Path(directory) / CONFIG
    names = read_json(path).get("architectures") or [] if path.is_file() else []
    return any(str(name).endswith(huggingface.CLASSIFIER) for name in names)


def load_classifier(
    directory: str | os.PathLike[str], *, dtype: huggingface.DType = "float32"
) -> Classifier:
    """Reads a classifier from a folder in the format of transformers.

    Raises:
      ValueError: labels that are not numbered from 0, several labels at once
        (`multi_label_classification`), and as `model.huggingface.load`.

    >>> import tempfile, jax, jax.numpy as jnp
    >>> from model.presets import gpt2_tiny
    >>> from model.transformer import Transformer
    >>> config = gpt2_tiny()
    >>> params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> params = {**params, "score": {"kernel": jnp.ones((config.width, 2))}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_classifier(folder, config, params, ("bad", "good"), pad_token=0)
    ...     load_classifier(folder).labels
    ('bad', 'good')
    """
    fields = read_json(Path(directory) / CONFIG)
    if fields.get("problem_type") == "multi_label_classification":
        raise ValueError(
            f"{Path(directory) / CONFIG}: problem_type is multi_label_classification, and classes "
            "of ours exclude each other"
        )
    labels = _labels(fields, Path(directory))
    config, params = huggingface.load(directory, dtype=dtype, classes=len(labels))
    return Classifier(config, params, labels, fields.get("pad_token_id"))


def save_classifier(
    directory: str | os.PathLike[str],
    config: TransformerConfig,
    params: Mapping[str, Any],
    labels: Sequence[str],
    *,
    pad_token: int | None,
    dtype: huggingface.DType | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that `AutoModelForSequenceClassification.from_pretrained` reads.

    Args:
      directory: the folder to make.
      config: of the model.
      params: the model's, and `score/kernel` [D, C]. A head for tokens that is not tied is left
        out: such a folder has no place for it.
      labels: C names; one alone is a regression.
      pad_token: see the module.
      dtype, extra: as `model.huggingface.save`.

    Raises:
      ValueError: another number of labels than of classes, names given twice, and as
        `model.huggingface.save`.
    """
    kernel = params.get(SCORE, {}).get("kernel")
    classes = None if kernel is None else kernel.shape[-1]
    if classes != len(labels) or len(set(labels)) < len(labels):
        raise ValueError(
            f"a classifier of {classes} classes was given the labels {', '.join(labels)}; give "
            "each class a name of its own"
        )
    more = {
        "id2label": {str(n): label for n, label in enumerate(labels)},
        "label2id": {label: n for n, label in enumerate(labels)},
        "pad_token_id": pad_token,
        "problem_type": "regression" if classes == 1 else "single_label_classification",
        **(extra or {}),
    }
    left = {name: tree for name, tree in params.items() if name != "head"}
    tied = replace(config, tied_head=True)
    huggingface.save(directory, tied, left, dtype=dtype, extra=more, classes=classes)


def _labels(fields: Mapping[str, Any], directory: Path) -> tuple[str, ...]:
    named = fields.get("id2label")
    if named is None:  # as transformers has it
        return tuple(f"LABEL_{n}" for n in range(fields.get("num_labels", 2)))
    try:
        by_number = {int(number): str(label) for number, label in named.items()}
    except (AttributeError, ValueError):
        by_number = {}
    if not by_number or sorted(by_number) != list(range(len(by_number))):
        raise ValueError(f"{directory / CONFIG}: id2label does not number the labels from 0")
    return tuple(by_number[number] for number in range(len(by_number)))
