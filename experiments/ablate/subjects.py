"""What a measurement compresses: a model, text to calibrate on, and text to judge by.

"base" is one of `experiments.ablate.base`, calibrated on the train split and judged on the test
split, which no setting was chosen by. "stories" is a foreign model, stories260K of
karpathy/tinyllamas; both its texts are its own samples, so that the rise of the loss over the
dense model is the divergence from it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.ablate.base import base_cell, open_base
from experiments.compress import calibration_windows
from experiments.compression.quality import before_head, quality
from experiments.grid import Cell
from experiments.tables.table import Request
from model.generate import generate
from model.llama2c import load
from model.transformer import Transformer
from train.corpus import build_corpus
from train.data import evaluation_batches
from train.text.sources import open_source
from train.tokenizers.tokenizer import load_tokenizer

PyTree = Any
WINDOWS = 128  # of calibration text, as in GPTQ, SparseGPT and Wanda
STORIES_ROWS, STORIES_LENGTH, STORIES_START = 96, 256, 1
KEPT = 3  # models of each kind in memory: one table after the other asks for every seed
STORIES_FILES = ("stories260K.bin", "tok512.bin")


class Subject(NamedTuple):
    """A model and its texts.

    Attributes:
      model: the dense model.
      params: its parameters.
      calibration: int [B, T] each.
      held_out: batches as of `train.data.evaluation_batches`.
      text_bytes: of the held-out text.
      finals: what the dense model gives its head for each of those batches; kept, since everything
        that is made of it is compared with it.
    """

    model: Transformer
    params: PyTree
    calibration: tuple[np.ndarray, ...]
    held_out: tuple[dict[str, np.ndarray], ...]
    text_bytes: int
    finals: tuple[jax.Array, ...]


def base_settings(seed: int) -> dict[str, Any]:
    """Returns the settings that name a base model in a measurement."""
    return {"subject": "base", "base": base_cell(seed).key, "windows": WINDOWS, "seed": seed}


def stories_settings(seed: int) -> dict[str, Any]:
    """Returns the settings that name the foreign model, with samples of a seed."""
    sampled = {"rows": STORIES_ROWS, "length": STORIES_LENGTH}
    return {"subject": "stories", **sampled, "windows": WINDOWS, "seed": seed}


def needs_of(settings: Mapping[str, Any]) -> tuple[Cell, ...]:
    """Returns the cells that a measurement of such settings opens."""
    return (base_cell(settings["seed"]),) if settings["subject"] == "base" else ()


def open_subject(request: Request, settings: Mapping[str, Any]) -> Subject:
    """Opens what the settings name; the last few are kept in memory.

    Raises:
      ValueError: the folder of the foreign model was not given, or lacks a file.
    """
    if settings["subject"] == "base":
        return _base(request.cells, settings["seed"], settings["windows"])
    if request.stories is None:
        raise ValueError("the foreign model is needed: give its folder with --stories")
    return _stories(
        request.stories,
        settings["seed"],
        settings["rows"],
        settings["length"],
        settings["windows"],
    )


def judge(
    subject: Subject, model: Transformer, params: PyTree
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns what `compression_quality.quality` says of the dense and of the compressed model."""
    dense, texts = (subject.model, subject.params), (subject.held_out, subject.text_bytes)
    return quality(dense, (model, params), *texts, subject.finals)


@functools.lru_cache(maxsize=KEPT)
def _base(cells: Path, seed: int, count: int) -> Subject:
    run = open_base(cells, seed)
    phase = run.settings.phases[-1]
    corpus = build_corpus(open_source(run.settings.data[0]), run.tokenizer)
    batches = calibration_windows(
        corpus.split("train").tokens, length=phase.sequence_length, count=count, batch=16
    )
    split = corpus.split("test")
    held_out = evaluation_batches(split, sequence_length=phase.sequence_length, batch_size=16)
    texts = (tuple(batches), tuple(held_out), split.bytes)
    return Subject(run.model, run.params, *texts, before_head((run.model, run.params), texts[1]))


@functools.lru_cache(maxsize=KEPT)
def _stories(folder: Path, seed: int, rows: int, length: int, count: int) -> Subject:
    if missing := [name for name in STORIES_FILES if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {' and '.join(missing)} of karpathy/tinyllamas")
    config, params = load(folder / STORIES_FILES[0])
    tokenizer = load_tokenizer(folder / STORIES_FILES[1])
    model = Transformer(config)
    keys = jax.random.split(jax.random.key(seed))
    texts = [
        generate(model, params, [[STORIES_START]] * n, key=key, max_new_tokens=length).tokens[
            :, : length + 1
        ]
        for n, key in zip((count, rows), keys, strict=True)
    ]
    calibration, judged = (np.asarray(text, np.int32) for text in texts)
    held_out = [
        {
            "tokens": judged[i : i + 16, :-1],
            "targets": judged[i : i + 16, 1:],
            "weights": np.ones_like(judged[i : i + 16, 1:], np.float32),
        }
        for i in range(0, rows, 16)
    ]
    text_bytes = sum(len(tokenizer.decode_bytes(row)) for row in judged)
    batches = tuple(calibration[i : i + 16, :-1] for i in range(0, count, 16))
    finals = before_head((model, params), held_out)
    return Subject(model, params, batches, tuple(held_out), text_bytes, finals)
