"""Training with zeros: from the first step on, and of a model that is trained already.

Published beside it: JaxPruner's T5-Base on C4, validation loss at 80 % zeros, Lee et al. 2023
(arXiv:2304.14082); gradual pruning: Zhu & Gupta 2017 (arXiv:1710.01878).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from experiments.ablate import base
from experiments.grid import Cell
from experiments.methods.compression import Prune, Rewire
from experiments.recipes import recommended
from experiments.tables.margins import Claim, claims
from experiments.tables.markdown import grid, spread
from experiments.tables.table import Request, Results, Table
from train.optimizers import Muon

SPARSITY = 0.8
STEPS = 300
RECOVERY_STEPS = 200
# A quarter of the rates that trained the model: it starts where they had fallen to zero.
RECOVERY = Muon(learning_rate=0.004, adam_learning_rate=0.0008)

METHODS: dict[str, tuple[Any, ...]] = {
    "dense": (),
    "random, fixed from the start": (Prune(SPARSITY, score="random", schedule="one_shot"),),
    "magnitude, gradual": (Prune(SPARSITY),),
    "magnitude over all layers, gradual": (Prune(SPARSITY, pattern="global"),),
    "magnitude, straight-through": (Prune(SPARSITY, masked="straight_through"),),
    "RigL": (Rewire(SPARSITY, every=25),),
    "SET": (Rewire(SPARSITY, every=25, growth="set"),),
}
PUBLISHED = {
    "dense": "2.584",
    "random, fixed from the start": "3.173",
    "magnitude, gradual": "2.954",
    "magnitude over all layers, gradual": "5.440",
    "magnitude, straight-through": "2.712",
    "RigL": "3.124",
    "SET": "3.131",
}
SOURCE = (
    "Published: T5-Base on C4 at 80 % zeros, validation loss, Lee et al. 2023 (JaxPruner, "
    "arXiv:2304.14082)."
)
GRADUAL_SOURCE = (
    "The schedule is that of Zhu & Gupta 2017 (arXiv:1710.01878), who report no one-shot row. "
    "Their medium LSTM on PTB, perplexity: dense 83.37, gradually to 80, 90 and 95 % zeros 83.87, "
    "87.86 and 96.30."
)
ORDERINGS = (
    ("random, fixed from the start", "SET"),
    ("SET", "RigL"),
    ("RigL", "magnitude, gradual"),
    ("magnitude, gradual", "magnitude, straight-through"),
    ("magnitude over all layers, gradual", "magnitude, gradual"),
)
GRADUAL = (("one-shot", "gradual"), ("one-shot", "gradual, over after a quarter"))


def cells(request: Request) -> list[Cell]:
    """Returns runs of equal length from equal initial parameters, sparse or becoming so."""
    return [
        Cell(
            name,
            dataclasses.replace(recommended(base.SIZE, STEPS, seed), methods=methods),
            dataclasses.replace(base.LOOP, evaluate_every=None),
        )
        for seed in range(request.seeds)
        for name, methods in METHODS.items()
    ]


def recovered(steps: int) -> dict[str, tuple[Any, ...]]:
    """Returns the methods that prune the base model within a run of `steps`."""
    return {
        "dense": (),
        "one-shot": (Prune(SPARSITY, schedule="one_shot"),),
        "gradual": (Prune(SPARSITY, schedule="cubic"),),
        "gradual, over after a quarter": (Prune(SPARSITY, every=max(steps // 40, 1)),),
    }


def recovery_cells(request: Request, times: int = 1) -> list[Cell]:
    """Returns runs of equal length from the base model, pruned at once or gradually.

    Args:
      request: of the command.
      times: as long as the recovery.
    """
    found = []
    steps = times * RECOVERY_STEPS
    for seed in range(request.seeds):
        start = base.base_cell(seed)
        for name, methods in recovered(steps).items():
            settings = dataclasses.replace(
                recommended(base.SIZE, steps, seed),
                methods=methods,
                optimizer=RECOVERY,
                parent=str(request.cells / start.key),
            )
            loop = dataclasses.replace(base.LOOP, evaluate_every=None)
            found.append(Cell(name, settings, loop, needs=(start,)))
    return found


def render(
    published: dict[str, str], source: str, orderings: Sequence[tuple[str, str]], results: Results
) -> list[str]:
    """Returns the table and the orderings."""
    body = []
    for name in results.by_name:
        if losses := results.column(name, "loss"):
            perplexities = [math.exp(loss) for loss in losses]
            body.append([name, spread(losses, 4), spread(perplexities, 2), published.get(name, "")])
    names = ["method", "validation loss", "perplexity", "published"]
    lines = [*grid(names, body, "lrrr"), "", source]
    rows = []
    for larger, smaller in orderings:
        high, low = results.pair(larger, smaller, "loss")
        if high:
            figures = [published.get(name, "") for name in (larger, smaller)]
            text = " > ".join(figures) if all(figures) else ""
            rows.append(Claim((larger, high), (smaller, low), text))
    return [*lines, "", *claims(rows, 4)] if rows else lines


TABLES: tuple[Table, ...] = (
    Table(
        "prune-gradual",
        f"One-shot against gradual pruning to 80 %, {RECOVERY_STEPS} steps from the base model",
        recovery_cells,
        functools.partial(render, {}, GRADUAL_SOURCE, GRADUAL),
    ),
    Table(
        "prune-gradual-longer",
        f"The same in {2 * RECOVERY_STEPS} steps",
        functools.partial(recovery_cells, times=2),
        functools.partial(render, {}, GRADUAL_SOURCE, GRADUAL),
    ),
    Table(
        "sparse-training",
        f"Training for {STEPS} steps to 80 % zeros in the blocks' matrices",
        cells,
        functools.partial(render, PUBLISHED, SOURCE, ORDERINGS),
    ),
)
