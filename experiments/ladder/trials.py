"""What is tried before a ladder is climbed, in what order, and what follows from it.

Trials come in groups. Each group holds what the groups before it chose and tries every value of its
own grid, whatever stands in `experiments/ladder/scales.py` for that: so a chain of groups can run
unattended, and gives the same runs again once its choices stand there. The torch baseline and our
recipe have equally many (a test counts them); rungs that it is not made of come on top, and so does
what was run outside of any group (`experiments.ladder.techniques.OUTSIDE_TRIALS`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.baselines import tune
from experiments.ladder.child import Job
from experiments.ladder.climb import (
    BASELINES,
    TORCH_TUNED,
    data_name,
    job_called,
    recipe_key,
)
from experiments.ladder.measure import last_bits
from experiments.ladder.rungs import RUNGS, rung_named
from experiments.ladder.scales import SCALES, Choices, Scale
from experiments.tables.gathered import Gathered

SEED = 100  # one that no table uses
Tried = Callable[[Scale], Mapping[str, Choices]]


@dataclass(frozen=True)
class Group:
    """Trials that differ in a few choices.

    Attributes:
      name: of its table.
      subject: the rung or baseline that is trained.
      trials: scale, with what was chosen before -> title -> choices.
      share: of the baseline's budget that a trial takes.
      with_rows: choices and rows -> choices with a batch of so many, for trials that take equal
        seconds whatever their batch; None for equal tokens.
    """

    name: str
    subject: str
    trials: Tried
    share: float = 1.0
    with_rows: Callable[[Choices, int], Choices] | None = None

    @property
    def side(self) -> str:
        """Whose choices these are; "beside" of a rung that nothing builds on."""
        if self.subject in BASELINES:
            return "torch"
        return "ours" if rung_named(self.subject).kept else "beside"


def groups() -> tuple[Group, ...]:
    """Returns all groups in the order in which they choose."""
    torch = (
        Group("torch-tuned, rate and schedule", TORCH_TUNED, tune.rates_and_schedules),
        Group("torch-tuned, batch", TORCH_TUNED, tune.batches, with_rows=tune.with_rows),
        Group("torch-tuned, betas", TORCH_TUNED, tune.betas),
        Group("torch-tuned, decay", TORCH_TUNED, tune.decays),
        Group("torch-tuned, warmup", TORCH_TUNED, tune.warmups),
        Group("torch-tuned, clipping", TORCH_TUNED, tune.clips),
        Group("torch-tuned, rate again", TORCH_TUNED, tune.rates_again),
        Group("torch-tuned, betas again", TORCH_TUNED, tune.second_moments_again),
    )
    ours = (
        Group(r.name, r.name, r.trials, r.trial_share, r.with_rows)
        for r in RUNGS
        if r.trials is not None
    )
    return (*torch, *ours)


def groups_named(names: Sequence[str]) -> tuple[Group, ...]:
    """Returns the groups of rungs or of the tuned baseline; all for "all".

    Raises:
      ValueError: a rung with nothing to tune.

    >>> [group.name for group in groups_named(["muon"])]
    ['muon']
    """
    known = groups()
    if "all" in names:
        return known
    for name in names:
        if name not in BASELINES:
            rung_named(name)
        if name not in {group.subject for group in known}:
            some = ", ".join(dict.fromkeys(group.subject for group in known))
            raise ValueError(f"{name} has nothing to tune; there are trials for {some}, or all")
    return tuple(group for group in known if group.subject in names)


def trial_job(
    scale: Scale, group: Group, title: str, choices: Choices, pace: float = 1.0
) -> tuple[Job, str]:
    """Returns the cell of a trial, measured on the validation split at its end, and its recipe.

    Args:
      scale: with what was chosen before.
      group: that it is one of.
      title: of it.
      choices: that it tries.
      pace: times the tokens of the group's share that it takes.
    """
    tried = scale.at(choices=choices, held_out="validation")
    tokens = tried.search.rounded(pace * group.share * tried.tokens)
    job = job_called(title, tried, group.subject, tokens, SEED)
    return job, recipe_key(tried, group.subject)


def table_of(scale: Scale, group: Group) -> str:
    """Returns the name of a group's table in the JSON."""
    return f"{data_name(scale.at(held_out='validation'))}: {group.name}"


