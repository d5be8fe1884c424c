"""Several processes against one: the same training whichever way four devices are divided.

What runs is `experiments.scale.process_runs`, which starts real processes of the training command.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.grid import Measurement
from experiments.scale import process_runs
from experiments.tables.markdown import grid
from experiments.tables.table import Request, Results, Table

NAME = "processes"


def cells(request: Request) -> list[Measurement]:
    """All launches as one measurement: they compare with each other."""
    settings = {"table": NAME, "steps": process_runs.STEPS}
    settings["layouts"] = [list(layout) for layout in process_runs.LAYOUTS]
    return [Measurement(NAME, settings, functools.partial(measure, request.cells))]


def measure(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Launches everything."""
    return {"rows": process_runs.table(folder / NAME)}


def render(results: Results) -> list[str]:
    """Returns the table: a row a fact."""
    rows = []
    for seeds in results.by_name.values():
        for values in seeds.values():
            for row in values["rows"]:
                off = row["difference"]
                rows.append(
                    [
                        row["case"],
                        ", ".join(map(str, row["exits"])),
                        str(row["saved"]),
                        row["against"],
                        str(row["losses"]),
                        "the same bits" if off == 0 else f"{off:.1e}",
                    ]
                )
    head = ["processes x devices", "exit", "saved at step", "against", "losses", "difference"]
    return [
        "The largest relative difference of any loss. Several processes add around a ring (gloo), "
        "the devices of one process in their own order: so losses of several processes are the "
        "same bits among themselves where they add in the same order, and equal to those of one "
        "process up to rounding. 143 is the status of a process that SIGTERM has ended, after it "
        "has saved.",
        "",
        *grid(head, rows, "lrrlrr"),
    ]


TABLE = Table(NAME, "Processes: one, several, and a run that moves", cells, render)
