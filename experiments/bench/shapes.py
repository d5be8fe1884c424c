"""The sizes that are timed: the same model, data and optimizer for either side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from experiments.baselines.settings import Device, TorchBaseline
from model.config import TransformerConfig, config_from_dict
from model.presets import gpt2
from train.corpus import Split
from train.optimizers import AdamW
from train.schedules import Constant
from train.settings import Phase, Settings

# Low, so that rounding does not part the losses of two sides: at 1e-3 those of small models were
# 0.015 nats apart after 28 steps, at 3e-4 those of 124M in bfloat16 0.8 within 100.
RATE, RATE_124M = 3e-4, 3e-5


@dataclass(frozen=True)
class Shape:
    """A model, a batch and where they are run.

    Attributes:
      model: of GPT-2's layout, without dropout; its `dtype` is that of the products on either side.
      batch_size: rows.
      sequence_length: tokens of a row.
      device: of either side; "cuda" is the first GPU.
      rate: of the optimizer, without warmup.
    """

    model: TransformerConfig
    batch_size: int
    sequence_length: int
    device: Device = "cpu"
    rate: float = RATE


def _small(layers: int, width: int, heads: int, length: int) -> TransformerConfig:
    shape = {"layers": layers, "width": width, "heads": heads, "max_length": length}
    return gpt2(vocabulary_size=4096, dropout=0.0, **shape)


SHAPES: dict[str, Shape] = {
    "3m": Shape(_small(5, 192, 6, 128), 16, 128),
    "12m": Shape(_small(6, 384, 6, 256), 8, 256),
    "124m": Shape(gpt2(dropout=0.0), 4, 256, rate=RATE_124M),
    "124m-cuda": Shape(gpt2(dropout=0.0, dtype="bfloat16"), 16, 1024, "cuda", RATE_124M),
}


def shape_to_json(shape: Shape) -> dict[str, Any]:
    """Returns JSON values that `shape_from_json` reads.

    >>> shape_from_json(shape_to_json(SHAPES["3m"])) == SHAPES["3m"]
    True
    """
    return dataclasses.asdict(shape)


def shape_from_json(fields: Mapping[str, Any]) -> Shape:
    """Returns the shape that `shape_to_json` wrote."""
    return Shape(**{**fields, "model": config_from_dict(fields["model"])})


def settings_of(shape: Shape) -> Settings:
    """AdamW without clipping at a constant rate: the settings of either side."""
    phase = Phase(1_000_000, shape.model, shape.batch_size, shape.sequence_length)
    optimizer = AdamW(learning_rate=shape.rate, clip_norm=None)
    return Settings(phases=(phase,), optimizer=optimizer, schedule=Constant())


def baseline_of(shape: Shape, mode: Literal["eager", "compile"]) -> TorchBaseline:
    """The other side's settings: the same, from our initial weights; bfloat16 is its autocast.

    >>> baseline_of(SHAPES["124m-cuda"], "compile").precision
    'bfloat16'
    """
    precision: Any = shape.model.dtype
    model = dataclasses.replace(shape.model, dtype="float32")
    settings = settings_of(dataclasses.replace(shape, model=model))
    return TorchBaseline(settings, mode, shape.device, precision, "ours")


def environment_of(shape: Shape, side: Literal["ours", "torch"]) -> dict[str, str]:
    """Variables of a side's process: on a GPU, neither takes the other's memory before its turn.

    >>> environment_of(SHAPES["3m"], "torch")
    {}
    """
    if shape.device == "cpu":
        return {}
    if side == "torch":
        return {"JAX_PLATFORMS": "cpu"}
    return {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def batches_of(shape: Shape) -> Any:
    """The dataset of batches by step: our pipeline over text-like tokens made up here.

    Each token follows from the one before it in half of the cases and is drawn from Zipf's law
    otherwise, so that there is something to learn and the losses of the sides can be told apart.
    """
    from train.data import batches

    size = shape.model.vocabulary_size
    rng = np.random.default_rng(0)
    count = 64 * shape.batch_size * shape.sequence_length + 1
    drawn = np.minimum(rng.zipf(1.2, count), size) - 1
    follows = rng.random(count) < 0.5
    tokens = np.empty(count, np.int64)
    last = 0
    for place in range(count):
        last = (31 * last + 7) % size if follows[place] else int(drawn[place])
        tokens[place] = last
    split = Split(tokens.astype(np.uint16), np.array([0]), count)
    return batches(
        [(split, 1.0)],
        seed=0,
        sequence_length=shape.sequence_length,
        batch_size=shape.batch_size,
    )


def prompts_of(shape: Shape, rows: int, length: int) -> list[list[int]]:
    """Prompts of random ids."""
    rng = np.random.default_rng(1)
    return rng.integers(0, shape.model.vocabulary_size, (rows, length)).tolist()
