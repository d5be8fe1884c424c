"""The tables of transfer on a user's own files: any classification, any parallel text.

    python -m experiments.ablate transfer --labelled reviews.csv --columns text=review label=stars
    python -m experiments.ablate transfer --parallel train=a.en,a.de valid=b.en,b.de test=c.en,c.de

Models, steps and searches are those of the tables of SST-2 and of Multi30k. What follows the file
is the length of rows, which nine in ten fit, and the number of pieces, as many as its words give.
One file alone is divided by a hash of its rows. The report is named after the file and its content.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from experiments.ablate import transfer_multi30k as multi30k
from experiments.ablate import transfer_sst2 as sst2
from experiments.ablate import transfer_sst2_report as sst2_report
from experiments.ablate.tfidf import BASELINE, baseline
from experiments.grid import Measurement, without_folders
from experiments.tables.table import Item, Request, Results, Table
from train.settings import digest, essential
from train.tasks.classification import Classification
from train.tasks.rows import RowFormat, content_hash
from train.tasks.squad_files import file_of
from train.tasks.task import SPLITS, TRAIN, TaskFiles
from train.tasks.translation import Translation

FILES = "the files"
PIECES = (4096, 2048, 1024, 512)
SHORTEST, LONGEST, MULTIPLE = 16, 256, 16
KNOWN = {
    "squad": "58ccdee0b6f4dd97",
    "shakespeare": "8f8d9c69e8a85ecd",
    "sst2": "9677c0d08737822e",
    "multi30k": "eaf72e340c807904",
}
"""Hashes of the data that the tables of transfer are made of, see `other_data`."""
PIECES_A_WORD = 1.5  # of 4,096 pieces, about, in English


def files_named(words: Iterable[str], form: RowFormat) -> TaskFiles:
    """Returns the files of `FILE`, or of `train=FILE valid=FILE test=FILE`.

    Raises:
      ValueError: neither one file nor one for each split.

    >>> files_named(["a.csv"], RowFormat()).paths
    (('train', 'a.csv'),)
    """
    words = tuple(words)
    pairs = [word.partition("=") for word in words]
    named = [(split, path) for split, equals, path in pairs if equals and split in SPLITS]
    if len(words) == 1 and not named:
        return TaskFiles(((TRAIN, words[0]),), form)
    if len(named) != len(words) or sorted(split for split, _ in named) not in (
        [TRAIN],
        sorted(SPLITS),
    ):
        raise ValueError(
            f"{' '.join(words)!r} are not files for all splits; give one FILE, which is divided, "
            "or train=FILE valid=FILE test=FILE"
        )
    return TaskFiles(tuple(named), form)


def pieces_for(texts: Iterable[str], sizes: tuple[int, ...] = PIECES) -> str:
    """Returns the largest tokenizer that a text has words enough for.

    Each word of two characters or more ends as a piece of its own, if need be.

    >>> pieces_for(["few words"]), pieces_for([f"a{n}b" for n in range(9999)])
    ('bytes', 'sentencepiece:4096')
    """
    words = {word for text in texts for word in text.split() if 2 <= len(word) <= 15}
    return next((f"sentencepiece:{n}" for n in sizes if len(words) >= n), "bytes")


def length_for(texts: Iterable[str], pieces: str) -> int:
    """Returns the tokens of a row that nine in ten texts fit, roughly.

    >>> length_for(["one two three"] * 9 + ["long " * 99], "sentencepiece:4096")
    16
    """
    sizes = [
        len(text.encode()) if pieces == "bytes" else PIECES_A_WORD * len(text.split())
        for text in texts
    ]
    fits = float(np.quantile(sizes, 0.9, method="inverted_cdf")) + 2  # an end on both sides
    return int(np.clip(math.ceil(fits / MULTIPLE) * MULTIPLE, SHORTEST, LONGEST))


def name_of(files: TaskFiles) -> str:
    """Returns a name for the report on some files, with a hash of their content and format.

    >>> name_of(TaskFiles((("train", "data/my reviews.csv"),), sha256=("c3ab",)))[:11]
    'my-reviews-'
    """
    path = PurePath(dict(files.paths)[TRAIN].partition(",")[0])
    return f"{_plain(path.name)}-{identity(files)[:8]}"


def other_data(request: Request) -> str:
    """Returns a name for a report on other data than the tables were made of, else "".

    Data are known by content: a copy elsewhere is the same.
    """
    squad, plays = request.squad, request.shakespeare
    found = {
        "squad": [] if squad is None else [file_of(str(squad))],
        "shakespeare": [] if plays is None else [plays],
        "sst2": _files_in(request.sst2, sst2.FILES.values()),
        "multi30k": _files_in(
            request.multi30k,
            (f"{name}.{side}.gz" for name in multi30k.SPLITS.values() for side in ("en", "de")),
        ),
    }
    hashes = {
        name: digest([content_hash(path) for path in paths])
        for name, paths in found.items()
        if paths and all(path.is_file() for path in paths)  # else a table says what is missing
    }
    if all(KNOWN[name] == value for name, value in hashes.items()):
        return ""
    first = next(name for name, value in hashes.items() if KNOWN[name] != value)
    stem = first if len(found[first]) > 1 else found[first][0].name
    return f"{_plain(stem)}-{digest(hashes)[:8]}"


def _files_in(folder: Path | None, names: Iterable[str]) -> list[Path]:
    return [] if folder is None else [folder / name for name in names]


def _plain(name: str) -> str:
    stem = name.partition(".")[0]
    return re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-") or "files"


def identity(what: Any) -> str:
    """Returns a hash of settings, where files count by what they hold."""
    return digest(without_folders(essential([what])))


# A classification


def labelled_cells(request: Request) -> list[Item]:
    """Returns the ways to tune, as for SST-2, and what a linear model gives."""
    if request.labelled is None:
        return []
    task = sst2.task_of(request.labelled)
    texts = list(task.texts())
    pieces = pieces_for(texts)
    rows = sst2.Rows(task, pieces, length_for(texts, pieces))
    of = {"task": identity(task)}
    measured = {"measured": BASELINE, "pieces": pieces, "length": rows.length, **of}
    linear = Measurement(BASELINE, measured, functools.partial(_linear, task))
    return [linear, *sst2.cells_of(request, rows, of)]


def _linear(task: Classification, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**baseline(task), **{name: settings[name] for name in ("pieces", "length")}}


def render_labelled(results: Results) -> list[str]:
    """Returns what the files are, and the same as of SST-2."""
    found = next(iter(results.by_name.get(BASELINE, {}).values()), None)
    about = [
        "From scratch the model is trained on the labels alone; all others start from a language "
        "model of the same shape, trained on the standard library's source, the training texts "
        "without their labels, and plays if they were given. The best checkpoint on the validation "
        "split is measured on the test split. Rates and dropout are those that suit SST-2.",
        " ".join((sst2.__doc__ or "").split("\n\n")[3].split()),
    ]
    if found is None:
        return sst2_report.render_ways(results, about, math.nan)
    sizes = ", ".join(f"{split} {count:,}" for split, count in found["rows"].items())
    about.append(
        f"Rows: {sizes}; {found['labels']} labels, of which the commonest is "
        f"{found['commonest']:.1%} of the test split; {found['length']} tokens a row, "
        f"tokenizer {found['pieces']}."
    )
    return sst2_report.render_ways(results, about, found["accuracy"])


# A translation


def parallel_cells(request: Request) -> list[Item]:
    """Returns the runs and searches, as for Multi30k."""
    if request.parallel is None:
        return []
    task = Translation(files=request.parallel).resolve()
    pieces = pieces_for(task.texts(), (5000, *PIECES))
    of = {"task": identity(task)}
    measured = {"measured": FILES, "pieces": pieces, **of}
    counted = Measurement(FILES, measured, functools.partial(counts, task))
    return [counted, *multi30k.cells_of(request, task, pieces)]


def counts(task: Translation, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how many pairs each split has, and the settings."""
    return {
        "rows": {split: len(task.rows(split)[0]) for split in SPLITS},
        "pieces": settings["pieces"],
    }


def render_parallel(results: Results) -> list[str]:
    """Returns what the files are, and the same as of Multi30k."""
    about = [
        "An encoder and a decoder of three layers each, 192 wide, under Muon, from scratch: model, "
        "steps and searches are those of Multi30k."
    ]
    if found := next(iter(results.by_name.get(FILES, {}).values()), None):
        sizes = ", ".join(f"{split} {count:,}" for split, count in found["rows"].items())
        about.append(f"Pairs: {sizes}; tokenizer {found['pieces']}.")
    return multi30k.render_searches(results, about)


LABELLED: tuple[Table, ...] = (
    Table(
        "labelled",
        "Classification: ways to tune",
        labelled_cells,
        render_labelled,
        sst2_report.picture,
    ),
    Table("labels", "Classification: fewer labels", labelled_cells, sst2_report.render_shares),
)
PARALLEL: tuple[Table, ...] = (
    Table("parallel", "Translation", parallel_cells, render_parallel, multi30k.picture),
)
