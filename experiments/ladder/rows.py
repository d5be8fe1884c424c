"""The figures of a ladder: what every rung took to a target, and how much less than others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from experiments.ladder.climb import (
    BASELINES,
    LEARNS_AS,
    TORCH,
    TORCH_TUNED,
    Site,
    lengths_of,
)
from experiments.ladder.measure import BEYOND, Reached, fastest, last_bits, reached, whole
from experiments.ladder.rungs import RUNGS, below
from experiments.ladder.side_by_side import EQUAL, Speed, clock_of, speed_against, speed_of, timed

Curves = Mapping[int, Sequence[Sequence[Mapping[str, Any]]]]
"""seed -> the runs of a row, of several lengths, each as its evaluations."""


@dataclass(frozen=True)
class Row:
    """What a rung or a baseline took to a target.

    Attributes:
      name: of it.
      reached: seed -> costs there, for the seeds that got there.
      seeds: all that were run.
      bits: seed -> bits per byte at the end of its longest run.
      peak_bytes: the largest resident memory of its processes.
    """

    name: str
    reached: Mapping[int, Reached] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    bits: Mapping[int, float] = field(default_factory=dict)
    peak_bytes: float = math.nan

    def mean(self, what: str) -> tuple[float, float]:
        """Returns mean and standard error of a cost over the seeds that reached the target."""
        return mean_and_error([cost(each, what) for each in self.reached.values()])


def cost(reached: Reached, what: str) -> float:
    """Returns one cost: a field of `Reached`, "compiled" (training and compilation), or "speed"
    (tokens a second of training)."""
    if what == "compiled":
        return reached.training + reached.compiling
    if what == "speed":
        return reached.tokens / reached.training if reached.training else math.nan
    return float(getattr(reached, what))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error, NaN for what there are too few values for.

    >>> mean_and_error([1.0, 3.0]), mean_and_error([2.0])
    ((2.0, 1.0), (2.0, nan))
    """
    if not len(values):
        return math.nan, math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def curves_of(site: Site, name: str) -> Curves:
    """Returns all finished runs of a row by seed."""
    seeds = sorted(
        {int(seed) for each in site.gathered.index.get(site.table, {}).values() for seed in each}
    )
    found = {
        seed: [values["points"] for values in lengths_of(site, name, seed).values()]
        for seed in seeds
    }
    return {seed: runs for seed, runs in found.items() if runs}


def row_of(site: Site, name: str, target: float, end_of: str | None = None) -> Row:
    """Returns what a row took to a target in bits per byte.

    Args:
      site: with what is finished.
      name: of a rung or baseline.
      target: bits per byte.
      end_of: the baseline whose mean end the target is; a seed of its own that ends above the mean
        counts with all of its run.
    """
    curves = curves_of(site, name)
    # Where no further length may be tried, those there are do for what lies just past them.
    beyond = BEYOND if site.scale.held_out == "test" else 1.0
    ends_it = LEARNS_AS.get(name, name) == end_of
    found: dict[int, Reached] = {}
    for seed, runs in curves.items():
        there = fastest(runs, target, beyond)
        if there is None and ends_it:
            there = whole(runs[-1][-1])
        if there is not None:
            found[seed] = priced(site, name, there)
    peaks = [
        values["peak_bytes"] for seed in curves for values in lengths_of(site, name, seed).values()
    ]
    ends = {seed: last_bits(runs[-1]) for seed, runs in curves.items()}
    return Row(name, found, tuple(curves), ends, max(peaks, default=math.nan))


def priced(site: Site, name: str, found: Reached) -> Reached:
    """Returns costs with the seconds that their tokens take by the steps timed in turn.

    The seconds of runs stand where nothing of the data set has been timed; a row that is missing
    among those that have been has none (NaN).
    """
    if not timed(site):
        return found
    clock = clock_of(site, name)
    if clock is None:
        return dataclasses.replace(found, training=math.nan, compiling=math.nan, cold=math.nan)
    training = clock.token * found.tokens
    return dataclasses.replace(
        found, training=training, compiling=clock.compiling, cold=clock.starting + training
    )


def along(site: Site, name: str, target: float) -> Row:
    """Returns what a row took to a target on its way to the tuned baseline's end.

    Of each seed the shortest run counts that gets there (the longest where none does), between two
    of its evaluations: what a run is planned for decides how soon it is where. A seed whose first
    evaluation lies under the target already is left out of both `reached` and `seeds`.
    """
    goal = mean_end(site, TORCH_TUNED)
    found: dict[int, Reached] = {}
    seeds = []
    for seed, runs in curves_of(site, name).items():
        points = next((run for run in runs if last_bits(run) <= goal), runs[-1])
        if not points or float(points[0]["bits"]) <= target:
            continue
        seeds.append(seed)
        if (there := reached(points, target)) is not None:
            found[seed] = priced(site, name, there)
    return Row(name, found, tuple(seeds))


def paced(site: Site, row: Row, what: str) -> tuple[float, float]:
    """Returns the mean of a cost in time and its standard error, that of the pace included.

    All seeds have one pace, timed against the tuned baseline's, which counts as exact: its tokens a
    second have no error (NaN).
    """
    mean, error = row.mean(what)
    speed = speed_of(site, row.name)
    if speed is None or not timed(site):
        return mean, error
    if what == "speed":
        return mean, mean * speed.error if row.name != TORCH_TUNED else math.nan
    return mean, math.hypot(error, row.mean("training")[0] * speed.error)


