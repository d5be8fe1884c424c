"""Tunes the second baseline: AdamW on Hugging Face's GPT-2, every trial at the same budget.

    python -m experiments.baselines.tune --steps 400

The budget is in steps and fixed beforehand. First every rate with every schedule; then, with the
best of them, every beta 2 with every weight decay. Choices are made by the last validation loss;
the test split is never opened. Prints the whole grid, and says where the best trial lies at an edge
of it: then the grid is too small. Writes tune.json and tune.md; trials that have run stay.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.baselines.cells import BaselineCell, read_baseline, run_baselines
from experiments.baselines.settings import Mode, tuned
from experiments.cli import run_main
from experiments.grid import Result
from experiments.machine import machine
from experiments.recipes import DEMO, Size
from experiments.run import write_json
from train.optimizers import AdamW
from train.schedules import Constant, Cosine, Linear

# Around 2e-3, each about 1.7 times the one before it: the step that sees a factor of two.
RATES = (6e-4, 1e-3, 1.7e-3, 3e-3, 5e-3, 8e-3)
SCHEDULES = ("linear", "cosine")
MOMENTS = (0.95, 0.98, 0.999)
DECAYS = (0.0, 0.1, 0.3)
WARMUP = 0.05  # of the budget
COSINE_END = 0.1  # of the peak: the usual one, beside linear's zero


@dataclass(frozen=True)
class Trial:
    """What one run of the sweep tries.

    Attributes:
      learning_rate: peak.
      schedule: "linear" to zero, "cosine" to a tenth, or "constant", all after the warmup.
      b2: memory of the second moment.
      weight_decay: of the matrices.
    """

    learning_rate: float
    schedule: str
    b2: float = 0.98
    weight_decay: float = 0.1


@dataclass(frozen=True)
class Tune:
    """Settings of the sweep.

    Attributes:
      steps: of each trial.
      rates: learning rates.
      schedules: linear, cosine, constant.
      moments: betas 2 of the second round.
      decays: weight decays of the second round.
      seed: of all trials.
      data: sources.
      tokenizer: as in `experiments.pretrain`.
      batch_size: rows of a batch.
      sequence_length: tokens of a row.
      layers: of the model.
      width: of the model.
      heads: of the model.
      mode: eager, or through torch.compile.
      out: folder of trials and results.
      max_minutes: begin no further trial after so long; the same command goes on.
    """

    steps: int = 400
    rates: tuple[float, ...] = RATES
    schedules: tuple[str, ...] = SCHEDULES
    moments: tuple[float, ...] = MOMENTS
    decays: tuple[float, ...] = DECAYS
    seed: int = 0
    data: tuple[str, ...] = DEMO.data
    tokenizer: str = DEMO.tokenizer
    batch_size: int = DEMO.batch_size
    sequence_length: int = DEMO.sequence_length
    layers: int = DEMO.layers
    width: int = DEMO.width
    heads: int = DEMO.heads
    mode: Mode = "eager"
    out: Path = Path("runs/baseline-tune")
    max_minutes: float | None = None


def schedule_of(name: str, steps: int) -> Any:
    """Returns the schedule called `name` for a budget.

    Raises:
      ValueError: there is none of that name.

    >>> schedule_of("cosine", 400)
    Cosine(warmup_steps=20, final_fraction=0.1)
    """
    warmup = int(WARMUP * steps)
    kinds: dict[str, Any] = {
        "linear": lambda: Linear(warmup),
        "cosine": lambda: Cosine(warmup, COSINE_END),
        "constant": lambda: Constant(warmup),
    }
    if name not in kinds:
        raise ValueError(f"the sweep knows no schedule {name!r}; there are {', '.join(kinds)}")
    return kinds[name]()


def cell_of(
    trial: Trial, size: Size, steps: int, seed: int = 0, mode: Mode = "eager"
) -> BaselineCell:
    """Returns the cell of a trial; evaluated at its end alone.

    Args:
      trial: what it tries.
      size: data, batch and shape.
      steps: budget.
      seed: of weights and batches.
      mode: of torch.
    """
    optimizer = AdamW(trial.learning_rate, weight_decay=trial.weight_decay, b2=trial.b2)
    schedule = schedule_of(trial.schedule, steps)
    baseline = tuned(size, steps, seed, optimizer=optimizer, schedule=schedule, mode=mode)
    return BaselineCell(name_of(trial), baseline)


def name_of(trial: Trial) -> str:
    """Returns a row's name.

    >>> name_of(Trial(2e-3, "linear"))
    'linear 0.002, b2 0.98, decay 0.1'
    """
    return f"{trial.schedule} {trial.learning_rate:g}, b2 {trial.b2}, decay {trial.weight_decay:g}"


def first_round(rates: Sequence[float], schedules: Sequence[str]) -> list[Trial]:
    """Every rate with every schedule.

    Raises:
      ValueError: fewer than five rates or two schedules: too few to call the baseline tuned.
    """
    if len(set(rates)) < 5 or len(set(schedules)) < 2:
        raise ValueError(
            f"{len(set(rates))} rates and {len(set(schedules))} schedules do not tune a baseline; "
            "give at least 5 and 2"
        )
    return [Trial(rate, schedule) for schedule in schedules for rate in rates]


def second_round(best: Trial, moments: Sequence[float], decays: Sequence[float]) -> list[Trial]:
    """Every beta 2 with every weight decay, at the best rate and schedule of the first round."""
    return [
        dataclasses.replace(best, b2=b2, weight_decay=decay) for b2 in moments for decay in decays
    ]


def best_of(losses: dict[Trial, float]) -> Trial:
    """Returns the trial with the lowest loss; one that diverged counts as infinite.

    Raises:
      ValueError: all diverged.

    >>> best_of({Trial(1e-3, "linear"): 3.0, Trial(2e-3, "linear"): math.nan}).learning_rate
    0.001
    """
    finite = {trial: loss for trial, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise ValueError("every trial diverged; give lower rates")
    return min(finite, key=finite.__getitem__)


def edges(best: Trial, losses: dict[Trial, float]) -> list[str]:
    """Returns what of the best trial lies at an end of what was tried beside it.

    >>> trials = [Trial(rate, "linear") for rate in (1e-3, 2e-3, 4e-3)]
    >>> edges(trials[2], dict.fromkeys(trials, 3.0))
    ['learning_rate 0.004 is the highest that was tried']
    """
    found = []
    for name in ("learning_rate", "b2", "weight_decay"):
        tried = sorted({getattr(trial, name) for trial in losses})
        mine = getattr(best, name)
        # Nothing lies below no decay at all.
        if len(tried) > 1 and mine == tried[0] and mine > 0:
            found.append(f"{name} {mine:g} is the lowest that was tried")
        if len(tried) > 1 and mine == tried[-1]:
            found.append(f"{name} {mine:g} is the highest that was tried")
    return found


def grid_table(losses: dict[Trial, float], down: str, across: str) -> str:
    """Returns a Markdown table of last validation losses, the lowest in bold.

    Args:
      losses: by trial.
      down: the field whose values name the rows.
      across: the field whose values name the columns.

    >>> print(grid_table({Trial(1e-3, "linear"): 3.0, Trial(2e-3, "linear"): 2.5},
    ...                  "learning_rate", "schedule"))
    | learning_rate | linear |
    |--:|--:|
    | 0.001 | 3.0000 |
    | 0.002 | **2.5000** |
    """
    rows = list(dict.fromkeys(getattr(trial, down) for trial in losses))
    columns = list(dict.fromkeys(getattr(trial, across) for trial in losses))
    by_place = {(getattr(t, down), getattr(t, across)): loss for t, loss in losses.items()}
    best = min(losses.values(), key=lambda loss: (math.isnan(loss), loss))
    lines = [
        f"| {down} | " + " | ".join(map(_word, columns)) + " |",
        "|--:" * (len(columns) + 1) + "|",
    ]
    for row in rows:
        cells = [_word(row)]
        for column in columns:
            loss = by_place.get((row, column))
            text = "" if loss is None else f"{loss:.4f}"
            cells.append(f"**{text}**" if loss == best else text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def report(command: Tune, rounds: Sequence[dict[Trial, float]]) -> str:
    """Returns both grids and the choice, as Markdown.

    Args:
      command: its settings.
      rounds: losses by trial, of the first round and, once it has run, of the second.
    """
    first, second = rounds
    everything = {**first, **second}
    best = best_of(everything)
    shape = f"{command.layers} layers of width {command.width}"
    lines = [
        "# The second baseline, tuned",
        f"GPT-2 of transformers in torch, {shape}, AdamW without dropout, seed {command.seed}: "
        f"validation loss (nats a token) after {command.steps} steps of {command.batch_size} x "
        f"{command.sequence_length} tokens, every trial at the same budget.",
        "## Rates and schedules",
        grid_table(first, "learning_rate", "schedule"),
    ]
    if second:
        lines += ["## Second moment and decay", grid_table(second, "weight_decay", "b2")]
    lines.append(f"Chosen: **{name_of(best)}**, {everything[best]:.4f}.")
    # Each round by its own neighbours: the second holds the rate.
    at_edges = edges(best_of(first), first) + (edges(best_of(second), second) if second else [])
    lines += [f"Widen the grid: {edge}." for edge in at_edges]
    lines.append("Made by `python -m experiments.baselines.tune`.")
    return "\n\n".join(lines)


def size_of(command: Tune) -> Size:
    """Returns the size that a command asks for."""
    names = [field.name for field in dataclasses.fields(Size) if field.name != "optimizer"]
    return Size(**{name: getattr(command, name) for name in names})


def main() -> None:
    """Runs what is missing, prints the grids, writes tune.json and tune.md."""
    import tyro

    command = tyro.cli(Tune, description=__doc__)
    size, folder = size_of(command), command.out / "cells"

    def losses_of(trials: list[Trial]) -> dict[Trial, float]:
        cells = [
            cell_of(trial, size, command.steps, command.seed, command.mode) for trial in trials
        ]
        results: list[Result] = run_baselines(cells, folder, max_minutes=command.max_minutes)
        if len(results) < len(cells):
            missing = sum(read_baseline(cell, folder) is None for cell in cells)
            raise ValueError(f"{missing} trials are left; the same command goes on with them")
        return dict(zip(trials, (result.loss for result in results), strict=True))

    first = losses_of(first_round(command.rates, command.schedules))
    second = losses_of(second_round(best_of(first), command.moments, command.decays))
    text = report(command, (first, second))
    best = best_of({**first, **second})
    content = {
        "command": {**dataclasses.asdict(command), "out": str(command.out)},
        "machine": machine(),
        "best": dataclasses.asdict(best),
        "trials": [
            {**dataclasses.asdict(trial), "loss": loss if np.isfinite(loss) else str(loss)}
            for trial, loss in {**first, **second}.items()
        ],
    }
    write_json(command.out / "tune.json", content)
    (command.out / "tune.md").write_text(text + "\n")
    print(f"\n{text}\n\nwritten: {command.out / 'tune.md'}, {command.out / 'tune.json'}")


if __name__ == "__main__":
    run_main(main)