class Chosen(NamedTuple):
    """What a group says.

    Attributes:
      group: which.
      before: what held for all of it.
      trials: title -> choices.
      bits: title -> bits per byte at the end, of those on record; NaN for one that diverged.
      keys: of their cells: a run that two groups share is one run.
      best: the title of the lowest; None unless all are on record and one did not diverge.
    """

    group: Group
    before: Choices
    trials: Mapping[str, Choices]
    bits: Mapping[str, float]
    keys: frozenset[str]
    best: str | None

    @property
    def after(self) -> Choices:
        """What holds for the groups that follow."""
        return self.before if self.best is None else self.trials[self.best]


def read_group(gathered: Gathered, scale: Scale, group: Group) -> Chosen:
    """Returns what a group says by what is on record; the scale has what was chosen before it."""
    trials = group.trials(scale)
    rows = gathered.index.get(table_of(scale, group), {})
    bits, keys = {}, set()
    for title, choices in trials.items():
        key = rows.get(title, {}).get(str(SEED), "")
        cell = gathered.cells.get(key)
        recipe = recipe_key(scale.at(choices=choices), group.subject)
        if cell is not None and recipe in cell["values"].get("recipes", []):
            bits[title] = last_bits(cell["values"]["points"])
            keys.add(key)
    good = {title: value for title, value in bits.items() if math.isfinite(value)}
    whole = len(bits) == len(trials) and good
    best = min(good, key=good.__getitem__) if whole else None
    return Chosen(group, scale.choices, trials, bits, frozenset(keys), best)


def chain(gathered: Gathered, scale: Scale) -> list[Chosen]:
    """Returns what all groups say, one after another, each with what those before it chose.

    A group with trials missing chooses nothing: what stood before it holds.
    """
    found = []
    for group in groups():
        chosen = read_group(gathered, scale, group)
        scale = scale.at(choices=chosen.after)
        found.append(chosen)
    return found


def tuned_on(gathered: Gathered, scale: Scale) -> Scale:
    """Returns the scale on the data whose trials hold for it: its own where any are on record, else
    the data that the scale has by itself."""
    own = f"{data_name(scale.at(held_out='validation'))}: "
    if any(table.startswith(own) for table in gathered.index):
        return scale
    plain = SCALES[scale.name]
    return scale.at(data=plain.data, tokenizer=plain.tokenizer)


def edges(chosen: Chosen) -> list[str]:
    """Returns what of the best trial lies at an end of what its group tried, of three at least."""
    if chosen.best is None:
        return []
    places = {title: numbers(choices) for title, choices in chosen.trials.items()}
    found = []
    for name, mine in places[chosen.best].items():
        tried = sorted({place[name] for place in places.values()})
        if len(tried) < 3:
            continue
        if mine == tried[0] and mine > 0:  # nothing lies below no decay at all
            found.append(f"{name} {mine:g} is the lowest that was tried")
        if mine == tried[-1]:
            found.append(f"{name} {mine:g} is the highest that was tried")
    return found


def numbers(choices: Any, path: str = "") -> dict[str, float]:
    """Returns all numbers among choices, by their names.

    >>> numbers(Choices())["adamw.learning_rate"]
    0.004
    """
    found: dict[str, float] = {}
    for field in dataclasses.fields(choices):
        value, name = getattr(choices, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            found |= numbers(value, f"{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    return found


def changes(old: Choices, new: Choices) -> dict[str, Any]:
    """Returns the fields in which choices differ, with the new values.

    >>> changes(Choices(), Choices(rows=4))
    {'rows': 4}
    """
    names = (field.name for field in dataclasses.fields(Choices))
    return {n: getattr(new, n) for n in names if getattr(new, n) != getattr(old, n)}
