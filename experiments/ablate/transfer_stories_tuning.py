"""Optimizer and rate of every way of `experiments.ablate.transfer_stories`: the same trials for
each.

    python -m experiments.ablate transfer --tables stories-tuning --stories DIR --shakespeare FILE

AdamW at three rates, each three times the one before, and Muon at four, each twice the one before;
Muon's are higher from scratch, where more has to move. AdamW has what Muon leaves to it at a fifth
of Muon's rate. All trials have one seed of their own, which no other table has, and are
judged by the validation loss on plays at the end of their schedule.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.ablate import transfer_stories as stories
from experiments.ablate.transfer_stories import FULL, GROWN, LORA, SCRATCH
from experiments.grid import Cell, Measurement
from experiments.tables.markdown import grid
from experiments.tables.table import Item, Request, Results, Table
from train.loop import LoopSettings
from train.optimizers import AdamW, Muon
from train.optimizers.settings import OptimizerSettings
from train.records import read_rows

SEED = 1000
SHARE = 0.2  # of Muon's rate, for what it leaves to AdamW
ADAMW_RATES: Mapping[str, tuple[float, ...]] = {
    LORA: (3e-3, 1e-2, 3e-2),
    FULL: (1e-3, 3e-3, 1e-2),
    GROWN: (1e-3, 3e-3, 1e-2),
    SCRATCH: (1e-3, 3e-3, 1e-2),
}
MUON_RATES: Mapping[str, tuple[float, ...]] = {
    LORA: (2.5e-3, 5e-3, 1e-2, 2e-2),
    FULL: (2.5e-3, 5e-3, 1e-2, 2e-2),
    GROWN: (2.5e-3, 5e-3, 1e-2, 2e-2),
    SCRATCH: (5e-3, 1e-2, 2e-2, 4e-2),
}


def trials(way: str) -> dict[str, OptimizerSettings]:
    """Returns name -> optimizer of every trial of a way.

    >>> list(trials("full"))[::3]
    ['full, AdamW 0.001', 'full, Muon 0.0025', 'full, Muon 0.02']
    """
    found: dict[str, OptimizerSettings] = {
        f"{way}, AdamW {rate:g}": AdamW(learning_rate=rate, weight_decay=0.1)
        for rate in ADAMW_RATES[way]
    }
    for rate in MUON_RATES[way]:
        found[f"{way}, Muon {rate:g}"] = Muon(rate, round(SHARE * rate, 6))
    return found


def cells(request: Request) -> list[Item]:
    """Returns a measurement for every trial, which needs its run."""
    if request.stories is None or request.shakespeare is None:
        return []
    sources = stories.sources(request.cells, request.stories, request.shakespeare)
    run, plays = (str(request.cells / source.key) for source in sources.items)
    loop = LoopSettings(stories.EVERY, stories.STEPS)
    items: list[Item] = []
    for way in ADAMW_RATES:
        for name, optimizer in trials(way).items():
            tried = stories.WAYS[way]._replace(optimizer=optimizer)
            settings = stories.settings_of(tried, sources.model, SEED, run, plays, "")
            cell = Cell(name, settings, loop, needs=sources.items)
            about = {"measured": "validation", "run": cell.key, "seed": SEED}
            measure = functools.partial(measured, request.cells)
            items.append(Measurement(name, about, measure, needs=(cell,)))
    return items


def measured(cells: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the validation loss that a trial ended at."""
    rows = list(read_rows(cells / settings["run"] / "metrics.jsonl"))
    return {"loss": [row["loss"] for row in rows if row["kind"] == "evaluation"][-1]}


def render(results: Results) -> list[str]:
    """Returns the trials of every way, the best of them, and what the other tables use."""
    about = " ".join((__doc__ or "").split("\n\n")[2].split())
    rows, others = [], []
    for way in ADAMW_RATES:
        losses = {
            name: values[SEED]["loss"]
            for name in trials(way)
            if (values := results.by_name.get(name))
        }
        if not losses:
            continue
        used = next(
            (name for name, made in trials(way).items() if made == stories.WAYS[way].optimizer), ""
        )
        chosen = min(losses, key=lambda name: losses[name])
        if len(losses) == len(trials(way)) and chosen != used:
            others.append(way)
        shown = [f"{losses[name]:.3f}" if name in losses else "" for name in trials(way)]
        said = (name.removeprefix(f"{way}, ") for name in (chosen, used))
        rates = (
            ", ".join(f"{rate:g}" for rate in of_way[way]) for of_way in (ADAMW_RATES, MUON_RATES)
        )
        rows.append([way, *rates, *shown, *said])
    columns = [f"AdamW, {place}" for place in ("lowest", "middle", "highest")]
    columns += [f"Muon, {place}" for place in ("lowest", "second", "third", "highest")]
    names = ["way", "AdamW's rates", "Muon's rates", *columns, "best", "used"]
    lines = [about, "", "Validation loss, nats a token.", ""]
    lines += grid(names, rows, "lll" + "r" * (len(names) - 5) + "ll")
    if others:
        lines += ["", f"Not the best of these trials is what is used of: {'; '.join(others)}."]
    return lines


TABLE = Table(
    "stories-tuning",
    "A model of stories: optimizer and rate",
    cells,
    render,
    None,
    stories.missing,
)
