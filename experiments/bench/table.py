"""A table of the bench: what it measures, and how its figures are shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.grid import Measured, Measurement


class Table(NamedTuple):
    """One part of the bench.

    Attributes:
      title: its heading.
      measurements: what is found out, each once; a command that was stopped goes on.
      text: of the measurements that have been made, as Markdown.
      picture: draws them, where a picture says more.
    """

    title: str
    measurements: tuple[Measurement, ...]
    text: Callable[[Sequence[Measured]], str]
    picture: Callable[[Sequence[Measured], Path], None] | None = None


def rows_of(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table.

    >>> print(rows_of(["size", "ratio"], [["3m", "1.2x"]]))
    | size | ratio |
    |---|--:|
    | 3m | 1.2x |
    """
    lines = ["| " + " | ".join(names) + " |", "|---" + "|--:" * (len(names) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
