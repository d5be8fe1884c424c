"""A task: rows of a file in place of running text, a head, a loss, and what comes out of each row.

    task.resolve()                              what the settings must know of the files: labels
    task.examples(split, tokenizer, length)     rows -> fixed arrays
    task_batches(arrays, ...)[step]             the batch of a step, a pure function of (seed, step)
    task.head(key, config)                      parameters beside the model's, {} for none
    task.terms(model, label_smoothing)          the loss, as `train.plugs.LossTerm`s
    task.outputs(model)                         (weights, batch) -> what metrics are made of, by row

Settings of a task are a frozen dataclass with a `name`, an identity field of a run beside its
optimizer: the task replaces the data, the loss and the evaluation, a run has at most one, and it
comes after all methods, which see the model without its head. So a rule that freezes everything
leaves the head to train, and so does low-rank adaptation. Which tasks there are, and their metrics,
is for `experiments.tasks.table` to say.

Shapes: N examples, B rows of a batch, T time.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np

from model.config import TransformerConfig
from model.transformer import Transformer
from train import plugs
from train.data import MAX_WINDOWS, Batch
from train.plugs import LossTerm, PyTree
from train.tasks.rows import BadRow, Row, RowFormat, content_hash
from train.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    import grain

T = TypeVar("T")
TRAIN, VALID, TEST = "train", "valid", "test"
SPLITS = (TRAIN, VALID, TEST)
DIVIDED = ((TRAIN, 0.8), (VALID, 0.1), (TEST, 0.1))
"""Shares of the rows of one file alone."""
Outputs = Callable[[PyTree, plugs.Batch], dict[str, Any]]


@dataclass(frozen=True)
class TaskFiles:
    """The files of a task and how they are read.

    Attributes:
      paths: (split, path): "train" and "valid" at least, "test" for the end. One file alone, that
        of "train", serves all three.
      form: of their rows.
      sha256: of each file; filled in at the start of the run.
      share: of the training rows, drawn at random, that are trained on: what a task needs fewer of.
      share_seed: of that draw.
      shares: (split, share) of the rows where one file serves all splits, see `rows_of_split`;
        filled in there.
    """

    paths: tuple[tuple[str, str], ...] = ()
    form: RowFormat = RowFormat()  # noqa: RUF009 (frozen)
    sha256: tuple[str, ...] = ()
    share: float = 1.0
    share_seed: int = 0
    shares: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be above 0 and at most 1")

    def path(self, split: str) -> str:
        """Returns the path of a split.

        Raises:
          ValueError: there is none.
        """
        if split not in dict(self.paths):
            there = ", ".join(name for name, _ in self.paths) or "none"
            raise ValueError(
                f"the task has no {split} file (it has {there}); give one: --data {split}=FILE"
            )
        return dict(self.paths)[split]

    def has(self, split: str) -> bool:
        """Whether there is such a split."""
        return split in dict(self.paths)


class Examples(NamedTuple):
    """A split of a task, encoded.

    Attributes:
      arrays: each of N rows: `tokens`, `targets` int32 [N, T], `weights` float32 [N, T] (1 where a
        token is real and is followed by another, or where the task has its loss), and the task's
        own (`lengths` int32 [N], `labels`, ...).
      rows: what they were made of: of the training file those of the share that was asked for.
        Where several examples are made of one row, an array `row` int32 [N] says of which.
      bad: rows that were left out.
      cut: examples that were longer than T.
    """

    arrays: dict[str, np.ndarray]
    rows: list[Row]
    bad: list[BadRow]
    cut: int

    @property
    def size(self) -> int:
        """N."""
        return len(self.arrays["tokens"])


def resolved(
    files: TaskFiles, hash_of: Callable[[str], str] = lambda path: content_hash(Path(path))
) -> TaskFiles:
    """Returns the files with their hashes, one alone as that of every split.

    Args:
      files: of a task.
      hash_of: path of a split -> hash of its content.

    Raises:
      ValueError: a split that is none, none to train on or to choose by, a file that is not there,
        or is another than at the start of the run.
    """
    for split, _ in files.paths:
        if split not in SPLITS:
            raise ValueError(f"no split is called {split!r}; there are {', '.join(SPLITS)}")
    if [split for split, _ in files.paths] == [TRAIN]:
        paths = tuple((split, files.paths[0][1]) for split, _ in DIVIDED)
        files = replace(files, paths=paths, shares=DIVIDED)
    for split in (TRAIN, VALID):
        files.path(split)
    found = tuple(hash_of(path) for _, path in files.paths)
    if files.sha256:
        for (_, path), old, new in zip(files.paths, files.sha256, found, strict=True):
            if old != new:
                raise ValueError(
                    f"{path} has changed (sha256 {new[:12]}, not {old[:12]}); give it back as it "
                    "was, or begin a new run"
                )
    return replace(files, sha256=found)


def rows_used(rows: list[T], files: TaskFiles, split: str) -> list[T]:
    """Returns the rows of a split that are used, in order: of the training rows a share.

    A smaller share lies in a larger one.

    >>> files = TaskFiles(share=0.2)
    >>> few, more = (rows_used(list("abcdefghij"), TaskFiles(share=s), TRAIN) for s in (0.2, 0.5))
    >>> len(few), len(more), set(few) < set(more), rows_used(["a", "b"], files, VALID)
    (2, 5, True, ['a', 'b'])
    """
    if split != TRAIN or files.share == 1:
        return rows
    order = np.random.default_rng(files.share_seed).permutation(len(rows))
    return [rows[n] for n in np.sort(order[: max(1, round(files.share * len(rows)))])]


def rows_of_split(
    found: tuple[list[Row], list[BadRow]], files: TaskFiles, split: str, inputs: Sequence[str]
) -> tuple[list[Row], list[BadRow]]:
    """Returns what of a file belongs to a split: all, unless one file serves all splits.

    Then the hash of what the model sees of a row says where it belongs, whatever the order and
    number of the others: rows that say the same lie in one split. What was left out is counted
    with the training rows.

    Args:
      found: rows of the file, and what was left out.
      files: of the task.
      split: whose rows.
      inputs: columns that the model sees.

    Raises:
      ValueError: no row belongs to the split.

    >>> files = TaskFiles(shares=DIVIDED)
    >>> rows = [Row(n, {"text": str(n)}) for n in range(1, 101)]
    >>> [len(rows_of_split((rows, []), files, split, ["text"])[0]) for split in SPLITS]
    [83, 9, 8]
    """
    if not files.shares:
        return found
    rows, bad = found
    names = [name for name, _ in files.shares]
    ends = np.cumsum([share for _, share in files.shares])

    def belongs(row: Row) -> bool:
        text = "\0".join(row.columns[name] for name in inputs)
        drawn = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
        return names[int(np.searchsorted(ends[:-1], drawn, side="right"))] == split

    if not (kept := [row for row in rows if belongs(row)]):
        raise ValueError(
            f"of the {len(rows):,} rows of {files.path(split)} none falls to {split}; give a file "
            "for each split: train=FILE valid=FILE test=FILE"
        )
    return kept, bad if split == TRAIN else []


class Task(Protocol):
    """Settings of a task: a frozen dataclass."""

    name: ClassVar[str]
    watch: ClassVar[str]
    """Figure of the metrics that is best where it is least, such as "loss"; a minus before it, as
    in "-accuracy", where it is best at its greatest."""
    files: TaskFiles

    def resolve(self) -> Task:
        """Returns the settings with all filled in that the files say (labels, hashes).

        ValueError: a file that is not there, or is another than at the start of the run.
        """

    def head(self, key: Any, config: TransformerConfig) -> PyTree:
        """Returns new parameters beside the model's, such as {"score": {"kernel": [D, C]}}."""

    def terms(self, model: Transformer, label_smoothing: float) -> tuple[LossTerm, ...]:
        """Returns the loss. Rows and positions of weight 0 count nothing."""

    def texts(self) -> Iterator[str]:
        """Yields the training texts, for a tokenizer that is trained on them."""

    def examples(self, split: str, tokenizer: Tokenizer, length: int) -> Examples:
        """Returns a split in arrays of T = `length`; ValueError at bad rows, unless skipped."""

    def outputs(self, model: Transformer) -> Outputs:
        """Returns a traceable function `(weights, batch) -> arrays`, each of B rows."""


