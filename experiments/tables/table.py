"""A table: which cells it needs, and how their results become Markdown and a picture.

What is finished is gathered into one JSON a topic, which is kept with the code: a cell found there
does not run again, and tables and pictures are made from it alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.attempts import Failures
from experiments.compilation import forget_programs_if_many
from experiments.grid import (
    Measurement,
    read_measured,
    read_result,
    run_cells,
    run_measurements,
)
from experiments.json_files import read_json, write_json
from experiments.machine import machine
from experiments.runs.execute import Execution
from experiments.tables.gathered import Gathered, Item, Results, seed_of
from train.tasks.task import TaskFiles


@dataclass(frozen=True)
class Request:
    """What a table may ask of the command line.

    Attributes:
      cells: folder of the runs and measurements.
      seeds: how many, from 0.
      stories: folder of the foreign model, see `model.llama2c`; None leaves its rows out.
      rows: that are run, by name, "NAME at ..." along with NAME; all if empty.
      sst2: folder of the SST-2 files, see `experiments.ablate.transfer_sst2`.
      shakespeare: file of tiny Shakespeare.
      squad: file of SQuAD, see `experiments.ablate.transfer_squad`.
      multi30k: folder of Multi30k, see `experiments.ablate.transfer_multi30k`.
      labelled: a user's files for a classification, see `experiments.ablate.transfer_own`.
      parallel: those for a translation.
    """

    cells: Path = Path("runs/ablate/cells")
    seeds: int = 3
    stories: Path | None = None
    rows: tuple[str, ...] = ()
    sst2: Path | None = None
    shakespeare: Path | None = None
    squad: Path | None = None
    multi30k: Path | None = None
    labelled: TaskFiles | None = None
    parallel: TaskFiles | None = None

    def asks_for(self, item: Item) -> bool:
        """Whether a cell is to be run: all are, unless rows are named.

        >>> Request(rows=("adam",)).asks_for(Measurement("adam at 0.1", {}, dict))
        True
        """
        return not self.rows or item.name.split(" at ")[0] in self.rows or item.name in self.rows


@dataclass(frozen=True)
class Table:
    """One section of a topic's results.

    Attributes:
      name: on the command line.
      title: of the section.
      cells: what it needs; cheap, since it is asked for with every command.
      render: Markdown lines of the section, from the results alone; may meet any of them missing.
      picture: draws a figure from the results alone, or returns None.
      notes: a line for what the request leaves out.
    """

    name: str
    title: str
    cells: Callable[[Request], Sequence[Item]]
    render: Callable[[Results], list[str]]
    picture: Callable[[Results], Any] | None = None
    notes: Callable[[Request], list[str]] = lambda request: []


def values_of(item: Item, cells: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Returns (values, machine) of a finished cell or measurement under `cells`, else None.

    Those of a run are reason, step, seconds by kind, the rows of its evaluations, and loss,
    perplexity and bits per byte at its end.
    """
    if isinstance(item, Measurement):
        measured = read_measured(item, cells)
        if measured is None:
            return None
        return {**measured.values, "seconds": measured.seconds}, measured.machine
    result = read_result(item, cells)
    if result is None:
        return None
    path = cells / item.key / "machine.json"
    last = result.evaluations[-1] if result.evaluations else {}
    values = {
        "reason": result.reason,
        "step": result.step,
        "loss": last.get("loss", "nan"),
        "bits per byte": last.get("bits_per_byte", "nan"),
        "seconds": result.seconds,
        "evaluations": [
            {name: row[name] for name in ("step", "loss", "seconds")} for row in result.evaluations
        ],
    }
    return values, read_json(path) if path.exists() else {}


def run_item(item: Item, cells: Path, console: Console) -> None:
    """Runs a cell or measurement, and before it what it needs, unless they are finished."""
    if values_of(item, cells) is not None:
        return
    for needed in item.needs:
        if values_of(needed, cells) is None:
            about = f"    first: {needed.name}, seed {seed_of(needed)}"
            console.print(about, highlight=False, markup=False)
            run_item(needed, cells, console)
    if isinstance(item, Measurement):
        with console.status(item.name):
            run_measurements([item], cells)
    else:  # draws a bar of its own
        # Of a task, what counts is the best checkpoint.
        best = 0 if item.settings.task is None else 1
        run_cells([item], cells, execution=Execution(keep_last=1, keep_best=best))
        write_json(cells / item.key / "machine.json", machine())


def complete(
    tables: Sequence[Table],
    request: Request,
    gathered: Gathered,
    *,
    max_minutes: float | None = None,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Runs what is missing of the tables, and takes in all that is finished.

    Args:
      tables: of one topic.
      request: from the command line.
      gathered: what is finished by now; changed in place.
      max_minutes: no further cell is begun after so long.
      save: called whenever a cell has ended.

    Raises:
      KeyboardInterrupt: a cell was stopped; the same command goes on from there.
      ValueError: a row was asked for that there is not; or, once all others have run, cells that
        failed.
    """
    console, start = Console(), time.monotonic()
    listed = {table.name: list(table.cells(request)) for table in tables}
    for name, items in listed.items():
        gathered.enter(name, items)
    unique = {item.key: (name, item) for name, items in listed.items() for item in items}
    for _, item in unique.values():
        if not gathered.has(item) and (found := values_of(item, request.cells)):
            gathered.add(item, *found)
    known = {item.name for _, item in unique.values()}
    groups = sorted({name.split(" at ")[0] for name in known})
    if unknown := [row for row in request.rows if row not in known and row not in groups]:
        raise ValueError(f"no row is called {unknown[0]!r}; there are {', '.join(groups)}")
    todo = [
        (name, item)
        for name, item in unique.values()
        if request.asks_for(item) and not gathered.has(item)
    ]
    console.print(f"{len(unique) - len(todo)} cells are finished, {len(todo)} run now")
    failures = Failures()
    for number, (name, item) in enumerate(todo, start=1):
        spent = (time.monotonic() - start) / 60
        if max_minutes is not None and spent >= max_minutes:
            console.print(f"{len(todo) - number + 1} cells are left after {spent:.0f} minutes")
            break
        about = f"{number}/{len(todo)}  {name}: {item.name}, seed {seed_of(item)}"
        console.print(f"{about}  ({spent:.1f} min)", highlight=False, markup=False)
        with failures.passed_over(f"{item.name}, seed {seed_of(item)}"):
            run_item(item, request.cells, console)
            found = values_of(item, request.cells)
            assert found is not None
            gathered.add(item, *found)
            save()
        forget_programs_if_many()
    failures.raise_if_any()
