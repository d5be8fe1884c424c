"""How much of the bare compiled step's throughput the loop keeps.

    python -m experiments.bench.loop_overhead

Runs the same steps two ways in one process, one after the other, pair after pair: the compiled step
in a bare Python loop over batches that lie on the device, and `train.loop.train` with its
prefetched data, its record and its progress bar. Neither evaluates nor saves: a run reports those
seconds apart. The start of the loop (threads of the prefetch, signal handlers) counts against it.
Takes about two minutes on two cores; writes loop-overhead.json and loop-overhead.md.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cli import run_main
from experiments.machine import machine
from model.presets import modern_mini
from model.transformer import Transformer
from train.corpus import Split
from train.data import batches as batch_dataset
from train.data import prefetched
from train.loop import LoopSettings, train
from train.losses import cross_entropy
from train.optimizers import OPTIMIZERS, build
from train.plugs import State
from train.progress import progress_bar
from train.records import Record
from train.schedules import Constant
from train.step import Step, init_state, make_train_step

FLOOR = 0.97  # the share of the throughput that the loop must keep
SHORTEST = 0.05  # seconds: a shorter step would measure Python, not training


@dataclass(frozen=True)
class LoopOverhead:
    """Settings of the measurement.

    Attributes:
      pairs: how often both ways are timed.
      steps: of each timing.
      batch_size: rows of a batch.
      sequence_length: tokens of a row.
      out: folder of the figures.
    """

    pairs: int = 10
    steps: int = 20
    batch_size: int = 16
    sequence_length: int = 128
    out: Path = Path("experiments/results")


@dataclass(frozen=True)
class Summary:
    """What the pairs say.

    Attributes:
      median: of the ratios of throughput, loop over bare; 1 would be no overhead at all.
      lowest: the worst pair.
      highest: the best pair.
      bare_step: median seconds of a step without the loop.
      ratios: of all pairs, in the order they were timed.
    """

    median: float
    lowest: float
    highest: float
    bare_step: float
    ratios: tuple[float, ...]


def interleave(
    bare: Callable[[], Any],
    loop: Callable[[], Any],
    pairs: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[tuple[float, float]]:
    """Times both, pair after pair, and changes which goes first: a drift of the machine cancels.

    >>> interleave(lambda: None, lambda: None, 2, iter([0.0, 1, 1, 3, 3, 5, 5, 6]).__next__)
    [(1.0, 2), (1, 2)]
    """

    def timed(call: Callable[[], Any]) -> float:
        start = clock()
        call()
        return clock() - start

    found = []
    for number in range(pairs):
        if number % 2:
            after = timed(loop)
            found.append((timed(bare), after))
        else:
            found.append((timed(bare), timed(loop)))
    return found


def summarise(seconds: list[tuple[float, float]], steps: int) -> Summary:
    """Returns the ratios of throughput of (bare, loop) seconds for so many steps.

    Raises:
      ValueError: the step is shorter than the claim is about.

    >>> summarise([(1.0, 1.25), (1.0, 1.0), (2.0, 2.5)], 10).median
    0.8
    """
    bare_step = statistics.median(bare for bare, _ in seconds) / steps
    if bare_step < SHORTEST:
        raise ValueError(
            f"a step takes {1000 * bare_step:.1f} ms; the measurement is about steps of "
            f"{1000 * SHORTEST:.0f} ms and more: raise the batch size"
        )
    ratios = tuple(bare / loop for bare, loop in seconds)
    return Summary(statistics.median(ratios), min(ratios), max(ratios), bare_step, ratios)


class Subject:
    """One state that both ways take further, so that neither works on warmer memory.

    Args:
      step: compiled; donates its state.
      state: where to start.
      data: `(first, last) -> iterator` over batches of those steps.
      steps: of each timing.
      folder: of the record.
    """

    def __init__(
        self,
        step: Step,
        state: State,
        data: Callable[[int, int], Iterator[dict[str, np.ndarray]]],
        steps: int,
        folder: Path,
    ):
        self.step, self.state, self.data = step, state, data
        self.steps, self.folder = steps, folder
        self.ready = [jax.device_put(batch) for batch in data(0, steps)]

    def bare(self) -> None:
        """Only the compiled step, on batches that are on the device already."""
        for batch in self.ready:
            self.state, _ = self.step(self.state, {}, batch)
        jax.block_until_ready(self.state)

    def loop(self) -> None:
        """The loop as a run has it."""
        first = int(self.state.step)
        with (
            Record(self.folder / "metrics.jsonl") as record,
            progress_bar("loop", first, first + self.steps) as reporter,
        ):
            self.state = train(
                self.step,
                self.state,
                {},
                self.data,
                until=first + self.steps,
                record=record,
                settings=LoopSettings(),
                reporter=reporter,
            ).state
        jax.block_until_ready(self.state)


def make_subject(command: LoopOverhead, folder: Path) -> Subject:
    """Builds the step of a small run of the recommended kind, on random tokens."""
    config = modern_mini(vocabulary_size=4096)  # that of the demo's tokenizer
    model = Transformer(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    tx = build(OPTIMIZERS["muon"](), Constant(), command.steps, params)
    step = jax.jit(make_train_step(model, [cross_entropy()], tx), donate_argnums=0)
    count = 64 * command.batch_size * command.sequence_length
    tokens = np.random.default_rng(0).integers(0, config.vocabulary_size, count).astype(np.uint16)
    dataset = batch_dataset(
        [(Split(tokens, np.array([0]), count), 1.0)],
        seed=0,
        sequence_length=command.sequence_length,
        batch_size=command.batch_size,
    )
    state = init_state(jax.random.key(1), params, tx)

    def data(first: int, last: int) -> Iterator[dict[str, np.ndarray]]:
        return prefetched(dataset, first, last)

    return Subject(step, state, data, command.steps, folder)


def report(command: LoopOverhead, summary: Summary, here: dict[str, str | int]) -> str:
    """Returns the figures as Markdown."""
    kept = "keeps" if summary.median >= FLOOR else "does not keep"
    return (
        f"# What the loop costs\n\n"
        f"The loop {kept} {FLOOR:.0%} of the throughput of the bare compiled step: "
        f"**{summary.median:.1%}** (median of {command.pairs} interleaved pairs in one process, "
        f"lowest {summary.lowest:.1%}, highest {summary.highest:.1%}).\n\n"
        f"A timing is {command.steps} steps of {1000 * summary.bare_step:.0f} ms: modern_mini with "
        f"4,096 pieces and Muon, batches of {command.batch_size} x {command.sequence_length} "
        "tokens.\n\n"
        "| machine | |\n|---|---|\n"
        + "".join(f"| {name} | {value} |\n" for name, value in here.items())
        + "\nMade by `python -m experiments.bench.loop_overhead`.\n"
    )


def main() -> int:
    """Measures, writes, prints; status 1 if the loop costs more than the claim allows."""
    import tyro

    command = tyro.cli(LoopOverhead, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        subject = make_subject(command, Path(folder))
        for warm in (subject.bare, subject.loop):  # compiles, and starts what is started once
            warm()
        seconds = interleave(subject.bare, subject.loop, command.pairs)
    summary, here = summarise(seconds, command.steps), machine()
    command.out.mkdir(parents=True, exist_ok=True)
    content = {
        "what": "throughput of the loop over that of the bare compiled step",
        **dataclasses.asdict(summary),
        "seconds": [{"bare": bare, "loop": loop} for bare, loop in seconds],
        "settings": {**dataclasses.asdict(command), "out": str(command.out)},
        "machine": here,
    }
    (command.out / "loop-overhead.json").write_text(json.dumps(content, indent=2) + "\n")
    text = report(command, summary, here)
    (command.out / "loop-overhead.md").write_text(text)
    print(text)
    return int(summary.median < FLOOR)


if __name__ == "__main__":
    run_main(main)
