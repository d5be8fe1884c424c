"""What a run is fed with, and measured on: windows of text, or the rows of a task.

open_feed(settings, out) -> Opened          what needs no mesh: tokenizer, what the data is
opened.feed() -> Feed                       batches by step, and the evaluation
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.methods.replay import refuse_replay, replayed
from experiments.methods.table import batch_map
from experiments.runs.assemble import Parts, averages
from experiments.runs.layout import Layout, everywhere, own_rows, place
from experiments.runs.prepare import Corpora, check_lengths, describe, open_data
from experiments.runs.run import open_run, phase_at
from experiments.runs.task_data import TaskData, describe_task, open_task
from experiments.tasks.table import REPORTS
from model.transformer import Model
from train.data import batches as batch_dataset
from train.data import evaluation_batches
from train.evaluate import evaluate, gather
from train.losses import cross_entropy
from train.methods import Reading
from train.optimizers.averaging import averaged
from train.plugs import PyTree, State
from train.settings import Phase, Settings
from train.step import make_evaluation_step, make_output_step
from train.tasks.task import TRAIN, VALID, task_batches, task_evaluation_batches
from train.tokenizers.tokenizer import Tokenizer

Evaluation = Callable[[State], dict[str, float]]


class Feed(NamedTuple):
    """Batches and evaluation of a run.

    Attributes:
      own: (layout, phase) -> the rows of each batch that this process reads, None for all.
      dataset: (phase, own) -> what has the batch of step number n of the run under n.
      evaluation: (layout, model, parts, frozen) -> `state -> {name: figure}`, with "loss".
      sources: examples of each source to train on (of text, rows of the shortest phase), and its
        share of the rows.
    """

    own: Callable[[Layout, Phase], slice | None]
    dataset: Callable[[Phase, slice | None], Any]
    evaluation: Callable[[Layout, Model, Parts, PyTree], Evaluation]
    sources: list[tuple[int, float]]


class Opened(NamedTuple):
    """The data of a run, opened and recorded by content.

    Attributes:
      tokenizer: of the run.
      lines: about the data, for a person.
      feed: called within the mesh of the run.
    """

    tokenizer: Tokenizer
    lines: list[str]
    feed: Callable[[], Feed]


def open_feed(settings: Settings, out: Path) -> Opened:
    """Opens the data of a run, and its tokenizer (kept in `out`).

    Raises:
      ValueError: data that cannot be read, that does not fit the settings, or that has changed
        since the run in `out` began.
    """
    if settings.task is not None:
        tokenizer, data = open_task(settings, out)
        return Opened(tokenizer, describe_task(data), lambda: _task_feed(settings, tokenizer, data))
    refuse_replay(settings)
    tokenizer, corpora = open_data(settings.data, settings.tokenizer, out)
    check_lengths(corpora, _window_length(settings), settings.held_out)
    return Opened(tokenizer, describe(corpora), lambda: _text_feed(settings, corpora, out))


def text_dataset(
    settings: Settings, corpora: Corpora, phase: Phase, own: slice | None = None
) -> Any:
    """The batches of a phase, by step of the run: whole, or the rows `own` of each."""
    return batch_dataset(
        [(corpus.split("train"), weight) for corpus, weight in corpora],
        seed=settings.seed,
        sequence_length=phase.sequence_length,
        batch_size=_windows_by_step(settings),
        window_length=_window_length(settings),
        document_boundaries=settings.document_boundaries,
        rows=own and _of_first_batch(own, settings, phase),
    )


def _text_feed(settings: Settings, corpora: Corpora, out: Path) -> Feed:
    beside = batch_map(_reading(settings, corpora, out))
    held_out = [corpus.split(settings.held_out) for corpus, _ in corpora]
    # Masked, the first token of a document is not predicted, and how many bytes it has is not known
    # here: bits per byte would come out too low.
    masked = settings.document_boundaries == "mask"
    held_out_bytes = 0 if masked else sum(split.bytes for split in held_out)
    # Rows as long as the longest phase has them: one measure for all phases.
    longest = max(settings.phases, key=lambda phase: phase.sequence_length)

    def own(layout: Layout, phase: Phase) -> slice | None:
        rows = own_rows(layout, phase.batch_size)
        return None if rows and _of_first_batch(rows, settings, phase) is None else rows

    def dataset(phase: Phase, own: slice | None) -> Any:
        return text_dataset(settings, corpora, phase, own).map(beside)

    def evaluation(layout: Layout, model: Model, parts: Parts, frozen: PyTree) -> Evaluation:
        terms = [cross_entropy()]
        chunk = settings.loss_chunk
        step = make_evaluation_step(model, terms, parts.plugs.transforms, chunk)
        measure = _compiled(step, settings, layout)
        own_held_out = own_rows(layout, longest.batch_size)

        def batches() -> Iterator[dict[str, jax.Array]]:
            for split in held_out:
                for batch in evaluation_batches(
                    split,
                    sequence_length=longest.sequence_length,
                    batch_size=longest.batch_size,
                    document_boundaries=settings.document_boundaries,
                    rows=own_held_out,
                ):
                    yield place(layout, batch, own_held_out, longest.batch_size)

        return lambda state: evaluate(measure, state, frozen, batches(), held_out_bytes)

    window, shortest = _window_length(settings), min(p.sequence_length for p in settings.phases)
    windows = [((len(c.split("train").tokens) - 1) // window, weight) for c, weight in corpora]
    rows = [(count * (window // shortest), weight) for count, weight in windows]
    return Feed(own, dataset, evaluation, rows)


def _task_feed(settings: Settings, tokenizer: Tokenizer, data: TaskData) -> Feed:
    task = settings.task
    REPORTS[task.name].needs()  # before anything trains
    train, valid = data.splits[TRAIN], data.splits[VALID]
    phase = settings.phases[0]  # all have its shape

    def own(layout: Layout, phase: Phase) -> slice | None:
        if data.old is not None and layout.mesh.shape["context"] > 1:
            raise ValueError(
                "replayed text is not divided over the mesh axis context; leave it at 1"
            )
        return own_rows(layout, phase.batch_size)

    def dataset(phase: Phase, own: slice | None) -> Any:
        size = phase.batch_size
        made = task_batches(train.arrays, seed=settings.seed, batch_size=size, rows=own)
        return made if data.old is None else replayed(made, settings, data.old, phase, own)

    def evaluation(layout: Layout, model: Model, parts: Parts, frozen: PyTree) -> Evaluation:
        step = make_output_step(task.outputs(model), parts.terms, parts.plugs.transforms)
        measure = _compiled(step, settings, layout)
        rows, size = own_rows(layout, phase.batch_size), phase.batch_size

        def batches() -> Iterator[dict[str, jax.Array]]:
            for batch in task_evaluation_batches(valid.arrays, batch_size=size, rows=rows):
                yield place(layout, batch, rows, size)

        def apply(state: State) -> dict[str, float]:
            outputs = gather(measure, state, frozen, batches(), valid.size)
            return REPORTS[task.name].metrics(task, valid, outputs, tokenizer)

        return apply

    return Feed(own, dataset, evaluation, [(train.size, 1.0)])


def _compiled(step: Callable[..., Any], settings: Settings, layout: Layout) -> Callable[..., Any]:
    """The step of an evaluation, on the weights that count, its result on every device."""

    def apply(state: State, frozen: PyTree, batch: dict[str, jax.Array]) -> Any:
        if averages(settings):
            state = replace(state, params=averaged(state.optimizer, state.params))
        return step(state, frozen, batch)

    return jax.jit(apply, out_shardings=everywhere(layout))


def _reading(settings: Settings, corpora: Corpora, out: Path) -> Reading:
    """The data as methods see it that put something beside each batch."""
    phase = settings.phases[0]

    def windows() -> Iterator[dict[str, np.ndarray]]:
        for corpus, _ in corpora:
            yield from evaluation_batches(
                corpus.split("train"),
                sequence_length=phase.sequence_length,
                batch_size=phase.batch_size,
                document_boundaries=settings.document_boundaries,
            )

    facts = [{"sha256": c.fingerprint, "tokenizer": c.tokenizer} for c, _ in corpora]

    def dataset(phase: Phase) -> Any:
        return text_dataset(settings, corpora, phase)

    return Reading(settings, facts, dataset, windows, out, open_run)


def _window_length(settings: Settings) -> int:
    """Length that all phases cut their rows from: they go on through one order of windows."""
    return max(phase.sequence_length for phase in settings.phases)


def _windows_by_step(settings: Settings) -> int | Callable[[int], int]:
    """Windows that each step of the run takes.

    Raises:
      ValueError: a phase whose batch is no whole number of windows.
    """
    length = _window_length(settings)
    windows = []
    for phase in settings.phases:
        if length % phase.sequence_length or phase.batch_size % (length // phase.sequence_length):
            raise ValueError(
                f"a batch of {phase.batch_size} rows of {phase.sequence_length} tokens is no whole "
                f"number of the {length}-token windows that all phases share"
            )
        windows.append(phase.batch_size * phase.sequence_length // length)
    if len(set(windows)) == 1:
        return windows[0]
    return lambda step: windows[phase_at(settings, step)[0]]


def _of_first_batch(own: slice, settings: Settings, phase: Phase) -> slice | None:
    """The same part of the run's first batch, cut as in this phase: what `batch_dataset` takes.

    None if that batch has no such part: then this process reads all rows.
    """
    first = settings.phases[0]
    rows = first.batch_size * first.sequence_length // phase.sequence_length
    if own.start * rows % phase.batch_size or own.stop * rows % phase.batch_size:
        return None
    return slice(own.start * rows // phase.batch_size, own.stop * rows // phase.batch_size)
