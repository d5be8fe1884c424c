"""Speed of training step, generation and data against the usual tools, side by side.

    python -m experiments.bench --only train-3m decode

One process per side, asked in turn; every figure is a ratio of the same minutes, with its spread.
Each table takes one to three minutes on two cores (train-124m and growth take longer). What has
been measured stays in `--folder`, so that a command that was stopped goes on; `--fresh` measures
the tables again that it names, and goes on in the same way. What fails is named at the end and in
its table, and the rest goes on; the same command without `--fresh` tries it again. Have the machine
to yourself. Tables: train-3m, train-12m, train-124m, decode, tokenise, data, start, growth. Writes
bench-cpu.json, bench-cpu.md and a picture of the growth. On a machine with a GPU, some eight
minutes, most of them compilation:

    JAX_PLATFORMS=cpu python -m experiments.bench --name bench-gpu --only \
        gpu-ceilings train-124m-cuda gpu-forms gpu-products gpu-decode
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.bench.alone import FAILED, attempt, together
from experiments.bench.anew import begin_anew, end_if_whole
from experiments.bench.decode import decode_table, gpu_decode_table
from experiments.bench.gpu_forms import forms_table
from experiments.bench.gpu_products import ceilings_table, products_table
from experiments.bench.gpu_train import gpu_train_table
from experiments.bench.growth import growth_table
from experiments.bench.start import start_table, wait_table
from experiments.bench.table import Table
from experiments.bench.tokenise import tokenise_table
from experiments.bench.train_step import train_table
from experiments.busy import warn_if_busy
from experiments.cli import run_main
from experiments.grid import Measured, Measurement, read_measured, run_measurements
from experiments.json_files import write_json

TABLES: dict[str, Callable[[], Table]] = {
    "train-3m": lambda: train_table("3m"),
    "train-12m": lambda: train_table("12m"),
    "train-124m": lambda: train_table("124m"),
    "gpu-ceilings": ceilings_table,
    "train-124m-cuda": gpu_train_table,
    "gpu-forms": forms_table,
    "gpu-products": products_table,
    "gpu-decode": gpu_decode_table,
    "decode": decode_table,
    "tokenise": tokenise_table,
    "data": wait_table,
    "start": start_table,
    "growth": growth_table,
}


@dataclass(frozen=True)
class Bench:
    """Settings of the bench.

    Attributes:
      only: tables to measure; by default all.
      fresh: measure them again; go on with that if it was stopped.
      folder: holds a file per measurement.
      out: folder of the results.
      name: of the result files.
      max_minutes: begin no further measurement after so long.
    """

    only: tuple[str, ...] = ()
    fresh: bool = False
    folder: Path = Path("runs/bench")
    out: Path = Path("experiments/results")
    name: str = "bench-cpu"
    max_minutes: float | None = None


COMPILED = 8  # processes at a time; each keeps the device memory that it tuned products with
# These need a GPU.
ONLY_NAMED = ("gpu-ceilings", "train-124m-cuda", "gpu-forms", "gpu-products", "gpu-decode")


def chosen(only: Sequence[str], tables: Mapping[str, Any]) -> list[str]:
    """Returns the tables to measure, in their order.

    Raises:
      ValueError: a name that there is not.

    >>> chosen(["decode", "train-3m"], TABLES)
    ['train-3m', 'decode']
    """
    if unknown := sorted(set(only) - set(tables)):
        raise ValueError(f"no table is called {', '.join(unknown)}; there are {', '.join(tables)}")
    return [name for name in tables if (name in only if only else name not in ONLY_NAMED)]


def found_of(table: Table, folder: Path) -> list[Measured]:
    """Returns what of a table has been measured."""
    found = (read_measured(measurement, folder) for measurement in table.measurements)
    return [measured for measured in found if measured is not None]


def missing_of(table: Table, folder: Path) -> list[Measurement]:
    """Returns what of a table has not been measured; what failed is forgotten."""
    for measured in found_of(table, folder):
        if FAILED in measured.values:
            (folder / f"{measured.measurement.key}.json").unlink()
    return [m for m in table.measurements if read_measured(m, folder) is None]


def measure(table: Table, folder: Path, end: float | None) -> None:
    """Measures what is missing of a table, as many at a time as it says; what fails is kept so.

    Args:
      table: which.
      folder: holds a file per measurement.
      end: on the monotonic clock; begin nothing after it.
    """

    def measuring(measurement: Measurement) -> Callable[[], Any]:
        guarded = dataclasses.replace(measurement, function=attempt(measurement.function))

        def run() -> None:
            left = None if end is None else max(0.0, end - time.monotonic()) / 60
            if measured := run_measurements([guarded], folder, max_minutes=left):
                reason = measured[0].values.get(FAILED)
                said = "measured" if reason is None else f"failed: {str(reason).strip()[-300:]}"
                print(f"{measurement.name}: {said}", flush=True)

        return run

    together([measuring(m) for m in missing_of(table, folder)], table.together)


def prepare(tables: Sequence[Table], folder: Path, stage: int) -> None:
    """Does what tables want done in a stage before they are measured."""
    jobs = [
        job.run
        for table in tables
        if table.prepare is not None and (missing := missing_of(table, folder))
        for job in table.prepare(missing)
        if job.stage == stage
    ]
    begin = time.monotonic()
    together(jobs, COMPILED)
    if jobs:
        print(f"prepared {len(jobs)} in {time.monotonic() - begin:.0f} s", flush=True)


def found_in(
    tables: Mapping[str, Table], folder: Path
) -> dict[str, tuple[Table, Sequence[Measured]]]:
    """Returns every table with what of it has been measured."""
    return {name: (table, found_of(table, folder)) for name, table in tables.items()}


def report(found: Mapping[str, tuple[Table, Sequence[Measured]]]) -> str:
    """Returns all tables that have been measured as Markdown, those of one heading as one.

    A table shows what was measured; below it stands what failed.
    """
    together: dict[str, tuple[Table, list[Measured]]] = {}
    for table, results in found.values():
        together.setdefault(table.title, (table, []))[1].extend(results)
    parts = ["# Measured side by side"]
    for title, (table, results) in together.items():
        if results:
            good = [m for m in results if FAILED not in m.values]
            parts += [f"## {title}", *([table.text(good)] if good else []), *failures_of(results)]
    machines = {str(m.machine): m.machine for _, results in found.values() for m in results}
    for facts in machines.values():
        lines = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
        parts.append(f"| machine | |\n|---|---|\n{lines}".rstrip())
    parts.append("Made by `python -m experiments.bench`.")
    return "\n\n".join(parts)


def failures_of(results: Sequence[Measured]) -> list[str]:
    """Returns a line for each measurement that failed."""
    return [
        f"Failed: {m.measurement.name}: `{m.values[FAILED].strip().splitlines()[-1][:300]}`"
        for m in results
        if FAILED in m.values
    ]


def write(found: Mapping[str, tuple[Table, Sequence[Measured]]], out: Path, name: str) -> str:
    """Writes JSON, Markdown and pictures of what has been measured; returns the Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    content = {
        which: [
            {
                "settings": dict(m.measurement.settings),
                "values": m.values,
                "seconds": m.seconds,
                "machine": m.machine,
            }
            for m in results
        ]
        for which, (_, results) in found.items()
        if results
    }
    write_json(out / f"{name}.json", content)
    text = report(found)
    for which, (table, results) in found.items():
        good = [m for m in results if FAILED not in m.values]
        if table.picture is not None and good:
            file = f"{name}-{which}.png"
            table.picture(good, out / file)
            text += f"\n\n![{table.title}]({file})"
    (out / f"{name}.md").write_text(text + "\n")
    return text


def main() -> None:
    """Measures what is missing, writes and prints.

    Raises:
      ValueError: no such table; or, once all others have been measured, what failed.
    """
    import tyro

    command = tyro.cli(Bench, description=__doc__)
    minutes = command.max_minutes
    end = None if minutes is None else time.monotonic() + 60 * minutes
    tables = {name: make() for name, make in TABLES.items()}
    named = [tables[name] for name in chosen(command.only, tables)]
    if command.fresh:
        begin_anew([m.key for table in named for m in table.measurements], command.folder)
    warn_if_busy()
    prepare(named, command.folder, stage=0)
    for table in named:
        prepare([table], command.folder, stage=1)
        print(f"{table.title}: {len(missing_of(table, command.folder))} to measure", flush=True)
        measure(table, command.folder, end)
        write(found_in(tables, command.folder), command.out, command.name)
    end_if_whole({m.key for t in tables.values() for m in t.measurements}, command.folder)
    print("\n" + write(found_in(tables, command.folder), command.out, command.name))
    if failed := [line for table in named for line in failures_of(found_of(table, command.folder))]:
        raise ValueError("; ".join(failed) + "; without --fresh the same command tries again")


if __name__ == "__main__":
    run_main(main)
