"""The ladder as Markdown, from what is gathered alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.ladder.climb import (
    BASELINES,
    TORCH,
    TORCH_TUNED,
    Site,
    baselines_of,
    changed_since,
    recipe_for,
    rows_of,
    searched,
)
from experiments.ladder.held_out import planned_ratio, planned_row
from experiments.ladder.report_about import about
from experiments.ladder.rows import (
    Ratio,
    Row,
    along,
    at_least,
    compared_with,
    cost_ratio,
    curves_of,
    further_targets,
    mean_and_error,
    mean_end,
    names_of,
    paced,
    ratio_in_turn,
    row_of,
)
from experiments.ladder.rungs import formats_of, rung_named
from experiments.ladder.side_by_side import processors, speed_of, timed
from experiments.tables.markdown import grid

SEEDS_TO_KEEP = 3  # what `kept` is decided on
CLEAR = 0.05  # p: what lies above is no verdict
RATIOS = ("rung", "seconds", "p", "with compiling", "cold", "tokens")
RATIOS_OF = ("compiled", "cold", "tokens")
SECONDS = ("training", "compiled", "cold")
RANGES = tuple(
    (to, what, said)
    for to in (None, TORCH_TUNED, TORCH)
    for what, said in (
        ("training", "seconds of training"),
        ("compiled", "seconds of training and compiling"),
    )
)
"""Baseline, or None for the rung below; cost; what the cost is called."""


def render(site: Site, path: Path) -> list[str]:
    """Returns the section of one data set and split.

    Args:
      site: with what is gathered.
      path: of the ladder's JSON, beside which that of the trials lies.
    """
    lines = [f"## {site.table}", "", *about(site, path)]
    if old := changed_since(site):
        said = ", ".join(f"{name} {count}" for name, count in old.items())
        lines += ["", f"Left out, runs of recipes that have changed since: {said}."]
    for baseline, what in ((TORCH_TUNED, "the tuned baseline"), (TORCH, "the first baseline")):
        target = mean_end(site, baseline)
        if math.isnan(target):
            continue
        lines += ["", f"### To the end of {what}: {target:.4f} bits per byte", ""]
        rows = {name: row_of(site, name, target, baseline) for name in names_of(site)}
        lines += [
            *_looking(rows, baseline),
            *_costs(site, rows),
            "",
            *_ratios(site, rows, baseline),
        ]
        if site.scale.held_out == "test":
            lines += ["", *_planned(site, baseline, target)]
    if any(not math.isnan(mean_end(site, baseline)) for baseline in (TORCH, TORCH_TUNED)):
        lines += ["", "### Over a range of targets", "", *_ranges(site)]
    if timed(site):
        lines += ["", "### Steps in turn, by processor", "", *_steps(site)]
    if site.scale.held_out == "validation":  # nothing is chosen on the test split
        lines += ["", "### What is kept, and what it leaves in", "", *_kept(site)]
    return lines


def _looking(rows: Mapping[str, Row], baseline: str) -> list[str]:
    """Which rows have lengths that suit the end of a baseline, where not all look for them."""
    suited = [name for name in rows if searched(name, baseline) and name not in BASELINES]
    if len(suited) == sum(name not in BASELINES for name in rows):
        return []
    return [
        f"Lengths that suit this loss are looked for by {', '.join(suited) or 'no rung'}. Others "
        "take at most what stands here: it is read off runs that are planned for another loss.",
        "",
    ]


def _costs(site: Site, rows: dict[str, Row]) -> list[str]:
    head = ["rung", "seeds", "steps", "tokens, k", "TFLOP", "training s", "with compiling, s"]
    head += ["cold, s", "tokens/s", "peak MB"]
    body = [_cost_row(site, row) for row in rows.values()]
    return grid(head, body, "l" + "r" * (len(head) - 1))


def _cost_row(site: Site, row: Row) -> list[str]:
    there = f"{len(row.reached)} of {len(row.seeds)}"
    peak = f"{row.peak_bytes / 1e6:,.0f}"
    if not row.reached:
        last = max(row.bits.values())
        return [row.name, there, "", "", "", f"not reached ({last:.3f})", "", "", "", peak]
    return [
        row.name,
        there,
        _with_error(row.mean("steps"), "{:,.0f}"),
        _with_error(_times(row.mean("tokens"), 1e-3), "{:,.0f}"),
        _with_error(_times(row.mean("flops"), 1e-12), "{:.3g}"),
        *(_with_error(paced(site, row, what), "{:.1f}") for what in SECONDS),
        _with_error(paced(site, row, "speed"), "{:,.0f}"),
        peak,
    ]


def _ratios(site: Site, rows: dict[str, Row], baseline: str) -> list[str]:
    """How much faster than the rung below and than each baseline, in all ways of counting."""
    lines = ["#### To the rung below", ""]
    body = []
    for row in rows.values():
        under = compared_with(row.name)
        if under is None or under not in rows:
            continue
        if searched(row.name, baseline) and searched(under, baseline):  # or no length suits
            body.append([row.name, *_compared(site, row, rows, under)])
    lines += grid(RATIOS, body, "l" + "r" * (len(RATIOS) - 1))
    for name in (name for name in baselines_of(site.scale) if name in rows):
        lines += ["", f"#### To {name}", ""]
        body = [[r.name, *_compared(site, r, rows, name)] for r in rows.values() if r.name != name]
        lines += grid(RATIOS, body, "l" + "r" * (len(RATIOS) - 1))
    return lines


def _compared(site: Site, row: Row, rows: dict[str, Row], to: str) -> list[str]:
    """A row of `RATIOS`."""
    cells = [*_ratio(site, row, rows, to)]
    return [*cells, *(_ratio(site, row, rows, to, what)[0] for what in RATIOS_OF)]


def _ratio(
    site: Site, row: Row, rows: dict[str, Row], to: str | None, what: str = "training"
) -> tuple[str, str]:
    """A ratio and its p-value; a lower bound where a baseline did not get there."""
    if to is None or to == row.name or to not in rows:
        return "", ""
    found = cost_ratio(site, row, rows[to], what)
    if found.pairs and not math.isnan(found.mean):
        return f"{_with_error(found, '{:.2f}')}x", p_value(found)
    least = at_least(site, row, to, what) if to in BASELINES else math.nan
    return ("" if math.isnan(least) else f"> {least:.1f}x"), ""


def p_value(found: Ratio) -> str:
    """Returns the p-value as text, nothing for a single pair.

    >>> p_value(Ratio(2.0, 0.1, 3, 0.0004)), p_value(Ratio(2.0, 0.1, 3, 0.042))
    ('< 0.001', '0.042')
    """
    if math.isnan(found.p):
        return ""
    return "< 0.001" if found.p < 0.001 else f"{found.p:.3f}"


def _times(pair: tuple[float, float], factor: float) -> tuple[float, float]:
    return pair[0] * factor, pair[1] * factor


def _with_error(pair: Sequence[float], form: str) -> str:
    mean, error = pair[:2]
    if math.isnan(mean):
        return ""
    plain = form.replace("+", "")  # an error has no sign
    return form.format(mean) + ("" if math.isnan(error) else f" ± {plain.format(error)}")


def _planned(site: Site, baseline: str, target: float) -> list[str]:
    """The ends of the very runs that the validation split chose, whole against whole."""
    planned = {name: planned_row(site, name, baseline) for name in names_of(site)}
    to = planned[baseline]
    body = []
    for name, row in planned.items():
        if not row.ends:
            continue
        ends = list(row.ends.values())
        tokens = mean_and_error([end.tokens / 1e3 for end in ends])
        bits = mean_and_error([end.bits for end in ends])
        over = mean_and_error([end.bits - target for end in ends])
        found = None if name == baseline else planned_ratio(site, row, to)
        there = sum(end.bits <= target for end in ends)
        body.append(
            [
                *(name, str(len(ends)), _with_error(tokens, "{:,.0f}")),
                *(_with_error(bits, "{:.4f}"), _with_error(over, "{:+.4f}"), str(there)),
                _with_error(paced(site, Row(name, row.ends), "training"), "{:.1f}"),
                f"{_with_error(found, '{:.2f}')}x" if found and found.pairs else "",
                p_value(found) if found else "",
            ]
        )
    head = ["rung", "seeds", "tokens, k", "bits at the end", "over the target"]
    head += ["seeds at or under it", "training s", f"to {baseline}", "p"]
    said = (
        "At the ends of the lengths that the validation split chose, every run with all that it "
        "took, whether it ended at the target here or not:"
    )
    return [said, "", *grid(head, body, "l" + "r" * (len(head) - 1))]


def _ranges(site: Site) -> list[str]:
    """Ratios to baselines at other losses."""
    first, last = mean_end(site, TORCH), mean_end(site, TORCH_TUNED)
    middle = sorted(further_targets(site), reverse=True)
    if math.isnan(first) or math.isnan(last):
        return ["The baselines have not run yet."]
    lines = [
        "To so many bits per byte. At the ends of the two baselines as above, and at the first "
        "one's between rows that look for lengths to suit it. Between them along the runs that "
        "are planned for the tuned one's end, between two evaluations; empty where a target lies "
        "before the first of those, or where a row has not been timed. > is against all of a "
        "baseline that did not get there.",
    ]
    names = names_of(site)
    suited = [name for name in names if searched(name, TORCH)]
    found = {target: {name: along(site, name, target) for name in names} for target in middle}
    found[first] = {name: row_of(site, name, first, TORCH) for name in suited}
    found[last] = {name: row_of(site, name, last, TORCH_TUNED) for name in names}
    targets = [first, *(target for target in middle if last < target < first), last]
    for baseline, what, about_ in RANGES:
        body = []
        for name in names:
            if to := baseline or compared_with(name):
                cells = [_range(site, name, to, found[target], what) for target in targets]
                body.append([name, *cells])
        head = ["rung", *(f"{target:.3f}" for target in targets)]
        lines += ["", f"To {baseline or 'the rung below'}, {about_}:", ""]
        lines += grid(head, body, "l" + "r" * len(targets))
    return lines


def _range(site: Site, name: str, to: str, rows: dict[str, Row], what: str) -> str:
    """A ratio at one of the targets; 1 of a row to itself."""
    if name not in rows or not rows[name].seeds:
        return ""
    if not rows[name].reached:
        return "not reached"
    return "1" if name == to else _ratio(site, rows[name], rows, to, what)[0]


def _steps(site: Site) -> list[str]:
    """Pace of every row on each processor that has timed some, and what follows from it."""
    target, where = mean_end(site, TORCH_TUNED), processors(site)
    # Those without runs as well: what is slower than another program is not to be passed over.
    rows = {n: row_of(site, n, target, TORCH_TUNED) for n in rows_of(site.scale)}
    body = []
    for name, row in rows.items():
        cells = []
        for processor in where:
            speed = speed_of(site, name, processor)
            pace = "" if speed is None else f"{speed.ratio:.2f} ± {speed.ratio * speed.error:.2f}x"
            found = ratio_in_turn(site, row, rows[TORCH_TUNED], processor)
            cells += [pace, f"{_with_error(found, '{:.2f}')}x" if found and found.pairs else ""]
        if name != TORCH_TUNED and any(cells):
            body.append([name, *cells])
    said = (
        "Tokens a second to the tuned baseline's, medians with standard errors, and the ratio of "
        "seconds to its end that follows from them."
    )
    head = ["rung", *(f"{p}: {what}" for p in where for what in ("tokens a second", "seconds"))]
    return [said, "", *grid(head, body, "l" + "r" * (len(head) - 1))]


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
    head = ["rung", "in the recipe", "pays in time", "bits at the end of each length", "formats"]
    return grid(head, body, "lllll")


def verdict(site: Site, row: Row) -> tuple[str, str]:
    """Returns whether a rung is in the recipe, and what its time to the target says of that.

    Time is that of the tokens at the pace of steps that were timed in turn, on the processor that
    has timed most of those that have timed both. A rung pays if the mean
    logarithm of its ratios to the rung below lies above 0, and would lie as far off by chance in
    one of twenty cases at most (a paired t-test), over three seeds at least; it does not if it lies
    below as clearly. Where the rung below never gets there, both are held against the first
    baseline's end, if both look for lengths that suit it. Without such timings there is no verdict,
    since runs of different hours differ by more than many a rung is worth. Seeds of either that
    missed the target leave no verdict: those that are left would be the good ones.
    """
    kept = rung_named(row.name).kept
    word = "yes" if kept else "no"
    under = compared_with(row.name)
    if under is None:
        return word, ""
    to = row_of(site, under, mean_end(site, TORCH_TUNED), TORCH_TUNED)
    goal = ""
    if to.seeds and not to.reached and searched(row.name, TORCH) and searched(under, TORCH):
        row, to = (row_of(site, name, mean_end(site, TORCH), TORCH) for name in (row.name, under))
        goal = f" (to the first baseline's end: {under} never gets to the tuned one's)"
    ratios = {where: ratio_in_turn(site, row, to, where) for where in processors(site)}
    where, found = next(((w, f) for w, f in ratios.items() if f is not None), ("", None))
    if found is None:
        return word, "no verdict: its steps have not been timed in turn (--side-by-side)"
    if not found.pairs:
        return word, "nothing to compare"
    figure = f"{_with_error(found, '{:.2f}')}x"
    if where != next(iter(ratios)):
        figure += f" on {where}"
    pairs = set(row.seeds) & set(to.seeds or row.seeds)
    there = pairs & set(row.reached) & set(to.reached if to.seeds else pairs)
    if late := [str(seed) for seed in sorted(pairs - there)]:
        return word, f"no verdict, {figure}: the target was not reached with seed {', '.join(late)}"
    if found.pairs < SEEDS_TO_KEEP:
        plural = "s" if found.pairs > 1 else ""
        return word, f"no verdict from {found.pairs} seed{plural}, {figure}"
    pays = "unclear" if found.p > CLEAR else "yes" if found.errors > 0 else "no"
    says = f"{pays}, {figure}, p {p_value(found)}{goal}"
    if pays == "unclear" and kept:
        says += " (**kept without proof**)"
    elif pays == ("no" if kept else "yes"):
        says += " (**not what the recipe does**)"
    return word, says


def _ends(site: Site, name: str) -> Sequence[float]:
    """Bits at the end of each run of the first seed, by length."""
    runs = curves_of(site, name)
    first = runs[min(runs)]
    return [float(points[-1]["bits"]) for points in first if points]
