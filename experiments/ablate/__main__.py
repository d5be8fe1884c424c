"""Compares methods in tables: runs the cells that are missing, then writes what all of them say.

    python -m experiments.ablate compress --tables quantize
    python -m experiments.ablate optimizers --rows muon adamw

Finished cells are kept in experiments/results/TOPIC-BACKEND.json and do not run again; Markdown and
pictures beside it are made from it alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from experiments.ablate import compress, optimizers, rates, transfer
from experiments.ablate.gathered import Gathered
from experiments.ablate.report import read, write_data, write_report
from experiments.ablate.tables import Request, Table, complete
from experiments.cli import run_main
from experiments.compilation import use_compilation_cache

TOPICS: dict[str, tuple[Table, ...]] = {
    "compress": compress.TABLES,
    "optimizers": optimizers.TABLES,
    "rates": rates.TABLES,
    "transfer": transfer.TABLES,
}
"""The tables of each topic."""


@dataclass(frozen=True)
class Ablate:
    """What to compare.

    Attributes:
      topic: whose tables.
      tables: which of them; all by default.
      rows: which of their rows; all by default.
      seeds: how many, from 0.
      max_minutes: begin no further cell after so long.
      fresh: forget earlier results and run everything again, in a new folder; with --out, go on in
        that one.
      stories: folder with stories260K.bin and tok512.bin, a foreign model (karpathy/tinyllamas);
        rows for it are left out otherwise.
      sst2: folder with stsa.binary.train, .dev and .test (lines of label and sentence); tables of
        it are left out otherwise.
      shakespeare: tinyshakespeare.txt, part of what language models are trained on there.
      squad: a file of SQuAD 1.1 (.json, .json.gz or .zip), split by article; its table is left out
        otherwise.
      multi30k: folder with train, val and test_2016_flickr, each .en.gz and .de.gz; its table is
        left out otherwise.
      out: where runs and measurements lie; runs/ablate by default.
      results: where the topic's JSON, Markdown and pictures lie.
    """

    topic: str
    tables: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    seeds: int = 3
    max_minutes: float | None = None
    fresh: bool = False
    stories: Path | None = None
    sst2: Path | None = None
    shakespeare: Path | None = None
    squad: Path | None = None
    multi30k: Path | None = None
    out: Path | None = None
    results: Path = Path(__file__).parent.parent / "results"


def run_command(command: Ablate) -> list[Path]:
    """Runs what is missing and returns the files written.

    Raises:
      ValueError: a topic or table that there is not; no seed.
    """
    import jax

    if command.topic not in TOPICS:
        raise ValueError(f"no topic is called {command.topic!r}; there are {', '.join(TOPICS)}")
    tables = TOPICS[command.topic]
    names = [table.name for table in tables]
    if unknown := [name for name in command.tables if name not in names]:
        raise ValueError(f"no table is called {unknown[0]!r}; there are {', '.join(names)}")
    if command.seeds < 1:
        raise ValueError(f"{command.seeds} seeds are none; give at least 1")
    out = command.out or Path("runs/ablate")
    if command.fresh and command.out is None:
        out = Path(f"runs/ablate-{time.strftime('%Y%m%d-%H%M%S')}")
        print(f"runs anew in {out}; to go on with it later: --fresh --out {out}")
    request = Request(
        out / "cells",
        command.seeds,
        command.stories,
        command.rows,
        command.sst2,
        command.shakespeare,
        command.squad,
        command.multi30k,
    )
    path = command.results / f"{command.topic}-{jax.default_backend()}.json"
    gathered = read(path)
    chosen = [table for table in tables if not command.tables or table.name in command.tables]
    if command.fresh:
        _forget(gathered, chosen, request)
    try:
        complete(
            chosen,
            request,
            gathered,
            max_minutes=command.max_minutes,
            save=lambda: write_data(path, gathered),
        )
    finally:
        write_data(path, gathered)
        written = [path, *write_report(path, command.topic, tables, request, gathered)]
        print(f"written: {', '.join(map(str, written))}")
    return written


def _forget(gathered: Gathered, tables: list[Table], request: Request) -> None:
    for table in tables:
        for item in table.cells(request):
            gathered.cells.pop(item.key, None)


def main() -> None:
    """Parses the command line, runs, writes."""
    import tyro

    command = tyro.cli(Ablate, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))
    use_compilation_cache()
    run_command(command)


if __name__ == "__main__":
    run_main(main)
