"""The ladder's command: which runs, where they are kept, what is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.ablate.gathered import Gathered
from experiments.ablate.report import read, write_data
from experiments.ladder.child import run_apart
from experiments.ladder.climb import (
    BASELINES,
    TORCH,
    TORCH_TUNED,
    Runner,
    Site,
    climb,
    data_name,
    target_of,
)
from experiments.ladder.pictures import draw
from experiments.ladder.report import render
from experiments.ladder.rows import mean_end
from experiments.ladder.rungs import RUNGS, rung_named
from experiments.ladder.scales import SCALES, Scale
from experiments.ladder.side_by_side import measure
from experiments.run import write_text

HEADLINES = ("jax", "rate", "muon", "for-hf", "for-gguf")
"""Rungs that also look for the length that suits the first baseline's loss, besides the highest
that is kept; others stand in that table with the runs made for the second one's."""


@dataclass(frozen=True)
class Ladder:
    """What to run.

    Attributes:
      scale: by name.
      cells: folder of the runs.
      rungs: or baselines; all if empty.
      seeds: how many, from 0.
      data: sources in place of the scale's.
      tokenizer: in place of the scale's.
      max_minutes: begin no further run after so long.
      tune: a rung whose trials are run in place of the ladder.
      sizes: measure at four sizes in place of the ladder.
      side_by_side: time steps of rungs and tuned baseline in turn, in place of running them.
      fresh: forget what is gathered of this data.
      results: where it is kept.
      run: runs a cell.
    """

    scale: str
    cells: Path
    rungs: tuple[str, ...] = ()
    seeds: int = 1
    data: tuple[str, ...] = ()
    tokenizer: str | None = None
    max_minutes: float | None = None
    tune: str | None = None
    sizes: bool = False
    side_by_side: bool = False
    fresh: bool = False
    results: Path = Path("experiments/results")
    run: Runner = run_apart


def run_ladder(command: Ladder) -> list[Path]:
    """Runs what is missing and returns the files written.

    Raises:
      ValueError: an unknown rung, no seed, no data.
    """
    from experiments.ladder.sizes import run_sizes
    from experiments.ladder.tune import run_tuning

    scale = scale_of(command)
    for name in command.rungs:
        if name not in BASELINES:
            rung_named(name)
    if command.seeds < 1:
        raise ValueError(f"{command.seeds} seeds are none; give at least 1")
    if (command.tune is not None) + command.sizes + command.side_by_side > 1:
        raise ValueError("--tune, --sizes and --side-by-side are three commands; give one of them")
    kind = "tuning" if command.tune else "sizes" if command.sizes else ""
    path = command.results / f"speedrun-{'-'.join(filter(None, (kind, scale.name)))}.json"
    gathered = read(path)
    site = Site(
        scale,
        command.cells,
        gathered,
        save=lambda: write_data(path, gathered),
        run=command.run,
        minutes=command.max_minutes,
    )
    if command.fresh:
        _forget(site)
    if command.tune is not None:
        return run_tuning(site, command.tune, path)
    if command.sizes:
        return run_sizes(site, command.rungs, command.seeds, path)
    try:
        if command.side_by_side:
            for name in command.rungs or (*BASELINES, *(rung.name for rung in RUNGS)):
                measure(site, name)
        else:
            run_rungs(site, command.rungs, command.seeds)
    except TimeoutError as late:
        print(f"\nthe minutes are up: {late}")
    finally:
        site.save()
        written = write_all(path, gathered, scale)
        print(f"\nwritten: {', '.join(map(str, written))}")
    return written


def _forget(site: Site) -> None:
    """Forgets what is gathered of the data, and of its trials and sizes."""
    gathered = site.gathered
    for table in [name for name in gathered.index if site.table in name]:
        for seeds in gathered.index.pop(table).values():
            for key in seeds.values():
                gathered.cells.pop(key, None)


def scale_of(command: Ladder) -> Scale:
    """Returns the scale with the data of the command.

    Raises:
      ValueError: a scale without data of its own, and none given.
    """
    scale = SCALES[command.scale]
    if command.data:
        whole = all(Path(spec).is_file() for spec in command.data)
        tokenizer = command.tokenizer or ("bytes" if whole and scale.name != "gpu" else None)
        scale = scale.at(data=command.data, tokenizer=tokenizer or scale.tokenizer)
        if whole:  # a file of one document has two splits
            scale = scale.at(held_out="validation")
    elif command.tokenizer:
        scale = scale.at(tokenizer=command.tokenizer)
    if not scale.data:
        raise ValueError(
            f"the scale {scale.name} has no data of its own; name text of at least "
            f"{scale.tokens / 1e6:.0f} million tokens with --data (less is read several times)"
        )
    return scale


def run_rungs(site: Site, names: tuple[str, ...], seeds: int) -> None:
    """Runs the baselines at their budget, then every rung at the lengths that it needs.

    Raises:
      TimeoutError: the minutes are up.
    """
    for name in BASELINES:
        if not names or name in names:
            target_of(site, name, seeds)
        else:
            target_of(site, name, 1)  # a target has to be there
    second, first = mean_end(site, TORCH_TUNED), mean_end(site, TORCH)
    chosen = names or (TORCH_TUNED, *(rung.name for rung in RUNGS))
    highest = [rung.name for rung in RUNGS if rung.kept][-1]
    for name in (n for n in (TORCH_TUNED, *(rung.name for rung in RUNGS)) if n in chosen):
        for seed in range(seeds):
            if name == TORCH_TUNED:  # its length for the second target is its budget
                climb(site, name, seed, first)
                continue
            climb(site, name, seed, second)
            if name in (*HEADLINES, highest):
                climb(site, name, seed, first)


def write_all(path: Path, gathered: Gathered, scale: Scale) -> list[Path]:
    """Writes Markdown and pictures from what is gathered, all data sets of the scale."""
    lines = [f"# Speedrun: time to a loss, scale {scale.name}", ""]
    lines += [f"    python -m experiments.speedrun --scale {scale.name}", ""]
    for facts in gathered.content()["machines"].values():
        lines.append("* " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    written = [path, path.with_suffix(".md")]
    for table in sorted(gathered.index):
        site = Site(scale_named(scale, table), Path(), gathered)
        lines += ["", *render(site)]
        short = "".join(c if c.isalnum() else "-" for c in table).strip("-")
        image = path.with_name(f"{path.stem}-{short}.png")
        if draw(site, image):
            written.append(image)
            lines += ["", f"![Loss against time, and seconds of every rung]({image.name})"]
    write_text(written[1], "\n".join(lines) + "\n")
    return written


def scale_named(scale: Scale, table: str) -> Scale:
    """Returns the scale on the data that a table of the JSON is called by.

    >>> from experiments.ladder.scales import CPU
    >>> scale_named(CPU, "tale.txt, bytes, validation").tokenizer
    'bytes'
    """
    whole = table.removesuffix(", validation")
    names, tokenizer = whole.rsplit(", ", 1)
    split: Any = "test" if whole == table else "validation"
    found = scale.at(data=tuple(names.split(" + ")), tokenizer=tokenizer, held_out=split)
    assert data_name(found) == table
    return found
