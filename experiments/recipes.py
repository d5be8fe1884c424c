"""Recipes: sets of plugs with their settings, each a function of the size it is run at."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from model.presets import gpt2_mini, modern_mini
from train.optimizers import Adam, Muon
from train.schedules import Constant, Linear
from train.settings import Phase, Settings


@dataclass(frozen=True)
class Size:
    """What every recipe at one `--scale` shares: data, tokenizer, batch and shape of the model.

    Attributes:
      optimizer: rates that suit the recommended recipe at this size.
      bigram_rows: of the recommended recipe's table of pairs of tokens; None for none, as in
        what is measured of compression and of parallel training.
    """

    data: tuple[str, ...]
    tokenizer: str
    batch_size: int
    sequence_length: int
    layers: int
    width: int
    heads: int
    optimizer: Muon = field(default_factory=Muon)
    bigram_rows: int | None = None


# Of three pairs (Muon's rate, AdamW's) tried at the demo's size over 80 steps on seed 0, the
# default (0.016, 0.0032) ended at a validation loss of 4.75, (0.03, 0.006) at 4.56 and this one at
# 4.34. Over the 2,000 steps of `experiments.shakespeare` the default ended lower (1.567 to 1.582).
FEW_STEPS = Muon(learning_rate=0.03, adam_learning_rate=0.012)
# Rows that the trials of the ladder chose. Bytes have few pairs, which 500 steps on Tiny
# Shakespeare learn by themselves: it ended at 1.753 for 1.766 nats there, with dearer steps.
PAIRS = 32_768
DEMO = Size(("stdlib",), "sentencepiece:2048", 16, 128, 4, width=128, heads=4, optimizer=FEW_STEPS)


def baseline(size: Size, steps: int, seed: int = 0) -> Settings:
    """The mission's baseline: a GPT-2 block with its dropout, Adam at a constant 1e-4."""
    model = gpt2_mini(layers=size.layers, width=size.width, heads=size.heads)
    return _settings(size, model, steps, seed, Adam(learning_rate=1e-4), Constant())


def recommended(size: Size, steps: int, seed: int = 0) -> Settings:
    """The modern block, Muon on its matrices and AdamW on the rest, linearly down to zero.

    With embeddings of pairs of tokens where the size has rows for them.
    """
    model = modern_mini(layers=size.layers, width=size.width, heads=size.heads)
    model = dataclasses.replace(model, bigram_rows=size.bigram_rows)
    return _settings(size, model, steps, seed, size.optimizer, Linear())


def _settings(size, model, steps, seed, optimizer, schedule) -> Settings:
    model = dataclasses.replace(model, max_length=max(model.max_length, size.sequence_length))
    return Settings(
        phases=(Phase(steps, model, size.batch_size, size.sequence_length),),
        data=size.data,
        tokenizer=size.tokenizer,
        seed=seed,
        optimizer=optimizer,
        schedule=schedule,
    )
