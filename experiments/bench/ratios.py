"""What interleaved timings say: medians and spread of ratios, and how fast a cost grows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from experiments.tables.ratios import paired


class Ratio(NamedTuple):
    """How many times faster we are, from rounds in which both sides were timed.

    Attributes:
      median: of the rounds.
      low: the lower quartile.
      high: the upper one; a round in which the machine was held up moves neither.
      rounds: how many.
    """

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Compares the seconds of equal work, round by round: above 1, ours takes less.

    Args:
      ours: seconds of each round.
      theirs: seconds of the same rounds.

    Raises:
      ValueError: no round, or sides with different numbers of them.

    >>> str(ratio([1.0, 2.0, 1.0], [2.0, 3.0, 3.0]))
    '2.00x (1.75 to 2.50)'
    """
    found = paired(theirs, ours)
    low, high = found["quartiles"]
    return Ratio(found["ratio"], low, high, len(ours))


def order(names: Sequence[str], round_: int) -> list[str]:
    """Returns the names in the order of a round: each goes first in turn, so that drift cancels.

    >>> order(["a", "b", "c"], 0), order(["a", "b", "c"], 1), order(["a", "b", "c"], 3)
    (['a', 'b', 'c'], ['b', 'c', 'a'], ['c', 'b', 'a'])
    """
    start = round_ % len(names)
    turned = [*names[start:], *names[:start]]
    # Every other time around backwards, or one side would always follow the same one.
    return turned[::-1] if round_ // len(names) % 2 else turned


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Returns the slope of log cost against log size by least squares: cost ~ size ** slope.

    Raises:
      ValueError: fewer than two sizes, or a value that has no logarithm.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    if len(set(sizes)) < 2:
        raise ValueError(f"a slope needs two sizes, not {sorted(set(sizes))}")
    if min([*sizes, *costs]) <= 0:
        raise ValueError("sizes and costs must be above 0 to have a logarithm")
    xs, ys = [math.log(x) for x in sizes], [math.log(y) for y in costs]
    x_mean, y_mean = statistics.fmean(xs), statistics.fmean(ys)
    products = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return products / sum((x - x_mean) ** 2 for x in xs)


def farthest(losses: Mapping[str, Sequence[float]], steps: int = 100) -> float:
    """Returns the largest difference between sides in the loss of any of the first steps.

    NaN where a loss is none, or its name, as JSON has it.

    >>> farthest({"a": [3.0, 2.0], "b": [3.5, 2.25], "c": [3.0, 2.0]})
    0.5
    """
    rows = list(zip(*(map(float, side[:steps]) for side in losses.values()), strict=False))
    if any(math.isnan(loss) for row in rows for loss in row):  # which max() passes over
        return math.nan
    return max(max(row) - min(row) for row in rows)
