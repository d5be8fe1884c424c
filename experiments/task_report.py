"""After a fine-tuning: the best checkpoint on the test split, predictions, forgetting, sizes.

task.json                  all figures
predictions-SPLIT.jsonl    a line for each row, with its inputs
predictions-SPLIT.json     the same as others read it, where a task has such a form
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.export.stored import is_packed
from experiments.json_files import write_json, write_lines
from experiments.runs.assemble import abstract_state, assemble
from experiments.runs.run import Run, best_step, open_run, read_settings
from experiments.runs.run import phase_at as phase_of
from experiments.runs.task_data import read_task
from experiments.tasks.table import REPORTS
from model.heads import without_heads
from train.corpus import build_corpus
from train.data import evaluation_batches
from train.evaluate import evaluate, gather
from train.losses import cross_entropy
from train.plugs import PyTree, State
from train.records import plain
from train.settings import Settings
from train.step import make_evaluation_step
from train.tasks.task import TEST, VALID, Examples, task_evaluation_batches
from train.text.sources import open_source

REPORT = "task.json"


def report_task(out: Path, forgetting: str | None = None) -> dict[str, Any]:
    """Measures the best checkpoint of a finished fine-tuning, and writes what it predicts.

    Args:
      out: folder of the run.
      forgetting: a source of text to measure the language model on, before and after.

    Returns:
      What `task.json` holds: step, figures by split, sizes, and loss and perplexity before and
      after.

    Raises:
      ValueError: no checkpoint was evaluated; forgetting without a start.
    """
    step = best_step(out)
    if step is None:
        raise ValueError(f"{out} has no checkpoint that was evaluated; evaluate during the run")
    run = open_run(out, step)
    task, phase = run.settings.task, run.settings.phases[phase_of(run.settings, step)[0]]
    data = read_task(task, run.tokenizer, phase.sequence_length)
    figures: dict[str, Any] = {"step": step, **sizes(run)}
    for split in (VALID, TEST):
        if split in data.splits:
            examples = data.splits[split]
            outputs = outputs_of(run, examples, phase.batch_size)
            figures[split] = REPORTS[task.name].metrics(task, examples, outputs, run.tokenizer)
            rows = list(REPORTS[task.name].predictions(task, examples, outputs, run.tokenizer))
            write_lines(out / f"predictions-{split}.jsonl", map(plain, rows))
            if (whole := REPORTS[task.name].whole) is not None:
                write_json(out / f"predictions-{split}.json", whole(rows))
    if notes := REPORTS[task.name].notes(task):
        figures["notes"] = notes
    if forgetting is not None:
        figures["forgetting"] = forgotten(run, forgetting)
    write_json(out / REPORT, plain(figures))
    return figures


def outputs_of(run: Run, examples: Examples, batch_size: int) -> dict[str, np.ndarray]:
    """Returns what the model of a run makes of each example of its task."""
    outputs = jax.jit(run.settings.task.outputs(run.model))

    def step(state: State, frozen: PyTree, batch: dict[str, Any]) -> dict[str, jax.Array]:
        return outputs(state.params, batch)

    state = State(jnp.int32(run.step), run.params, (), jax.random.key(0), {})
    batches = task_evaluation_batches(examples.arrays, batch_size=batch_size)
    return gather(step, state, {}, batches, examples.size)


def forgotten(run: Run, data: str) -> dict[str, Any]:
    """Returns the loss of the language model on a source, at the start of a run and now.

    On the validation split, in windows as long as the start was trained with.

    Raises:
      ValueError: the run began from scratch, so there was nothing to forget.
    """
    if run.settings.parent is None:
        raise ValueError("forgetting is measured on what a run started from; give --start")
    parent = open_run(run.settings.parent)
    length = read_settings(parent.folder).phases[-1].sequence_length
    before, after = (language_loss(each, data, length) for each in (parent, run))
    return {
        "data": data,
        "before": before,
        "after": after,
        "perplexity_before": math.exp(min(before, 700.0)),
        "perplexity_after": math.exp(min(after, 700.0)),
    }


def language_loss(run: Run, data: str, length: int, batch_size: int = 16) -> float:
    """Returns the mean cross-entropy of a run's language model on the validation split, in nats."""
    split = build_corpus(open_source(data), run.tokenizer).split("validation")
    params = without_heads(run.params)
    state = State(jnp.int32(run.step), params, (), jax.random.key(0), {})
    measure = jax.jit(make_evaluation_step(run.model, [cross_entropy()]))
    batches = evaluation_batches(split, sequence_length=length, batch_size=batch_size)
    return evaluate(measure, state, {}, batches)["loss"]


def sizes(run: Run) -> dict[str, int]:
    """Returns how many parameters train and there are, and bytes of gradient and optimizer state.

    Both exist for what trains alone.
    """
    parts = assemble(run.settings, run.model.config)
    state = abstract_state(run.settings, parts)
    trained = jax.tree.leaves(state.params)
    leaves = jax.tree.leaves(run.params, is_leaf=is_packed)
    return {
        "trained_parameters": sum(leaf.size for leaf in trained),
        "parameters": sum(math.prod(w.shape) for w in leaves),
        "gradient_bytes": sum(map(_bytes, trained)),
        "optimizer_bytes": sum(map(_bytes, jax.tree.leaves(state.optimizer))),
    }


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.size * leaf.dtype.itemsize


def describe_report(out: Path, settings: Settings, figures: dict[str, Any]) -> list[str]:
    """Returns the lines that a person reads of a report."""
    lines = [
        f"best        step {figures['step']}, by {settings.task.watch.removeprefix('-')}",
        f"trained     {figures['trained_parameters']:,} parameters of {figures['parameters']:,}; "
        f"gradient {figures['gradient_bytes']:,} bytes, optimizer state "
        f"{figures['optimizer_bytes']:,} bytes",
    ]
    for split in (VALID, TEST):
        if split in figures:
            numbers = (f"{name} {value:.4f}" for name, value in figures[split].items())
            lines.append(f"{split:<12}" + "  ".join(numbers))
    if "forgetting" in figures:
        f = figures["forgetting"]
        lines.append(
            f"forgetting  perplexity on {f['data']}: {f['perplexity_before']:.3f} before, "
            f"{f['perplexity_after']:.3f} after"
        )
    lines += [f"{name:<12}{note}" for name, note in figures.get("notes", {}).items()]
    split = TEST if TEST in figures else VALID
    return [*lines, f"rows        {out / f'predictions-{split}.jsonl'}"]
