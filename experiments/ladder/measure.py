"""What a loss costs: between the ends of two runs, or between two evaluations of one.

A rung's length is known no better than the lengths that were tried. Two of them, one that ends over
a target and one under it, give what lies between by a line in the logarithm of tokens; so rows are
compared by what they need, not by which lengths a search happened to try, nor by how often each is
evaluated.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.grid import Result
from experiments.protocol import flops_until, tokens_until
from train.tokenizers.tokenizer import load_tokenizer

Values = Mapping[str, Any]

NEAR = 1.5
"""The most that two lengths may lie apart for what is between them to be read off a line."""

BEYOND = 1.15
"""How far past either of them the line is read where no further length may be tried."""


@dataclass(frozen=True)
class Reached:
    """The costs of a run up to an evaluation.

    Attributes:
      bits: bits per byte there.
      loss: nats a token there.
      steps: updates.
      tokens: of their batches.
      flops: by the analytic count, forward and backward.
      training: seconds of everything but compilation, evaluations and checkpoints.
      compiling: seconds of compilation.
      cold: seconds of everything, from the start of the process: imports, compilation, evaluations
        and checkpoints included; NaN for a run that was interrupted.
    """

    bits: float
    loss: float
    steps: int
    tokens: int
    flops: float
    training: float
    compiling: float
    cold: float


COSTS = tuple(field.name for field in dataclasses.fields(Reached))
APART = ("compile", "evaluation", "checkpoint")  # of a clock


def points_of(result: Result, outside: float | None = None) -> list[dict[str, Any]]:
    """Returns the costs at each evaluation of a run, as JSON values.

    Args:
      result: of the run.
      outside: seconds of its process before the run and after it; None if unknown.
    """
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
                "training": row["seconds"] - sum(clock.get(name, 0.0) for name in APART),
                "compiling": clock.get("compile", 0.0),
                "cold": "nan" if outside is None else row["seconds"] + outside,
            }
        )
    return points


def reached(points: Iterable[Values], target: float) -> Reached | None:
    """Returns the costs at which a run first is at a target in bits per byte, or None.

    They lie on the line from the evaluation before to the first one at or under the target, as in
    `between`; the first evaluation of all counts as it is.

    >>> row = {"loss": 1.0, "flops": 1.0, "training": 1.0, "compiling": 0.0, "cold": 1.0}
    >>> high, low = (row | {"bits": 2.2, "steps": 10, "tokens": 100},
    ...              row | {"bits": 1.8, "steps": 20, "tokens": 200})
    >>> reached([high, low], 2.0).tokens, reached([low], 2.0).tokens, reached([high], 2.0)
    (141, 200, None)
    """
    before: Values | None = None
    for point in points:
        if float(point["bits"]) <= target:
            if before is not None and math.isfinite(float(before["bits"])):
                return _on_the_line(before, point, _tokens_at(before, point, target), target)
            return whole(point)
        before = point
    return None


def whole(point: Values) -> Reached:
    """Returns the costs of an evaluation as it is."""
    return Reached(**{name: _number(value) for name, value in point.items()})


def between(runs: Sequence[Sequence[Values]], target: float, beyond: float = 1.0) -> Reached | None:
    """Returns what a run that ends at a target would cost, by those that end nearest to it.

    With ``n0 < n1`` the tokens of two runs, at most `NEAR` apart, and ``b0 > b1`` the bits at their
    ends, it has ``n = n0 (n1 / n0) ** ((b0 - target) / (b0 - b1))`` tokens; all other costs lie on
    the line through those of the two, at n.

    Args:
      runs: of several lengths, each as its evaluations.
      target: bits per byte.
      beyond: how many times longer than the longer of the two, or shorter than the shorter, n may
        be; 1 for between them alone.

    Returns:
      None where there are no such two.

    >>> cost = {"loss": 1.0, "steps": 1, "flops": 1.0, "compiling": 0.0, "cold": 1.0}
    >>> short = cost | {"bits": 2.2, "tokens": 100, "training": 1.0}
    >>> long = cost | {"bits": 1.8, "tokens": 121, "training": 1.21}
    >>> found = between([[short], [long]], 2.0)
    >>> found.tokens, round(found.training, 6)
    (110, 1.1)
    """
    ends = sorted((run[-1] for run in runs if run), key=lambda end: end["tokens"])
    ends = [end for end in ends if math.isfinite(float(end["bits"]))]
    for reach in dict.fromkeys((1.0, beyond)):
        for low, high in itertools.pairwise(ends):
            worse, better = float(low["bits"]), float(high["bits"])
            apart = high["tokens"] / low["tokens"]
            if not (1 < apart <= NEAR and worse > better):
                continue
            tokens = _tokens_at(low, high, target)
            if low["tokens"] / reach <= tokens <= high["tokens"] * reach:
                return _on_the_line(low, high, tokens, target)
    return None


def _tokens_at(low: Values, high: Values, target: float) -> float:
    worse, better = float(low["bits"]), float(high["bits"])
    share = (worse - target) / (worse - better)
    return float(low["tokens"] * (high["tokens"] / low["tokens"]) ** share)


def _on_the_line(low: Values, high: Values, tokens: float, target: float) -> Reached:
    share = (tokens - low["tokens"]) / (high["tokens"] - low["tokens"])
    ends = {name: (_number(low[name]), _number(high[name])) for name in COSTS}
    costs = {name: first + share * (last - first) for name, (first, last) in ends.items()}
    counts = {name: round(costs[name]) for name in ("steps", "tokens")}
    return Reached(**{**costs, **counts, "bits": target})


def fastest(runs: Sequence[Sequence[Values]], target: float, beyond: float = 1.0) -> Reached | None:
    """Returns what a target costs a row: between two of its runs, or else within one of them.

    Of several crossings the one with fewest tokens counts.
    """
    if found := between(runs, target, beyond):
        return found
    crossings = [each for each in (reached(points, target) for points in runs) if each]
    return min(crossings, key=lambda each: each.tokens) if crossings else None


def last_bits(points: Sequence[Values]) -> float:
    """Returns the bits per byte at the end of a run; NaN if it had no evaluation."""
    return float(points[-1]["bits"]) if points else math.nan


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value
