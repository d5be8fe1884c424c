"""Trains the torch baseline: Hugging Face's GPT-2 on our data, batches and evaluation.

    python -m experiments.baselines --data stdlib --steps 400

Without more it is the mission's: Adam at a constant 1e-4 with GPT-2's dropout. The second one is
AdamW without dropout, tuned by `python -m experiments.speedrun --scale cpu --tune torch-tuned`:

    python -m experiments.baselines --steps 400 --model.dropout 0 \
        --optimizer adamw --learning-rate 2e-3 --schedule linear --schedule.warmup-steps 20

A run that was stopped begins anew. `python -m experiments.compare` puts it beside our own runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.baselines.cells import run_baseline
from experiments.baselines.settings import Device, Initial, Keep, Mode, Precision, TorchBaseline
from experiments.cli import Choices, parse, run_main
from model.config import TransformerConfig
from model.presets import PRESETS
from train.loop import LoopSettings
from train.optimizers import Adam, AdamW
from train.optimizers.settings import OptimizerSettings
from train.schedules import SCHEDULES
from train.settings import Phase, Settings

GPT2 = {name: make for name, make in PRESETS.items() if "gpt2" in name}
OPTIMIZERS: dict[str, Callable[[], OptimizerSettings]] = {
    "adam": lambda: Adam(learning_rate=1e-4),
    "adamw": AdamW,
}


@dataclass(frozen=True)
class Baseline:
    """All settings of a baseline.

    Attributes:
      model: preset, and its fields.
      optimizer: name, and its fields.
      schedule: name, and its fields.
      data: sources, as for `experiments.pretrain`.
      tokenizer: as there.
      out: folder of the run.
      steps: updates.
      batch_size: rows of a batch.
      sequence_length: tokens of a row.
      learning_rate: short for --optimizer.learning-rate.
      seed: of weights, data order and dropout.
      mode: eager, or through torch.compile.
      device: where to train.
      precision: of the products; bfloat16 is autocast.
      initial: who draws the initial weights.
      keep: leave the last weights in the run's folder, as Hugging Face has them.
      target_loss: stop at the first evaluation at or under it.
      evaluate_every: steps between evaluations on the whole held-out split.
      log_every: steps between rows of metrics.jsonl.
    """

    model: TransformerConfig
    optimizer: OptimizerSettings
    schedule: Any
    data: tuple[str, ...] = ("stdlib",)
    tokenizer: str = "sentencepiece:4096"
    out: Path = Path("runs/baseline")
    steps: int = 1000
    batch_size: int = 16
    sequence_length: int = 128
    learning_rate: float | None = None
    seed: int = 0
    mode: Mode = "eager"
    device: Device = "cpu"
    precision: Precision = "float32"
    initial: Initial = "huggingface"
    keep: Keep = "nothing"
    target_loss: float | None = None
    evaluate_every: int | None = None
    log_every: int = 10


def baseline_of(command: Baseline) -> tuple[TorchBaseline, LoopSettings]:
    """Returns what the command asks for, checked."""
    optimizer = command.optimizer
    if command.learning_rate is not None:
        optimizer = dataclasses.replace(optimizer, learning_rate=command.learning_rate)
    phase = Phase(command.steps, command.model, command.batch_size, command.sequence_length)
    settings = Settings(
        phases=(phase,),
        data=command.data,
        tokenizer=command.tokenizer,
        seed=command.seed,
        optimizer=optimizer,
        schedule=command.schedule,
    )
    how = (command.mode, command.device, command.precision, command.initial, command.keep)
    loop = LoopSettings(command.log_every, command.evaluate_every, target_loss=command.target_loss)
    return TorchBaseline(settings, *how), loop


def main() -> int:
    """Parses the command line, trains, and says how it ended."""
    groups: dict[str, tuple[str, Choices]] = {
        "model": ("gpt2_mini", GPT2),
        "optimizer": ("adam", OPTIMIZERS),
        "schedule": ("constant", SCHEDULES),
    }
    command = parse(Baseline, groups, description=__doc__ or "")
    baseline, loop = baseline_of(command)
    if command.device == "cuda":
        jax.config.update("jax_platforms", "cpu")  # its memory is torch's here
    outcome = run_baseline(baseline, command.out, loop)
    parts = "  ".join(f"{name} {spent:.1f} s" for name, spent in outcome.seconds.items())
    print(f"{outcome.reason} at step {int(outcome.state.step)}  ({parts})")
    if outcome.evaluation:
        numbers = (f"{name} {outcome.evaluation[name]:.4f}" for name in ("loss", "bits_per_byte"))
        print("validation  " + "  ".join(numbers))
    print(f"run         {command.out}")
    if outcome.signal is not None and outcome.reason == "signal":
        print("stopped: the same command begins anew, for torch runs keep no checkpoints")
        return 128 + outcome.signal
    return 3 if outcome.reason == "nonfinite" else 0


if __name__ == "__main__":
    run_main(main)
