"""Baselines as cells of an experiment: each a folder that reads like any other run's.

A cell that was stopped begins anew: torch runs keep no checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.baselines.learner import make_learner
from experiments.baselines.settings import TorchBaseline, baseline_to_json
from experiments.grid import Cell, Result, read_result, without_folders
from experiments.json_files import read_json, write_json
from experiments.runs.prepare import Corpora, check_lengths, describe, open_data
from experiments.runs.run import config_for
from model.flops import flops_per_token
from train.data import Batch, evaluation_batches, prefetched
from train.data import batches as batch_dataset
from train.evaluate import evaluate
from train.loop import SILENT, LoopSettings, Outcome, train
from train.optimizers import learning_rate_at
from train.plugs import State
from train.progress import progress_bar
from train.records import Record
from train.settings import Phase, differences, digest, essential, to_json

TORCH = "torch.json"  # beside settings.json: how torch carries them out


@dataclass(frozen=True)
class BaselineCell:
    """One torch run of an experiment.

    Attributes:
      name: of the row that it belongs to; seeds share it.
      baseline: what it is, seed included.
      loop: what it is stopped and measured by.
    """

    name: str
    baseline: TorchBaseline
    loop: LoopSettings = field(default_factory=LoopSettings)

    @property
    def key(self) -> str:
        """Hash of baseline and loop; the name of the folder."""
        return digest(without_folders(essential([self.baseline, self.loop])))


def read_baseline(cell: BaselineCell, folder: Path) -> Result | None:
    """Returns the result of a cell under `folder`, or None if it has not ended.

    Its `cell` is the cell of ours with the same settings, so that tables and `protocol.time_to`
    need not know the difference.
    """
    return read_result(_Lying(cell.name, cell.baseline.settings, cell.loop, at=cell.key), folder)


def run_baselines(
    cells: Sequence[BaselineCell],
    folder: Path,
    *,
    progress: bool = True,
    max_minutes: float | None = None,
) -> list[Result]:
    """Runs the cells that are missing and returns all results there are, in order.

    Args:
      cells: what to run.
      folder: holds a run per cell; may be that of `grid.run_cells`.
      progress: draw a progress bar and print evaluations.
      max_minutes: no further cell is started after so long.

    Raises:
      KeyboardInterrupt: a cell was stopped by a signal; the same command begins it anew.
    """
    start, results = time.monotonic(), []
    for cell in cells:
        result = read_baseline(cell, folder)
        spent = (time.monotonic() - start) / 60
        if result is None and (max_minutes is None or spent < max_minutes):
            outcome = run_baseline(cell.baseline, folder / cell.key, cell.loop, progress=progress)
            if outcome.reason == "signal":
                raise KeyboardInterrupt(f"{cell.name} was stopped; the same command begins it anew")
            result = read_baseline(cell, folder)
        if result is not None:
            results.append(result)
    return results


def run_baseline(
    baseline: TorchBaseline,
    out: Path,
    loop: LoopSettings = LoopSettings(),  # noqa: B008 (frozen)
    *,
    progress: bool = True,
) -> Outcome:
    """Trains a baseline into `out` from its first step, unless it has ended there.

    The first step counts as compilation, evaluations (always eager) as evaluation.

    Args:
      baseline: what to train.
      out: folder of the run: settings.json, torch.json, data.json, tokenizer/, metrics.jsonl and,
        once it has ended, result.json (and model/, if it is kept).
      loop: when to log, to evaluate and to stop; it is the loop of our own runs.
      progress: draw a progress bar and print evaluations.

    Raises:
      ImportError: torch or transformers are missing.
      ValueError: `out` holds another run, the device is not there, or data and settings do not fit.
    """
    settings, (phase,) = baseline.settings, baseline.settings.phases
    if loop.profile is not None:
        raise ValueError("a torch baseline takes no trace; leave profile out")
    if baseline.device == "cuda" and jax.default_backend() != "cpu":
        raise ValueError(
            "JAX holds the GPU's memory in this process; start it with JAX_PLATFORMS=cpu"
        )
    rate = learning_rate_at(settings.optimizer, settings.schedule, settings.steps)
    _check_folder(baseline, out)
    if (out / "result.json").exists():
        ended = read_json(out / "result.json")
        state = State(jnp.int32(ended["step"]), {}, (), jax.random.key(settings.seed), {})
        return Outcome(state, ended["reason"], None, ended["evaluation"], ended["seconds"])
    tokenizer, corpora = open_data(settings.data, settings.tokenizer, out)
    check_lengths(corpora, phase.sequence_length, settings.held_out)
    config = config_for(phase, tokenizer)
    if progress:
        print("\n".join(f"data: {line}" for line in describe(corpora)))
    learner = make_learner(baseline, config)
    write_json(out / "settings.json", to_json(settings))
    facts = {"torch": version("torch"), "transformers": version("transformers")}
    write_json(out / TORCH, {**_torch_only(baseline), **facts})
    (out / "metrics.jsonl").unlink(missing_ok=True)  # of a run that was stopped
    data = batch_dataset(
        [(corpus.split("train"), weight) for corpus, weight in corpora],
        seed=settings.seed,
        sequence_length=phase.sequence_length,
        batch_size=phase.batch_size,
    )
    held_out_bytes = sum(corpus.split(settings.held_out).bytes for corpus, _ in corpora)

    def evaluation(state: State) -> dict[str, float]:
        rows = map(learner.place, _held_out(corpora, phase, settings.held_out))
        measure: Any = learner.measure  # gives plain numbers in place of arrays
        return evaluate(measure, state, {}, rows, held_out_bytes)

    bar = progress_bar(out.name, 0, settings.steps) if progress else None
    with Record(out / "metrics.jsonl") as record, bar or nullcontext(SILENT) as reporter:
        outcome = train(
            learner.step,
            learner.state,
            {},
            lambda start, stop: prefetched(data, start, stop),
            until=settings.steps,
            record=record,
            settings=loop,
            evaluate=evaluation,
            learning_rate=np.asarray(jax.vmap(rate)(jnp.arange(settings.steps))),
            flops_per_token=3 * flops_per_token(config, phase.sequence_length),
            max_nonfinite=settings.max_nonfinite,
            place=learner.place,
            reporter=reporter,
        )
    if outcome.reason != "signal":
        if baseline.keep == "weights":
            learner.model.save_pretrained(out / "model")
        result = {
            "reason": outcome.reason,
            "step": int(outcome.state.step),
            "evaluation": outcome.evaluation,
            "seconds": outcome.seconds,
            "skipped_updates": 0,
        }
        write_json(out / "result.json", result)
    return outcome


@dataclass(frozen=True)
class _Lying(Cell):
    """A cell of ours whose run lies where the baseline's does."""

    at: str = ""

    @property
    def key(self) -> str:
        return self.at


def _held_out(corpora: Corpora, phase: Phase, split: str) -> Iterator[Batch]:
    for corpus, _ in corpora:
        yield from evaluation_batches(
            corpus.split(split),
            sequence_length=phase.sequence_length,
            batch_size=phase.batch_size,
        )


def _torch_only(baseline: TorchBaseline) -> dict[str, Any]:
    return {name: v for name, v in baseline_to_json(baseline).items() if name != "settings"}


def _check_folder(baseline: TorchBaseline, out: Path) -> None:
    """Raises ValueError if `out` holds a run of other settings, or one of ours."""
    if not (out / "settings.json").exists():
        return
    if not (out / TORCH).exists():
        raise ValueError(f"{out} holds a run that is no torch baseline; choose another folder")
    theirs = {**read_json(out / TORCH), "settings": read_json(out / "settings.json")}
    ours = baseline_to_json(baseline)
    ours["settings"] = {**ours["settings"], "data": list(ours["settings"]["data"])}
    known = {name: theirs.get(name) for name in ours}
    if lines := differences(ours, known):
        raise ValueError(
            f"{out} holds a run of other settings; choose another folder, or the same settings:\n  "
            + "\n  ".join(lines)
        )
