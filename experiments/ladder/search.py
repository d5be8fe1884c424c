"""How long a schedule must be to end at a loss: the next length to try, from those tried so far.

A rate that falls to zero gains most at its end, so that how long a run takes to a loss depends on
how long it was planned to be. Every rung, the tuned torch baseline among them, looks for its length
by this one rule, with as many runs at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Search:
    """The rule.

    Attributes:
      least: tokens of the shortest run.
      most: tokens of the longest, the budget of the baseline.
      quantum: tokens that every length is a multiple of.
      factor: up to the next length, as long as all fail.
      shorter: down to the next length, as long as all are enough.
      close: a shorter length that fails, within this factor, ends the search: what lies between the
        two is interpolated (`experiments.ladder.measure.between`).
      runs: the most lengths to try.
    """

    least: int
    most: int
    quantum: int
    factor: float = 2**0.5
    shorter: float = 2.0  # short runs are cheap
    close: float = 1.25
    runs: int = 5

    def rounded(self, tokens: float) -> int:
        """Returns the nearest length that may be tried.

        >>> Search(100, 1000, 50).rounded(333), Search(100, 1000, 50).rounded(5000)
        (350, 1000)
        """
        nearest = self.quantum * round(tokens / self.quantum)
        return min(max(nearest, self.least), self.most)


def next_length(
    rule: Search, tried: Mapping[int, float], target: float, start: float
) -> int | None:
    """Returns the next length to try, or None at the end of the search.

    Args:
      rule: of the search.
      tried: tokens -> loss at the end of that run; NaN for one that diverged.
      target: the loss to end at, or under.
      start: length to begin with.

    >>> rule = Search(10, 1000, 10)
    >>> next_length(rule, {}, 3.0, 400)
    400
    >>> next_length(rule, {400: 2.9}, 3.0, 400), next_length(rule, {400: 3.1}, 3.0, 400)
    (200, 570)
    >>> next_length(rule, {400: 2.9, 200: 3.1}, 3.0, 400)  # half of the way, in log(tokens)
    280
    >>> next_length(rule, {400: 2.9, 370: 3.1}, 3.0, 400) is None
    True
    """
    if not tried:
        return rule.rounded(start)
    if len(tried) >= rule.runs:
        return None
    enough = [tokens for tokens, loss in tried.items() if loss <= target]
    if not enough:
        return _new(rule, tried, max(tried) * rule.factor)
    best = min(enough)
    shorter = [tokens for tokens in tried if tokens < best]
    if not shorter:
        return _new(rule, tried, best / rule.shorter)
    if between_ends(rule, tried, target):
        return None
    worse = max(shorter)
    high, low = tried[worse], tried[best]
    share = (high - target) / (high - low) if math.isfinite(high) and high > low else 0.5
    # Not so near to either end that the run would tell nothing new; not under the line, as a run
    # that misses the target by a hair costs another.
    return _new(rule, tried, worse * (best / worse) ** min(max(share, 0.3), 0.85))


def between_ends(rule: Search, tried: Mapping[int, float], target: float) -> bool:
    """Whether two lengths near each other end on either side of a target.

    >>> rule = Search(10, 1000, 10)
    >>> [between_ends(rule, {400: 2.9, n: 3.1}, 3.0) for n in (370, 200, 410)]
    [True, False, False]
    """
    enough = [tokens for tokens, loss in tried.items() if loss <= target]
    shorter = [tokens for tokens in tried if enough and tokens < min(enough)]
    return bool(shorter) and min(enough) <= rule.close * max(shorter)


def _new(rule: Search, tried: Mapping[int, float], tokens: float) -> int | None:
    length = rule.rounded(tokens)
    return None if length in tried else length
