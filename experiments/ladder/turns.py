"""Steps of several cells in turn, each in a process of its own: seconds a token, round by round."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import NamedTuple

from experiments.baselines.cells import BaselineCell
from experiments.bench.ratios import order
from experiments.bench.sides import REST, Side
from experiments.ladder.child import Job, environment_of, job_to_json
from experiments.tables.ratios import paired
from train.settings import Settings
from train.tokenizers.tokenizer import load_tokenizer

TOKENS = 20_000  # of a turn, about: a second or two on two cores
ROUNDS = 9


class Turn(NamedTuple):
    """The step of a phase of a cell.

    Attributes:
      job: the cell.
      phase: of it, by number.
    """

    job: Job
    phase: int = 0


class Taken(NamedTuple):
    """What a side took.

    Attributes:
      seconds: for a token, in every round.
      compiling: seconds of the first step.
      starting: seconds from the start of the process to the end of its second step.
    """

    seconds: list[float]
    compiling: float
    starting: float


def take_turns(turns: Mapping[str, Turn], rounds: int = ROUNDS) -> dict[str, Taken]:
    """Returns what each side took.

    Args:
      turns: side -> whose steps.
      rounds: how many.
    """
    found: dict[str, Taken] = {}
    sides: dict[str, Side] = {}
    with contextlib.ExitStack() as stack:
        for name, turn in turns.items():  # one is up before the next one starts
            side = sides[name] = stack.enter_context(_side(turn))
            starting = time.perf_counter() - side.started
            found[name] = Taken([], side.facts["compiling"], starting)
        steps = {name: max(1, TOKENS // side.facts["tokens"]) for name, side in sides.items()}
        for round_ in range(rounds):
            for name in order(list(sides), round_):
                time.sleep(REST)
                taken = sides[name].ask("time", steps=steps[name])
                found[name].seconds.append(taken / (steps[name] * sides[name].facts["tokens"]))
    return found


def pace(job: Job, to: Job) -> float:
    """Returns how many times as many tokens a cell learns from in a second as another one."""
    taken = take_turns({"job": Turn(job), "to": Turn(to)})
    return float(paired(taken["to"].seconds, taken["job"].seconds)["ratio"])


def settings_of(job: Job) -> Settings:
    """Returns the settings of a cell of either side."""
    return job.baseline.settings if isinstance(job, BaselineCell) else job.settings


def _side(turn: Turn) -> Side:
    size = _vocabulary(settings_of(turn.job).tokenizer)
    return Side(
        "ladder",
        {"job": job_to_json(turn.job), "vocabulary": size, "phase": turn.phase},
        environment_of(turn.job),
    )


def _vocabulary(tokenizer: str) -> int:
    kind, _, number = tokenizer.partition(":")
    return int(number) if kind == "sentencepiece" else load_tokenizer(tokenizer).vocabulary_size
