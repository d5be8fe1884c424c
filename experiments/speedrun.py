"""Time to a loss: the recommended recipe against baselines, and every technique by itself.

    python -m experiments.speedrun --scale demo

trains a baseline for a fixed number of steps, then the recommended recipe to the same loss. It
needs no download and three to five minutes on two CPU cores, prints a table and a sample of text,
and writes JSON, Markdown and a picture of loss against time.

    python -m experiments.speedrun --scale cpu                     # the ladder, one seed
    python -m experiments.speedrun --scale cpu --rung muon --seeds 3
    python -m experiments.speedrun --scale cpu --data tinyshakespeare.txt

climbs the ladder: baselines in torch (extra `baseline`), then a technique a rung, each on top of
those that are kept below it (`experiments/ladder/rungs.py`). Targets are means over as many seeds
as the scale says (five at cpu), which run before any rung, so that they never move. Finished runs
are kept in experiments/results/speedrun-SCALE.json and do not run again; Markdown and pictures
beside it are made from it alone. What fails is named at the end, and the rest goes on.

    python -m experiments.speedrun --scale cpu --held-out test --rung muon-batch for-hf --seeds 5

opens the test split for the rungs named, once they are chosen: their runs are trained once more at
the lengths that suited the validation split, on which all else is measured.

    python -m experiments.speedrun --scale cpu --tune all          # the trials of both sides
    python -m experiments.speedrun --scale cpu --tune muon         # those of one rung
    python -m experiments.speedrun --scale cpu --tuned             # the ladder with what they chose
    python -m experiments.speedrun --scale cpu --sizes             # rungs at four sizes, and a fit
    python -m experiments.speedrun --scale cpu --sizes --size 0.5M 1.3M
    python -m experiments.speedrun --scale cpu --sizes --side-by-side
    python -m experiments.speedrun --scale cpu --side-by-side      # steps alone, in turn

What is kept is decided by the last of these together with the ladder, three seeds at least: how
many tokens a rung needs, at the pace of steps that took turns on one machine.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.busy import warn_if_busy
from experiments.cli import run_main
from experiments.compilation import use_compilation_cache
from experiments.ladder.command import Asked, Ladder, run_ladder
from experiments.ladder.demo import run_demo


@dataclass(frozen=True)
class Speedrun(Asked):
    """Settings of a speedrun.

    Attributes:
      scale: size of model, data and budget; "tiny" is for trying the command out.
      out: folder of the runs, those of the demo and its results; runs/speedrun-SCALE by default.
      seed: of all runs of the demo.
    """

    scale: Literal["demo", "cpu", "gpu", "tiny"] = "demo"
    out: Path | None = None
    seed: int = 0


def main() -> None:
    """Parses the command line, runs what is missing, writes and prints."""
    import tyro

    command = tyro.cli(Speedrun, description=__doc__)
    use_compilation_cache()
    if not command.tune:  # trials are compared by their losses
        warn_if_busy()
    out = command.out or Path(f"runs/speedrun-{command.scale}")
    cells = out / "cells"
    if command.fresh:
        cells = out / f"cells-{time.strftime('%Y%m%d-%H%M%S')}"
    if command.scale != "demo":
        run_ladder(ladder_of(command, cells))
        return
    check_demo(command)
    run_demo(out, command.seed, cells)


def ladder_of(command: Speedrun, cells: Path) -> Ladder:
    """Returns what the command asks of the ladder."""
    if command.seed:
        raise ValueError("--seed is the demo's; the ladder takes --seeds N, from 0")
    asked = {field.name: getattr(command, field.name) for field in dataclasses.fields(Asked)}
    return Ladder(scale=command.scale, cells=cells, **asked)


def check_demo(command: Speedrun) -> None:
    """Raises ValueError for what the demo does not know."""
    names = [field.name for field in dataclasses.fields(Asked) if field.name != "fresh"]
    plain = Speedrun()
    if given := [name for name in names if getattr(command, name) != getattr(plain, name)]:
        flag = given[0].replace("_", "-")
        raise ValueError(f"the demo has no --{flag}; give --scale cpu or gpu with it")


if __name__ == "__main__":
    run_main(main)
