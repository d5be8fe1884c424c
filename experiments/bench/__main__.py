"""Speed of training step, generation and data against the usual tools, side by side.

    python -m experiments.bench --only train-3m decode

One process per side, asked in turn; every figure is a ratio of the same minutes, with its spread.
Each table takes one to three minutes on two cores (train-124m and growth take longer). What has
been measured stays in `--folder`, so that a command that was stopped goes on; `--fresh` measures
the tables again that it names. Have the machine to yourself. Tables: train-3m, train-12m,
train-124m, decode, tokenise, data, start, growth. Writes bench-cpu.json, bench-cpu.md and a picture
of the growth. On a machine with a GPU:

    JAX_PLATFORMS=cpu python -m experiments.bench --only train-124m-cuda --name bench-gpu
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.bench.decode import decode_table
from experiments.bench.growth import growth_table
from experiments.bench.start import start_table, wait_table
from experiments.bench.table import Table
from experiments.bench.tokenise import tokenise_table
from experiments.bench.train_step import train_table
from experiments.cli import run_main
from experiments.grid import Measured, read_measured, run_measurements
from experiments.run import write_json

TABLES: dict[str, Callable[[], Table]] = {
    "train-3m": lambda: train_table("3m"),
    "train-12m": lambda: train_table("12m"),
    "train-124m": lambda: train_table("124m"),
    "train-124m-cuda": lambda: train_table("124m-cuda"),
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
      fresh: measure them again.
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


ONLY_NAMED = ("train-124m-cuda",)  # needs a GPU


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


def report(found: Mapping[str, tuple[Table, Sequence[Measured]]]) -> str:
    """Returns all tables that have been measured as Markdown, those of one heading as one."""
    together: dict[str, tuple[Table, list[Measured]]] = {}
    for table, results in found.values():
        together.setdefault(table.title, (table, []))[1].extend(results)
    parts = ["# Measured side by side"]
    for title, (table, results) in together.items():
        if results:
            parts += [f"## {title}", table.text(results)]
    machines = {str(m.machine): m.machine for _, results in found.values() for m in results}
    for facts in machines.values():
        lines = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
        parts.append(f"| machine | |\n|---|---|\n{lines}".rstrip())
    parts.append("Made by `python -m experiments.bench`.")
    return "\n\n".join(parts)


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
        if table.picture is not None and results:
            file = f"{name}-{which}.png"
            table.picture(results, out / file)
            text += f"\n\n![{table.title}]({file})"
    (out / f"{name}.md").write_text(text + "\n")
    return text


def main() -> None:
    """Measures what is missing, writes and prints."""
    import tyro

    command = tyro.cli(Bench, description=__doc__)
    tables = {name: make() for name, make in TABLES.items()}
    for name in chosen(command.only, tables):
        if command.fresh:
            for measurement in tables[name].measurements:
                (command.folder / f"{measurement.key}.json").unlink(missing_ok=True)
        print(f"{name}: {len(tables[name].measurements)} to measure", flush=True)
        run_measurements(tables[name].measurements, command.folder, max_minutes=command.max_minutes)
    found = {name: (table, found_of(table, command.folder)) for name, table in tables.items()}
    print("\n" + write(found, command.out, command.name))


if __name__ == "__main__":
    run_main(main)
