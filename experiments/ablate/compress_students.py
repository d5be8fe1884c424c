"""Smaller models made of finished runs: a measurement writes a run, for cells to start from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compress.distillation.students import distilgpt2_style
from experiments.compress import calibration_windows
from experiments.compression.compressors import Structured
from experiments.compression.quality import quality
from experiments.compression.runs import write_run
from experiments.grid import Cell, Measurement
from experiments.runs.run import Run, open_run
from model.config import TransformerConfig
from model.flops import parameter_count
from train.corpus import build_corpus
from train.data import evaluation_batches
from train.text.sources import open_source, parse_mixture

WINDOWS = 64  # of calibration text, for importance by activation
BATCH = 16


def _half_of_the_layers(run: Run, tokens: Any) -> tuple[TransformerConfig, Any]:
    return distilgpt2_style(run.model.config, run.params)


def half_of(config: TransformerConfig, *, layers: bool) -> Structured:
    """Returns what keeps half of the neurons of a model, and of its layers if these are asked for.

    >>> from model.presets import gpt2_tiny
    >>> half_of(gpt2_tiny(), layers=False).neurons
    64
    """
    return Structured(layers=config.layers // 2 if layers else None, neurons=config.ffn_width_ // 2)


def _structured(layers: bool) -> Callable[[Run, Any], tuple[TransformerConfig, Any]]:
    def make(run: Run, tokens: Any) -> tuple[TransformerConfig, Any]:
        length = run.settings.phases[-1].sequence_length
        batches = calibration_windows(tokens, length=length, count=WINDOWS, batch=BATCH)
        return half_of(run.model.config, layers=layers)(run.model, run.params, batches)

    return make


KINDS: dict[str, Callable[[Run, Any], tuple[TransformerConfig, Any]]] = {
    "half of the layers, spread": _half_of_the_layers,
    "half of the layers and neurons, by activation": _structured(layers=True),
    "half of the neurons, by activation": _structured(layers=False),
}
"""Kind of student -> `(run, calibration tokens) -> its model`."""


def student(cells: Path, parent: Cell, kind: str) -> Measurement:
    """Returns what makes a student of a cell's run; the run it writes is called by its key.

    Its values are the parameters before and after, and loss, perplexity and agreement with the
    whole model right after the removal.

    Args:
      cells: folder of the runs.
      parent: whose run.
      kind: key of `KINDS`.
    """
    settings = {
        "measured": "student",
        "kind": kind,
        "parent": parent.key,
        "seed": parent.settings.seed,
        "windows": WINDOWS,
    }
    return Measurement(kind, settings, functools.partial(_make, cells), needs=(parent,))


def folder_of(cells: Path, made: Measurement) -> Path:
    """Returns the run that a student's measurement writes."""
    return cells / made.key


def _make(cells: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    run = open_run(cells / settings["parent"])
    corpus = build_corpus(open_source(parse_mixture(run.settings.data)[0][0]), run.tokenizer)
    config, params = KINDS[settings["kind"]](run, corpus.split("train").tokens)
    made = Measurement("", settings, _make_nothing)
    out = cells / made.key
    if not out.exists():  # else an earlier attempt came as far as here
        facts = {"from": settings["parent"], "from_step": run.step, "method": settings["kind"]}
        write_run(out, config, params, run.folder / "tokenizer", run.settings, facts)
    split = corpus.split("validation")
    batches = evaluation_batches(
        split, sequence_length=run.settings.phases[-1].sequence_length, batch_size=BATCH
    )
    whole = (run.model, run.params)
    before, after = quality(whole, (run.model.clone(config=config), params), batches, split.bytes)
    return {
        "parameters before": parameter_count(run.model.config),
        "parameters": parameter_count(config),
        "loss before": before["loss"],
        **after,
    }


def _make_nothing(settings: Mapping[str, Any]) -> dict[str, Any]:
    raise AssertionError("only its key is asked for")
