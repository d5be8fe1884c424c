"""Recipes: sets of plugs with their settings, each a function of the size it is run at."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from model.presets import gpt2_mini, modern_mini
from train.optimizers import Adam, Muon
from train.schedules import Constant, Linear
from train.settings import Phase, Settings


@dataclass(frozen=True)
class Size:
    """What every recipe at one `--scale` shares: data, tokenizer, batch and shape of the model."""

    data: tuple[str, ...]
    tokenizer: str
    batch_size: int
    sequence_length: int
    layers: int
    width: int
    heads: int


DEMO = Size(("stdlib",), "sentencepiece:2048", 16, 128, layers=4, width=128, heads=4)

# Of the three pairs (Muon's rate, AdamW's) tried at the demo's size over 80 steps on seed 0, the
# default (0.016, 0.0032) ended at a validation loss of 4.75, (0.03, 0.006) at 4.56 and this one at
# 4.34: batches of 2,000 tokens and few steps want more than the half a million of the defaults.
SMALL_BATCH = Muon(learning_rate=0.03, adam_learning_rate=0.012)


def baseline(size: Size, steps: int, seed: int = 0) -> Settings:
    """The mission's baseline: a GPT-2 block with its dropout, Adam at a constant 1e-4."""
    model = gpt2_mini(layers=size.layers, width=size.width, heads=size.heads)
    return _settings(size, model, steps, seed, Adam(learning_rate=1e-4), Constant())


def recommended(size: Size, steps: int, seed: int = 0) -> Settings:
    """The modern block, Muon on its matrices and AdamW on the rest, linearly down to zero."""
    model = modern_mini(layers=size.layers, width=size.width, heads=size.heads)
    return _settings(size, model, steps, seed, SMALL_BATCH, Linear())


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
