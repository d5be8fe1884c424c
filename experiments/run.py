"""A run: a folder that `experiments.execute` fills and `open_run` opens.

settings.json     what the run is
data.json         what its text was, by content
tokenizer/        self-contained
frozen/           what does not train, if anything
metrics.jsonl     the record, a row a line
checkpoints/      state by step
result.json       how it ended
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.assemble import abstract_state, assemble, effective_weights, read_frozen
from experiments.methods import METHODS
from model.config import TransformerConfig
from model.transformer import Transformer
from train.checkpoints import Checkpoints
from train.settings import Phase, Settings, from_json
from train.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Run:
    """A trained run, opened.

    Attributes:
      folder: where it lies.
      settings: what it is.
      step: of the checkpoint.
      model: with the config of that checkpoint's phase.
      params: what its model runs with: what trained and what did not, merged, and the weight
        transforms applied.
      tokenizer: its tokenizer.
    """

    folder: Path
    settings: Settings
    step: int
    model: Transformer
    params: Any
    tokenizer: Tokenizer


def open_run(folder: str | os.PathLike[str], step: int | None = None) -> Run:
    """Opens a run at `step`, or at its newest intact checkpoint.

    Raises:
      FileNotFoundError: the folder is no run, or has no such checkpoint.
      ValueError: the checkpoint is damaged.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    with Checkpoints(folder / "checkpoints", mode="read") as checkpoints:
        there = checkpoints.steps()
        at = step if step is not None else (there[-1] if there else 0)
        phase = settings.phases[phase_at(settings, at)[0]]
        parts = assemble(settings, config_for(phase, tokenizer))
        state = abstract_state(settings, parts)
        found = checkpoints.restore_part("params", state.params, step)
        extra = checkpoints.restore_part("extra", state.extra, found.step).state
        frozen = read_frozen(folder, parts, found.info.get("frozen"))
    params = effective_weights(parts, found.step, found.state, frozen, extra)
    return Run(folder, settings, found.step, Transformer(parts.config), params, tokenizer)


def read_settings(folder: Path) -> Settings:
    """Returns the settings of the run in `folder`."""
    path = folder / "settings.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} is no run: it has no settings.json")
    return from_json(json.loads(path.read_text()), METHODS)


def phase_at(settings: Settings, step: int) -> tuple[int, int, int]:
    """Returns (index, first step, last step) of the phase that step number `step` belongs to.

    >>> from model.presets import gpt2_tiny
    >>> two = Settings(phases=(Phase(10, gpt2_tiny(), 4, 8), Phase(5, gpt2_tiny(), 4, 16)))
    >>> phase_at(two, 9), phase_at(two, 10), phase_at(two, 15)
    ((0, 0, 10), (1, 10, 15), (1, 10, 15))
    """
    first = 0
    for index, phase in enumerate(settings.phases):
        if step < first + phase.steps or index == len(settings.phases) - 1:
            return index, first, first + phase.steps
        first += phase.steps
    raise AssertionError("a run has at least one phase")


def config_for(phase: Phase, tokenizer: Tokenizer) -> TransformerConfig:
    """Returns the phase's config with the tokenizer's vocabulary."""
    return dataclasses.replace(phase.model, vocabulary_size=tokenizer.vocabulary_size)


def parse_parent(text: str) -> tuple[Path, int | None]:
    """Splits "RUN" or "RUN@STEP".

    >>> parse_parent("runs/a@300")
    (PosixPath('runs/a'), 300)
    """
    folder, at, step = text.rpartition("@")
    return (Path(folder), int(step)) if at and step.isdecimal() else (Path(text), None)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name, then renames it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)
