"""A run's record: `metrics.jsonl`, one JSON object a line, and what else wants to see the numbers.

Every row has `step`, `kind` ("train", "evaluation" or "skipped") and numbers. The file is the
record; TensorBoard and Weights & Biases only show it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from model.extras import from_extra

Row = dict[str, Any]


class Sink(NamedTuple):
    """Another place that rows go to.

    Attributes:
      write: gets every row.
      close: called at the end of the record.
    """

    write: Callable[[Row], None]
    close: Callable[[], None] = lambda: None


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a record; a last line cut off by a kill is passed over.

    Raises:
      ValueError: if any other line is damaged; it is named.
    """
    lines = path.read_text(errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it
                return
            raise ValueError(
                f"line {number} of {path} is no JSON ({error}); take the line out to go on"
            ) from None


def cut_back(path: Path, step: int) -> None:
    """Keeps the rows up to `step`: what came after it will be written again.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "metrics.jsonl"
    ...     _ = path.write_text('{"step": 1}\\n{"step": 2}\\n{"st')
    ...     cut_back(path, 1)
    ...     list(read_rows(path))
    [{'step': 1}]
    """
    if not path.exists():
        return
    kept = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


class Record:
    """Appends rows to a file and passes them on; a context manager.

    Args:
      path: the file; made if missing, continued otherwise. None writes nowhere: in a process that
        another one keeps the record for.
      sinks: get every row, and are closed with it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "metrics.jsonl"
    ...     with Record(path) as record:
    ...         _ = record.write("train", 1, {"loss": math.inf})
    ...     path.read_text()
    '{"kind": "train", "step": 1, "loss": "inf"}\\n'
    """

    def __init__(self, path: Path | None, sinks: tuple[Sink, ...] = ()):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a") if path is not None else None
        self._sinks = sinks

    def write(self, kind: str, step: int, values: dict[str, Any]) -> Row:
        """Writes one row. Numbers that are not finite become their names: JSON has none."""
        row: Row = {"kind": kind, "step": step, **values}
        if self._file is not None:
            self._file.write(json.dumps(plain(row), allow_nan=False) + "\n")
            self._file.flush()  # a kill loses no row
        for sink in self._sinks:
            sink.write(row)
        return row

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        for sink in self._sinks:
            sink.close()


def tensorboard_sink(folder: Path) -> Sink:
    """Writes numbers as TensorBoard scalars under `folder` (extra `log`)."""
    writer = from_extra("tensorboardX", "log", "TensorBoard logs need").SummaryWriter(str(folder))

    def write(row: Row) -> None:
        for name, value in _numbers(row):
            writer.add_scalar(name, value, row["step"])

    return Sink(write, writer.close)


def wandb_sink(folder: Path, settings: dict[str, Any]) -> Sink:
    """Sends numbers to Weights & Biases (extra `wandb`), settings along with them."""
    wandb = from_extra("wandb", "wandb", "Weights & Biases needs")
    run = wandb.init(dir=str(folder), config=settings, resume="allow", id=folder.name)

    return Sink(lambda row: run.log(dict(_numbers(row)), step=row["step"]), run.finish)


def _numbers(row: Row) -> list[tuple[str, float]]:
    """Returns (name, number) of all but the step; "train/norms/weight/blocks/attention/q/kernel/0".

    >>> _numbers({"kind": "train", "step": 3, "loss": 2.5, "norms": {"weight": {"head": [1.0]}}})
    [('train/loss', 2.5), ('train/norms/weight/head/0', 1.0)]
    """
    numbers: list[tuple[str, float]] = []

    def collect(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{name}/{key}", inner)
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                collect(f"{name}/{index}", inner)
        elif isinstance(value, int | float):
            numbers.append((name, value))

    collect(row["kind"], {name: v for name, v in row.items() if name not in ("kind", "step")})
    return numbers


def plain(value: Any) -> Any:
    """Returns the values with numbers that are not finite as their names: JSON has none.

    >>> plain({"losses": [1.5, math.inf]})
    {'losses': [1.5, 'inf']}
    """
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
