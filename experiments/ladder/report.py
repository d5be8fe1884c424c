"""The ladder as Markdown, from what is gathered alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.ablate.markdown import grid
from experiments.ladder.climb import BASELINES, TORCH, TORCH_TUNED, Site, recipe_for
from experiments.ladder.rows import (
    Row,
    at_least,
    compared_with,
    curves_of,
    further_targets,
    mean_end,
    names_of,
    ratio,
    row_of,
)
from experiments.ladder.rungs import RUNGS, formats_of, rung_named
from experiments.ladder.side_by_side import speed_of

SEEDS_TO_KEEP = 3  # what `kept` is decided on


def render(site: Site) -> list[str]:
    """Returns the section of one data set."""
    lines = [f"## {site.table}", "", *_about(site)]
    for baseline, about in ((TORCH_TUNED, "the tuned baseline"), (TORCH, "the first baseline")):
        target = mean_end(site, baseline)
        if math.isnan(target):
            continue
        lines += ["", f"### To the end of {about}: {target:.4f} bits per byte", ""]
        lines += _times(site, target, baseline)
    lines += ["", "### Over a range of targets", "", *_range(site)]
    lines += ["", "### What is kept, and what it leaves in", "", *_kept(site)]
    return lines


def _about(site: Site) -> list[str]:
    scale = site.scale
    lines = [
        f"Budget of either baseline: {scale.steps:,} steps of {scale.rows} x {scale.length} tokens "
        f"({scale.tokens / 1e6:.2f} M), fixed before anything was tuned. A target is the mean loss "
        "of a baseline at the end of that budget. Every rung looks for the length of its schedule "
        "by one rule (`experiments/ladder/search.py`), with at most "
        f"{scale.search.runs} runs; the first evaluation at or under the target counts, at "
        f"{scale.evaluations} evaluations a run. Seconds are means over seeds ± standard errors; "
        "ratios are of paired seeds, above 1 is faster. "
        "Side by side: the ratio of tokens times that of seconds a token, with rung and baseline "
        "in turn on the same machine. "
        + (
            "Losses are of the test split, which no trial has seen."
            if scale.held_out == "test"
            else "Losses are of the validation split: the data has no other."
        ),
        "",
    ]
    lines += [f"* {name}: {about}" for name, about in BASELINES.items()]
    lines += [f"* {rung.name}: {rung.about}" for rung in RUNGS]
    return lines


def _times(site: Site, target: float, baseline: str) -> list[str]:
    rows = {name: row_of(site, name, target, baseline) for name in names_of(site)}
    head = [
        *("rung", "seeds", "steps", "tokens, k", "TFLOP", "training s", "with compiling, s"),
        *("all s", "tokens/s", "peak MB", "to below", f"to {TORCH}", f"to {TORCH_TUNED}"),
        *(f"to {TORCH_TUNED}, with compiling", f"to {TORCH_TUNED}, side by side"),
    ]
    body = [_time_row(site, row, rows) for row in rows.values()]
    return grid(head, body, "l" + "r" * (len(head) - 1))


def _time_row(site: Site, row: Row, rows: dict[str, Row]) -> list[str]:
    there = f"{len(row.reached)} of {len(row.seeds)}"
    peak = f"{row.peak_bytes / 1e6:,.0f}"
    if not row.reached:
        last = max(row.bits.values())
        missed = f"not reached ({last:.3f})"
        return [row.name, there, "", "", "", missed, "", "", "", peak, "", "", "", "", ""]
    under = compared_with(row.name)
    return [
        row.name,
        there,
        f"{row.mean('steps')[0]:,.0f}",
        f"{row.mean('tokens')[0] / 1e3:,.0f}",
        f"{row.mean('flops')[0] / 1e12:.3g}",
        _with_error(row.mean("training"), "{:.1f}"),
        f"{row.mean('compiled')[0]:.1f}",
        f"{row.mean('total')[0]:.1f}",
        f"{row.mean('speed')[0]:,.0f}",
        peak,
        _ratio(site, row, rows, under),
        _ratio(site, row, rows, TORCH),
        _ratio(site, row, rows, TORCH_TUNED),
        _ratio(site, row, rows, TORCH_TUNED, "compiled"),
        _beside(site, row, rows),
    ]


def _beside(site: Site, row: Row, rows: dict[str, Row]) -> str:
    """The ratio of tokens, times that of seconds a token, measured in turn."""
    speed = speed_of(site, row.name)
    if speed is None or TORCH_TUNED not in rows:
        return ""
    mean, _, pairs = ratio(row, rows[TORCH_TUNED], "tokens")
    return f"{mean * speed:.2f}x" if pairs else ""


def _ratio(
    site: Site, row: Row, rows: dict[str, Row], to: str | None, what: str = "training"
) -> str:
    if to is None or to == row.name or to not in rows:
        return ""
    mean, error, pairs = ratio(row, rows[to], what)
    if pairs:
        return _with_error((mean, error), "{:.2f}") + "x"
    least = at_least(site, row, to, what) if to in BASELINES else math.nan
    return "" if math.isnan(least) else f"> {least:.1f}x"


def _with_error(pair: tuple[float, float], form: str) -> str:
    mean, error = pair
    return form.format(mean) + ("" if math.isnan(error) else f" ± {form.format(error)}")


def _range(site: Site) -> list[str]:
    """Ratios of training seconds to the tuned baseline at other losses."""
    targets = sorted({mean_end(site, TORCH), *further_targets(site)}, reverse=True)
    targets = [*(t for t in targets if not math.isnan(t)), mean_end(site, TORCH_TUNED)]
    if not targets or any(map(math.isnan, targets)):
        return ["The baselines have not run yet."]
    body = []
    for name in names_of(site):
        cells = []
        for target in targets:
            rows = {n: row_of(site, n, target, TORCH_TUNED) for n in (name, TORCH_TUNED)}
            mean, error, pairs = ratio(rows[name], rows[TORCH_TUNED])
            cells.append(_with_error((mean, error), "{:.2f}") + "x" if pairs else "not reached")
        body.append([name, *cells])
    head = ["rung", *(f"{target:.3f}" for target in targets)]
    about = (
        f"Seconds of training that {TORCH_TUNED} takes to so many bits per byte, over those of the "
        "rung; each takes the fastest of its runs, whatever length they were planned for."
    )
    return [about, "", *grid(head, body, "l" + "r" * len(targets))]


def _kept(site: Site) -> list[str]:
    target = mean_end(site, TORCH_TUNED)
    body = []
    for name in names_of(site):
        held = ", ".join(formats_of(recipe_for(site.scale, name))) or "native and StableHLO alone"
        if name in BASELINES:
            body.append([name, "", "", "", held])
            continue
        row = row_of(site, name, target, TORCH_TUNED)
        ends = [f"{bits:.4f}" for bits in _ends(site, name)]
        body.append([name, *verdict(site, row), ", ".join(ends), held])
    head = ["rung", "in the recipe", "pays in seconds", "bits at the end of each length", "formats"]
    return grid(head, body, "lllll")


def verdict(site: Site, row: Row) -> tuple[str, str]:
    """Returns whether a rung is in the recipe, and what the seconds to the target say of that."""
    kept = rung_named(row.name).kept
    under = compared_with(row.name)
    if under is None:
        return ("yes" if kept else "no"), ""
    below_row = row_of(site, under, mean_end(site, TORCH_TUNED), TORCH_TUNED)
    mean, error, pairs = ratio(row, below_row)
    if not pairs:
        says = "nothing to compare"
    else:
        pays = mean > 1.0
        says = f"{'yes' if pays else 'no'}, {_with_error((mean, error), '{:.2f}')}x"
        if pairs < SEEDS_TO_KEEP:
            says += f" ({pairs} seed{'s' if pairs > 1 else ''}: no verdict)"
        elif pays != kept:
            says += " (**not what the recipe does**)"
    return ("yes" if kept else "no"), says


def _ends(site: Site, name: str) -> Sequence[float]:
    """Bits at the end of each run of the first seed, by length."""
    runs = curves_of(site, name)
    first = runs[min(runs)]
    return [float(points[-1]["bits"]) for points in first if points]