class Ratio(NamedTuple):
    """How many times the cost of one row another one had, over paired seeds.

    Attributes:
      mean: of the ratios.
      error: its standard error, NaN for one pair.
      pairs: how many.
      p: of a two-sided paired t-test of the logarithms against 0, NaN for one pair.
      errors: the mean logarithm in its standard errors, NaN for one pair.
    """

    mean: float
    error: float
    pairs: int
    p: float = math.nan
    errors: float = math.nan


def ratio_of(ratios: Sequence[float], speed: Speed = EQUAL) -> Ratio:
    """Returns mean and error of paired ratios, and how clearly their logarithms lie off 0.

    With ``m`` and ``s`` mean and standard error of the logarithms over n pairs, ``t = m / s`` has
    Student's distribution of n - 1 degrees of freedom if there is no difference. A factor of all
    pairs adds its own error: ``m + log f`` and ``sqrt(s^2 + e^2)``, on the same degrees.

    Args:
      ratios: of the pairs.
      speed: a factor that all of them share, and the standard error of its logarithm.

    >>> found = ratio_of([1.9, 2.0, 2.1])
    >>> found.pairs, round(found.mean, 6), 0.001 < found.p < 0.01
    (3, 2.0, True)
    """
    mean, error = mean_and_error([speed.ratio * value for value in ratios])
    count = len(ratios)
    if count < 2:
        return Ratio(mean, error, count)
    error = math.hypot(error, mean * speed.error)
    logs = np.log(ratios) + math.log(speed.ratio)
    middle = float(logs.mean())
    spread = math.hypot(float(logs.std(ddof=1)) / math.sqrt(count), speed.error)
    if spread == 0.0:  # equal to the last bit: of counts, not of times
        errors = math.copysign(math.inf, middle) if middle else 0.0
    else:
        errors = middle / spread
    from scipy.stats import t

    return Ratio(mean, error, count, float(2 * t.sf(abs(errors), count - 1)), errors)


def ratio(of: Row, to: Row, what: str = "training") -> Ratio:
    """Returns how many times the cost of `of` the row `to` had.

    Seeds are paired: same initial parameters where the model is the same, same order of the data.
    """
    return ratio_of(_pairs(of, to, what))


def _pairs(of: Row, to: Row, what: str) -> list[float]:
    seeds = sorted(set(of.reached) & set(to.reached))
    return [cost(to.reached[s], what) / cost(of.reached[s], what) for s in seeds]


def ratio_in_turn(site: Site, of: Row, to: Row, processor: str | None = None) -> Ratio | None:
    """Returns the ratio of tokens, times that of seconds a token that was timed in turn.

    Runs of different hours do not tilt it, as they do the ratio of their seconds. None where the
    steps of either have not been timed (`experiments.ladder.side_by_side`), on the processor given
    or on the one that has timed most.
    """
    speed = speed_against(site, of.name, to.name, processor)
    return None if speed is None else ratio_of(_pairs(of, to, "tokens"), speed)


def cost_ratio(site: Site, of: Row, to: Row, what: str = "training") -> Ratio:
    """Returns the ratio of a cost, with the error of the pace that its seconds come from.

    A row that has no seconds, since others were timed and it was not, has no ratio either (NaN).
    """
    speed = speed_against(site, of.name, to.name)
    if speed is None or what == "tokens":
        return ratio(of, to, what)
    if what == "training":
        return ratio_of(_pairs(of, to, "tokens"), speed)
    share = of.mean("training")[0] / of.mean(what)[0]  # what else there is has no pace
    return ratio_of(_pairs(of, to, what), Speed(1.0, speed.error * share))


def at_least(site: Site, of: Row, baseline: str, what: str = "training") -> float:
    """Returns the ratio to all of a baseline that did not reach the target: at least so many times.

    NaN where there is nothing to compare.
    """
    found = []
    for seed, runs in curves_of(site, baseline).items():
        if seed in of.reached:
            all_of_it = priced(site, baseline, whole(runs[-1][-1]))
            found.append(cost(all_of_it, what) / cost(of.reached[seed], what))
    return mean_and_error(found)[0]


def names_of(site: Site) -> list[str]:
    """Returns the baselines and rungs that have runs, from the bottom up."""
    names = [*BASELINES, *(rung.name for rung in RUNGS)]
    return [name for name in names if curves_of(site, name)]


def compared_with(name: str) -> str | None:
    """Returns the row below: for the first rung the baseline that learns alike, None for that."""
    if name in BASELINES:
        return {TORCH_TUNED: TORCH, **LEARNS_AS}.get(name)
    return below(name) or TORCH


def mean_end(site: Site, baseline: str) -> float:
    """Returns the mean bits per byte at the end of a baseline's whole budget; NaN without runs.

    Of the scale's `target_seeds` first seeds, all of them and no further ones: so that it never
    moves.
    """
    ends = []
    for seed in range(site.scale.target_seeds):
        run = lengths_of(site, baseline, seed).get(site.scale.tokens)
        if run is None:
            return math.nan
        ends.append(last_bits(run["points"]))
    return mean_and_error(ends)[0]


def further_targets(site: Site, shares: Sequence[float] = (0.25, 0.5, 0.75)) -> list[float]:
    """Returns the mean bits per byte of the tuned baseline after shares of its budget, falling."""
    ends: list[list[float]] = [[] for _ in shares]
    for seed in range(site.scale.target_seeds):
        run = lengths_of(site, TORCH_TUNED, seed).get(site.scale.tokens)
        if run is None:
            continue
        for share, found in zip(shares, ends, strict=True):
            due = share * site.scale.tokens
            late = [p for p in run["points"] if p["tokens"] >= due]
            found.append(float(late[0]["bits"]))
    return [float(np.mean(found)) for found in ends if found]
