"""The runs that tables about losses are made of: one small size, cells on meshes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.ablate.tables import Request
from experiments.execute import Execution
from experiments.grid import Cell, Measurement, run_cells
from experiments.recipes import Size
from model.presets import modern_mini
from train.loop import LoopSettings
from train.optimizers import AdamW
from train.schedules import Linear
from train.settings import Phase, Settings

STEPS = 500
SIZE = Size(("stdlib",), "bytes", 16, 64, 2, width=128, heads=4)
VOCABULARY = 257  # of bytes, with the end of a document
RATE = 3e-3
LOOP = LoopSettings(log_every=50, evaluate_every=STEPS)


def settings_of(seed: int, **changes: Any) -> Settings:
    """Returns the settings of a run, other fields changed as given."""
    model = modern_mini(
        layers=SIZE.layers, width=SIZE.width, heads=SIZE.heads, vocabulary_size=VOCABULARY
    )
    settings = Settings(
        (Phase(STEPS, model, SIZE.batch_size, SIZE.sequence_length),),
        data=SIZE.data,
        tokenizer=SIZE.tokenizer,
        seed=seed,
        optimizer=AdamW(learning_rate=RATE),
        schedule=Linear(),
    )
    return dataclasses.replace(settings, **changes)


def trained(name: str, settings: Settings, mesh: str, request: Request, table: str) -> Measurement:
    """Returns the measurement that a run on a mesh is.

    Args:
      name: of its row.
      settings: of the run, seed included.
      mesh: as on a command line; part of the hash, as workers are counted by it.
      request: says where runs lie.
      table: whose row it is.
    """
    cell = Cell(name, settings, LOOP)
    return Measurement(
        name,
        {"table": table, "cell": cell.key, "mesh": mesh, "seed": settings.seed},
        functools.partial(train, cell, mesh, request.cells),
    )


def train(cell: Cell, mesh: str, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the cell on the mesh, or goes on with it, and returns its final loss.

    Raises:
      KeyboardInterrupt: it was stopped; the same command goes on from there.
    """
    execution = Execution(mesh=mesh, keep_last=1, keep_best=0, progress=False)
    where = folder / mesh.replace("=", "").replace(",", "-")  # a cell of one key for each mesh
    (result,) = run_cells([cell], where, execution=execution)
    return {
        "reason": result.reason,
        "step": result.step,
        "loss": result.loss,
        "wall": result.seconds,
    }
