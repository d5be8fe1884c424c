"""PowerSGD by rank and optimizer: what it takes to end where uncompressed gradients do.

A rank-4 gradient is most of a gradient to an optimizer that follows it (SGD, for which PowerSGD was
made), and less of one to those that make all its directions alike, as Muon does, or all its
entries, as AdamW. The seed is none of those that other tables report.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.ablate.markdown import grid
from experiments.ablate.tables import Request, Results, Table
from experiments.grid import Measurement
from experiments.parallel_methods import CompressedReduce
from experiments.scale.compression import TRAINED_ON, shapes_of_runs
from experiments.scale.training import STEPS, settings_of, trained
from train.optimizers import AdamW

SEED = 1000
RANKS = (4, 16, 32)
# None is the demo's Muon; AdamW's rate is the best of the first trials at the demo's size.
OPTIMIZERS: dict[str, Any] = {"Muon": None, "AdamW": AdamW(learning_rate=4e-3)}
PLAIN = CompressedReduce("none")


def name_of(optimizer: str, rank: int | None) -> str:
    """What a row is called.

    >>> name_of("Muon", 4), name_of("AdamW", None)
    ('Muon, rank 4', 'AdamW, uncompressed')
    """
    return f"{optimizer}, uncompressed" if rank is None else f"{optimizer}, rank {rank}"


def reduce_of(rank: int | None) -> CompressedReduce:
    """The method of a row."""
    return PLAIN if rank is None else dataclasses.replace(PLAIN, codec="powersgd", rank=rank)


def cells(request: Request) -> list[Measurement]:
    """A run for each optimizer and rank."""
    runs = []
    for optimizer, chosen in OPTIMIZERS.items():
        for rank in (None, *RANKS):
            settings = settings_of(SEED, methods=(reduce_of(rank),))
            if chosen is not None:
                settings = dataclasses.replace(settings, optimizer=chosen)
            name, mesh = name_of(optimizer, rank), f"data={TRAINED_ON}"
            runs.append(trained(name, settings, mesh, request, "compression-ranks"))
    return runs


def render(results: Results) -> list[str]:
    """Returns the table: a row a rank and optimizer."""
    rows, shapes = [], shapes_of_runs()
    whole = PLAIN.reduce().bytes_sent(shapes, TRAINED_ON)
    for optimizer in OPTIMIZERS:
        plain = results.column(name_of(optimizer, None), "loss")
        for rank in (None, *RANKS):
            found = results.column(name_of(optimizer, rank), "loss")
            if not found or not plain:
                continue
            part = reduce_of(rank).reduce().bytes_sent(shapes, TRAINED_ON) / whole
            off = "-" if rank is None else f"{found[0] / plain[0] - 1:+.2%}"
            rows.append([name_of(optimizer, rank), f"{part:.1%}", f"{found[0]:.4f}", off])
    if not rows:
        return []
    return [
        f"{STEPS} steps on {TRAINED_ON} workers, seed {SEED}, which no other table has; bytes are "
        "those of a float32 all-reduce.",
        "",
        *grid(["optimizer, PowerSGD", "bytes", "loss", "off uncompressed"], rows, "lrrr"),
    ]


TABLE = Table("compression-ranks", "PowerSGD by rank and optimizer", cells, render)
