"""Writes a topic's JSON, Markdown and pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.json_files import read_json, write_json, write_text
from experiments.tables.gathered import Gathered
from experiments.tables.table import Request, Table


def read(path: Path) -> Gathered:
    """Returns what a topic's JSON holds, nothing if there is none."""
    return Gathered(read_json(path) if path.exists() else {})


def write_data(path: Path, gathered: Gathered) -> None:
    """Writes a topic's JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, gathered.content())


def write_report(
    path: Path,
    topic: str,
    tables: Sequence[Table],
    request: Request,
    gathered: Gathered,
    *,
    command: str,
    legend: str | None = None,
) -> list[Path]:
    """Writes the Markdown and the pictures of a topic from its JSON alone.

    Args:
      path: of the JSON; the others lie beside it.
      topic: on the command line.
      tables: of the topic, all of them.
      request: from the command line, for what it leaves out.
      gathered: what is finished.
      command: line that runs them.
      legend: what holds for all figures, where it is not means over seeds.

    Returns:
      The files written.
    """
    lines = [f"# {topic.capitalize()}: tables", "", f"    {command}", ""]
    # A run that is read from its folder says nothing of a machine.
    known = filter(None, gathered.content()["machines"].values())
    lines += [_machine_line(facts) for facts in known]
    lines += ["", legend or _LEGEND]
    written = [path.with_suffix(".md")]
    for table in tables:
        _enter_anew(table, request, gathered)
        results = gathered.results(table.name)
        lines += ["", f"## {table.title}", ""]
        if any(results.by_name.values()):
            lines += table.render(results)
            figure = table.picture(results) if table.picture else None
            if figure is not None:
                image = path.with_name(f"{path.stem}-{table.name}.png")
                figure.savefig(image, dpi=130)
                written.append(image)
                lines += ["", f"![{table.title}]({image.name})"]
        lines += _ended(table, request, gathered, command)
    write_text(written[0], "\n".join(lines) + "\n")
    return written


_LEGEND = (
    "Each figure is a mean over seeds ± standard deviation. An ordering is the mean difference "
    "over paired seeds (same initial parameters, same order of the data), beside it that mean in "
    "standard errors: three seeds make an exploration, no proof. Figures of others are for other "
    "models and texts: only their order is comparable."
)


def _enter_anew(table: Table, request: Request, gathered: Gathered) -> None:
    """Rows that were made with settings of the past are no rows of a table any more."""
    seeds = [int(seed) for row in gathered.index.get(table.name, {}).values() for seed in row]
    if seeds:
        every = max(request.seeds, max(seeds) + 1)
        gathered.enter(table.name, table.cells(dataclasses.replace(request, seeds=every)))


def _machine_line(facts: Mapping[str, Any]) -> str:
    return "* " + ", ".join(f"{name} {value}" for name, value in facts.items())


def _ended(table: Table, request: Request, gathered: Gathered, command: str) -> list[str]:
    lines = [line for note in table.notes(request) for line in ("", note)]
    if missing := gathered.missing(table.name):
        lines += ["", f"Missing, `{command} --tables {table.name}` runs them:"]
        lines += ["", *(f"* {name}" for name in missing)]
    elif not gathered.index.get(table.name) and not lines:
        lines += ["", f"Not run yet: `{command} --tables {table.name}`"]
    return lines
