"""Rows of a task's file: `.tsv`, `.csv`, `.jsonl`, lines of any text, or TFDS; columns by name.

A row that does not parse is an error with its line number, or is left out and counted, as asked.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from train.tasks import tfds as tasks_tfds

T = TypeVar("T")
OBJECTS = (".jsonl", ".ndjson")  # a JSON object a line
SHOWN = 3  # bad rows that a report names one by one


class Row(NamedTuple):
    """One row of a file: the line where it ends, counted from 1, and its columns."""

    line: int
    columns: dict[str, str]


class BadRow(NamedTuple):
    """A row that does not parse."""

    line: int
    reason: str


@dataclass(frozen=True)
class RowFormat:
    """How rows are read.

    Attributes:
      columns: (what the task calls it, the file's column) where they differ.
      separator: of columns; by default a tab in `.tsv`, a comma in `.csv`. With it any other file
        has one row a line, and the last column takes what is left of the line.
      names: of the columns, for a file whose first line does not name them.
      bad_rows: "stop" at a row that does not parse, or "skip" it and count.
    """

    columns: tuple[tuple[str, str], ...] = ()
    separator: str | None = None
    names: tuple[str, ...] = ()
    bad_rows: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        if self.bad_rows not in ("stop", "skip"):
            raise ValueError(f"bad_rows is {self.bad_rows!r}; it is 'stop' or 'skip'")
        if self.separator == "":
            raise ValueError("the separator is empty; give a character, such as ' ' or ';'")
        for what, names in (("names", self.names), ("columns", [a for a, _ in self.columns])):
            if twice := sorted({name for name in names if list(names).count(name) > 1}):
                raise ValueError(f"{what} has {', '.join(twice)} more than once")

    def column(self, name: str) -> str:
        """Returns the file's column for what the task calls `name`.

        >>> RowFormat(columns=(("text", "sentence"),)).column("text"), RowFormat().column("label")
        ('sentence', 'label')
        """
        return dict(self.columns).get(name, name)


def read_rows(path: Path, form: RowFormat, wanted: Sequence[str]) -> Iterator[Row | BadRow]:
    """Yields the rows of a file, with what the task calls its columns.

    Args:
      path: of the file, UTF-8; or a split of a TFDS dataset, see `train.tasks.tfds`.
      form: how it is read.
      wanted: columns, as the task calls them.

    Raises:
      ValueError: no such file, a kind that needs a separator, or a column that is not there; those
        that are there are listed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.txt"
    ...     _ = path.write_text("1 very good\\n0\\n")
    ...     form = RowFormat(separator=" ", names=("label", "text"))
    ...     good, bad = read_rows(path, form, ["text", "label"])
    >>> good.columns, bad.reason
    ({'text': 'very good', 'label': '1'}, '1 of 2 columns (label, text)')
    """
    if unknown := sorted({name for name, _ in form.columns} - set(wanted)):
        raise ValueError(
            f"columns names {', '.join(unknown)}, and the task reads {', '.join(wanted)}"
        )
    if str(path).startswith(tasks_tfds.PREFIX):
        if form.separator is not None or form.names:
            raise ValueError(f"{path} names its columns; leave separator and names out")
        names = [form.column(name) for name in wanted]
        return _named(path, tasks_tfds.read_examples(str(path), names), form, wanted)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise ValueError(f"{path} {what}; give a .tsv, .csv, .jsonl or text file, or tfds:NAME")
    suffix = path.suffix.lower()
    if suffix in OBJECTS:
        if form.separator is not None or form.names:
            raise ValueError(f"{path} names its columns in every line; leave separator and names")
        found = _read_json_lines(path)
    elif suffix in (".tsv", ".csv") or form.separator is not None:
        found = _read_columns(path, form, wanted)
    else:
        raise ValueError(
            f"{path} is of no known kind (.tsv, .csv, .jsonl); say how its columns are separated, "
            "and name them if its first line does not: --separator ' ' --column-names label text"
        )
    return _named(path, found, form, wanted)


def keep_good(
    path: Path, rows: Iterator[Row | BadRow], form: RowFormat, parse: Callable[[Row], T]
) -> tuple[list[T], list[BadRow]]:
    """Returns what is made of the rows, and those that were left out.

    Args:
      path: of their file, for the error.
      rows: from `read_rows`.
      form: says whether bad rows stop.
      parse: makes something of a row; ValueError where it does not parse.

    Raises:
      ValueError: a bad row, under "stop"; no row is left.
    """
    good: list[T] = []
    bad: list[BadRow] = []
    for row in rows:
        if isinstance(row, Row):
            try:
                good.append(parse(row))
                continue
            except ValueError as error:
                row = BadRow(row.line, str(error))
        if form.bad_rows == "stop":
            raise ValueError(
                f"{path}, line {row.line}: {row.reason}. Correct the row, or leave such rows out "
                "with --bad-rows skip"
            )
        bad.append(row)
    if not good:
        raise ValueError(f"{path} has no row to use" + (f"; {said_of(bad)}" if bad else ""))
    return good, bad


def said_of(bad: Sequence[BadRow]) -> str:
    """Returns a text about the rows that were left out.

    >>> said_of([BadRow(7, "no text")])
    '1 row was left out: line 7 (no text)'
    """
    first = "; ".join(f"line {row.line} ({row.reason})" for row in bad[:SHOWN])
    more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    count = "1 row was" if len(bad) == 1 else f"{len(bad):,} rows were"
    return f"{count} left out: {first}{more}"


def content_hash(path: Path) -> str:
    """Returns the sha256 of a file, or of a split of a TFDS dataset, hex.

    Raises:
      ValueError: it is not there.
    """
    if str(path).startswith(tasks_tfds.PREFIX):
        return tasks_tfds.tfds_hash(str(path))
    if not path.is_file():
        raise ValueError(f"{path} is not there; give a .tsv, .csv, .jsonl or text file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text_of(path: Path) -> str:
    """The text; bytes that are no UTF-8 become lone surrogates, by which their row is known."""
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path} is UTF-16; write it as UTF-8")
    return content.decode("utf-8-sig", errors="surrogateescape")


def _read_json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, object] | str]]:
    for line, text in enumerate(_text_of(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            yield line, f"no JSON ({error.msg} at column {error.colno})"
            continue
        yield line, value if isinstance(value, dict) else "no JSON object"


def _read_columns(
    path: Path, form: RowFormat, wanted: Sequence[str]
) -> Iterator[tuple[int, Mapping[str, object] | str]]:
    suffix, rows = path.suffix.lower(), None
    text = _text_of(path)
    separator = form.separator or {".tsv": "\t", ".csv": ","}[suffix]
    names: list[str] = list(form.names)
    if suffix == ".csv":  # quoted as spreadsheets do it; a cell may run over lines
        if len(separator) > 1:
            raise ValueError(f"the separator of {path} is one character, not {separator!r}")
        rows = _csv_rows(list(io.StringIO(text, newline="")), separator)
    else:
        lines = (line.removesuffix("\r") for line in text.split("\n"))
        # A quote is a character like others here. Free text is the last column of a line.
        # Asked for with each line: the first one may name them.
        rows = (
            (number, line.split(separator, _splits(suffix, names)) if line else [])
            for number, line in enumerate(lines, start=1)
        )
    for line, cells in rows:
        if isinstance(cells, str):
            yield line, cells
        elif not cells:
            continue
        elif not names:
            names = cells
            if lacking := [name for name in map(form.column, wanted) if name not in names]:
                raise _lacks(path, lacking, names)
        elif len(cells) != len(names):
            yield line, f"{len(cells)} of {len(names)} columns ({', '.join(names)})"
        else:
            yield line, dict(zip(names, cells, strict=True))


def _splits(suffix: str, names: Sequence[str]) -> int:
    """How often a line is split at most, -1 for no end."""
    return -1 if suffix == ".tsv" or not names else len(names) - 1


def _csv_rows(lines: list[str], separator: str) -> Iterator[tuple[int, list[str] | str]]:
    """(number of its last line, cells or what is wrong) of every record."""
    before = 0  # lines in front of those that are read
    while True:
        over: list[bool] = []  # filled once the reader has asked for more lines than there are
        reader = csv.reader(_fed(lines[before:], over), delimiter=separator, strict=True)
        while True:
            begin = before + reader.line_num
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if over:
                    break
                yield before + reader.line_num, f"no CSV ({error})"
                continue
            yield before + reader.line_num, cells
        # In quotes to the end of the file: that is to blame on one line, and others are read.
        yield begin + 1, "no CSV (a quote is opened and never closed)"
        before = begin + 1


def _fed(lines: list[str], over: list[bool]) -> Iterator[str]:
    yield from lines
    over.append(True)


def _named(
    path: Path,
    found: Iterator[tuple[int, Mapping[str, object] | str]],
    form: RowFormat,
    wanted: Sequence[str],
) -> Iterator[Row | BadRow]:
    """Rows with the task's names in place of the file's, each value checked."""
    lacked: Mapping[str, object] | None = None
    alike = path.suffix.lower() not in OBJECTS  # all rows of a table have the same columns
    good = False
    for line, values in found:
        if isinstance(values, str):
            yield BadRow(line, values)
            continue
        lacking = [name for name in map(form.column, wanted) if name not in values]
        if lacking and (alike or (form.bad_rows == "stop" and not good)):  # no row is to blame
            raise _lacks(path, lacking, values)
        if lacking:
            lacked = lacked or values
            yield BadRow(line, f"no column {', '.join(lacking)}")
            continue
        good = True
        columns = {name: values[form.column(name)] for name in wanted}
        if wrong := [name for name, v in columns.items() if not isinstance(v, str | int | float)]:
            yield BadRow(line, f"{', '.join(wrong)} is neither text nor a number")
            continue
        texts = {name: str(value) for name, value in columns.items()}
        try:
            "".join(texts.values()).encode()
        except UnicodeEncodeError:
            yield BadRow(line, "bytes that are no UTF-8: another encoding")
            continue
        yield Row(line, texts)
    if lacked is not None and not good:  # of every row
        raise _lacks(path, [n for n in map(form.column, wanted) if n not in lacked], lacked)


class LackingColumns(ValueError):
    """A file without columns that are read: `columns`, as the file would call them."""

    def __init__(self, message: str, columns: Sequence[str]):
        super().__init__(message)
        self.columns = tuple(columns)


def _lacks(path: Path, lacking: Sequence[str], names: Sequence[str] | Mapping) -> LackingColumns:
    return LackingColumns(
        f"{path} has no column {', '.join(map(repr, lacking))}; it has "
        f"{', '.join(map(repr, names))}. Name the right one with --columns, as in text=COLUMN"
        ", or all of them with --column-names if its first line is a row like others",
        lacking,
    )
