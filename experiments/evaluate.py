"""Measures a trained run on text: loss, perplexity, bits per byte.

python -m experiments.evaluate --run runs/first --data text.txt --protocol stride:64
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from experiments.cli import run_main
from experiments.compilation import use_compilation_cache
from experiments.runs.run import check_continues, open_run, phase_at
from train.corpus import Split, build_corpus
from train.data import evaluation_batches
from train.evaluate import evaluate
from train.losses import cross_entropy
from train.plugs import State
from train.step import make_evaluation_step
from train.text.sources import open_source, parse_mixture


@dataclass(frozen=True)
class Evaluate:
    """Settings of an evaluation.

    Attributes:
      run: folder of the run.
      data: a source; by default the run's first (a converted run has none).
      split: which part of the source.
      protocol: "windows:N" predicts windows of N tokens side by side, each from its own start;
        "stride:N" slides a window of the training length by N tokens, so that all but the first
        predictions see at least (length - N) tokens. By default windows of the training length.
      step: checkpoint; by default the newest, or of a task the best.
      batch_size: rows at a time; changes no figure.
    """

    run: Path
    data: str | None = None
    split: Literal["train", "validation", "test"] = "validation"
    protocol: str | None = None
    step: int | None = None
    batch_size: int = 16


def protocol_of(text: str | None, length: int) -> tuple[int, int]:
    """Returns (sequence length, stride) of a protocol; `length` is the one of training.

    >>> protocol_of(None, 128), protocol_of("windows:64", 128), protocol_of("stride:32", 128)
    ((128, 128), (64, 64), (128, 32))
    """
    if text is None:
        return length, length
    kind, _, number = text.partition(":")
    if kind not in ("windows", "stride") or not number.isdecimal() or int(number) < 1:
        raise ValueError(f"protocol is {text!r}; give windows:N or stride:N, N tokens")
    return (int(number), int(number)) if kind == "windows" else (length, int(number))


def main() -> None:
    """Parses the command line, measures, prints."""
    import tyro

    command = tyro.cli(Evaluate, description=__doc__)
    use_compilation_cache()
    run = open_run(command.run, command.step)
    check_continues(run)
    if command.data is None and not run.settings.data:
        raise ValueError(f"{command.run} has no running text of its own; give --data")
    phase = run.settings.phases[phase_at(run.settings, run.step)[0]]
    length, stride = protocol_of(command.protocol, phase.sequence_length)
    model = run.model.config
    if model.positions == "learned" and length > model.max_length:
        raise ValueError(
            f"windows of {length} tokens do not fit the {model.max_length} learned positions of "
            f"{command.run}; give --protocol windows:N with N at most {model.max_length}"
        )
    data = command.data or parse_mixture(run.settings.data)[0][0]
    split: Split = build_corpus(open_source(data), run.tokenizer).split(command.split)
    state = State(jnp.int32(run.step), run.params, (), jax.random.key(0), {})
    means = evaluate(
        jax.jit(make_evaluation_step(run.model, [cross_entropy()])),
        state,
        {},
        evaluation_batches(
            split,
            sequence_length=length,
            batch_size=command.batch_size,
            stride=stride,
            document_boundaries=run.settings.document_boundaries,
        ),
        split.bytes,
    )
    shape = f"windows:{length}" if stride == length else f"stride:{stride} of {length}"
    print(f"run            {command.run} at step {run.step}")
    print(f"data           {data} ({command.split}, {means['tokens']:,.0f} tokens, {shape})")
    print(f"loss           {means['loss']:.4f} nats a token")
    print(f"perplexity     {math.exp(min(means['loss'], 700.0)):.3f}")
    print(f"bits per byte  {means['bits_per_byte']:.4f}")


if __name__ == "__main__":
    run_main(main)
