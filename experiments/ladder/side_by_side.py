"""Seconds a token, rung and tuned baseline in turn: what a loaded machine cannot tilt.

Seconds of whole runs are those of the hour they ran in. Here the step of each rung and that of the
tuned baseline take turns, each in a process of its own, and their ratio is the median over rounds.
From them the seconds of a rung are those of its tokens, so that runs may share the machine. What
decides whether a rung pays is timed once more by itself: its step and that of the rung below.

How fast one side's forms are beside the other's is a matter of the processor. Steps are timed on
each one apart, and seconds are those of the processor that has timed the most rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.busy import busy_cores
from experiments.grid import Measurement
from experiments.ladder.child import Job
from experiments.ladder.climb import (
    TORCH_TUNED,
    Site,
    data_name,
    job_of,
    recipe_key,
    rows_of,
    settings_cell,
)
from experiments.ladder.scales import Scale
from experiments.ladder.turns import ROUNDS, TOKENS, Taken, Turn, settings_of, take_turns
from experiments.machine import machine
from experiments.tables.ratios import paired

SIDE_BY_SIDE = "side by side, "
"""What titles of timed steps begin with; a row follows."""
_BESIDE = " beside "  # and what stands before the other row, where that is not the tuned baseline
PAIR_ROUNDS = 21  # of a rung and the one below: the few percent between them are to be told apart


class Speed(NamedTuple):
    """How many times as many tokens a row learns from in a second as another one.

    Attributes:
      ratio: the median over rounds in turn, or what follows from two such medians.
      error: standard error of its logarithm.
    """

    ratio: float
    error: float


EQUAL = Speed(1.0, 0.0)


class Clock(NamedTuple):
    """What a row takes on a machine that does nothing else.

    Attributes:
      token: seconds of training for one.
      compiling: seconds of the first step, summed over phases.
      starting: seconds from the start of the process until all is compiled.
    """

    token: float
    compiling: float
    starting: float


def processor_of(facts: Mapping[str, Any]) -> str:
    """Returns what steps are timed on, by the facts of a machine.

    >>> processor_of({"processor": "AMD EPYC", "cores": 2})
    'AMD EPYC, 2 cores'
    >>> processor_of({"processor": "AMD EPYC", "cores": 2, "gpu": "NVIDIA H100 80GB HBM3"})
    'NVIDIA H100 80GB HBM3'
    """
    return str(facts.get("gpu", f"{facts.get('processor', '')}, {facts.get('cores', 0)} cores"))


def item_of(site: Site, name: str, processor: str, to: str = TORCH_TUNED) -> Measurement:
    """Returns the measurement of a row against another one."""
    jobs = [job_of(site.scale, each, site.scale.tokens, 0) for each in (name, to)]
    rounds = {"rounds": _rounds(to), "tokens": TOKENS}
    about = {"side by side": [job.key for job in jobs], **rounds, "processor": processor}
    needs = tuple(map(settings_cell, jobs))
    return Measurement(title_of(name, processor, to), about, dict, needs)


def title_of(name: str, processor: str, to: str = TORCH_TUNED) -> str:
    """Returns the title under which the steps of a row stand.

    >>> title_of("muon", "AMD EPYC, 2 cores", to="block")
    'side by side, muon beside block on AMD EPYC, 2 cores'
    """
    beside = "" if to == TORCH_TUNED else _BESIDE + to
    return f"{SIDE_BY_SIDE}{name}{beside} on {processor}"


def name_of(title: str, processor: str) -> str:
    """Returns the row of such a title if the processor is its own, and all of it otherwise.

    >>> title = "side by side, muon beside block on A, 2 cores"
    >>> name_of(title, "A, 2 cores"), name_of(title, "B, 2 cores")
    ('muon', 'muon beside block on A, 2 cores')
    """
    rows = title.removeprefix(SIDE_BY_SIDE)
    own = rows.removesuffix(f" on {processor}")
    return rows if own == rows else own.partition(_BESIDE)[0]


def measure(site: Site, name: str, to: str = TORCH_TUNED) -> None:
    """Takes in how many times as long another row takes for a token as a row does.

    Does nothing if that is known of the processor at hand.

    Raises:
      TimeoutError: the minutes are up.
    """
    facts = machine()
    item = item_of(site, name, processor_of(facts), to)
    seeds = site.gathered.index.setdefault(_table(site), {}).setdefault(item.name, {})
    if not site.gathered.has(item):
        site.begin(item.name)
        others = {"busy": busy_cores()}
        values = {**_measured(site, name, to), "recipes": _recipes(site.scale, name, to), **others}
        site.gathered.add(item, values, facts)
    seeds["0"] = item.key
    site.save()


def speed_of(
    site: Site, name: str, processor: str | None = None, to: str = TORCH_TUNED
) -> Speed | None:
    """Returns the ratio of seconds a token, above 1 for a row faster than the tuned baseline.

    Or than another row that it was timed with.

    Of a median over n normal rounds with quartiles q1 and q3, 1.25 (q3 - q1) / (1.35 sqrt(n)) is
    the standard error.

    None if it has not been measured, or of other recipes than today's. It is the same on either
    split. The processor is the one that has timed the most rows unless one is given.
    """
    if name == to:
        return EQUAL
    values = _items(site, processor, to).get(name)
    if values is None or values["recipes"] != _recipes(site.scale, name, to):
        return None
    low, high = values["quartiles"]
    return Speed(
        values["ratio"], 1.25 * math.log(high / low) / (1.35 * math.sqrt(values["rounds"]))
    )


def speed_against(site: Site, name: str, other: str, processor: str | None = None) -> Speed | None:
    """Returns the ratio of seconds a token of any row to a row.

    As timed in turn where they were, and otherwise each by the tuned baseline's.
    """
    if direct := speed_of(site, name, processor, other):
        return direct
    mine, theirs = (speed_of(site, each, processor) for each in (name, other))
    if mine is None or theirs is None:
        return None
    return Speed(mine.ratio / theirs.ratio, math.hypot(mine.error, theirs.error))


def timed(site: Site) -> bool:
    """Whether any steps of the data set have been timed in turn."""
    return bool(processors(site))


def clock_of(site: Site, name: str) -> Clock | None:
    """Returns what a row takes by the steps timed in turn.

    The tuned baseline's figures are medians over all measurements that it took part in, and a
    rung's seconds for a token are those divided by its ratio.

    None if its steps have not been timed, or were for other recipes than today's.
    """
    speed, items = speed_of(site, name), _items(site)
    if speed is None or not items:
        return None
    base = Clock(
        *(float(np.median([v["baseline"][what] for v in items.values()])) for what in Clock._fields)
    )
    own = base._asdict() if name == TORCH_TUNED else items[name]
    return Clock(base.token / speed.ratio, own["compiling"], own["starting"])


def processors(site: Site) -> list[str]:
    """Returns the processors that timed steps against today's tuned baseline, most rows first."""
    counts = Counter(processor for processor, *_ in _timings(site))
    return sorted(counts, key=lambda name: (-counts[name], name))


