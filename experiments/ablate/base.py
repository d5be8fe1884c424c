"""The models that tables compress: the modern block at 2.6 million parameters, trained well.

4 layers of width 192 on the standard library's source, 2,000 steps of 16 x 128 tokens under Muon,
after which the held-out loss is near flat; one a seed, each a cell that all tables share. Width and
feed-forward width are multiples of 32, so that every format fits.
"""

from __future__ import annotations

from pathlib import Path

from experiments.grid import Cell
from experiments.recipes import Size, recommended
from experiments.runs.run import Run, open_run
from train.loop import LoopSettings
from train.optimizers import Muon

STEPS = 2000
# The default rates ended lower than those of the demo over as many steps: see `recipes.FEW_STEPS`.
SIZE = Size(("stdlib",), "sentencepiece:2048", 16, 128, 4, width=192, heads=6, optimizer=Muon())
LOOP = LoopSettings(log_every=50, evaluate_every=500)


def base_cell(seed: int) -> Cell:
    """Returns the cell of the base model of a seed."""
    return Cell(f"base model, seed {seed}", recommended(SIZE, STEPS, seed), LOOP)


def open_base(cells: Path, seed: int) -> Run:
    """Returns the base model of a seed, which must have been trained under `cells`."""
    return open_run(cells / base_cell(seed).key)
