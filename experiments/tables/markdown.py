"""Markdown tables from rows of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

_EDGES = {"l": "---", "r": "--:"}


def grid(names: Sequence[str], rows: Iterable[Sequence[str]], sides: str) -> list[str]:
    """Returns the lines of a table.

    Args:
      names: of the columns.
      rows: a text for each column.
      sides: "l" or "r" for each column.

    >>> print("\\n".join(grid(["a", "b"], [["x", "1"]], "lr")))
    | a | b |
    |---|--:|
    | x | 1 |
    """
    lines = ["| " + " | ".join(names) + " |", "|" + "|".join(_EDGES[s] for s in sides) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Returns the mean, and the standard deviation where there are several values.

    >>> spread([1.0, 3.0], 1), spread([2.0], 1), spread([], 1)
    ('2.0 ± 1.4', '2.0', '')
    """
    if not len(values):
        return ""
    mean = f"{np.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):,.{digits}f}"
