"""DiLoCo: rate and momentum of the outer steps, by trial at one length of a round.

The seed is none of those that the table of DiLoCo reports.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.grid import Measurement
from experiments.methods.parallel import Diloco
from experiments.scale.training import STEPS, settings_of, trained
from experiments.tables.markdown import grid
from experiments.tables.table import Request, Results, Table

EVERY, WORKERS, SEED = 50, 4, 1000
# From local SGD (1 and no momentum) to what Douillard et al. 2023 (arXiv:2311.08105) recommend,
# 0.7 and 0.9, for rounds that are ten times longer and far more of them.
OUTER = ((1.0, 0.0), (1.0, 0.3), (0.7, 0.5), (1.0, 0.5), (0.4, 0.9), (0.7, 0.9))
PLAIN = "synchronous"


def name_of(rate: float, momentum: float) -> str:
    """What a row is called.

    >>> name_of(0.7, 0.9)
    'rate 0.7, momentum 0.9'
    """
    return f"rate {rate:g}, momentum {momentum:g}"


def cells(request: Request) -> list[Measurement]:
    """The synchronous run, and one for each pair of rate and momentum."""
    forms: list[tuple[str, tuple[Any, ...]]] = [(PLAIN, ())]
    for rate, momentum in OUTER:
        method = Diloco(EVERY, WORKERS, outer_rate=rate, outer_momentum=momentum)
        forms.append((name_of(rate, momentum), (method,)))
    mesh = f"data={WORKERS}"
    return [
        trained(name, settings_of(SEED, methods=methods), mesh, request, "diloco-outer")
        for name, methods in forms
    ]


def render(results: Results) -> list[str]:
    """Returns the table: a row a pair."""
    names = [PLAIN, *(name_of(*outer) for outer in OUTER)]
    losses = {name: results.column(name, "loss") for name in names}
    found = {name: float(np.mean(loss)) for name, loss in losses.items() if loss}
    if PLAIN not in found:
        return []
    rows = [
        [name, f"{loss:.4f}", "-" if name == PLAIN else f"{loss / found[PLAIN] - 1:+.2%}"]
        for name, loss in found.items()
    ]
    return [
        f"Rounds of {EVERY} steps, {STEPS} in all, {WORKERS} workers, seed {SEED}, which no other "
        "table has. The next table takes the best pair.",
        "",
        *grid(["outer steps", "loss", "off synchronous"], rows, "lrr"),
    ]


TABLE = Table("diloco-outer", "DiLoCo: the outer steps, by trial", cells, render)
