"""Tiny Shakespeare in bytes, at the size that nanoGPT gives for a CPU: ours beside it, in seconds.

    python -m experiments.shakespeare --data tinyshakespeare.txt

4 layers, width 128, context 64 and batches of 12, on the first nine tenths of karpathy/char-rnn's
file (1,115,394 bytes); the last tenth is the validation split, all of it measured. nanoGPT's own
README gives 1.88 nats a character for this size after 2,000 steps; 1.669 is what a 5-gram reaches.
Writes shakespeare.json, which the README's figures are made from, shakespeare.md and a picture.

Theirs is that setting in torch (extra `baseline`): Hugging Face's GPT-2, AdamW at 1e-3, a warmup
and a cosine to a tenth. Each side runs its 2,000 steps, and for each of the two losses a schedule
of the length that it takes to end there, looked for by one rule (`experiments.ladder.search`) with
a seed that the table does not use. The sides take turns, run by run, each in a process of its own;
which goes first changes with the seed.

It needs two CPU cores to itself: torch's threads wait for each other at every product, so that on a
busy machine theirs takes many times as long and the ratios say nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.baselines.cells import BaselineCell, read_baseline
from experiments.baselines.settings import nanogpt_cpu
from experiments.bench.ratios import order
from experiments.busy import warn_if_busy
from experiments.cli import run_main
from experiments.compare import picture
from experiments.grid import Cell, Result, read_result
from experiments.json_files import write_json, write_text
from experiments.ladder.child import Job, run_apart
from experiments.ladder.search import Search, next_length
from experiments.machine import machine
from experiments.recipes import Size, recommended
from experiments.shakespeare_report import Runs, curves, report, summary
from train.loop import LoopSettings

STEPS = 2000
TARGETS = (1.88, 1.669)
"""nanoGPT's README ("i only have a macbook", https://github.com/karpathy/nanoGPT), and a 5-gram."""
EVERY = 20
TUNING_SEED = 100
# Seeds end some 0.01 apart, and the chosen length is to do for all of them.
MARGIN = 0.01
# Lengths are taken as they are, nothing is interpolated: close ones.
SEARCH = Search(60, 16_000, quantum=20, factor=2.0, shorter=4.0, close=1.1, runs=8)
WARMUP = 0.05  # of the steps, as 100 of 2,000


@dataclass(frozen=True)
class Shakespeare:
    """Settings of the experiment.

    Attributes:
      data: the text.
      seeds: how many, from 0.
      out: folder of the runs.
      max_minutes: start no further run after so long; the same command goes on.
      results: where JSON, Markdown and picture lie.
    """

    data: Path
    seeds: int = 3
    out: Path = Path("runs/shakespeare")
    max_minutes: float | None = None
    results: Path = Path(__file__).parent / "results"


def ours(data: str, steps: int, seed: int) -> Cell:
    """Returns our run: the modern block under Muon, linearly down to zero."""
    size = Size((data,), "bytes", 12, 64, layers=4, width=128, heads=4)
    return Cell(f"ours, {steps} steps", recommended(size, steps, seed), _loop(steps))


def nanogpt(data: str, steps: int, seed: int) -> BaselineCell:
    """Returns nanoGPT's: its warmup and its cosine span the steps, as they do 2,000."""
    baseline = nanogpt_cpu(data, seed)
    settings = baseline.settings
    (phase,) = settings.phases
    schedule = dataclasses.replace(settings.schedule, warmup_steps=round(WARMUP * steps))
    phases = (dataclasses.replace(phase, steps=steps),)
    settings = dataclasses.replace(settings, phases=phases, schedule=schedule)
    name = f"nanoGPT, {steps} steps"
    return BaselineCell(name, dataclasses.replace(baseline, settings=settings), _loop(steps))


def _loop(steps: int) -> LoopSettings:
    # Some hundred evaluations at most, at steps that do not depend on how the run goes.
    return LoopSettings(log_every=50, evaluate_every=EVERY * max(1, round(steps / (100 * EVERY))))


