"""An experiment is a list of cells; each is a resumable run with a result of its own.

A cell's folder is named by the hash of its settings, so a command runs only what is missing, goes
on where it was stopped, and tables and pictures are made from the results alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.execute import Execution, execute
from train.loop import LoopSettings
from train.records import Row, read_rows
from train.settings import Settings, fingerprint

ENDS = ("finished", "target", "nonfinite")  # not "signal": that cell goes on


@dataclass(frozen=True)
class Cell:
    """One run of an experiment.

    Attributes:
      name: of the row that it belongs to; seeds share it.
      settings: what it is, seed included.
      loop: what it is stopped and measured by; part of its hash, since a target is part of the
        result.
    """

    name: str
    settings: Settings
    loop: LoopSettings = field(default_factory=LoopSettings)

    @property
    def key(self) -> str:
        """Hash of settings and loop."""
        return fingerprint(self.settings, dataclasses.asdict(self.loop))


@dataclass(frozen=True)
class Result:
    """What a cell gave.

    Attributes:
      cell: which.
      folder: of its run.
      reason: how it ended.
      step: its last step.
      seconds: wall-clock seconds by kind.
      evaluations: rows of the record, with step, loss and seconds.
    """

    cell: Cell
    folder: Path
    reason: str
    step: int
    seconds: dict[str, float]
    evaluations: list[Row]

    @property
    def loss(self) -> float:
        """The last validation loss; NaN if the run diverged before its first evaluation."""
        return float(self.evaluations[-1]["loss"]) if self.evaluations else math.nan


def read_result(cell: Cell, folder: Path) -> Result | None:
    """Returns the result of a cell under `folder`, or None if it has not ended."""
    run = folder / cell.key
    path = run / "result.json"
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text())
    if content["reason"] not in ENDS:
        return None
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "evaluation"]
    return Result(cell, run, content["reason"], content["step"], content["seconds"], rows)


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    *,
    execution: Execution | None = None,
    max_minutes: float | None = None,
) -> list[Result]:
    """Runs the cells that are missing and returns all results there are, in order.

    Args:
      cells: what the experiment consists of.
      folder: holds a run per cell.
      execution: how; its loop is the cell's.
      max_minutes: no further cell is started after so long.

    Raises:
      KeyboardInterrupt: a cell was stopped by a signal; the same command goes on from there.
    """
    start, results = time.monotonic(), []
    for cell in cells:
        result = read_result(cell, folder)
        spent = (time.monotonic() - start) / 60
        if result is None and (max_minutes is None or spent < max_minutes):
            how = dataclasses.replace(execution or Execution(), loop=cell.loop)
            outcome = execute(cell.settings, folder / cell.key, how)
            if outcome.reason == "signal":
                raise KeyboardInterrupt(
                    f"{cell.name} is saved at step {int(outcome.state.step)}; "
                    "the same command goes on from there"
                )
            result = read_result(cell, folder)
        if result is not None:
            results.append(result)
    return results
