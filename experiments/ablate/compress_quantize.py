"""Quantization after training: how many bits, round to nearest or GPTQ, and groups.

Published beside it: OPT-125M on WikiText-2, Frantar et al. 2022 (arXiv:2210.17323), groups of 128
there and of 32 here.
"""

from __future__ import annotations

from typing import Any, Literal

from experiments.ablate.compress_recipes import ALL, BLOCKS, Recipe, measurement, rounded
from experiments.ablate.subjects import base_settings, stories_settings
from experiments.grid import Measurement
from experiments.tables.margins import Claim, claims
from experiments.tables.markdown import grid, spread
from experiments.tables.table import Request, Results, Table

DENSE = "float32"
# name of the row -> (method, name of the format)
METHODS: dict[str, tuple[Literal["rtn", "gptq"], str]] = {
    "int16": ("rtn", "int16"),
    "RTN8": ("rtn", "int8"),
    "RTN4": ("rtn", "int4"),
    "RTN4 g32": ("rtn", "q4_0"),
    "GPTQ4": ("gptq", "int4"),
    "GPTQ4 g32": ("gptq", "q4_0"),
    "RTN3": ("rtn", "int3"),
    "GPTQ3": ("gptq", "int3"),
    "RTN3 g32": ("rtn", "int3_g32"),
    "GPTQ3 g32": ("gptq", "int3_g32"),
}
PUBLISHED = {
    DENSE: "27.65",
    "RTN8": "27.66",
    "RTN4": "37.28",
    "RTN4 g32": "30.48 (g128)",
    "GPTQ4": "31.12",
    "GPTQ4 g32": "29.45 (g128)",
    "RTN3": "1.3e3",
    "GPTQ3": "53.85",
    "RTN3 g32": "51.20 (g128)",
}
ORDERINGS = (
    ("RTN4", "GPTQ4"),
    ("RTN4 g32", "GPTQ4 g32"),
    ("RTN3", "GPTQ3"),
    ("RTN3 g32", "GPTQ3 g32"),
    ("RTN4", "RTN4 g32"),
    ("GPTQ4", "GPTQ4 g32"),
    ("RTN3", "RTN3 g32"),
)
SOURCE = (
    "Published: OPT-125M on WikiText-2, the blocks' matrices alone, Frantar et al. 2022 "
    "(arXiv:2210.17323), groups of 128. Three bits are kept in four here, so they save no bytes."
)
LIMITS = {"int16": 0.01, "RTN8": 0.1}
"""Largest rise of the perplexity that is expected, in per cent."""

SCOPES = {"all": ALL, "blocks": BLOCKS}


def recipes(scope: str) -> dict[str, Recipe]:
    """Returns what each row does to the matrices of a scope.

    >>> [step.format.bits for step in recipes("blocks")["GPTQ3"]]
    [3]
    """
    rows: dict[str, Recipe] = {DENSE: ()}
    for name, (method, format) in METHODS.items():
        if scope == "all" or name != "int16":
            rows[name] = (rounded(method, format, SCOPES[scope]),)
    return rows


def _cells(subject: Any, scope: str, request: Request) -> list[Measurement]:
    return [
        measurement(request, name, subject(seed), recipe)
        for seed in range(request.seeds)
        for name, recipe in recipes(scope).items()
    ]


def render(results: Results) -> list[str]:
    """Returns the table, the limits on 8 and 16 bits, and the orderings."""
    body = []
    for name in results.by_name:
        if not (bytes_ := results.column(name, "bytes")):
            continue
        dense = results.column(name, "dense bytes")
        body.append(
            [
                name,
                spread(results.column(name, "perplexity")),
                f"{spread(results.column(name, 'rise in %'), 4)} %",
                spread(results.column(name, "bits per byte"), 4),
                spread(results.column(name, "KL to the dense model"), 5),
                spread(results.column(name, "top-1 agreement"), 4),
                f"{bytes_[0]:,.0f} ({bytes_[0] / dense[0]:.3f}x)",
                PUBLISHED.get(name, ""),
            ]
        )
    names = ["weights", "perplexity", "rise", "bits per byte", "KL to float32 (nats)", "top-1"]
    lines = grid([*names, "bytes", "published"], body, "lrrrrrrr")
    lines += ["", SOURCE, "", *_limits(results)]
    rows = []
    for larger, smaller in ORDERINGS:
        high, low = results.pair(larger, smaller, "perplexity")
        if high:
            published = [PUBLISHED.get(name, "") for name in (larger, smaller)]
            text = " > ".join(published) if all(published) else ""
            rows.append(Claim((larger, high), (smaller, low), text))
    return [*lines, "", *claims(rows)] if rows else lines


def _limits(results: Results) -> list[str]:
    lines = []
    for name, limit in LIMITS.items():
        if rises := results.column(name, "rise in %"):
            held = sum(rise <= limit for rise in rises)
            worst = max(rises)
            lines.append(
                f"* {name}: perplexity at most {limit} % above float32 is expected; it is so on "
                f"{held} of {len(rises)} seeds (largest rise {worst:+.4f} %)."
            )
    return lines


def picture(results: Results) -> Any:
    """Draws perplexity against bytes, a point a row."""
    from matplotlib.figure import Figure

    points = {
        name: (results.column(name, "bytes")[0], results.column(name, "perplexity"))
        for name in results.by_name
        if results.column(name, "bytes")
    }
    if len(points) < 2:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for kind, marker in (("RTN", "o"), ("GPTQ", "s"), ("", "^")):
        chosen = {
            name: point
            for name, point in points.items()
            if (name.startswith(kind) if kind else not name.startswith(("RTN", "GPTQ")))
        }
        if not chosen:
            continue
        sizes = [size / 1e6 for size, _ in chosen.values()]
        means = [sum(found) / len(found) for _, found in chosen.values()]
        axis.scatter(sizes, means, marker=marker, label=kind or "wide")
        for name, size, mean in zip(chosen, sizes, means, strict=True):
            below = -10 if name.endswith("g32") else 4  # or it meets that of the row without
            axis.annotate(
                name, (size, mean), xytext=(4, below), textcoords="offset points", fontsize=8
            )
    axis.set(xlabel="megabytes of parameters", ylabel="perplexity", xscale="log")
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if axis.get_xlim()[0] < tick]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(right=1.3 * max(size for size, _ in points.values()) / 1e6)
    highest, *_, lowest = sorted((max(found) for _, found in points.values()), reverse=True)
    if highest > 3 * lowest:
        axis.set_yscale("log")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _table(name: str, title: str, subject: Any, scope: str) -> Table:
    foreign = subject is stories_settings

    def cells(request: Request) -> list[Measurement]:
        if foreign and request.stories is None:
            return []
        return _cells(subject, scope, request)

    def notes(request: Request) -> list[str]:
        if foreign and request.stories is None:
            return ["Rows of the foreign model run with `--stories DIR` (stories260K, tok512)."]
        return []

    return Table(name, title, cells, render, picture, notes)


TABLES: tuple[Table, ...] = (
    _table(
        "quantize",
        "Quantization of all matrices, embedding and head included",
        base_settings,
        "all",
    ),
    _table(
        "quantize-blocks",
        "Quantization of the blocks' matrices alone, as the published table has it",
        base_settings,
        "blocks",
    ),
    _table(
        "quantize-stories",
        "Quantization of a foreign model, stories260K, judged on its own samples",
        stories_settings,
        "all",
    ),
)
