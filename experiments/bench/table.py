"""A table of the bench: what it measures, and how its figures are shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.grid import Measured, Measurement


class Job(NamedTuple):
    """Something to be done before a table is measured, with others of its stage at the same time.

    Attributes:
      stage: 0 for what is done before any table is measured, 1 for what waits for its own turn.
      run: does it.
    """

    stage: int
    run: Callable[[], Any]


class Table(NamedTuple):
    """One part of the bench.

    Attributes:
      title: its heading.
      measurements: what is found out, each once; a command that was stopped goes on.
      text: of the measurements that have been made, as Markdown.
      picture: draws them, where a picture says more.
      prepare: returns what is to be done before the measurements that are missing, such as
        compilation for all of them at once.
      together: how many measurements may be made at the same time; they wait for each other where
        they time.
    """

    title: str
    measurements: tuple[Measurement, ...]
    text: Callable[[Sequence[Measured]], str]
    picture: Callable[[Sequence[Measured], Path], None] | None = None
    prepare: Callable[[Sequence[Measurement]], Sequence[Job]] | None = None
    together: int = 1


def rows_of(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table.

    >>> print(rows_of(["size", "ratio"], [["3m", "1.2x"]]))
    | size | ratio |
    |---|--:|
    | 3m | 1.2x |
    """
    lines = ["| " + " | ".join(names) + " |", "|---" + "|--:" * (len(names) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
