"""What a rung is worth at four sizes, fitted against size, and said of 124 M beforehand.

At each size the ladder is climbed from `rate`, our GPT-2 block under tuned AdamW, whose loss at the
end of its budget is the target: 0.3 of the scale's budget at the smallest, more with the root of
the parameters. Rates of AdamW go down with the width, as muP has it for kernels; those of Muon hold
as they are. The ratio of a rung is that of its seconds of training (`--sizes --side-by-side` times
the steps in turn, as for the ladder) to those of the next one below that was run at any size, and
that of the whole recipe to `rate`; its mean logarithm at a size is fitted as a line over the
logarithm of the parameters (embeddings included), and the range is where a further size would lie
in 19 of 20 cases, by Student's distribution. A ratio measured at 124 M (`--scale gpu`) stands
beside what the line says, once there is one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.attempts import Failures
from experiments.json_files import write_text
from experiments.ladder.climb import Site, climb, scale_named, target_of
from experiments.ladder.rows import curves_of, mean_end, ratio, row_of
from experiments.ladder.rungs import RUNGS, below, recipe_of, rung_named
from experiments.ladder.scales import SCALES, Scale
from experiments.ladder.side_by_side import SIDE_BY_SIDE, measure, timed
from experiments.tables.gathered import Gathered
from experiments.tables.markdown import grid
from experiments.tables.report import read
from model.flops import parameter_count

FROM = "rate"
PREDICTED = 124e6
SHARE = 0.3  # of the scale's budget, at the smallest size
RUNS = 4
SHAPES: Mapping[str, tuple[int, int, int]] = {
    # layers, width, heads: 0.5, 1.3, 4 and 12 M parameters with 2,048 pieces
    "0.5M": (2, 96, 3),
    "1.3M": (4, 144, 4),
    "4M": (6, 216, 6),
    "12M": (8, 336, 8),
}


class Line(NamedTuple):
    """A line through points, and what it says elsewhere.

    Attributes:
      value: at the new place.
      error: standard error of a new point there, NaN below three points.
      slope: of the line.
    """

    value: float
    error: float
    slope: float


def line(xs: Sequence[float], ys: Sequence[float], at: float) -> Line:
    """Returns the least-squares line through points, read at `at`.

    The error of a new observation is ``s * sqrt(1 + 1/n + (at - mean)^2 / Sxx)``, s from n - 2
    degrees of freedom.

    Raises:
      ValueError: fewer than two different places.

    >>> line([0.0, 1.0, 2.0], [1.0, 3.0, 5.0], 4.0)[:3]
    (9.0, 0.0, 2.0)
    """
    x, y = np.asarray(xs, float), np.asarray(ys, float)
    middle, spread = x.mean(), float(((x - x.mean()) ** 2).sum())
    if spread == 0.0:
        raise ValueError("a line needs points at two places at least")
    slope = float(((x - middle) * (y - y.mean())).sum()) / spread
    residuals = y - y.mean() - slope * (x - middle)
    value = float(y.mean() + slope * (at - middle))
    if len(x) < 3:
        return Line(value, math.nan, slope)
    s = math.sqrt(float((residuals**2).sum()) / (len(x) - 2))
    return Line(value, s * math.sqrt(1 + 1 / len(x) + (at - middle) ** 2 / spread), slope)


def scales_of(scale: Scale) -> dict[str, Scale]:
    """Returns the scale at four sizes; the tiny one at sizes for trying the command out."""
    base = scale.model
    shapes = SHAPES
    if scale.name == "tiny":
        shapes = {"8k": (1, 16, 1), "20k": (1, 32, 2), "40k": (2, 32, 2), "90k": (2, 48, 3)}
    found = {}
    first = None
    for label, (layers, width, heads) in shapes.items():
        model = dataclasses.replace(base, layers=layers, width=width, heads=heads)
        size = _parameters(model, scale)
        first = first or size
        tokens = SHARE * scale.tokens * (size / first) ** 0.5
        quantum = scale.search.quantum
        chosen = scale.choices
        factor = base.width / width
        choices = dataclasses.replace(
            chosen,
            adamw=dataclasses.replace(
                chosen.adamw, learning_rate=factor * chosen.adamw.learning_rate
            ),
            rows_rate=factor * chosen.rows_rate,
            block_rate=factor * chosen.block_rate,
        )
        found[label] = scale.at(
            model=model,
            tokens=round(tokens / quantum) * quantum,
            choices=choices,
            runs=RUNS,
            target_seeds=1,
            label=label,
        )
    return found


def run_sizes(
    site: Site,
    names: tuple[str, ...],
    seeds: int,
    path: Path,
    failures: Failures,
    only: tuple[str, ...] = (),
) -> list[Path]:
    """Climbs at every size, and returns the files written.

    Args:
      site: where; the scale to be resized.
      names: rungs; all that are kept if empty.
      seeds: how many.
      path: of the JSON; Markdown and picture lie beside it.
      failures: takes in rungs that failed; others go on.
      only: labels of sizes; all if empty.

    Raises:
      ValueError: a rung below the first that is measured, or no such size.
    """
    chosen = _above(names)

    def climbed(label: str, small: Site) -> None:
        with failures.passed_over(f"{FROM} at {label}, and so the size"):
            target_of(small, FROM, max(seeds, small.scale.target_seeds))
            for name in chosen:
                for seed in range(seeds):
                    with failures.passed_over(f"{name} at {label}, seed {seed}"):
                        climb(small, name, seed, mean_end(small, FROM))

    return _at_every_size(site, path, climbed, only)


def time_sizes(
    site: Site,
    names: tuple[str, ...],
    path: Path,
    failures: Failures,
    only: tuple[str, ...] = (),
) -> list[Path]:
    """Times steps in turn at every size, and returns the files written.

    Args:
      site: where; the scale to be resized.
      names: rungs; the first and all that are kept if empty.
      path: of the JSON.
      failures: takes in rungs that failed; others go on.
      only: labels of sizes; all if empty.

    Raises:
      ValueError: a rung below the first that is measured, or no such size.
    """
    chosen = (FROM, *_above(names))

    def measured(label: str, small: Site) -> None:
        for name in chosen:
            with failures.passed_over(f"{SIDE_BY_SIDE}{name} at {label}"):
                measure(small, name)

    return _at_every_size(site, path, measured, only)


def _at_every_size(
    site: Site, path: Path, work: Callable[[str, Site], None], only: tuple[str, ...]
) -> list[Path]:
    """Does the work at one size after another until the minutes are up; writes what is there."""
    scales = scales_of(site.scale)
    if unknown := [label for label in only if label not in scales]:
        raise ValueError(f"no size is called {unknown[0]!r}; there are {', '.join(scales)}")
    try:
        for label, scale in scales.items():
            if only and label not in only:
                continue
            work(label, dataclasses.replace(site, scale=scale))
    except TimeoutError as late:
        print(f"\nthe minutes are up: {late}")
    finally:
        site.save()
        written = write_sizes(site, path)
        print(f"\nwritten: {', '.join(map(str, written))}")
    return written


def _above(names: tuple[str, ...]) -> tuple[str, ...]:
    """The rungs named that lie above the first that is measured; all that are kept if none is.

    Raises:
      ValueError: one of the names lies below it.
    """
    order = [rung.name for rung in RUNGS]
    above = RUNGS[order.index(FROM) + 1 :]
    if low := set(names) - {FROM, *(rung.name for rung in above)}:
        raise ValueError(f"{min(low)} lies below {FROM}, from which the sizes are measured")
    return tuple(rung.name for rung in above if (rung.name in names if names else rung.kept))


def ratios_of(site: Site, scale: Scale, name: str, to: str) -> list[float]:
    """Returns seconds of another rung over those of a rung, a figure a seed.

    Args:
      site: with what is gathered.
      scale: of a size.
      name: of the rung.
      to: of the other.
    """
    small = dataclasses.replace(site, scale=scale)
    target = mean_end(small, FROM)
    if math.isnan(target):
        return []
    rows = [row_of(small, each, target, FROM) for each in (name, to)]
    seeds = sorted(set(rows[0].reached) & set(rows[1].reached))
    found = [rows[1].reached[s].training / rows[0].reached[s].training for s in seeds]
    return [each for each in found if not math.isnan(each)]  # of a row that was not timed


def _of_one_clock(site: Site, scales: Mapping[str, Scale]) -> dict[str, Scale]:
    """The sizes whose steps have been timed in turn; all of them if none has."""
    there = {n: s for n, s in scales.items() if timed(dataclasses.replace(site, scale=s))}
    return there or dict(scales)


def _measured_below(sites: Sequence[Site], name: str) -> str | None:
    """The next rung below that was run at any of the sizes: the same one at all of them."""
    under = below(name)
    while under is not None and not any(curves_of(site, under) for site in sites):
        under = below(under)
    return under


def write_sizes(site: Site, path: Path) -> list[Path]:
    """Writes the table, the fit and the picture from what is gathered."""
    scales = scales_of(site.scale)
    sizes = {label: _parameters(scale.model, scale) for label, scale in scales.items()}
    lines = [f"# Rungs against size, scale {site.scale.name}", ""]
    lines += [f"    python -m experiments.speedrun --scale {site.scale.name} --sizes", ""]
    lines += [" ".join((__doc__ or "").split()), ""]
    compared_at = _of_one_clock(site, scales)
    by_runs = not any(timed(dataclasses.replace(site, scale=scale)) for scale in scales.values())
    if left := [label for label in scales if label not in compared_at]:
        lines += [f"Not run or not timed, and so left out: {', '.join(left)}.", ""]
    if by_runs:
        said = "Seconds are those of the runs, as no steps have been timed: nothing is foretold"
        lines += [f"**{said} from hours that differ.**", ""]
    body, points = [], {}
    sites = [dataclasses.replace(site, scale=scale) for scale in scales.values()]
    order = [rung.name for rung in RUNGS]
    compared: list[tuple[str, str, str]] = [
        (name, name, under)
        for name in order[order.index(FROM) + 1 :]
        if (under := _measured_below(sites, name))
    ]
    if whole := _whole(site, scales):
        compared.append((f"{whole}, to {FROM}", whole, FROM))
    for title, name, to in compared:
        found = {label: ratios_of(site, scale, name, to) for label, scale in compared_at.items()}
        means = {label: float(np.exp(np.mean(np.log(v)))) for label, v in found.items() if v}
        # Seeds of a size share its rates and its pace: they are one point.
        pairs = [(sizes[label], mean) for label, mean in means.items()]
        if not pairs:
            continue
        points[title] = pairs
        cells = [f"{means[label]:.2f}x" if label in means else "" for label in scales]
        foretold = ("", "") if by_runs else _prediction(pairs)
        body.append([title, *cells, *foretold, _measured(path, name, to)])
    head = ["rung", *(f"{sizes[label] / 1e6:.2f} M" for label in scales)]
    head += ["per tenfold", "said of 124 M", "measured at 124 M"]
    lines += grid(head, body, "l" + "r" * (len(head) - 1))
    written = [path, path.with_suffix(".md")]
    if points:
        image = path.with_suffix(".png")
        _draw(points, image, lines=not by_runs)
        written.append(image)
        lines += ["", f"![Ratios against parameters]({image.name})"]
    write_text(written[1], "\n".join(lines) + "\n")
    return written


def _prediction(pairs: Sequence[tuple[float, float]]) -> tuple[str, str]:
    xs = [math.log(size) for size, _ in pairs]
    if len(set(xs)) < 3:  # a line through two points says nothing of how far off it is
        return "", ""
    fit = line(xs, [math.log(value) for _, value in pairs], math.log(PREDICTED))
    from scipy.stats import t

    # Where a new size lies in 19 of 20 cases, if the line is one.
    reach = float(t.ppf(0.975, len(pairs) - 2)) * fit.error
    low, high = math.exp(fit.value - reach), math.exp(fit.value + reach)
    return f"x{10**fit.slope:.2f}", f"{math.exp(fit.value):.2f}x ({low:.2f} to {high:.2f})"


def _whole(site: Site, scales: Mapping[str, Scale]) -> str | None:
    """The highest kept rung that was measured at every size: the recipe as far as it goes."""
    sites = [dataclasses.replace(site, scale=scale) for scale in scales.values()]
    kept = [rung.name for rung in RUNGS if rung.kept and rung.name != FROM]
    found = [name for name in kept if all(curves_of(small, name) for small in sites)]
    return found[-1] if found else None


def _measured(path: Path, name: str, to: str) -> str:
    """The ratio of the 124 M ladder, where one lies beside."""
    other = path.with_name("speedrun-gpu.json")
    if not other.exists():
        return ""
    gathered: Gathered = read(other)
    for table in gathered.index:
        far = Site(scale_named(SCALES["gpu"], table), Path(), gathered)
        target = mean_end(far, FROM)
        if math.isnan(target):
            continue
        found = ratio(row_of(far, name, target, FROM), row_of(far, to, target, FROM))
        if found.pairs:
            return f"{found.mean:.2f}x"
    return ""


def _draw(points: Mapping[str, Sequence[tuple[float, float]]], path: Path, *, lines: bool) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Any = figure.add_subplot()
    for name, pairs in points.items():
        xs, ys = zip(*pairs, strict=True)
        (drawn,) = axes.plot(xs, ys, marker="o", linestyle="", label=name)
        if lines and len(set(xs)) > 2:
            ends = [min(xs), PREDICTED]
            logs = [math.log(x) for x in xs], [math.log(y) for y in ys]
            fitted = [math.exp(line(*logs, math.log(x)).value) for x in ends]
            axes.plot(ends, fitted, color=drawn.get_color(), linewidth=0.8)
    axes.axhline(1.0, color="grey", linewidth=0.6)
    axes.axvline(PREDICTED, color="grey", linewidth=0.6, linestyle=":")
    axes.set(xlabel="parameters", ylabel="times as fast as what it is compared with", xscale="log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.yaxis.set_minor_formatter("{x:g}x")
    axes.legend(fontsize=7, frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _parameters(model: Any, scale: Scale) -> int:
    kind, _, number = scale.tokenizer.partition(":")
    pieces = int(number) if kind == "sentencepiece" else 257
    untied = recipe_of(rung_named("muon").name, scale.at(model=model)).model
    return parameter_count(dataclasses.replace(untied, vocabulary_size=pieces))
