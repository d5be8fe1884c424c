"""What the ladder is climbed with at each `--scale`: data, shape, budget, and what was tuned."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from experiments.ladder.search import Search
from model.config import TransformerConfig
from model.presets import gpt2
from train.optimizers import AdamW, Muon
from train.schedules import Linear

HeldOut = Literal["validation", "test"]


@dataclass(frozen=True)
class Choices:
    """What is chosen by trials (`--tune all`), with as many of ours as of the baseline's.

    Attributes:
      torch_adamw: of the second baseline.
      torch_rows: of its batch; None for the scale's.
      torch_warmup: share of its steps.
      torch_schedule: after that.
      adamw: for the GPT-2 block.
      adamw_warmup: share of the steps.
      rows: of the batch that fits the budget.
      rows_rate: AdamW's at that batch.
      block_rate: AdamW's for the modern block.
      muon: for the modern block.
      muon_rows: of the batch that fits Muon.
      muon_factor: on Muon's rates at that batch.
      bigram_rows: of the table of pairs of tokens.
      bigram_width: of those rows.
      embedding_rate: factor on the rate of the embeddings.
      head_rate: factor on the rate of the head.
      vocabulary: tokenizer of the rung that changes it.
    """

    torch_adamw: AdamW = field(default_factory=lambda: AdamW(learning_rate=4e-3))
    torch_rows: int | None = None
    torch_warmup: float = 0.05
    torch_schedule: Any = field(default_factory=Linear)
    adamw: AdamW = field(default_factory=lambda: AdamW(learning_rate=4e-3))
    adamw_warmup: float = 0.05
    rows: int = 8
    rows_rate: float = 4e-3
    block_rate: float = 4e-3
    muon: Muon = field(default_factory=lambda: Muon(learning_rate=0.02, adam_learning_rate=0.008))
    muon_rows: int = 16
    muon_factor: float = 1.0
    bigram_rows: int = 1024
    bigram_width: int = 16
    embedding_rate: float = 2.0
    head_rate: float = 0.5
    vocabulary: str = "sentencepiece:1024"


@dataclass(frozen=True)
class Scale:
    """A size of everything.

    Attributes:
      name: on the command line.
      data: sources, with a test split where tuning is to leave one alone.
      model: GPT-2's block at this size.
      rows: of the baselines' batch.
      length: tokens of a row.
      tokenizer: of all rungs but one.
      held_out: the split that runs are evaluated on. All is chosen on "validation"; "test" is
        opened for what has been chosen.
      tokens: the budget of either baseline, fixed before anything was tuned.
      target_seeds: seeds of a baseline, from 0, whose mean end is the target: so many are run
        before any rung, however many the rungs have, so that a target never moves.
      evaluations: of a run; a torch baseline, which is run once, has four times as many.
      runs: lengths that the search tries at most.
      choices: what was tuned.
      mode: of the torch baselines.
      device: of the torch baselines.
      label: of a size, where one is measured at several.
      precision: of the torch baselines.
    """

    name: str
    data: tuple[str, ...]
    model: TransformerConfig
    rows: int
    length: int
    tokenizer: str
    tokens: int
    evaluations: int = 4
    runs: int = 5
    choices: Choices = field(default_factory=Choices)
    mode: Any = "eager"
    device: Any = "cpu"
    precision: Any = "float32"
    label: str = ""
    held_out: HeldOut = "validation"
    target_seeds: int = 1

    @property
    def steps(self) -> int:
        """Updates of either baseline."""
        return self.tokens // (self.rows * self.length)

    @property
    def search(self) -> Search:
        """The rule by which every rung finds its length."""
        # Half a batch of the baseline: the fitted batch may be smaller.
        quantum = self.rows * self.length // 2
        least = self.evaluations * quantum
        # A rung may take a quarter more than the baseline: one that learns as the baseline does
        # ends a little above or under it.
        most = self.tokens * 5 // 4 // quantum * quantum
        return Search(least, most, quantum, runs=self.runs)

    def at(self, **changes: Any) -> Scale:
        """Returns the scale with other fields."""
        return dataclasses.replace(self, **changes)


# 1.1 M parameters and 1.2 million tokens, so that either baseline takes about two minutes on two
# cores of a Zen 4. Choices are those of experiments/results/speedrun-tuning-cpu.json.
CPU = Scale(
    name="cpu",
    data=("stdlib",),
    model=gpt2(layers=4, width=128, heads=4, max_length=256),
    rows=16,
    length=128,
    tokenizer="sentencepiece:2048",
    tokens=16 * 128 * 600,
    target_seeds=5,
    choices=Choices(
        torch_adamw=AdamW(learning_rate=3e-3, clip_norm=0.5, b1=0.8, b2=0.999),
        torch_rows=4,
        torch_warmup=0.3,
        adamw=AdamW(learning_rate=4e-3, clip_norm=0.5, b1=0.8, b2=0.999),
        adamw_warmup=0.3,
        rows=2,
        rows_rate=2e-3,
        block_rate=4e-3,
        muon=Muon(learning_rate=5e-3, adam_learning_rate=8e-3),
        muon_rows=8,
        muon_factor=1.4,
        bigram_rows=32768,
        bigram_width=16,
        head_rate=1.0,
    ),
)

# GPT-2 124M, batches of 32 x 1,024 tokens, 1,000 steps of them: 33 million tokens, which an H100 or
# H200 trains in two to three minutes at 40 % of its peak. It has no data of its own.
GPU = Scale(
    name="gpu",
    data=(),
    model=gpt2(dtype="bfloat16"),
    rows=32,
    length=1024,
    tokenizer="sentencepiece:32768",
    tokens=32 * 1024 * 1000,
    evaluations=8,
    runs=3,
    choices=Choices(
        torch_adamw=AdamW(learning_rate=2e-3),
        adamw=AdamW(learning_rate=2e-3),
        rows=16,
        rows_rate=2e-3,
        block_rate=4e-3,
        muon=Muon(newton_schulz_dtype="bfloat16"),
        muon_rows=64,
        bigram_rows=5 * 32768,  # as many times the vocabulary as in modded-nanogpt
        bigram_width=128,
        vocabulary="sentencepiece:16384",
    ),
    mode="compile",
    device="cuda",
    precision="bfloat16",
)

# For tests and for trying out a rung: seconds a run.
TINY = Scale(
    name="tiny",
    data=("stdlib",),
    model=gpt2(layers=3, width=32, heads=2, max_length=64),
    rows=8,
    length=32,
    tokenizer="bytes",
    tokens=8 * 32 * 48,
    evaluations=4,
    target_seeds=2,
    choices=Choices(rows=4, muon_rows=8, vocabulary="sentencepiece:512"),
)

SCALES: dict[str, Scale] = {scale.name: scale for scale in (CPU, GPU, TINY)}
