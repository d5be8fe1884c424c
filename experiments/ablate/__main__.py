"""Compares methods in tables: runs the cells that are missing, then writes what all of them say.

    python -m experiments.ablate compress --tables quantize
    python -m experiments.ablate optimizers --rows muon adamw

    python -m experiments.ablate transfer --labelled reviews.csv --columns text=review label=stars

Finished cells are kept in experiments/results/TOPIC-BACKEND.json and do not run again; Markdown and
pictures beside it are made from it alone. Own files have a report of their own, named after them;
so has other data behind --sst2, --shakespeare, --squad and --multi30k of transfer.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.ablate import compress, optimizers, rates, transfer, transfer_own
from experiments.ablate.transfer_sst2 import task_of as sst2_task
from experiments.cli import named_pairs, run_main
from experiments.compilation import use_compilation_cache
from experiments.tables.command import check_seeds, folder_of_runs, run_tables, tables_named
from experiments.tables.table import Request, Table
from train.tasks.rows import RowFormat
from train.tasks.task import TaskFiles
from train.tasks.translation import Translation

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
      labelled: own files for a classification of any labels, in place of SST-2: one FILE, divided
        by a hash of its rows, or train=FILE valid=FILE test=FILE; .tsv, .csv, .jsonl, or any text
        with --separator.
      parallel: own files for a translation, in place of Multi30k: the same, or SOURCE,TARGET in
        place of FILE, two files of aligned lines, plain or .gz.
      columns: of own files, NAME=COLUMN where a column is called otherwise than text, label,
        source or target.
      separator: of their columns; by default a tab in .tsv, a comma in .csv.
      column_names: of their columns in order, where the first line does not name them.
      bad_rows: "stop" at a row of them that does not parse, or "skip" it and count.
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
    labelled: tuple[str, ...] = ()
    parallel: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    separator: str | None = None
    column_names: tuple[str, ...] = ()
    bad_rows: Literal["stop", "skip"] = "stop"
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
    labelled, parallel = own_files(command)
    tables, name = TOPICS[command.topic], command.topic
    line = f"python -m experiments.ablate {command.topic}"
    if own := labelled or parallel:
        tables = transfer_own.LABELLED if labelled else transfer_own.PARALLEL
        name += f"-{transfer_own.name_of(own)}"
        line = _again(command)
    check_seeds(command.seeds)
    request = Request(
        folder_of_runs(command.out, "runs/ablate", command.fresh) / "cells",
        command.seeds,
        command.stories,
        command.rows,
        command.sst2,
        command.shakespeare,
        command.squad,
        command.multi30k,
        labelled,
        parallel,
    )
    if command.topic == "transfer" and (other := transfer_own.other_data(request)):
        tables = tuple(table for table in tables if table.cells(request))
        name += f"-{other}"
        line = _again(command)
    chosen = tables_named(command.tables, tables)
    path = command.results / f"{name}-{jax.default_backend()}.json"
    return run_tables(
        command.topic,
        tables,
        chosen,
        request,
        path,
        command=line,
        fresh=command.fresh,
        max_minutes=command.max_minutes,
    )


def own_files(command: Ablate) -> tuple[TaskFiles | None, TaskFiles | None]:
    """Returns the user's files for a classification, and those for a translation, with hashes.

    Raises:
      ValueError: both, or beside files of the tables that there are; no such file.
    """
    form = RowFormat(
        named_pairs("columns", command.columns),
        command.separator,
        command.column_names,
        command.bad_rows,
    )
    if not command.labelled and not command.parallel:
        if form != RowFormat():
            raise ValueError(
                "columns, separator, column_names and bad_rows are for own files; give --labelled "
                "or --parallel too"
            )
        return None, None
    given = ("labelled", "parallel", "sst2", "squad", "multi30k", "stories")
    flags = [f"--{flag}" for flag in given if getattr(command, flag)]
    if command.topic != "transfer" or len(flags) > 1:
        raise ValueError(
            f"{command.topic} {' '.join(flags)}: a report on own files is one of transfer, on "
            "--labelled or on --parallel, without other data"
        )
    files = transfer_own.files_named(command.labelled or command.parallel, form)
    if command.labelled:
        return sst2_task(files).files, None
    return None, Translation(files=files).resolve().files


def _again(command: Ablate) -> str:
    """Returns the command line that a report on own files, or on other data, names."""
    words = ["python", "-m", "experiments.ablate", command.topic]
    for flag in ("stories", "sst2", "shakespeare", "squad", "multi30k"):
        if (path := getattr(command, flag)) is not None:
            words += [f"--{flag}", str(path)]
    for flag in ("labelled", "parallel", "columns", "separator", "column_names"):
        value = getattr(command, flag)
        values = [value] if isinstance(value, str) else list(value or ())
        words += [f"--{flag.replace('_', '-')}", *values] if values else []
    words += ["--bad-rows", command.bad_rows] if command.bad_rows != "stop" else []
    return shlex.join(words)


def main() -> None:
    """Parses the command line, runs, writes."""
    import tyro

    command = tyro.cli(Ablate, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))
    use_compilation_cache()
    run_command(command)


if __name__ == "__main__":
    run_main(main)
