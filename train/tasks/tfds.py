"""Rows of a task from a prepared TensorFlow dataset, read without TensorFlow.

    tfds:NAME[/CONFIG][:VERSION][@DATA_DIR]#SPLIT

Columns are its features: text, numbers, and labels by their names. A row is known by its number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.text.source_tfds import READ, open_dataset, split_files

PREFIX = "tfds:"


class Examples(NamedTuple):
    """A split of a dataset.

    Attributes:
      examples: a random-access sequence.
      features: by name.
      files: that hold them.
    """

    examples: Any
    features: Mapping[str, Any]
    files: list[Path]


def open_split(text: str) -> Examples:
    """Opens a split.

    Raises:
      ValueError: the dataset is not prepared there, or has no such split; those it has are listed.
    """
    rest, _, split = text.removeprefix(PREFIX).partition("#")
    name, _, data_dir = rest.partition("@")
    if not name:
        raise ValueError(f"{text} is not of the form tfds:NAME[/CONFIG][:VERSION][@DATA_DIR]#SPLIT")
    builder = open_dataset(name, data_dir or None)
    files = split_files(builder, name, split, "Name it: #SPLIT")
    examples = builder.as_data_source(split=split, file_format="array_record")
    return Examples(examples, builder.info.features or {}, files)


def tfds_hash(text: str) -> str:
    """Returns the sha256 of the hashes of a split's files, hex."""
    digest = hashlib.sha256()
    for path in open_split(text).files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_examples(
    text: str, wanted: Collection[str]
) -> Iterator[tuple[int, Mapping[str, object] | str]]:
    """Yields (number, columns) of each example, counted from 1, or what is wrong with it.

    Args:
      text: see above.
      wanted: features that are turned into text or numbers.

    Raises:
      ValueError: see `open_split`.
    """
    examples, features, _ = open_split(text)
    for begin in range(0, len(examples), READ):
        numbers = range(begin, min(begin + READ, len(examples)))
        for number, example in zip(numbers, examples.__getitems__(list(numbers)), strict=True):
            try:
                yield (
                    number + 1,
                    {
                        name: _plain(features[name], value) if name in wanted else None
                        for name, value in example.items()
                    },
                )
            except ValueError as error:
                yield number + 1, str(error)


def _plain(feature: Any, value: Any) -> object:
    """Text of bytes, the name of a label, a number; anything else as it is."""
    if isinstance(value, np.ndarray | np.generic) and np.ndim(value) == 0:
        value = value.item()
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="surrogateescape")
    names = getattr(feature, "names", None)
    if isinstance(value, int) and names:
        if not 0 <= value < len(names):
            raise ValueError(f"the label {value} has no name: a row that was left without one")
        return names[value]
    return value