def task_batches(
    arrays: Mapping[str, np.ndarray], *, seed: int, batch_size: int, rows: slice | None = None
) -> grain.MapDataset:
    """The endless dataset whose element `step` is the batch of that step.

    The examples are shuffled anew in each epoch and taken one batch after another, over the ends of
    epochs too, so a batch is a pure function of (seed, step): it does not depend on where a run
    was resumed or how many processes there are.

    Args:
      arrays: of N examples each.
      seed: of the order, at least 0.
      batch_size: B.
      rows: those of the B rows that this process reads; all by default.

    Raises:
      ValueError: no example, arrays of different N, or a size that is not positive.

    >>> batches = task_batches({"tokens": np.arange(4)[:, None]}, seed=0, batch_size=2)
    >>> sorted(int(n) for step in (0, 1) for n in batches[step]["tokens"][:, 0])
    [0, 1, 2, 3]
    """
    import grain

    count = _count(arrays)
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}; it must be at least 1")
    if seed < 0:
        raise ValueError(f"the seed must be >= 0, not {seed}")
    own_seed = int(np.random.SeedSequence((seed, 0)).generate_state(1)[0])  # as for windows of text
    order = grain.MapDataset.range(count).shuffle(seed=own_seed).repeat()

    def batch_at(step: int) -> Batch:
        own = range(batch_size)[rows or slice(None)]
        chosen = np.array([order[step * batch_size + row] % count for row in own])
        return {name: array[chosen] for name, array in arrays.items()}

    return grain.MapDataset.range(sys.maxsize).map(batch_at)


