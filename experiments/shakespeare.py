"""Tiny Shakespeare in bytes, at the size that nanoGPT gives for a CPU.

    python -m experiments.shakespeare --data tinyshakespeare.txt

4 layers, width 128, context 64, batches of 12 and 2,000 steps, on the first nine tenths of
karpathy/char-rnn's file (1,115,394 bytes); the last tenth is the validation split, all of it
measured. nanoGPT's own README gives 1.88 nats a character for this setting. About four minutes a
seed on two CPU cores, half of it in evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cli import run_main
from experiments.compare import Curve, picture
from experiments.compilation import use_compilation_cache
from experiments.execute import Execution
from experiments.grid import Cell, Result, run_cells
from experiments.machine import machine
from experiments.recipes import Size, recommended
from experiments.run import write_json
from train.loop import LoopSettings

PUBLISHED = 1.88  # https://github.com/karpathy/nanoGPT, "i only have a macbook"
STEPS = 2000
EVERY = 20


@dataclass(frozen=True)
class Shakespeare:
    """Settings of the experiment.

    Attributes:
      data: the text.
      seeds: how many, from 0.
      out: folder of the runs and results.
      max_minutes: start no further run after so long.
    """

    data: Path
    seeds: int = 3
    out: Path = Path("runs/shakespeare")
    max_minutes: float | None = None


def crossing(result: Result, loss: float) -> int | None:
    """Returns the first evaluated step at or under a loss, or None."""
    rows = result.evaluations
    return next((row["step"] for row in rows if float(row["loss"]) <= loss), None)


def summary(results: list[Result]) -> dict[str, Any]:
    """Returns the figures of all seeds: final losses, and steps to the published loss."""
    losses = [result.loss for result in results]
    return {
        "published": PUBLISHED,
        "steps": STEPS,
        "seeds": len(results),
        "losses": losses,
        "mean_loss": float(np.mean(losses)),
        "steps_to_published": [crossing(result, PUBLISHED) for result in results],
    }


def table(facts: dict[str, Any]) -> str:
    """Returns a Markdown table, a row a seed.

    >>> print(table({"published": 1.88, "losses": [1.5], "steps_to_published": [400], "steps": 9}))
    | seed | loss after 9 steps | step at 1.88 |
    |--:|--:|--:|
    | 0 | 1.500 | 400 |
    """
    lines = [
        f"| seed | loss after {facts['steps']} steps | step at {facts['published']} |",
        "|--:|--:|--:|",
    ]
    columns = (facts["losses"], facts["steps_to_published"])
    for seed, (loss, step) in enumerate(zip(*columns, strict=True)):
        lines.append(f"| {seed} | {loss:.3f} | {step or 'never'} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the seeds that are missing, writes the table and the picture."""
    import tyro

    command = tyro.cli(Shakespeare, description=__doc__)
    use_compilation_cache()
    size = Size((str(command.data),), "bytes", 12, 64, layers=4, width=128, heads=4)
    loop = LoopSettings(evaluate_every=EVERY, log_every=50)
    cells = [
        Cell(f"seed {seed}", recommended(size, STEPS, seed), loop) for seed in range(command.seeds)
    ]
    results = run_cells(
        cells,
        command.out / "cells",
        execution=Execution(keep_last=1),
        max_minutes=command.max_minutes,
    )
    if not results:
        raise ValueError("no run has ended yet; give more --max-minutes")
    facts = {"machine": machine(), **summary(results)}
    write_json(command.out / "shakespeare.json", facts)
    text = table(facts)
    (command.out / "shakespeare.md").write_text(text + "\n")
    curves = [
        Curve(
            result.cell.name,
            [row["step"] for row in result.evaluations],
            [float(row["loss"]) for row in result.evaluations],
            [row["seconds"] for row in result.evaluations],
            {},
        )
        for result in results
    ]
    picture(curves, command.out / "shakespeare.png")
    written = (str(command.out / f"shakespeare.{kind}") for kind in ("md", "json", "png"))
    print(f"\n{text}\n\nwritten: {', '.join(written)}")


if __name__ == "__main__":
    run_main(main)