def busy(site: Site) -> float:
    """Returns the most cores that were busy with something else when steps were timed.

    Of a row and the tuned baseline, or of any two rows.
    """
    where = next(iter(processors(site)), "")
    found = (_items(site, where, to).values() for to in rows_of(site.scale))
    return max((values.get("busy") or 0.0 for each in found for values in each), default=0.0)


def _items(
    site: Site, processor: str | None = None, to: str = TORCH_TUNED
) -> dict[str, Mapping[str, Any]]:
    """All that one processor has timed of the data set against a row, by the other one."""
    chosen = next(iter(processors(site)), "") if processor is None else processor
    return {name: values for where, name, values in _timings(site, to) if where == chosen}


def _timings(site: Site, to: str = TORCH_TUNED) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yields processor, row and figures of all that was timed against a row of today's recipe."""
    today = recipe_key(site.scale, to)
    for title, seeds in site.gathered.index.get(_table(site), {}).items():
        if not title.startswith(SIDE_BY_SIDE):
            continue
        cell = site.gathered.cells.get(seeds.get("0", ""))
        if cell and cell["values"].get("recipes", [])[1:] == [today]:
            rows, _, _ = title.removeprefix(SIDE_BY_SIDE).partition(" on ")
            name, _, other = rows.partition(_BESIDE)
            if (other or TORCH_TUNED) == to:
                facts = site.gathered.machines[cell["machine"]]
                yield processor_of(facts), name, cell["values"]


def _rounds(to: str) -> int:
    return ROUNDS if to == TORCH_TUNED else PAIR_ROUNDS


def _recipes(scale: Scale, name: str, to: str = TORCH_TUNED) -> list[str]:
    return [recipe_key(scale, each) for each in (name, to)]


def _table(site: Site) -> str:
    return data_name(site.scale.at(held_out="validation"))


class _Side(NamedTuple):
    """A row in turns: each of its phases has a process.

    Attributes:
      job: of the row.
      shares: of the run's tokens, by phase.
    """

    job: Job
    shares: list[float]

    def turns(self, label: str) -> dict[str, Turn]:
        return {f"{label} {phase}": Turn(self.job, phase) for phase in range(len(self.shares))}

    def seconds(self, taken: list[Taken]) -> list[float]:
        """For a token of the run, in every round."""
        of_phases = np.asarray([each.seconds for each in taken])
        return (np.asarray(self.shares) @ of_phases).tolist()


def _measured(site: Site, name: str, to: str) -> dict[str, Any]:
    """All phases of a row in turn with those of another one, and the whole runs."""
    mine, theirs = (_side(site, each) for each in (name, to))
    taken = take_turns({**mine.turns("mine"), **theirs.turns("theirs")}, _rounds(to))
    my_steps, their_steps = (
        [each for label, each in taken.items() if label.startswith(whose)]
        for whose in ("mine", "theirs")
    )
    found = paired(theirs.seconds(their_steps), mine.seconds(my_steps))
    own, other = _costs(my_steps), _costs(their_steps)
    token = float(np.median(theirs.seconds(their_steps)))
    return {
        "ratio": found["ratio"],
        "quartiles": list(found["quartiles"]),
        "rounds": _rounds(to),
        **own,
        "baseline": {"token": token, **other},
    }


def _side(site: Site, name: str) -> _Side:
    job = job_of(site.scale, name, site.scale.tokens, 0)
    phases = settings_of(job).phases
    tokens = [phase.steps * phase.batch_size * phase.sequence_length for phase in phases]
    return _Side(job, [count / sum(tokens) for count in tokens])


def _costs(steps: list[Taken]) -> dict[str, float]:
    """Of compiling all phases, and of starting with the first and going on to the others."""
    return {
        "compiling": sum(each.compiling for each in steps),
        "starting": steps[0].starting + sum(each.compiling for each in steps[1:]),
    }