SIDES: dict[str, Callable[[str, int, int], Job]] = {"nanoGPT": nanogpt, "ours": ours}

Run = Callable[[Job], Result | None]
"""Runs a job unless it has ended, and returns its result; None once time is up."""


def read(job: Job, folder: Path) -> Result | None:
    """Returns the result of a job under `folder`, or None if it has not ended."""
    if isinstance(job, BaselineCell):
        return read_baseline(job, folder)
    return read_result(job, folder)


def runner(folder: Path, max_minutes: float | None) -> Run:
    """Returns what runs jobs under `folder`, each in a process of its own."""
    start = time.monotonic()

    def run(job: Job) -> Result | None:
        spent = (time.monotonic() - start) / 60
        if read(job, folder) is None and (max_minutes is None or spent < max_minutes):
            run_apart(job, folder)
        return read(job, folder)

    return run


def lengths(run: Run, data: str, target: float) -> dict[str, int | None]:
    """Returns by side the steps of the shortest schedule that ends at a loss.

    A side that ends nowhere at it has None; one whose search was cut off is not there, since a
    shorter schedule may do as well. The sides take turns in being tried.

    Args:
      run: runs a job.
      data: the text.
      target: the loss, in nats a token; aimed at is `MARGIN` less.
    """
    aim = target - MARGIN
    tried: dict[str, dict[int, float]] = {side: {} for side in SIDES}
    found: dict[str, int | None] = {}
    searching = list(SIDES)
    while searching:
        for side in tuple(searching):
            steps = next_length(SEARCH, tried[side], aim, STEPS // 4)
            if steps is None:
                ended = (steps for steps, loss in tried[side].items() if loss <= aim)
                found[side] = min(ended, default=None)
            elif result := run(SIDES[side](data, steps, TUNING_SEED)):
                tried[side][steps] = result.loss
                continue
            searching.remove(side)
    return found


def run_all(
    run: Run, data: str, seeds: Sequence[int], targets: Sequence[float]
) -> tuple[Runs, Mapping[float, Mapping[str, int | None]]]:
    """Runs everything, the two sides in turn, and returns the runs and the chosen lengths.

    Either side goes first in as many seeds, or in one more: what drifts within a pair, like the
    clock of a machine that grows warm, favours neither.

    Args:
      run: runs a job.
      data: the text.
      seeds: of the table.
      targets: losses.

    Returns:
      (plan, side) -> results, a plan being None for `STEPS` or the target that a length was chosen
      for; and target -> side -> that length.
    """
    chosen = {target: lengths(run, data, target) for target in targets}
    runs: Runs = {}
    for seed in seeds:
        for plan in (None, *targets):
            for side in order(list(SIDES), seed):
                steps = STEPS if plan is None else chosen[plan].get(side)
                result = None if steps is None else run(SIDES[side](data, steps, seed))
                if result is not None:
                    runs.setdefault((plan, side), {})[seed] = result
    return runs, chosen


def main() -> None:
    """Runs what is missing, writes the tables and the picture."""
    import tyro

    command = tyro.cli(Shakespeare, description=__doc__)
    warn_if_busy()
    run = runner(command.out / "cells", command.max_minutes)
    runs, chosen = run_all(run, str(command.data), range(command.seeds), TARGETS)
    if not runs:
        raise ValueError("no run of the table has ended yet; give more --max-minutes")
    facts = {"machine": machine(), **summary(runs, chosen, STEPS, TARGETS)}
    command.results.mkdir(parents=True, exist_ok=True)
    write_json(command.results / "shakespeare.json", facts)
    text = report(facts)
    write_text(command.results / "shakespeare.md", text + "\n")
    picture(curves(runs), command.results / "shakespeare.png")
    written = (str(command.results / f"shakespeare.{kind}") for kind in ("md", "json", "png"))
    print(f"\n{text}\n\nwritten: {', '.join(written)}")


if __name__ == "__main__":
    run_main(main)
