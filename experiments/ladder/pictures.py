"""The ladder drawn: loss against time, and what every rung takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.ladder.climb import (
    BASELINES,
    TORCH,
    TORCH_BFLOAT16,
    TORCH_COMPILED,
    TORCH_TUNED,
    Site,
    lengths_of,
)
from experiments.ladder.rows import curves_of, mean_end, names_of, paced, row_of
from experiments.ladder.rungs import RUNGS
from experiments.ladder.side_by_side import clock_of, timed


def draw(site: Site, path: Path) -> bool:
    """Draws both into a PNG; returns False where there is nothing to draw yet."""
    from matplotlib.figure import Figure

    names = names_of(site)
    target = mean_end(site, TORCH_TUNED)
    if not names or math.isnan(target):
        return False
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _losses(left, site, names, target)
    _bars(right, site, names, target)
    figure.suptitle(site.table, fontsize=10)
    figure.savefig(path, dpi=130)
    return True


def _losses(axes: Any, site: Site, names: list[str], target: float) -> None:
    from matplotlib import colormaps

    kept = {rung.name for rung in RUNGS if rung.kept}
    shown = [name for name in names if name in BASELINES or name in kept]
    coloured = sum(name not in BASELINES for name in shown)
    colours = colormaps["viridis"].resampled(max(coloured, 1))
    number = 0
    for name in shown:
        points = _shown_run(site, name, target)
        seconds = [seconds_at(site, name, p) for p in points]
        if any(map(math.isnan, seconds)):
            continue  # it has not been timed, and others have
        bits = [float(p["bits"]) for p in points]
        if name in BASELINES:
            dash = {TORCH_COMPILED: ":", TORCH_BFLOAT16: "-."}.get(name, "--")
            style: dict[str, Any] = {"color": "black", "linestyle": dash}
            style["alpha"] = 0.5 if name == TORCH else 1.0
        else:
            style = {"color": colours(number)}
            number += 1
        axes.plot(seconds, bits, marker=".", label=name, **style)
    for baseline in (TORCH, TORCH_TUNED):  # the targets
        if not math.isnan(end := mean_end(site, baseline)):
            axes.axhline(end, color="grey", linewidth=0.6)
    axes.set(xlabel="seconds of training", ylabel="bits per byte, held out", xscale="log")
    axes.legend(fontsize=7, frameon=False)
    _plain(axes)


def _shown_run(site: Site, name: str, target: float) -> list[dict[str, Any]]:
    """The run of the first seed that reaches the target first; its longest if none does."""
    runs = lengths_of(site, name, min(curves_of(site, name)))
    enough = [v for v in runs.values() if v["points"] and float(v["points"][-1]["bits"]) <= target]
    return list((enough[0] if enough else runs[max(runs)])["points"])


def _bars(axes: Any, site: Site, names: list[str], target: float) -> None:
    kept = {rung.name for rung in RUNGS if rung.kept}
    rows = [row_of(site, name, target, TORCH_TUNED) for name in names]
    rows = [row for row in rows if not math.isnan(_longest(site, row.name))]
    for place, row in enumerate(rows):
        there = len(row.reached) > 0
        mean, error = (
            paced(site, row, "training") if there else (_longest(site, row.name), math.nan)
        )
        colour = "black" if row.name in BASELINES else "tab:blue" if row.name in kept else "silver"
        bar = {"color": colour} if there else {"color": "white", "edgecolor": colour, "hatch": "//"}
        error = 0.0 if math.isnan(error) else error
        axes.barh(place, mean, xerr=error, **bar)
        text = f" {mean:.1f} s" if there else f" not reached in {mean:.0f} s"
        axes.text(mean + error, place, text, va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set(xlabel=f"seconds of training to {target:.3f} bits per byte")
    _plain(axes)


def _longest(site: Site, name: str) -> float:
    """Seconds of the longest run of the first seed; 0 where none came to an evaluation."""
    runs = curves_of(site, name)
    ends = (seconds_at(site, name, points[-1]) for points in runs[min(runs)] if points)
    return max(ends, default=0.0)


def seconds_at(site: Site, name: str, point: Mapping[str, Any]) -> float:
    """Seconds of training up to an evaluation: at the pace of steps timed in turn, if there is one.

    NaN for a row that was not timed where others were.
    """
    if not timed(site):
        return float(point["training"])
    clock = clock_of(site, name)
    return math.nan if clock is None else clock.token * point["tokens"]


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
