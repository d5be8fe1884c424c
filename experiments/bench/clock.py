"""Seconds of work on a device: synchronised, warm, over inputs that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

REPEATS = 7


def seconds_of(
    run: Callable[[int], Any], *, calls: int, repeats: int = REPEATS, warm: int = 3
) -> list[float]:
    """Returns the seconds of one call in each repeat.

    Args:
      run: gets the number of the call, from which it picks its inputs; returns arrays.
      calls: dispatched one after the other in a repeat; the host waits for the last alone.
      repeats: how often.
      warm: calls before that are not timed.

    >>> from jax import numpy as jnp
    >>> double = jax.jit(lambda x: 2 * x)
    >>> len(seconds_of(lambda number: double(jnp.float32(number)), calls=2, repeats=3))
    3
    """
    jax.block_until_ready([run(number) for number in range(warm)])
    found, number = [], warm
    for _ in range(repeats):
        begin = time.perf_counter()
        out = None
        for _ in range(calls):
            out = run(number)
            number += 1
        jax.block_until_ready(out)
        found.append((time.perf_counter() - begin) / calls)
    return found


def calls_for(run: Callable[[int], Any], seconds: float) -> int:
    """Returns how many calls take about so many seconds, at least 1.

    >>> from jax import numpy as jnp
    >>> calls_for(lambda number: jnp.float32(number), 1e-9)
    1
    """
    each = min(seconds_of(run, calls=3, repeats=2, warm=2))
    return max(1, min(10_000, round(seconds / max(each, 1e-9))))


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Returns median and quartiles.

    >>> spread([1.0, 2.0, 3.0, 4.0, 9.0])
    (3.0, 2.0, 4.0)
    """
    if len(seconds) == 1:
        return (seconds[0],) * 3
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return middle, low, high
