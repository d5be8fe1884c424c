"""Ratios of times taken in turn: round by round, so that a slow spell meets both sides."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def paired(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """Returns median and quartiles of `above / below`, round by round.

    Raises:
      ValueError: they are no pairs.

    >>> paired([2.0, 4.0, 6.0], [1.0, 1.0, 1.0])
    {'ratio': 4.0, 'quartiles': [3.0, 5.0]}
    """
    if len(above) != len(below) or not above:
        raise ValueError(f"{len(above)} and {len(below)} times are no pairs")
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    if len(ratios) == 1:
        return {"ratio": ratios[0], "quartiles": [ratios[0], ratios[0]]}
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"ratio": middle, "quartiles": [low, high]}
