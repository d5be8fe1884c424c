"""Distillation: what each part of it is worth, at which temperature, and against no teacher.

The teacher is the base model of the seed, the student has half of its layers, spread evenly from
the first to the last: 0 and 3 of four. Each row trains for equally many steps on the same batches.
Weights are in DistilBERT's proportions (5 for the soft, 2 for the hard loss, 1 for the cosine of
hidden states; Sanh et al. 2019, arXiv:1910.01108), whose table of parts left out stands beside. Its
cosine is that of the last hidden states; ours is the mean over the student's layers, each against
the teacher's at the same share of the depth.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.ablate import base
from experiments.ablate.compress_students import folder_of, student
from experiments.grid import Cell
from experiments.methods.distill import Distil
from experiments.recipes import Size, recommended
from experiments.tables.margins import Claim, claims, margin
from experiments.tables.markdown import grid, spread
from experiments.tables.table import Item, Request, Results, Table
from train.loop import LoopSettings
from train.optimizers import Muon

STEPS = 300
# The rates that the base model was trained with, for every row.
OPTIMIZER = Muon()
KIND = "half of the layers, spread"

WHOLE = Distil(hard=(0.25,), soft=(0.625,), hidden=(0.125,), temperature=(2.0,))
_drop = dataclasses.replace

WHOLE_ROW = "all parts"
ROWS: dict[str, tuple[Distil | None, bool]] = {
    WHOLE_ROW: (WHOLE, True),
    "without the hard loss": (_drop(WHOLE, hard=(0.0,)), True),
    "without hidden states": (_drop(WHOLE, hidden=(0.0,)), True),
    "without the soft loss": (_drop(WHOLE, soft=(0.0,)), True),
    "without the teacher's layers": (WHOLE, False),
    "no teacher, its layers": (None, True),
    "no teacher, random start": (None, False),
    "temperature 1": (_drop(WHOLE, temperature=(1.0,)), True),
    "temperature 4": (_drop(WHOLE, temperature=(4.0,)), True),
    "temperature 8": (_drop(WHOLE, temperature=(8.0,)), True),
}
"""Row -> (the method without its teacher or None, whether it starts from the teacher's layers)."""

PUBLISHED = {
    "without the hard loss": -0.31,
    "without hidden states": -1.46,
    "without the soft loss": -2.96,
    "without the teacher's layers": -3.69,
}
"""DistilBERT's table 4: points of the GLUE score against all parts; lower is worse."""

TEMPERATURES = {"1": "temperature 1", "2": WHOLE_ROW, "4": "temperature 4", "8": "temperature 8"}


def cells(request: Request) -> list[Item]:
    """Returns the cells of all rows and seeds."""
    return [
        _cell(request.cells, name, method, inherited, seed)
        for name, (method, inherited) in ROWS.items()
        for seed in range(request.seeds)
    ]


def _cell(folder: Path, name: str, method: Distil | None, inherited: bool, seed: int) -> Cell:
    teacher = base.base_cell(seed)
    made = student(folder, teacher, KIND)
    size: Size = dataclasses.replace(base.SIZE, layers=base.SIZE.layers // 2, optimizer=OPTIMIZER)
    settings = dataclasses.replace(
        recommended(size, STEPS, seed),
        parent=str(folder_of(folder, made)) if inherited else None,
        methods=()
        if method is None
        else (dataclasses.replace(method, teacher=str(folder / teacher.key)),),
    )
    needs = (made,) if inherited else (teacher,)
    return Cell(name, settings, LoopSettings(log_every=50), needs=needs)


def render(results: Results) -> list[str]:
    """Returns the table, the orderings and the temperatures."""
    lines = [
        f"Student of half of the teacher's layers, {STEPS} steps each; the teacher is the base "
        "model of the seed. Difference: to all parts, positive is worse; standard errors over "
        "paired seeds. DistilBERT: points of its GLUE score, lower is worse; its cosine of hidden "
        "states is that of the last ones, ours the mean over the student's layers, the first "
        "against the teacher's second, the last against its last.",
        "",
    ]
    rows = []
    for name in ROWS:
        losses = results.column(name, "loss")
        if not losses:
            continue
        ours, whole = results.pair(name, WHOLE_ROW, "loss")
        found = margin(ours, whole) if ours and name != WHOLE_ROW else None
        rows.append(
            [
                name,
                spread(losses),
                spread([math.exp(min(loss, 700.0)) for loss in losses], 2),
                f"{found.difference:+.4f}" if found else "",
                found.text if found else "",
                f"{PUBLISHED[name]:+.2f}" if name in PUBLISHED else "",
            ]
        )
    names = ["row", "loss", "perplexity", "difference", "standard errors", "DistilBERT"]
    lines += [*grid(names, rows, "lrrrrr"), "", *claims(_claims(results), 4)]
    return [*lines, "", *_temperatures(results)]


def _claims(results: Results) -> list[Claim]:
    order = list(PUBLISHED)
    expected = [
        (above, below, f"{PUBLISHED[above]} < {PUBLISHED[below]}")
        for below, above in itertools.pairwise(order)
    ]
    expected += [(name, WHOLE_ROW, f"{PUBLISHED[name]} < 0") for name in order]
    expected += [
        ("no teacher, its layers", WHOLE_ROW, "GPT-2 1.5B to 120M, Rouge-L: 23.2 (none), 22.8"),
        ("no teacher, random start", "without the teacher's layers", ""),
    ]
    found = []
    for above, below, published in expected:
        high, low = results.pair(above, below, "loss")
        if high:
            found.append(Claim((above, high), (below, low), published))
    return found


def _temperatures(results: Results) -> list[str]:
    rows: list[Sequence[str]] = []
    means = {}
    for T, name in TEMPERATURES.items():
        if losses := results.column(name, "loss"):
            means[T] = float(np.mean(losses))
            rows.append([T, spread(losses, 4)])
    if not rows:
        return []
    best = min(means, key=lambda T: means[T])
    inside = best not in (next(iter(means)), list(means)[-1])
    return [
        *grid(["temperature", "loss"], rows, "rr"),
        "",
        f"Lowest at {best}, {'inside' if inside else 'at an end'} of the range; Hinton et al. 2015 "
        "found 2.5 to 4 best for their smallest student, and 20 good for a large one.",
    ]


TABLES: tuple[Table, ...] = (Table("distil", "Distillation", cells, render),)
