"""Documents of a prepared TensorFlow dataset, read without TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from train.text.source_files import Piece, cut_text

READ = 256  # examples fetched at a time


class TfdsSpec(NamedTuple):
    """``NAME[/CONFIG][:VERSION][@DATA_DIR][#[SPLIT/]FIELD]`` in its parts."""

    name: str
    data_dir: str | None
    split: str
    field: str


def parse_tfds(text: str) -> TfdsSpec:
    """Read what follows ``tfds:``; the split is "train" and the field "text" where not given.

    >>> parse_tfds("lm1b")
    TfdsSpec(name='lm1b', data_dir=None, split='train', field='text')
    >>> parse_tfds("mine/small:1.0.0@~/prepared#test/body")
    TfdsSpec(name='mine/small:1.0.0', data_dir='~/prepared', split='test', field='body')
    """
    rest, _, choice = text.partition("#")
    name, _, data_dir = rest.partition("@")
    split, slash, field = choice.rpartition("/")
    if not name or (slash and not split) or (choice and not field):
        raise ValueError(
            f"tfds:{text} is not of the form"
            " tfds:NAME[/CONFIG][:VERSION][@DATA_DIR][#[SPLIT/]FIELD]"
        )
    return TfdsSpec(name, data_dir or None, split or "train", field or "text")


def open_dataset(name: str, data_dir: str | None) -> Any:
    """The builder of a prepared dataset, read from its files.

    Raises:
        ValueError: the dataset is not prepared there, or not as array_record; the message says what
            there is and how to prepare it.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    folder = Path(data_dir).expanduser() if data_dir else None
    prepare = (
        f"tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare()"
    )
    try:  # from the files, never from code: what is read is what was prepared
        builder = read_only_builder.builder_from_files(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        raise ValueError(
            f"no prepared dataset {name!r} in {folder or 'the default folder of TFDS'}."
            f" Prepare it with {prepare}, or name its folder: tfds:NAME@DATA_DIR (and its config,"
            " where it has some: tfds:NAME/CONFIG)"
        ) from None
    formats = builder.info.available_file_formats()
    if not any(form.value == "array_record" for form in formats):
        there = ", ".join(sorted(form.value for form in formats)) or "unknown"
        raise ValueError(
            f"{builder.data_path} is prepared as {there}, which cannot be read without TensorFlow."
            f" Prepare it as array_record: {prepare}, or convert it: tfds convert_format"
            f" --dataset_version_dir={builder.data_path} --out_file_format=array_record"
            " --out_dir=... (both may need TensorFlow, once)"
        )
    return builder


def split_files(builder: Any, name: str, split: str, hint: str) -> list[Path]:
    """The files that hold a split.

    Raises:
        ValueError: there is no such split; those that there are are listed, and `hint` follows.
    """
    if split not in builder.info.splits:
        raise ValueError(
            f"{name} has no split {split!r}; its splits are"
            f" {', '.join(builder.info.splits)}. {hint}"
        )
    return [Path(file) for file in builder.info.splits[split].filepaths]


def open_examples(spec: TfdsSpec) -> tuple[Any, list[Path]]:
    """The split's examples as a random-access sequence, and the files that hold them.

    Raises:
        ValueError: the dataset is not prepared there, not as array_record, or has no such split or
            field; the message says what there is and how to prepare it.
    """
    builder = open_dataset(spec.name, spec.data_dir)
    files = split_files(builder, spec.name, spec.split, "Choose one with #SPLIT/FIELD")
    if spec.field not in (builder.info.features or {}):
        raise ValueError(
            f"{spec.name} has no field {spec.field!r}; its fields are"
            f" {', '.join(builder.info.features or {})}. Choose one with #FIELD"
        )
    return builder.as_data_source(split=spec.split, file_format="array_record"), files


def read_examples(examples: Any, spec: TfdsSpec, size: int) -> Iterator[Piece]:
    """A document per example; `size` is that of all files in bytes."""
    count, before = len(examples), 0
    for begin in range(0, count, READ):
        indices = range(begin, min(begin + READ, count))
        for index, example in zip(indices, examples.__getitems__(list(indices)), strict=True):
            where = f"tfds:{spec.name}, example {index} of {spec.split}, field {spec.field!r}"
            for part, last in cut_text(example[spec.field], where):  # bytes or str, as TFDS likes
                yield Piece(part, last, size * (index + 1) // count - before)
                before = size * (index + 1) // count
