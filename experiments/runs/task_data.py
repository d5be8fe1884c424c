"""From the task that settings name to its tokenizer and its examples, recorded by content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.methods.replay import old_text
from experiments.runs.prepare import begin_data, describe, facts_of, keep_tokenizer, record_facts
from parallel.agreement import by_main, together
from train.corpus import Corpus
from train.settings import Settings
from train.tasks.rows import said_of
from train.tasks.task import Examples
from train.tokenizers.tokenizer import Tokenizer


class TaskData(NamedTuple):
    """The splits of a task, encoded.

    Attributes:
      paths: of the files, by split.
      splits: examples, by split.
      old: text that is replayed beside the rows, or None.
    """

    paths: Mapping[str, str]
    splits: Mapping[str, Examples]
    old: Corpus | None = None


def open_task(settings: Settings, out: Path) -> tuple[Tokenizer, TaskData]:
    """Returns the tokenizer (kept in `out`) and the examples of all splits of the run's task.

    Process 0 prepares, the others then find its tokenizer.

    Raises:
      ValueError: a file that does not parse, settings that do not fit a task, or files that have
        changed since the run in `out` began.
    """
    task = settings.task
    _check(settings)
    opened: list[tuple[Tokenizer, TaskData]] = []

    def prepare() -> None:
        begin_data(out)
        tokenizer = keep_tokenizer(settings.tokenizer, out, task.texts)
        data = read_task(task, tokenizer, settings.phases[0].sequence_length)
        old = old_text(settings, tokenizer)
        replayed = [] if old is None else facts_of([(old, 1.0)])
        record_facts([*_facts(task, data, tokenizer), *replayed], out)
        opened.append((tokenizer, data._replace(old=old)))

    by_main(prepare)
    together(lambda: None if opened else prepare())
    return opened[0]


def read_task(task: Any, tokenizer: Tokenizer, length: int) -> TaskData:
    """Returns the examples of all splits, in rows of `length` tokens.

    Raises:
      ValueError: a file that does not parse.
    """
    files = task.files
    splits = {split: task.examples(split, tokenizer, length) for split, _ in files.paths}
    return TaskData(dict(files.paths), splits)


def describe_task(data: TaskData) -> list[str]:
    """Returns lines about the splits: how many examples, what was left out or cut."""
    lines = []
    for split, examples in data.splits.items():
        about = f"{split} {data.paths[split]}: {examples.size:,} examples"
        if examples.size != (rows := len(examples.rows)):
            about += f" of {rows:,} rows"  # packed, or in windows
        if examples.cut:
            about += f", {examples.cut:,} cut, as they are too long"
        lines.append(about)
        if examples.bad:
            lines.append(f"{split} {data.paths[split]}: {said_of(examples.bad)}")
    if data.old is not None:
        lines += [f"replay {line}" for line in describe([(data.old, 1.0)])]
    return lines


def _facts(task: Any, data: TaskData, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    hashes = dict(zip(data.paths, task.files.sha256, strict=True))
    return [
        {
            "name": Path(data.paths[split]).name,
            "split": split,
            "sha256": hashes[split],
            "tokenizer": tokenizer.fingerprint(),
            "examples": examples.size,
            "left_out": len(examples.bad),
        }
        for split, examples in data.splits.items()
    ]


def _check(settings: Settings) -> None:
    """Raises ValueError for settings that do not go with a task."""
    if settings.data:
        raise ValueError("a task has files of its own; leave the sources of text out")
    if len({(phase.batch_size, phase.sequence_length) for phase in settings.phases}) > 1:
        raise ValueError("the phases of a task have batches of one shape; change the model alone")
    if readers := [method.name for method in settings.methods if hasattr(method, "read")]:
        raise ValueError(
            f"{', '.join(readers)} reads windows of text, and a task has rows; leave it out"
        )
