"""The runs that tables about losses are made of: one small size, cells on meshes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.grid import Cell, Measurement, run_cells
from experiments.recipes import DEMO, recommended
from experiments.runs.execute import Execution
from experiments.tables.table import Request
from train.loop import LoopSettings
from train.settings import Settings

STEPS = 500
# The demo's size and recipe. Two layers on bytes under AdamW ended anywhere from 1.83 to 2.06 by
# the seed alone, with steps as few as these: no form can be told from another there.
SIZE = DEMO
VOCABULARY = 2048  # of its tokenizer
LOOP = LoopSettings(log_every=50, evaluate_every=STEPS)


def settings_of(seed: int, **changes: Any) -> Settings:
    """Returns the settings of a run, other fields changed as given."""
    settings = recommended(SIZE, STEPS, seed)
    (phase,) = settings.phases
    model = dataclasses.replace(phase.model, vocabulary_size=VOCABULARY)
    phases = (dataclasses.replace(phase, model=model),)
    return dataclasses.replace(settings, phases=phases, **changes)


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
