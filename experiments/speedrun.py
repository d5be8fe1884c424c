"""Trains a baseline for a fixed number of steps, then the recommended recipe to the same loss.

    python -m experiments.speedrun --scale demo

On two CPU cores the demo takes under four minutes. It prints a table and a sample of text, and
writes JSON, Markdown and a picture of loss against time.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax

from experiments.cli import run_main
from experiments.compare import Curve, picture
from experiments.compilation import use_compilation_cache
from experiments.execute import Execution
from experiments.grid import Cell, Result, run_cells
from experiments.protocol import table, time_to
from experiments.recipes import DEMO, baseline, recommended
from experiments.run import open_run
from model.flops import parameter_count
from model.generate import Sampling, generate
from train.loop import LoopSettings

BASELINE_STEPS = 150  # 36 s of training measured on two cores
RECIPE_STEPS = 80  # what its schedule spans; it stops at the target
PROMPT = "def "


@dataclass(frozen=True)
class Speedrun:
    """Settings of a speedrun.

    Attributes:
      scale: size of model, data and budget.
      out: folder of the results; the runs lie in `cells/` there.
      seed: of both runs.
      fresh: forget earlier results of this command and run again.
    """

    scale: Literal["demo"] = "demo"
    out: Path = Path("runs/speedrun-demo")
    seed: int = 0
    fresh: bool = False


def main() -> None:
    """Parses the command line, runs what is missing, writes and prints."""
    import tyro

    command = tyro.cli(Speedrun, description=__doc__)
    use_compilation_cache()
    cells = command.out / "cells"
    if command.fresh:
        cells = command.out / f"cells-{time.strftime('%Y%m%d-%H%M%S')}"
    every = LoopSettings(evaluate_every=BASELINE_STEPS // 3)
    first = Cell("baseline", baseline(DEMO, BASELINE_STEPS, command.seed), every)
    print(f"1. {first.name}: GPT-2 block, Adam at 1e-4, {BASELINE_STEPS} steps")
    (base,) = _run(first, cells)
    print(f"\n2. recommended: modern block, Muon, until the loss is {base.loss:.4f}")
    toward = LoopSettings(evaluate_every=5, target_loss=base.loss)
    second = Cell("recommended", recommended(DEMO, RECIPE_STEPS, command.seed), toward)
    (ours,) = _run(second, cells)

    times = [time_to(result, base.loss) for result in (base, ours)]
    text = table(times)
    command.out.mkdir(parents=True, exist_ok=True)
    (command.out / "speedrun.md").write_text(text + "\n")
    content = {"target": base.loss, "runs": [dataclasses.asdict(t) for t in times]}
    (command.out / "speedrun.json").write_text(json.dumps(content, indent=2) + "\n")
    picture([_curve(result) for result in (base, ours)], command.out / "speedrun.png")

    print(f"\n{text}\n")
    print(_sample(ours, command.seed))
    print(
        f"\nwritten: {', '.join(str(command.out / f'speedrun.{x}') for x in ('md', 'json', 'png'))}"
    )


def _run(cell: Cell, folder: Path) -> list[Result]:
    start = time.perf_counter()
    results = run_cells([cell], folder, execution=Execution(keep_last=1))
    spent = time.perf_counter() - start
    if spent < 1:
        print("   (finished earlier; --fresh runs it again)")
    return results


def _curve(result: Result) -> Curve:
    rows = result.evaluations
    return Curve(
        result.cell.name,
        [row["step"] for row in rows],
        [float(row["loss"]) for row in rows],
        [row["seconds"] for row in rows],
        {},
    )


def _sample(result: Result, seed: int) -> str:
    """A continuation by the recommended run, and what wrote it."""
    run = open_run(result.folder)
    found = generate(
        run.model,
        run.params,
        [run.tokenizer.encode(PROMPT).tolist()],
        key=jax.random.key(seed),
        max_new_tokens=60,
        sampling=Sampling(temperature=0.8, top_p=0.95),
        stop_tokens=[run.tokenizer.end_of_document],
    )
    size = parameter_count(run.model.config)
    text = PROMPT + run.tokenizer.decode(found.new_tokens()[0])
    body = "\n".join(f"  | {line}" for line in text.splitlines())
    return f"What {size / 1e6:.1f} M parameters write after {run.step} steps:\n{body}"


if __name__ == "__main__":
    run_main(main)
