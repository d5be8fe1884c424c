"""What a run had cost when it first reached a loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.grid import Result
from experiments.protocol import flops_until, tokens_until
from train.tokenizers.tokenizer import load_tokenizer

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Reached:
    """The costs of a run up to an evaluation.

    Attributes:
      bits: bits per byte there.
      loss: nats a token there.
      steps: updates.
      tokens: of their batches.
      flops: by the analytic count, forward and backward.
      training: seconds of data and steps.
      compiling: seconds of compilation.
      total: seconds of everything but evaluations, of which rows have different numbers.
    """

    bits: float
    loss: float
    steps: int
    tokens: int
    flops: float
    training: float
    compiling: float
    total: float


def points_of(result: Result) -> list[dict[str, float]]:
    """Returns the costs at each evaluation of a run, as JSON values."""
    size = load_tokenizer(result.folder / "tokenizer").vocabulary_size
    settings = result.cell.settings
    points = []
    for row in result.evaluations:
        step, clock = int(row["step"]), row["clock"]
        points.append(
            {
                "bits": row["bits_per_byte"],
                "loss": row["loss"],
                "steps": step,
                "tokens": tokens_until(settings, step),
                "flops": flops_until(settings, step, size),
                "training": clock.get("data", 0.0) + clock.get("step", 0.0),
                "compiling": clock.get("compile", 0.0),
                "total": row["seconds"] - clock.get("evaluation", 0.0),
            }
        )
    return points


def reached(points: Iterable[Values], target: float) -> Reached | None:
    """Returns the first evaluation at or under a target in bits per byte, or None.

    >>> row = {"loss": 1.0, "steps": 1, "tokens": 8, "flops": 1.0, "training": 1.0,
    ...        "compiling": 0.0, "total": 1.0}
    >>> reached([row | {"bits": 3.0}, row | {"bits": 1.9, "steps": 2}], 2.0).steps
    2
    """
    for point in points:
        if float(point["bits"]) <= target:
            return Reached(**{name: _number(value) for name, value in point.items()})
    return None


def fastest(runs: Sequence[Sequence[Values]], target: float) -> Reached | None:
    """Returns the cheapest first crossing among runs of several lengths, by seconds of training."""
    found = [each for each in (reached(points, target) for points in runs) if each]
    return min(found, key=lambda each: each.training) if found else None


def last_bits(points: Sequence[Values]) -> float:
    """Returns the bits per byte at the end of a run; NaN if it had no evaluation."""
    return float(points[-1]["bits"]) if points else math.nan


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value
