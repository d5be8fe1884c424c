"""What commands share that make tables: which are meant, where runs lie, running and writing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from experiments.tables.report import read, write_data, write_report
from experiments.tables.table import Request, Table, complete


def tables_named(names: Sequence[str], tables: Sequence[Table]) -> list[Table]:
    """Returns the tables of these names in their own order; all of them for none.

    Raises:
      ValueError: a name that there is not.
    """
    known = [table.name for table in tables]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no table is called {unknown[0]!r}; there are {', '.join(known)}")
    return [table for table in tables if not names or table.name in names]


def check_seeds(seeds: int) -> None:
    """Raises ValueError for a number of seeds that is none."""
    if seeds < 1:
        raise ValueError(f"{seeds} seeds are none; give at least 1")


def folder_of_runs(out: Path | None, default: str, fresh: bool) -> Path:
    """Returns where runs lie: `out`, or the default, or beside it a new folder to begin anew in.

    >>> folder_of_runs(None, "runs/scale", fresh=False)
    PosixPath('runs/scale')
    """
    if out is not None or not fresh:
        return out or Path(default)
    anew = Path(f"{default}-{time.strftime('%Y%m%d-%H%M%S')}")
    print(f"runs anew in {anew}; to go on with it later: --fresh --out {anew}")
    return anew


def run_tables(
    topic: str,
    tables: Sequence[Table],
    chosen: Sequence[Table],
    request: Request,
    path: Path,
    *,
    command: str,
    legend: str | None = None,
    fresh: bool = False,
    max_minutes: float | None = None,
) -> list[Path]:
    """Runs what is missing, writes after every cell, and the report in the end, come what may.

    Args:
      topic: heading of the report.
      tables: of the report, all of them.
      chosen: those that are run.
      request: from the command line.
      path: of the JSON; Markdown and pictures lie beside it.
      command: line that the report names.
      legend: what holds for all figures, where it is not means over seeds.
      fresh: forgets earlier results of the chosen tables.
      max_minutes: no further cell is begun after so long.

    Returns:
      The files written.

    Raises:
      KeyboardInterrupt: a cell was stopped; the same command goes on from there.
      ValueError: as of `experiments.tables.table.complete`.
    """
    gathered = read(path)
    if fresh:
        for item in (item for table in chosen for item in table.cells(request)):
            gathered.cells.pop(item.key, None)
    written = [path]
    try:
        complete(
            chosen,
            request,
            gathered,
            max_minutes=max_minutes,
            save=lambda: write_data(path, gathered),
        )
    finally:
        write_data(path, gathered)
        written += write_report(
            path, topic, tables, request, gathered, command=command, legend=legend
        )
        print(f"written: {', '.join(map(str, written))}")
    return written
