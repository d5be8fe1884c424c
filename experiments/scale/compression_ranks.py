"""PowerSGD by rank, matrices and optimizer: what it takes to end where uncompressed gradients do.

A rank-R gradient is most of a gradient if few directions hold it. Those of embedding and head have
one for every piece of a batch, and what a code left out is sent only as the factors come round to
it: until then it is late, by more steps the lower the rank. The seed is none of those that other
tables report.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from experiments.grid import Measurement
from experiments.methods.parallel import CompressedReduce
from experiments.scale.compression import TRAINED_ON, shapes_of_runs
from experiments.scale.training import STEPS, settings_of, trained
from experiments.tables.markdown import grid
from experiments.tables.table import Request, Results, Table
from train.optimizers import AdamW

SEED = 1000
EVERY, BLOCKS = ".*", "blocks/.*/kernel"
# None is the demo's Muon; AdamW's rate is the best of the first trials at the demo's size.
OPTIMIZERS: dict[str, Any] = {"Muon": None, "AdamW": AdamW(learning_rate=4e-3)}
PLAIN = CompressedReduce("none")


class Row(NamedTuple):
    """A run of the table.

    Attributes:
      optimizer: a key of OPTIMIZERS.
      rank: of the factors, None without compression.
      matrices: those that are factored.
    """

    optimizer: str
    rank: int | None = None
    matrices: str = EVERY

    @property
    def name(self) -> str:
        """What it is called.

        >>> Row("Muon", 4, BLOCKS).name, Row("AdamW").name
        ('Muon, rank 4, blocks alone', 'AdamW, uncompressed')
        """
        if self.rank is None:
            return f"{self.optimizer}, uncompressed"
        return f"{self.optimizer}, rank {self.rank}" + ", blocks alone" * (self.matrices == BLOCKS)

    @property
    def method(self) -> CompressedReduce:
        """What the workers do with their gradients."""
        if self.rank is None:
            return PLAIN
        return CompressedReduce("powersgd", rank=self.rank, matrices=self.matrices)


ROWS = (
    Row("Muon"),
    *(Row("Muon", rank) for rank in (4, 16, 32)),
    *(Row("Muon", rank, BLOCKS) for rank in (4, 16, 32)),
    Row("AdamW"),
    *(Row("AdamW", rank) for rank in (4, 32)),
    Row("AdamW", 32, BLOCKS),
)


def cells(request: Request) -> list[Measurement]:
    """A run for each row."""
    runs = []
    for row in ROWS:
        settings = settings_of(SEED, methods=(row.method,))
        if (chosen := OPTIMIZERS[row.optimizer]) is not None:
            settings = dataclasses.replace(settings, optimizer=chosen)
        mesh = f"data={TRAINED_ON}"
        runs.append(trained(row.name, settings, mesh, request, "compression-ranks"))
    return runs


def render(results: Results) -> list[str]:
    """Returns the table: a line a row."""
    rows, shapes = [], shapes_of_runs()
    whole = PLAIN.reduce().bytes_sent(shapes, TRAINED_ON)
    for row in ROWS:
        plain = results.column(Row(row.optimizer).name, "loss")
        found = results.column(row.name, "loss")
        if not found or not plain:
            continue
        part = row.method.reduce().bytes_sent(shapes, TRAINED_ON) / whole
        off = "-" if row.rank is None else f"{found[0] / plain[0] - 1:+.2%}"
        rows.append([row.name, f"{part:.1%}", f"{found[0]:.4f}", off])
    if not rows:
        return []
    return [
        f"{STEPS} steps on {TRAINED_ON} workers, seed {SEED}, which no other table has; bytes are "
        "those of a float32 all-reduce. Blocks alone: embedding and head are summed as they are.",
        "",
        *grid(["optimizer, PowerSGD", "bytes", "loss", "off uncompressed"], rows, "lrrr"),
    ]


TABLE = Table("compression-ranks", "PowerSGD by rank, matrices and optimizer", cells, render)