def task_evaluation_batches(
    arrays: Mapping[str, np.ndarray], *, batch_size: int, rows: slice | None = None
) -> Iterator[Batch]:
    """All examples in order; what is missing in the last batch are rows of zeros (no weight).

    Args:
      arrays: of N examples each.
      batch_size: B.
      rows: those of the B rows that this process reads; all by default.

    >>> batches = task_evaluation_batches({"tokens": np.ones(3)}, batch_size=2)
    >>> [batch["tokens"].tolist() for batch in batches]
    [[1.0, 1.0], [1.0, 0.0]]
    """
    count = _count(arrays)
    for first in range(0, count, batch_size):
        own = range(first, first + batch_size)[rows or slice(None)]
        taken = slice(min(own.start, count), min(own.stop, count))

        def padded(array: np.ndarray, taken: slice = taken, size: int = len(own)) -> np.ndarray:
            part = array[taken]
            return np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])

        yield {name: padded(array) for name, array in arrays.items()}


def pad_rows(
    ids: Sequence[Any], length: int, scored: Sequence[slice] | None = None
) -> dict[str, np.ndarray]:
    """Returns rows of ids as `tokens`, `targets`, `weights` [N, T] and `lengths` [N].

    Args:
      ids: int [n] of each row, n from 1 to T; zeros follow at the right.
      length: T.
      scored: which ids of each row are predicted with weight 1; by default all but the first.

    >>> arrays = pad_rows([[5, 6, 7]], 4)
    >>> [arrays[name].tolist() for name in ("tokens", "targets", "weights", "lengths")]
    [[[5, 6, 7, 0]], [[6, 7, 0, 0]], [[1.0, 1.0, 0.0, 0.0]], [3]]
    """
    block = np.zeros((len(ids), length + 1), np.int32)
    weights = np.zeros((len(ids), length + 1), np.float32)
    for number, row in enumerate(ids):
        if not 1 <= len(row) <= length:
            raise ValueError(f"row {number} has {len(row)} ids; 1 to {length} fit")
        block[number, : len(row)] = row
        predicted = slice(1, len(row)) if scored is None else scored[number]
        weights[number, : len(row)][predicted] = 1
    return {
        "tokens": np.ascontiguousarray(block[:, :-1]),
        "targets": np.ascontiguousarray(block[:, 1:]),
        "weights": np.ascontiguousarray(weights[:, 1:]),
        "lengths": np.array([len(row) for row in ids], np.int32),
    }


def _count(arrays: Mapping[str, np.ndarray]) -> int:
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) != 1 or not min(sizes.values()):
        raise ValueError(f"a task needs arrays of as many examples each, at least 1, not {sizes}")
    count = next(iter(sizes.values()))
    if count >= MAX_WINDOWS:
        raise ValueError(f"{count} examples cannot be shuffled; {MAX_WINDOWS - 1} at most")
    return count
