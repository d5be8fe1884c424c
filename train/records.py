"""A run's record: `metrics.jsonl`, one JSON object a line, and what else wants to see the numbers.

Every row has `step`, `kind` ("train" or "evaluation") and numbers. The file is the record;
TensorBoard and Weights & Biases only show it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Sink = Callable[[Row], None]


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a record; a last line cut off by a kill is passed over.

    Raises:
      ValueError: if any other line is damaged; it is named.
    """
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it
                return
            raise ValueError(f"line {number} of {path} is no JSON: {error}") from None


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
      path: the file; made if missing, continued otherwise.
      sinks: called with every row.
    """

    def __init__(self, path: Path, sinks: tuple[Sink, ...] = ()):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")
        self._sinks = sinks

    def write(self, kind: str, step: int, values: dict[str, Any]) -> Row:
        """Writes one row. Numbers that are not finite become their names: JSON has none."""
        row: Row = {"kind": kind, "step": step, **values}
        self._file.write(json.dumps(_plain(row)) + "\n")
        self._file.flush()  # a kill loses no row
        for sink in self._sinks:
            sink(row)
        return row

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def tensorboard_sink(folder: Path) -> Sink:
    """Writes numbers as TensorBoard scalars under `folder` (extra `log`)."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ImportError("TensorBoard logs need: pip install 'accelerando[log]'") from None
    writer = SummaryWriter(str(folder))

    def sink(row: Row) -> None:
        for name, value in _numbers(row):
            writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    return sink


def wandb_sink(folder: Path, settings: dict[str, Any]) -> Sink:
    """Sends numbers to Weights & Biases (extra `wandb`), settings along with them."""
    try:
        import wandb
    except ImportError:
        raise ImportError("Weights & Biases needs: pip install 'accelerando[wandb]'") from None
    run = wandb.init(dir=str(folder), config=settings, resume="allow", id=folder.name)

    def sink(row: Row) -> None:
        run.log({f"{row['kind']}/{n}": v for n, v in _numbers(row)}, step=row["step"])

    return sink


def _numbers(row: Row) -> list[tuple[str, float]]:
    return [(name, v) for name, v in row.items() if name != "step" and isinstance(v, int | float)]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
