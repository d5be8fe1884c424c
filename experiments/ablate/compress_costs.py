"""What the rows of the table of training cost: a step of each, a teacher's cache, and shrinking."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.distillation.teacher_cache import write_teacher_cache
from compress.quantization.probe import time_interleaved
from experiments.ablate.compress_students import BATCH, half_of
from experiments.ablate.random_weights import random_weights
from experiments.ablate.steps import known, step_times
from experiments.methods.cached_answers import Kept, answers, with_targets
from experiments.runs.run import open_run
from model.config import TransformerConfig
from model.transformer import Transformer
from train.settings import Phase, Settings


def costs(
    cells: Path,
    runs: Mapping[str, Settings],
    cached: str,
    first: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Times a step of every row in turn, what a cache costs, and what shrinking costs.

    Args:
      cells: folder of the runs.
      runs: row -> settings.
      cached: the row whose teacher's answers are kept.
      first: the row that others are compared with; it is the one that shrinks.
      settings: with the key of a teacher's run, whose vocabulary is used; repeats; and windows of
        calibration.

    Returns:
      "steps": row -> seconds and ratios to the first row's step; "look-up": seconds a batch;
      "cache": seconds to write what one step reads; "shrink": seconds of the calibration and of the
      removal. None of them compiles.
    """
    run = open_run(cells / settings["run"])
    size, repeats = run.model.config.vocabulary_size, settings["repeats"]
    pairs = {
        name: (
            known(each, run.model.config),
            dataclasses.replace(each.phases[0].model, vocabulary_size=size),
        )
        for name, each in runs.items()
    }
    (method,) = runs[cached].methods
    phase = runs[first].phases[0]
    look_up, cache = cache_costs(run.model, run.params, method.kept, phase, repeats)
    return {
        "steps": step_times(pairs, repeats, first),
        "look-up": look_up,
        "cache": cache,
        "shrink": shrink_costs(pairs[first][1], phase, settings["windows"]),
    }


def cache_costs(
    model: Transformer, params: Any, kept: Kept, phase: Phase, repeats: int
) -> tuple[float, float]:
    """Returns the seconds of a batch, to look it up in a teacher's cache and to write it there.

    Args:
      model: the teacher.
      params: its parameters.
      kept: what is kept.
      phase: whose batches it reads.
      repeats: batches of a cache, and how often one is read.
    """
    batches = _batches(model.config, phase, repeats)
    say = answers(model, params, kept)  # compiled once, in the call that is not timed
    with tempfile.TemporaryDirectory() as name:
        folders = (Path(name) / str(number) for number in itertools.count())

        def write() -> Any:
            size = model.config.vocabulary_size
            return write_teacher_cache(next(folders), batches, say, {}, size)

        cache = write()

        def read() -> None:
            for batch in batches:
                with_targets(cache, batch)

        look_up = time_interleaved({"read": read}, repeats)["read"]
        written = time_interleaved({"write": write}, 3)["write"]
    return float(np.median(look_up)) / repeats, float(np.median(written)) / repeats


def shrink_costs(config: TransformerConfig, phase: Phase, count: int) -> float:
    """Returns the seconds of taking half of the neurons, by their activations on some windows.

    Args:
      config: of the model before.
      phase: whose sequence length the windows have.
      count: windows.
    """
    windows = dataclasses.replace(phase, batch_size=min(BATCH, count))
    batches = [
        each["tokens"] for each in _batches(config, windows, -(-count // windows.batch_size))
    ]
    model, params = Transformer(config), random_weights(config)
    cut = half_of(config, layers=False)
    times = time_interleaved({"cut": lambda: cut(model, params, batches)[1]}, 3)
    return float(np.median(times["cut"]))


def _batches(config: TransformerConfig, phase: Phase, count: int) -> list[dict[str, np.ndarray]]:
    shape = (count, phase.batch_size, phase.sequence_length)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocabulary_size, shape).astype(np.int32)
    return [{"tokens": each} for each in tokens]
