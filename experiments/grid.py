"""An experiment is a list of cells; each is a resumable run with a result of its own.

A cell's folder is named by the hash of its settings, so a command runs only what is missing, goes
on where it was stopped, and tables and pictures are made from the results alone.

What is measured on finished runs is a `Measurement`: a function of JSON settings whose result is
kept under their hash, too.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.json_files import read_json, write_json
from experiments.machine import machine
from experiments.runs.execute import Execution, execute
from train.loop import LoopSettings
from train.records import Row, plain, read_rows
from train.settings import Settings, digest, essential

# Of cells; of a source in a mixture, its weight counts as well.
_IN_A_FOLDER = re.compile(r"([\d.]+\*)?.*[/\\]([0-9a-f]{16}(@\d+|[/\\]tokenizer)?)")
ENDS = ("finished", "target", "patience", "nonfinite")  # not "signal": that cell goes on


@dataclass(frozen=True)
class Cell:
    """One run of an experiment.

    Attributes:
      name: of the row that it belongs to; seeds share it.
      settings: what it is, seed included.
      loop: what it is stopped and measured by; part of its hash, since a target is part of the
        result.
      needs: cells whose runs it starts from, a parent or a teacher, and measurements that write
        such a run. No part of the hash, since its settings name them.
    """

    name: str
    settings: Settings
    loop: LoopSettings = field(default_factory=LoopSettings)
    needs: tuple[Cell | Measurement, ...] = field(default=(), compare=False, repr=False)

    @property
    def key(self) -> str:
        """Hash of settings and loop, as `train.settings.fingerprint` has it.

        Another cell that they name, a parent or a teacher, counts by its key, wherever it lies.
        """
        return digest(without_folders(essential([self.settings, self.loop])))


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


@dataclass(frozen=True)
class Measurement:
    """Something to find out once, after training: an error, a size, a time.

    Attributes:
      name: of the row that it belongs to; seeds share it.
      settings: JSON values that say what it is, seed and keys of cells included; its hash is theirs
        alone.
      function: finds it out; takes the settings and returns JSON values.
      needs: cells whose runs it opens, and measurements that write such a run.
    """

    name: str
    settings: Mapping[str, Any]
    function: Callable[[Mapping[str, Any]], Mapping[str, Any]] = field(compare=False, repr=False)
    needs: tuple[Cell | Measurement, ...] = field(default=(), compare=False, repr=False)

    @property
    def key(self) -> str:
        """Hash of the settings.

        >>> Measurement("a", {"bits": 4, "seed": 0}, dict).key
        '367a9f9e1584ccdf'
        """
        return digest(dict(self.settings))


@dataclass(frozen=True)
class Measured:
    """What a measurement gave.

    Attributes:
      measurement: which.
      values: what its function returned, through JSON: numbers that are not finite are their names.
      seconds: that it took.
      machine: that it was made on.
    """

    measurement: Measurement
    values: dict[str, Any]
    seconds: float
    machine: dict[str, Any]


def read_measured(measurement: Measurement, folder: Path) -> Measured | None:
    """Returns what a measurement under `folder` gave, or None if it has not been made.

    Raises:
      ValueError: its file is damaged.
    """
    path = folder / f"{measurement.key}.json"
    if not path.exists():
        return None
    content = read_json(path)
    return Measured(measurement, content["values"], content["seconds"], content["machine"])


def run_measurements(
    measurements: Sequence[Measurement], folder: Path, *, max_minutes: float | None = None
) -> list[Measured]:
    """Makes the measurements that are missing and returns all results there are, in order.

    Args:
      measurements: what to find out.
      folder: holds a file for each.
      max_minutes: no further one is begun after so long.

    Raises:
      ValueError: a function returned what JSON cannot hold.
    """
    start, found = time.monotonic(), []
    folder.mkdir(parents=True, exist_ok=True)
    for measurement in measurements:
        result = read_measured(measurement, folder)
        begun = time.monotonic()
        if result is None and (max_minutes is None or (begun - start) / 60 < max_minutes):
            values = measurement.function(measurement.settings)
            content = {
                "name": measurement.name,
                "settings": dict(measurement.settings),
                "values": plain(dict(values)),
                "seconds": time.monotonic() - begun,
                "machine": machine(),
            }
            try:
                json.dumps(content)
            except TypeError as error:
                raise ValueError(
                    f"the measurement {measurement.name!r} returned what JSON cannot hold: {error}"
                ) from None
            write_json(folder / f"{measurement.key}.json", content)
            result = read_measured(measurement, folder)
        if result is not None:
            found.append(result)
    return found


def without_folders(values: Any) -> Any:
    """Returns JSON values with the key alone in place of the path to a cell's folder.

    >>> without_folders({"parent": "runs/cells/0123456789abcdef@300", "data": ["a/b.txt"]})
    {'parent': '0123456789abcdef@300', 'data': ['a/b.txt']}
    >>> without_folders("runs/cells/0123456789abcdef/tokenizer")
    '0123456789abcdef/tokenizer'
    >>> without_folders("9*runs/cells/0123456789abcdef")
    '9*0123456789abcdef'
    >>> without_folders({"paths": [["train", "a/b.tsv"]], "sha256": ["c3ab"]})
    {'sha256': ['c3ab']}
    """
    if isinstance(values, dict):
        kept = {name: without_folders(value) for name, value in values.items()}
        # The files of a task count by their content.
        return {n: v for n, v in kept.items() if n != "paths"} if kept.get("sha256") else kept
    if isinstance(values, list | tuple):
        return [without_folders(value) for value in values]
    if isinstance(values, str) and (found := _IN_A_FOLDER.fullmatch(values)):
        return (found[1] or "") + found[2]
    return values
