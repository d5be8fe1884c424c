"""The README's tables of speed, from the files that `speedrun` and `bench` write.

Each is empty as long as there is nothing to show, so that the README stands before it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.bench import decode, train_step
from experiments.bench.alone import FAILED
from experiments.bench.ratios import ratio as ratio_of_rounds
from experiments.bench.shapes import shape_from_json
from experiments.grid import Measured, Measurement
from experiments.json_files import read_json
from experiments.ladder.climb import (
    BASELINES,
    TORCH,
    TORCH_COMPILED,
    TORCH_TUNED,
    Site,
    scale_named,
    searched,
)
from experiments.ladder.rows import (
    Ratio,
    cost_ratio,
    curves_of,
    mean_end,
    names_of,
    ratio_in_turn,
    row_of,
)
from experiments.ladder.rungs import RUNGS, rung_named
from experiments.ladder.scales import Scale
from experiments.ladder.side_by_side import processors
from experiments.tables.markdown import grid
from experiments.tables.report import read
from model.flops import parameter_count

CLAIM, CLEAR = 5, 0.01  # seeds and p: with fewer or above it is an exploration
AGAINST = (
    ("first loss", TORCH, TORCH, "training"),
    ("first loss, cold", TORCH, TORCH, "cold"),
    ("tuned loss", TORCH_TUNED, TORCH_TUNED, "training"),
    ("tuned loss, cold", TORCH_TUNED, TORCH_TUNED, "cold"),
    ("tuned loss, torch.compile", TORCH_COMPILED, TORCH_TUNED, "training"),
)
"""Column, baseline, the one whose loss is the target, and the cost."""

TRAIN = ("train-3m", "train-12m", "train-124m")


def speedrun(path: Path, scale: Scale) -> str:
    """Returns how many times less time the headline rungs take to the losses of both baselines.

    Of every data set, on its test split once that has been opened, and on validation before.

    Args:
      path: of the ladder's JSON; Markdown lies beside it.
      scale: of the ladder.
    """
    if not path.exists():
        return ""
    gathered = read(path)
    sites = (Site(scale_named(scale, name), Path(), gathered) for name in sorted(gathered.index))
    bodies = {site.table: body for site in sites if (body := _headlines(site))}
    shown = {name: body for name, body in bodies.items() if f"{name}, test" not in bodies}
    if not shown:
        return ""
    head = ["data", "rung", *(column for column, *_ in AGAINST), "timed on"]
    rows = [[name, *row] for name, body in shown.items() for row in body]
    return "\n".join(
        [
            "Times less training to the mean final loss of Hugging Face's GPT-2 in torch: under "
            "Adam at a constant 1e-4 (the first), and under AdamW with tuned rate, schedule, betas "
            "and decay, eager and through `torch.compile`. Seconds are of tokens at the pace of "
            f"steps that were timed in turn; means over {CLAIM} paired seeds at least ± standard "
            f"errors, with p < {CLEAR}. Cold is from the start of the process, imports and "
            "compilation included, which are timed once: no error is claimed. A second start finds "
            "its programs in the cache.",
            "",
            *grid(head, rows, "ll" + "r" * len(AGAINST) + "l"),
            "",
            _what_rungs_are(list(dict.fromkeys(row[1] for row in rows))),
            "",
            f"`python -m experiments.speedrun --scale {scale.name} --seeds {CLAIM}`, and with "
            f"`--side-by-side`: all rungs, trials of both sides, targets and p-values in "
            f"[{path.stem}.md](experiments/results/{path.stem}.md).",
        ]
    )


def _what_rungs_are(names: Sequence[str]) -> str:
    """What stands on what, and what the rungs are that a table names."""
    kept = ", ".join(rung.name for rung in RUNGS if rung.kept)
    said = "; ".join(f"{name}: {rung_named(name).about}" for name in names)
    return f"A rung is a technique on top of those before it: {kept}. ({said}.)"


def _headlines(site: Site) -> list[list[str]]:
    targets = {baseline: mean_end(site, baseline) for baseline in (TORCH, TORCH_TUNED)}
    if any(map(math.isnan, targets.values())):
        return []
    rungs = [name for name in names_of(site) if name not in BASELINES and searched(name, TORCH)]
    rungs = [name for name in rungs if len(curves_of(site, name)) >= CLAIM]  # less is no claim
    where = next(iter(processors(site)), "")  # whose steps the seconds are of
    return [[name, *_ratios(site, name, targets), where] for name in rungs]


def _ratios(site: Site, name: str, targets: dict[str, float]) -> list[str]:
    cells = []
    for _, baseline, loss, what in AGAINST:
        mine, theirs = (row_of(site, each, targets[loss], loss) for each in (name, baseline))
        found, counts = ratio_in_turn(site, mine, theirs), (len(mine.seeds), len(theirs.seeds))
        if what == "training":
            cells.append(_said(found, *counts))
        else:  # where training is no claim, the whole is none
            whole = cost_ratio(site, mine, theirs, what).mean
            cells.append(f"{whole:.1f}x" if " ± " in cells[-1] else cells[-1])
    return cells


def _said(found: Ratio | None, seeds: int, of_baseline: int) -> str:
    """A ratio with its spread and how many seeds it is of, or why there is none to be claimed.

    >>> _said(Ratio(31.24, 0.8, 5, 1e-6), 5, 5), _said(Ratio(2.0, 0.4, 5, 0.02), 5, 5)
    ('31.2x ± 0.8, 5 seeds', 'no claim, p 0.02')
    >>> _said(Ratio(2.0, 0.4, 3, 0.001), 5, 5), _said(None, 5, 5), _said(None, 5, 0)
    ('not reached by 2 of 5 seeds', 'not timed', 'not run')
    """
    if not of_baseline:
        return "not run"
    if found is None:
        return "not timed"
    pairs = min(seeds, of_baseline)
    if found.pairs < pairs:
        return f"not reached by {pairs - found.pairs} of {pairs} seeds"
    if found.pairs < CLAIM:
        return f"no claim, {found.pairs} seeds"
    if not found.p < CLEAR:
        return f"no claim, p {found.p:.2g}"
    return f"{found.mean:.1f}x ± {found.error:.1f}, {found.pairs} seeds"


def bench(path: Path) -> str:
    """Returns ratios of the training step at three sizes, and of generation.

    Args:
      path: of the bench's JSON; Markdown lies beside it.
    """
    content = read_json(path) if path.exists() else {}
    steps = [m for table in TRAIN for m in _measured(content.get(table, []))]
    written = _measured(content.get("decode", []))
    if not steps and not written:
        return ""
    parts = ["Tokens a second, ours / theirs in the same minutes: medians and quartiles of rounds."]
    if steps:
        sides = (train_step.EAGER, train_step.COMPILE)
        rows = [
            [
                f"{m.values['facts'][train_step.JAX]['parameters'] / 1e6:.1f} M",
                *(train_step.ratio_where_equal(m, side) for side in sides),
                str(min(train_step.steps_compared(m, side) for side in sides)),
            ]
            for m in steps
        ]
        names = ["train step", *sides, "steps of compared losses"]
        parts.append("\n".join(grid(names, rows, "lrrr")))
    if written:
        rows = [row for m in written for row in _generation(m)]
        names = ["batch", "prefill", "decode, against transformers' `generate`"]
        parts.append("\n".join(grid(names, rows, "lrr")))
    facts = [measured.machine for measured in steps + written]
    machines = sorted({f"{each['cores']} cores of an {each['processor']}" for each in facts})
    parts.append(
        f"`python -m experiments.bench`, on {' and '.join(machines)}; memory, shares of the peak, "
        f"data, starts and how cost grows: [{path.stem}.md](experiments/results/{path.stem}.md)."
    )
    return "\n\n".join(parts)


def _generation(measured: Measured) -> list[list[str]]:
    count = parameter_count(shape_from_json(measured.measurement.settings["shape"]).model) / 1e6
    ours, theirs = (measured.values[side] for side in (decode.OURS, decode.THEIRS))
    return [
        [
            f"{rows} of {count:.1f} M",
            *(str(ratio_of_rounds(ours[rows][p], theirs[rows][p])) for p in ("prefill", "decode")),
        ]
        for rows in ours
    ]


def _measured(rows: Sequence[dict[str, Any]]) -> list[Measured]:
    """What the bench's JSON holds of a table, without what failed."""
    return [
        Measured(Measurement("", r["settings"], dict), r["values"], r["seconds"], r["machine"])
        for r in rows
        if FAILED not in r["values"]
    ]
