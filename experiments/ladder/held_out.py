"""The test split: opened for rungs that are named, at the lengths that the validation split chose.

The very runs between which a target was reached on the validation split are trained once more, now
measured on the test split; nothing is searched there. Its targets are the baselines' own ends on
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.attempts import Failures
from experiments.ladder.climb import (
    BASELINES,
    LEARNS_AS,
    TORCH,
    TORCH_TUNED,
    Site,
    bracket,
    enough,
    lengths_of,
    rows_of,
    searched,
)
from experiments.ladder.measure import Reached, whole
from experiments.ladder.rows import Ratio, mean_end, priced, ratio_of
from experiments.ladder.side_by_side import speed_against, timed

Planning = Mapping[tuple[str, int], set[int]]


def planned(site: Site, name: str, seed: int, baseline: str) -> int | None:
    """Returns the length that the validation split chose for the loss of a baseline, or None.

    Args:
      site: of either split.
      name: of a rung or baseline.
      seed: of the run.
      baseline: whose mean end is to be met: its own length is all of its budget.
    """
    if LEARNS_AS.get(name, name) == baseline or name == TORCH:
        return site.scale.tokens
    if not searched(name, baseline):
        return None
    there = site.on_validation
    return enough(there, LEARNS_AS.get(name, name), seed, mean_end(there, baseline))


def planned_bracket(site: Site, name: str, seed: int, baseline: str) -> set[int]:
    """Returns the lengths between which the validation split saw the loss of a baseline reached."""
    length = planned(site, name, seed, baseline)
    if length is None or name == TORCH or LEARNS_AS.get(name, name) == baseline:
        return {length} - {None}  # type: ignore[return-value]
    there = site.on_validation
    return bracket(there, LEARNS_AS.get(name, name), seed, mean_end(there, baseline))


def lengths_planned(site: Site, names: Sequence[str], seeds: int) -> Planning:
    """Returns the lengths of each row and seed whose runs are to be measured on the test split.

    Raises:
      ValueError: a baseline, or a seed of a rung, that has not run on the validation split.
    """
    there = site.on_validation
    found: dict[tuple[str, int], set[int]] = {}
    missing = []
    for name in names:
        for seed in range(max(seeds, site.scale.target_seeds) if name in BASELINES else seeds):
            if not lengths_of(there, LEARNS_AS.get(name, name), seed):
                missing.append(f"{name} (seed {seed})")
            brackets = (planned_bracket(site, name, seed, b) for b in (TORCH_TUNED, TORCH))
            found[name, seed] = set().union(*brackets)
    if missing:
        raise ValueError(
            f"the lengths of {', '.join(missing)} have not been found on the validation split; "
            "give the same command without --held-out test first"
        )
    return found


def open_test(site: Site, names: Sequence[str], seeds: int, failures: Failures) -> None:
    """Measures the rungs that are named, and the baselines, on the test split.

    Args:
      site: of the test split.
      names: of rungs, and of baselines.
      seeds: how many, from 0.
      failures: takes in rungs that failed.

    Raises:
      ValueError: no rung is named; one has not run on the validation split.
      TimeoutError: the minutes are up.
    """
    order = rows_of(site.scale)
    if not names:
        raise ValueError(
            "the test split is opened for rungs that are named, once they are chosen: --rung NAME"
        )
    chosen = [name for name in order if name in {TORCH, TORCH_TUNED, *names}]
    lengths = lengths_planned(site, chosen, seeds)
    for (name, seed), found in lengths.items():
        if not found:
            print(f"{name}, seed {seed}: reached no target on the validation split; left out")
        for tokens in sorted(found):
            if name in (TORCH, TORCH_TUNED):  # without which there is no target
                site.outcome(name, tokens, seed)
                continue
            with failures.passed_over(f"{name}, seed {seed}"):
                site.outcome(name, tokens, seed)


@dataclass(frozen=True)
class Planned:
    """The runs of a row that the validation split chose for a target.

    Attributes:
      name: of the row.
      ends: seed -> the last evaluation of its run, on the split of the site.
    """

    name: str
    ends: Mapping[int, Reached]


def planned_ratio(site: Site, of: Planned, to: Planned) -> Ratio | None:
    """Returns how many times the seconds of training the whole runs of another row took.

    By the runs' own seconds where no steps have been timed; None where others' have.
    """
    speed = speed_against(site, of.name, to.name)
    seeds = sorted(set(of.ends) & set(to.ends))
    if speed is None:
        seconds = [to.ends[s].training / of.ends[s].training for s in seeds]
        return None if timed(site) else ratio_of(seconds)
    return ratio_of([to.ends[s].tokens / of.ends[s].tokens for s in seeds], speed)


def planned_row(site: Site, name: str, baseline: str) -> Planned:
    """Returns the ends of the planned runs of a row, of the seeds that have run."""
    seeds = {int(s) for each in site.gathered.index.get(site.table, {}).values() for s in each}
    ends = {}
    for seed in sorted(seeds):
        runs = lengths_of(site, name, seed)
        length = planned(site, name, seed, baseline) if runs else None
        # The last evaluation, whatever it is: the run counts with all that it took.
        if length in runs and (points := runs[length]["points"]):
            ends[seed] = priced(site, name, whole(points[-1]))
    return Planned(name, ends)
