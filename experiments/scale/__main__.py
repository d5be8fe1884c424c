"""Tables of what parallelism costs and keeps, on eight virtual CPU devices.

    python -m experiments.scale
    python -m experiments.scale --tables equality memory

Finished cells are kept in experiments/results/scale-BACKEND.json and do not run again; Markdown and
pictures beside it are made from it alone. The parameter server's padded steps alone take some fifty
minutes with three seeds, on any machine; the runs under compression and DiLoCo are 48 of 500 steps.
Where there are fewer than eight devices, as on a machine with one GPU, the table `device` alone is
made.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import jax

from experiments.cli import run_main
from experiments.compilation import use_compilation_cache
from experiments.scale import (
    compression,
    compression_ranks,
    device,
    diloco,
    diloco_outer,
    equality,
    memory,
    processes,
    server,
    traffic,
)
from experiments.tables.command import check_seeds, folder_of_runs, run_tables, tables_named
from experiments.tables.table import Request, Table

DEVICES = 8
THREADS = 64  # of XLA:CPU's pools; nearly all of them wait
TABLES: tuple[Table, ...] = (
    equality.TABLE,
    memory.TABLE,
    traffic.TABLE,
    compression.TABLE,
    compression_ranks.TABLE,
    diloco_outer.TABLE,
    diloco.TABLE,
    server.TABLE,
    processes.TABLE,
    device.TABLE,
)
"""In the order of the report."""

LEGEND = (
    "Bytes and equalities are exact for this backend and its compiler, whatever the machine's "
    "load; seconds are of this machine. Losses are means over seeds with their range."
)


@dataclass(frozen=True)
class Scale:
    """What to measure.

    Attributes:
      tables: which; all by default.
      seeds: how many, from 0, of what is trained.
      max_minutes: begin no further cell after so long.
      fresh: forget earlier results of these tables and run them again, in a new folder; with --out,
        go on in that one.
      out: where runs and measurements lie; runs/scale by default.
      results: where JSON, Markdown and pictures lie.
    """

    tables: tuple[str, ...] = ()
    seeds: int = 3
    max_minutes: float | None = None
    fresh: bool = False
    out: Path | None = None
    results: Path = Path(__file__).parent.parent / "results"


def run_command(command: Scale) -> list[Path]:
    """Makes what is missing and returns the files written.

    Raises:
      ValueError: a table that there is not, or that needs more devices; no seed.
    """
    named = [table.name for table in tables_named(command.tables, TABLES)]
    check_seeds(command.seeds)
    chosen = tables_for(tuple(named), len(jax.devices()))
    out = folder_of_runs(command.out, "runs/scale", command.fresh)
    return run_tables(
        "Scale",
        TABLES,
        chosen,
        Request(out / "cells", command.seeds),
        command.results / f"scale-{jax.default_backend()}.json",
        command="python -m experiments.scale",
        legend=LEGEND,
        fresh=command.fresh,
        max_minutes=command.max_minutes,
    )


def tables_for(names: tuple[str, ...], devices: int) -> list[Table]:
    """Returns the tables that so many devices can make.

    Raises:
      ValueError: none of them.
    """
    chosen = [table for table in TABLES if table.name in names]
    if devices < DEVICES:
        chosen = [table for table in chosen if table.name == "device"]
    if not chosen:
        raise ValueError(
            f"{', '.join(names)} need {DEVICES} devices, and there are {devices}; the table "
            "'device' needs one, and JAX_PLATFORMS=cpu gives all the others virtual ones"
        )
    return chosen


def give_devices() -> None:
    """Makes the virtual devices, before any device is asked for.

    XLA:CPU runs independent collectives of one program at the same time, and each waits in a thread
    of one pool, which is made large. That is no cure: with it too a step hung whose conditional
    spoke beside other collectives (see `experiments.methods.parallel.Diloco`), devices waiting for
    each other in different ones. A program must order them by what depends on what.
    """
    os.environ.setdefault("NPROC", str(THREADS))
    jax.config.update("jax_num_cpu_devices", DEVICES)


def main() -> None:
    """Parses the command line, measures, writes."""
    import tyro

    command = tyro.cli(Scale, description=__doc__)
    give_devices()
    use_compilation_cache()
    run_command(command)


if __name__ == "__main__":
    run_main(main)
