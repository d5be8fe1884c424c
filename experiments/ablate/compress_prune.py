"""Pruning after training, with and without quantization.

Published beside it: OPT-125M on WikiText-2, Frantar & Alistarh 2023 (arXiv:2301.00774) table 1 and
Sun et al. 2023 (arXiv:2306.11695) table 10; joint rows from Mozaffari et al. 2024 (SLiM,
arXiv:2410.09615); the order of pruning and quantizing from Harma et al. 2024 (arXiv:2405.20935).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from compress.quantization.formats import Format
from experiments.ablate.compress_recipes import BLOCKS, Recipe, measurement, rounded
from experiments.ablate.subjects import base_settings, stories_settings
from experiments.compression.compressors import Magnitude, SparseGPT, Wanda
from experiments.grid import Measurement
from experiments.tables.margins import Claim, claims
from experiments.tables.markdown import grid, spread
from experiments.tables.table import Request, Results, Table

FOUR_BITS = rounded("rtn", "q4_0", BLOCKS)
TWO_BITS = rounded("gptq", Format(bits=2, group=32, span="full", scale_dtype="float16"), BLOCKS)

METHODS: dict[str, Recipe] = {
    "dense": (),
    "magnitude 50 %": (Magnitude(),),
    "Wanda 50 %": (Wanda(),),
    "SparseGPT 50 %": (SparseGPT(),),
    "magnitude 2:4": (Magnitude(pattern="2:4"),),
    "Wanda 2:4": (Wanda(pattern="2:4"),),
    "SparseGPT 2:4": (SparseGPT(pattern="2:4"),),
    # What scores are compared with differs between the two as well: each in the other's way.
    "magnitude 50 % of each output": (Magnitude(pattern="by_output"),),
    "Wanda 50 % of each kernel": (Wanda(pattern="by_kernel"),),
}
# Rounding keeps zeros, which are on the grid.
JOINT: dict[str, Recipe] = {
    "GPTQ4 g32": (rounded("gptq", "q4_0", BLOCKS),),
    "SparseGPT 50 % + 4 bit, jointly": (SparseGPT(format="q4_0"),),
    "SparseGPT 2:4 + 4 bit, jointly": (SparseGPT(pattern="2:4", format="q4_0"),),
    "SparseGPT 50 %, then RTN4 g32": (SparseGPT(), FOUR_BITS),
    "Wanda 50 %, then RTN4 g32": (Wanda(), FOUR_BITS),
    "magnitude 50 %, then RTN4 g32": (Magnitude(), FOUR_BITS),
    "RTN4 g32, then magnitude 50 %": (FOUR_BITS, Magnitude()),
    "GPTQ2 g32, dense": (TWO_BITS,),
}
PUBLISHED = {
    "dense": "27.66",
    "magnitude 50 %": "193",
    "Wanda 50 %": "38.96",
    "SparseGPT 50 %": "36.85",
    "magnitude 2:4": "341.5",
    "Wanda 2:4": "81.6",
    "SparseGPT 2:4": "60.7",
    "SparseGPT 50 %, then RTN4 g32": "42.60 (OPTQ)",
    "Wanda 50 %, then RTN4 g32": "42.49 (AWQ)",
    "magnitude 50 %, then RTN4 g32": "9.37 (2:4, int8, Llama-2-7B)",
    "RTN4 g32, then magnitude 50 %": "14.65 (2:4, int8, Llama-2-7B)",
    "GPTQ2 g32, dense": "116.2 (SLiM)",
}
SOURCE = (
    "Published: OPT-125M on WikiText-2, Frantar & Alistarh 2023 (arXiv:2301.00774) and Sun et al. "
    "2023 (arXiv:2306.11695); joint rows Mozaffari et al. 2024 (SLiM, arXiv:2410.09615); the order "
    "of pruning and quantizing Harma et al. 2024 (arXiv:2405.20935)."
)
ORDERINGS = (
    ("magnitude 50 %", "Wanda 50 %"),
    ("Wanda 50 %", "SparseGPT 50 %"),
    ("magnitude 2:4", "Wanda 2:4"),
    ("Wanda 2:4", "SparseGPT 2:4"),
    ("SparseGPT 2:4", "SparseGPT 50 %"),
    ("magnitude 50 % of each output", "Wanda 50 %"),
    ("magnitude 50 %", "Wanda 50 % of each kernel"),
)
JOINT_ORDERINGS = (
    ("SparseGPT 50 %, then RTN4 g32", "SparseGPT 50 % + 4 bit, jointly"),
    ("RTN4 g32, then magnitude 50 %", "magnitude 50 %, then RTN4 g32"),
    ("GPTQ2 g32, dense", "SparseGPT 50 % + 4 bit, jointly"),
)


def _cells(subject: Any, rows: dict[str, Recipe], request: Request) -> list[Measurement]:
    return [
        measurement(request, name, subject(seed), recipe)
        for seed in range(request.seeds)
        for name, recipe in rows.items()
    ]


def render(orderings: Sequence[tuple[str, str]], results: Results) -> list[str]:
    """Returns the table and the orderings."""
    body = [
        [
            name,
            spread(results.column(name, "zeros")),
            spread(results.column(name, "perplexity")),
            spread(results.column(name, "KL to the dense model"), 4),
            spread(results.column(name, "top-1 agreement"), 3),
            PUBLISHED.get(name, ""),
        ]
        for name in results.by_name
        if results.column(name, "perplexity")
    ]
    names = ["method", "zeros", "perplexity", "KL to dense (nats)", "top-1", "published"]
    lines = [*grid(names, body, "lrrrrr"), "", SOURCE]
    rows = []
    for larger, smaller in orderings:
        high, low = results.pair(larger, smaller, "perplexity")
        if high:
            published = [PUBLISHED.get(name, "") for name in (larger, smaller)]
            text = " > ".join(published) if all(published) else ""
            rows.append(Claim((larger, high), (smaller, low), text))
    return [*lines, "", *claims(rows)] if rows else lines


def picture(results: Results) -> Any:
    """Draws the perplexity of each row as a bar with its spread."""
    import numpy as np
    from matplotlib.figure import Figure

    rows = {name: results.column(name, "perplexity") for name in results.by_name}
    rows = {name: found for name, found in rows.items() if found}
    if len(rows) < 2:
        return None
    figure = Figure(figsize=(7, 0.4 * len(rows) + 1), layout="constrained")
    axis = figure.subplots()
    means = [np.mean(found) for found in rows.values()]
    errors = [np.std(found, ddof=1) if len(found) > 1 else 0 for found in rows.values()]
    axis.barh(list(rows), means, xerr=errors, height=0.6)
    axis.invert_yaxis()
    axis.set(xlabel="perplexity", xscale="log")
    axis.grid(alpha=0.3, axis="x")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _table(
    name: str,
    title: str,
    subject: Any,
    rows: dict[str, Recipe],
    orderings: Sequence[tuple[str, str]],
) -> Table:
    foreign = subject is stories_settings

    def cells(request: Request) -> list[Measurement]:
        if foreign and request.stories is None:
            return []
        return _cells(subject, rows, request)

    def notes(request: Request) -> list[str]:
        if foreign and request.stories is None:
            return ["Rows of the foreign model run with `--stories DIR` (stories260K, tok512)."]
        return []

    return Table(name, title, cells, functools.partial(render, orderings), picture, notes)


TABLES: tuple[Table, ...] = (
    _table(
        "prune",
        "Pruning of the blocks' matrices after training",
        base_settings,
        METHODS,
        ORDERINGS,
    ),
    _table(
        "prune-quantize",
        "Pruning and quantizing the blocks' matrices together",
        base_settings,
        JOINT,
        JOINT_ORDERINGS,
    ),
    _table(
        "prune-stories",
        "Pruning of a foreign model, stories260K, judged on its own samples",
        stories_settings,
        METHODS,
        ORDERINGS,
    ),
)
