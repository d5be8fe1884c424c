"""Rate and dropout of every way of `experiments.ablate.transfer_sst2`: the same trials for each.

    python -m experiments.ablate transfer --tables sst2-tuning --sst2 DIR --shakespeare FILE

Four rates, each about three times the one before, with a dropout of 0.1 and of 0.5. The four are
higher where less trains, and lower beside n-grams that learn the rest. All trials have one seed of
their own, which no other table has. They are trained on four fifths of the training file, drawn by
a hash of what a row says, and judged by their best validation accuracy on the last fifth; pieces
and language model are learned from those four fifths too. Files of validation and test are not
opened. Every rank of LoRA is a way of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.ablate import transfer_sst2 as sst2
from experiments.ablate.transfer_sst2 import (
    BAG,
    FULL,
    FULL_GRAMS,
    GRAMS,
    HEAD,
    LORA,
    SCRATCH,
    Recipe,
    recipe_of,
)
from experiments.grid import Cell, Measurement
from experiments.tables.markdown import grid
from experiments.tables.table import Item, Request, Results, Table
from train.loop import LoopSettings
from train.tasks.rows import content_hash
from train.tasks.task import TRAIN, VALID, TaskFiles

SEED = 100
KEPT = ((TRAIN, 0.8), (VALID, 0.2))
EVERY = 100
DROPOUTS = (0.1, 0.5)
RATES: Mapping[str, tuple[float, ...]] = {
    SCRATCH: (3e-4, 1e-3, 3e-3, 1e-2),
    BAG: (3e-4, 1e-3, 3e-3, 1e-2),
    GRAMS: (1e-4, 3e-4, 1e-3, 3e-3),
    HEAD: (1e-3, 3e-3, 1e-2, 3e-2),
    **{f"{LORA} {rank}": (3e-4, 1e-3, 3e-3, 1e-2) for rank in sst2.RANKS},
    FULL: (1e-4, 3e-4, 1e-3, 3e-3),
    FULL_GRAMS: (1e-4, 3e-4, 1e-3, 3e-3),
}


def trials() -> dict[str, tuple[str, Recipe]]:
    """Returns name -> way and recipe of every trial."""
    found = {}
    for way, rates in RATES.items():
        for rate in rates:
            for dropout in DROPOUTS:
                recipe = Recipe(rate, dropout)
                found[name_of(way, recipe)] = (way, recipe)
    return found


def name_of(way: str, recipe: Recipe) -> str:
    """Returns the name of a trial.

    >>> name_of("full", Recipe(1e-3, 0.5))
    'full, rate 0.001, dropout 0.5'
    """
    return f"{way}, rate {recipe.rate:g}, dropout {recipe.dropout:g}"


def cells(request: Request) -> list[Item]:
    """Returns a measurement for every trial, which needs its run."""
    if request.sst2 is None or request.shakespeare is None:
        return []
    path = request.sst2 / sst2.FILES[TRAIN]
    paths = tuple((split, str(path)) for split, _ in KEPT)
    task = sst2.task_of(TaskFiles(paths, sst2.FORM, shares=KEPT))
    rows = sst2.Rows(task, sst2.PIECES, sst2.LENGTH)
    about = {"sha256": content_hash(path), "shares": KEPT}
    language = sst2.language_cell(request, rows, SEED, about)
    items: list[Item] = []
    for name, (way, recipe) in trials().items():
        parent = str(request.cells / language.key)
        settings = sst2.task_settings(way, rows, SEED, sst2.STEPS, parent, recipe)
        loop = LoopSettings(
            log_every=50, evaluate_every=EVERY, checkpoint_every=sst2.STEPS, watch="-accuracy"
        )
        needs = () if settings.parent is None else (language,)
        cell = Cell(name, settings, loop, needs=needs)
        measured = {"measured": VALID, "run": cell.key, "seed": SEED}
        function = functools.partial(measure, request.cells)
        items.append(Measurement(name, measured, function, needs=(cell,)))
    return items


def measure(cells: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `curve` and `losses` of a trial, as `transfer_sst2.curves`."""
    return dict(sst2.curves(cells / settings["run"]))


def best(values: Mapping[str, Any]) -> float:
    """Returns the best validation accuracy of a trial."""
    return float(max(accuracy for _, accuracy in values["curve"]))


def render(results: Results) -> list[str]:
    """Returns the trials of every way, the best of them, and which the other tables use."""
    about = " ".join((__doc__ or "").split("\n\n")[2].split())
    rows, others = [], []
    for way, rates in RATES.items():
        found = {}
        for name, (owner, recipe) in trials().items():
            if owner == way and (values := results.by_name.get(name, {}).get(SEED)):
                found[recipe] = best(values)
        if not found:
            continue
        used, chosen = recipe_of(way), max(found, key=lambda recipe: found[recipe])
        cells = [
            f"{100 * found[recipe]:.1f}" if (recipe := Recipe(rate, dropout)) in found else ""
            for dropout in DROPOUTS
            for rate in rates
        ]
        said = (f"{recipe.rate:g}, {recipe.dropout:g}" for recipe in (chosen, used))
        rows.append([way, ", ".join(f"{rate:g}" for rate in rates), *cells, *said])
        if len(found) == len(rates) * len(DROPOUTS) and chosen != used:
            others.append(way)
    places = ("lowest rate", "second", "third", "highest")
    names = ["way", "rates", *(f"{p}, dropout {d:g}" for d in DROPOUTS for p in places)]
    names += ["best (rate, dropout)", "used"]
    lines = [about, "", "Validation accuracy, %.", ""]
    lines += grid(names, rows, "ll" + "r" * (len(names) - 4) + "ll")
    if others:
        lines += ["", f"Not the best of these trials is what is used of: {'; '.join(others)}."]
    return lines


def _missing(request: Request) -> list[str]:
    if request.sst2 is None or request.shakespeare is None:
        return ["Runs with the data at hand: `--sst2 FOLDER --shakespeare FILE`."]
    return []


TABLE = Table(
    "sst2-tuning", "Sentiment of sentences: rate and dropout", cells, render, None, _missing
)
