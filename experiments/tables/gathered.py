"""The finished cells of a topic, as one JSON holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.grid import Cell, Measurement, without_folders
from train.settings import to_json

Item = Cell | Measurement
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """The finished cells of one table.

    Attributes:
      by_name: name -> seed -> values, in the order of the table.
    """

    by_name: Mapping[str, Mapping[int, Values]] = field(default_factory=dict)

    def column(self, name: str, value: str, seeds: Sequence[int] | None = None) -> list[float]:
        """Returns one figure of a row for its seeds in order, or for those named.

        >>> found = Results({"a": {0: {"loss": 2.0}, 1: {"loss": "nan"}}})
        >>> found.column("a", "loss"), found.column("b", "loss")
        ([2.0, nan], [])
        """
        row = self.by_name.get(name, {})
        return [float(row[seed][value]) for seed in (sorted(row) if seeds is None else seeds)]

    def shared(self, *names: str) -> list[int]:
        """Returns the seeds that all these rows have, to be compared in pairs.

        >>> Results({"a": {0: {}, 1: {}}, "b": {1: {}}}).shared("a", "b")
        [1]
        """
        rows = [set(self.by_name.get(name, {})) for name in names]
        return sorted(set.intersection(*rows)) if rows else []

    def pair(self, first: str, second: str, value: str) -> tuple[list[float], list[float]]:
        """Returns one figure of two rows, for the seeds that both have."""
        seeds = self.shared(first, second)
        return self.column(first, value, seeds), self.column(second, value, seeds)


def seed_of(item: Item) -> int:
    """Returns the seed of a cell or measurement, 0 where it has none."""
    if isinstance(item, Cell):
        return item.settings.seed
    return int(item.settings.get("seed", 0))


class Gathered:
    """The finished cells of a topic, as its JSON holds them.

    Attributes:
      index: table -> name -> seed (text, as JSON has it) -> key.
      cells: key -> {"values", "machine"}.
      machines: name -> facts of a machine.
      settings: key -> settings in full, of the runs that results come from.
    """

    def __init__(self, content: Mapping[str, Any]):
        self.index: dict[str, dict[str, dict[str, str]]] = dict(content.get("tables", {}))
        self.cells: dict[str, dict[str, Any]] = dict(content.get("cells", {}))
        self.machines: dict[str, dict[str, Any]] = dict(content.get("machines", {}))
        self.settings: dict[str, dict[str, Any]] = dict(content.get("settings", {}))

    def has(self, item: Item) -> bool:
        """Whether the result of a cell is there, and was made with the settings of today.

        A key leaves out what is at its default: that a default has changed shows here.
        """
        runs = {cell.key: in_full(cell) for cell in runs_of(item)}
        same = (agree(self.settings.get(key, {}), now) for key, now in runs.items())
        return item.key in self.cells and all(same)

    def add(self, item: Item, values: Values, facts: Mapping[str, Any]) -> None:
        """Takes in what a cell gave, and on which machine."""
        self.settings |= {cell.key: in_full(cell) for cell in runs_of(item)}
        known = [name for name, other in self.machines.items() if other == facts]
        name = known[0] if known else f"machine {len(self.machines) + 1}"
        self.machines[name] = dict(facts)
        runs = [cell.key for cell in runs_of(item)]
        self.cells[item.key] = {"values": dict(values), "machine": name, "runs": runs}

    def enter(self, table: str, items: Iterable[Item]) -> None:
        """Says which cells a table consists of; rows that were not asked for stay.

        Raises:
          ValueError: two cells of one name and seed.
        """
        rows: dict[str, dict[str, str]] = {}
        for item in items:
            seeds = rows.setdefault(item.name, {})
            seed = str(seed_of(item))
            if seeds.setdefault(seed, item.key) != item.key:
                raise ValueError(f"the table {table} has two cells {item.name!r} of seed {seed}")
        old = self.index.get(table, {})
        names = [*rows, *(name for name in old if name not in rows)]
        self.index[table] = {name: old.get(name, {}) | rows.get(name, {}) for name in names}

    def results(self, table: str) -> Results:
        """Returns the finished cells of a table."""
        return Results(
            {
                name: {
                    int(seed): self.cells[key]["values"]
                    for seed, key in seeds.items()
                    if key in self.cells
                }
                for name, seeds in self.index.get(table, {}).items()
            }
        )

    def missing(self, table: str) -> list[str]:
        """Returns a text for each row of a table that is not complete."""
        lines = []
        for name, seeds in self.index.get(table, {}).items():
            if left := [seed for seed, key in seeds.items() if key not in self.cells]:
                lines.append(f"{name} (seed {', '.join(left)})")
        return lines

    def content(self) -> dict[str, Any]:
        """Returns what the JSON shall hold: cells that no table has any more are left out."""
        used = {
            k for rows in self.index.values() for seeds in rows.values() for k in seeds.values()
        }
        cells = {key: cell for key, cell in self.cells.items() if key in used}
        named = {cell["machine"] for cell in cells.values()}
        runs = {key for cell in cells.values() for key in cell["runs"]}
        return {
            "machines": {name: facts for name, facts in self.machines.items() if name in named},
            "tables": self.index,
            "cells": cells,
            "settings": {key: made for key, made in self.settings.items() if key in runs},
        }


def runs_of(item: Item) -> Iterator[Cell]:
    """Yields the training runs that a result comes from, its own first."""
    if isinstance(item, Cell):
        yield item
    for needed in item.needs:
        yield from runs_of(needed)


def in_full(cell: Cell) -> dict[str, Any]:
    """Returns all settings of a cell as JSON values, defaults included."""
    made = {"settings": to_json(cell.settings), "loop": dataclasses.asdict(cell.loop)}
    return without_folders(made)


def agree(old: Any, new: Any) -> bool:
    """Whether no setting that both have has changed.

    >>> agree({"steps": 3, "gone": 1}, {"steps": 3, "added": 2}), agree({"steps": 3}, {"steps": 4})
    (True, False)
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return all(agree(old[name], new[name]) for name in old.keys() & new.keys())
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(agree, old, new))
    return old == new
