"""Time to a loss: one protocol for every claim that something trains faster.

The baseline runs for a number of steps fixed beforehand; the loss that it ends at is the target.
What is compared runs until an evaluation, at steps fixed beforehand, is at or under the target:
the first crossing counts. Time is that of training alone (data and steps, no compilation and no
evaluation), and beside it everything from the start of the loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.grid import Result
from model.flops import training_flops_per_token
from train.settings import Settings


@dataclass(frozen=True)
class Time:
    """How long a run took to a loss.

    Attributes:
      name: of the run.
      reached: whether it got there.
      loss: at the crossing, or the last.
      steps: to the crossing, or all.
      tokens: likewise.
      training: seconds of data and steps.
      total: seconds of everything.
    """

    name: str
    reached: bool
    loss: float
    steps: int
    tokens: int
    training: float
    total: float


def time_to(result: Result, target: float) -> Time:
    """Returns the time of a run that ended at its first crossing of `target`, or never crossed it.

    Raises:
      ValueError: the run went on after it had crossed, so that its seconds are not those to the
        target.
    """
    crossed = [row for row in result.evaluations if float(row["loss"]) <= target]
    if crossed and crossed[0]["step"] != result.step:
        raise ValueError(
            f"{result.cell.name} crossed {target:.4f} at step {crossed[0]['step']} and ran to "
            f"{result.step}; set target_loss"
        )
    training = sum(result.seconds.get(name, 0.0) for name in ("data", "step"))
    return Time(
        result.cell.name,
        bool(crossed),
        result.loss,
        result.step,
        tokens_until(result.cell.settings, result.step),
        training,
        sum(result.seconds.values()),
    )


def tokens_until(settings: Settings, steps: int) -> int:
    """Returns the tokens of the first `steps` batches of a run.

    >>> from model.presets import gpt2_tiny
    >>> from train.settings import Phase
    >>> two = Settings(phases=(Phase(10, gpt2_tiny(), 4, 8), Phase(5, gpt2_tiny(), 4, 16)))
    >>> tokens_until(two, 10), tokens_until(two, 11)
    (320, 384)
    """
    total = 0
    for phase in settings.phases:
        taken = min(steps, phase.steps)
        total += taken * phase.batch_size * phase.sequence_length
        steps -= taken
    return total


def flops_until(settings: Settings, steps: int, vocabulary_size: int) -> float:
    """Returns the floating-point operations of the first `steps` steps of a run.

    The analytic count of `model.flops`, phase by phase, and what methods add that say so
    (`training_flops_per_token` of their settings); what an optimizer does besides is not counted.

    >>> from model.presets import gpt2_tiny
    >>> from train.settings import Phase
    >>> one = Settings(phases=(Phase(10, gpt2_tiny(), 4, 8),))
    >>> flops_until(one, 2, 64) == 64 * training_flops_per_token(gpt2_tiny(), 8)
    True
    """
    total = 0.0
    for phase in settings.phases:
        taken = min(steps, phase.steps)
        model = dataclasses.replace(phase.model, vocabulary_size=vocabulary_size)
        tokens = taken * phase.batch_size * phase.sequence_length
        each = training_flops_per_token(model, phase.sequence_length)
        for method in settings.methods:
            if (more := getattr(method, "training_flops_per_token", None)) is not None:
                each += more(model)
        total += tokens * each
        steps -= taken
    return total


def table(times: Sequence[Time]) -> str:
    """Returns a Markdown table; the first row is the baseline that the ratios compare with.

    >>> a = Time("baseline", True, 3.0, 100, 1000, 60.0, 70.0)
    >>> print(table([a, Time("ours", True, 2.9, 20, 200, 15.0, 35.0)]))
    | run | loss | steps | tokens | training s | speed-up | all s | speed-up |
    |---|--:|--:|--:|--:|--:|--:|--:|
    | baseline | 3.000 | 100 | 1,000 | 60.0 | 1.0x | 70.0 | 1.0x |
    | ours | 2.900 | 20 | 200 | 15.0 | 4.0x | 35.0 | 2.0x |
    """
    names = ("run", "loss", "steps", "tokens", "training s", "speed-up", "all s", "speed-up")
    lines = ["| " + " | ".join(names) + " |", "|---" + "|--:" * 7 + "|"]
    base = times[0]
    for t in times:
        ratios = [
            f"{ours / theirs:.1f}x" if t.reached else "not reached"
            for ours, theirs in ((base.training, t.training), (base.total, t.total))
        ]
        cells = (
            t.name,
            f"{t.loss:.3f}",
            str(t.steps),
            f"{t.tokens:,}",
            f"{t.training:.1f}",
            ratios[0],
            f"{t.total:.1f}",
            ratios[1],
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
