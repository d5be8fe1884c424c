"""Orderings over paired seeds: which is lower, by how many standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.tables.markdown import grid


class Margin(NamedTuple):
    """A mean paired difference and its standard error, nan for a single pair."""

    difference: float
    error: float

    @property
    def errors(self) -> float:
        """The difference in standard errors; infinite where it never varies."""
        if math.isnan(self.error) or self.difference == 0:
            return math.nan if math.isnan(self.error) else 0.0
        return (
            self.difference / self.error
            if self.error
            else math.copysign(1, self.difference) * (math.inf)
        )

    @property
    def text(self) -> str:
        """For a table."""
        return "one seed" if math.isnan(self.error) else f"{self.errors:+.1f}"


class Claim(NamedTuple):
    """An expected ordering: `larger` exceeds `smaller`.

    Attributes:
      larger: name of a row and its values, one a seed.
      smaller: the same.
      published: the pair of figures that was published, or "".
    """

    larger: tuple[str, Sequence[float]]
    smaller: tuple[str, Sequence[float]]
    published: str = ""


def margin(larger: Sequence[float], smaller: Sequence[float]) -> Margin:
    """Returns the mean of `larger - smaller` over pairs, and its standard error.

    Raises:
      ValueError: they are no pairs.

    >>> margin([3.0, 5.0], [1.0, 2.0])
    Margin(difference=2.5, error=0.5)
    >>> margin([3.0, 5.0], [1.0, 2.0]).text
    '+5.0'
    """
    if len(larger) != len(smaller) or not larger:
        raise ValueError(f"{len(larger)} and {len(smaller)} values are no pairs of seeds")
    differences = np.subtract(larger, smaller)
    count = len(differences)
    error = differences.std(ddof=1) / math.sqrt(count) if count > 1 else math.nan
    return Margin(float(differences.mean()), float(error))


def claims(rows: Sequence[Claim], digits: int = 3) -> list[str]:
    """Returns a Markdown table that says of each ordering whether it came out, and how clearly.

    >>> print("\\n".join(claims([Claim(("a", [3.0, 5.0]), ("b", [1.0, 2.0]), "9 > 8")])))
    | expected | seeds in which it holds | difference | standard errors | published |
    |---|--:|--:|--:|---|
    | a > b | 2 of 2 | +2.500 | +5.0 | 9 > 8 |
    """
    body = []
    for row in rows:
        (above, high), (below, low) = row.larger, row.smaller
        found = margin(high, low)
        holds = sum(a > b for a, b in zip(high, low, strict=True))
        body.append(
            [
                f"{above} > {below}",
                f"{holds} of {len(high)}",
                f"{found.difference:+.{digits}f}",
                found.text,
                row.published,
            ]
        )
    names = ["expected", "seeds in which it holds", "difference", "standard errors", "published"]
    return grid(names, body, "lrrrl")
