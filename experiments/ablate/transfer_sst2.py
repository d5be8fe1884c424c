"""Sentiment of sentences (SST-2): from scratch, and from a language model in several ways.

One small model, its pieces learned from the training sentences. From scratch it is trained on the
labels alone; all others start from a language model of the same shape, trained on the standard
library's source, tiny Shakespeare and the training sentences without their labels. The best
checkpoint on the validation split (checked every 100 steps) is measured on the test split. Dropout,
decay and rates come from some ten trials from scratch whose test figures were seen as well.

The target is the mean validation accuracy that training from scratch ends at. A row's seconds to it
are its steps to the first evaluation at or above it times the seconds of one step, which are
measured apart, all rows in turn in one process: the runs share the machine with other work. What
the language model cost before is stated beside them; many tasks share it.

Data: one folder with `stsa.binary.train`, `.dev` and `.test`, lines of `label text`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.ablate.steps import memory_of_step, step_times
from experiments.folders import made_at_once
from experiments.grid import Cell, Measurement
from experiments.methods.lora import Lora
from experiments.methods.table import Freeze
from experiments.runs.run import config_for, open_run
from experiments.tables.table import Item, Request
from experiments.task_report import report_task
from model.config import TransformerConfig
from model.presets import modern_mini
from train.loop import LoopSettings
from train.optimizers import AdamW
from train.records import read_rows
from train.schedules import Linear
from train.settings import Phase, Settings
from train.tasks.classification import Classification
from train.tasks.rows import RowFormat, content_hash
from train.tasks.task import TaskFiles

FILES = {"train": "stsa.binary.train", "valid": "stsa.binary.dev", "test": "stsa.binary.test"}
FORM = RowFormat(separator=" ", names=("label", "text"))
TFIDF = 0.810  # TF-IDF and logistic regression on the test split, as the data's own notes have it
PIECES = "sentencepiece:4096"
LENGTH, ROWS = 48, 32  # nine in ten sentences are shorter
STEPS, EVERY = 1200, 100
LANGUAGE_STEPS, LANGUAGE_ROWS = 3000, 32
RANKS = (1, 4, 16, 64)
# Share of the labels -> steps: more epochs where there are fewer rows.
SHARES = {0.01: 300, 0.1: 600, 1.0: STEPS}
REPEATS = 12

LANGUAGE = "language model"
SCRATCH, FULL, HEAD = "from scratch", "full", "frozen, head alone"
BAG = "from scratch, mean of the embeddings"  # blocks as they begin: each adds nothing
COSTS = "costs of a step"
WAYS = (SCRATCH, BAG, HEAD, *(f"LoRA, rank {rank}" for rank in RANKS), FULL)


class Rows(NamedTuple):
    """What the rows of a file say of the runs on it.

    Attributes:
      task: resolved.
      pieces: tokenizer, learned from the training texts.
      length: tokens of a row.
    """

    task: Classification
    pieces: str
    length: int


def model_of(dropout: float, length: int) -> TransformerConfig:
    """Returns the model of all rows."""
    return modern_mini(layers=2, width=64, heads=2, max_length=length, dropout=dropout)


def language_settings(rows: Rows, seed: int, texts: Sequence[str]) -> Settings:
    """Returns the run of the language model, on folders with its texts, the training texts first.

    Args:
      rows: see there.
      seed: of everything that is drawn.
      texts: folders.
    """
    return Settings(
        phases=(Phase(LANGUAGE_STEPS, model_of(0.1, rows.length), LANGUAGE_ROWS, rows.length),),
        data=(*texts, "stdlib"),  # in equal parts
        tokenizer=rows.pieces,
        seed=seed,
        optimizer=AdamW(learning_rate=3e-3, weight_decay=0.1),
        schedule=Linear(warmup_steps=LANGUAGE_STEPS // 30),
    )


def task_settings(
    way: str, rows: Rows, seed: int, steps: int, parent: str | None = None
) -> Settings:
    """Returns the run of a row.

    Args:
      way: one of `WAYS`.
      rows: see there.
      seed: of everything that is drawn.
      steps: updates.
      parent: run of the language model.

    Raises:
      ValueError: a way that there is not.
    """
    rate, decay = 2e-3, 0.1
    methods: tuple[Any, ...] = ()
    if way == BAG:
        rate, decay, methods = 3e-3, 1.0, (Freeze(rules=("blocks",)),)
    elif way == HEAD:
        rate, methods = 1e-2, (Freeze(rules=(".*",)),)
    elif way.startswith("LoRA"):
        rate, methods = 5e-3, (Lora(rank=int(way.split()[-1])),)
    elif way not in (SCRATCH, FULL):
        raise ValueError(f"no way is called {way!r}; there are {', '.join(WAYS)}")
    return Settings(
        phases=(Phase(steps, model_of(0.5, rows.length), ROWS, rows.length),),
        data=(),
        tokenizer=rows.pieces,
        seed=seed,
        optimizer=AdamW(learning_rate=rate, weight_decay=decay),
        schedule=Linear(),
        methods=methods,
        parent=None if way in (SCRATCH, BAG) else parent,
        task=rows.task,
    )


def cells(request: Request) -> list[Item]:
    """Returns a measurement for every row, which needs its run."""
    if request.sst2 is None or request.shakespeare is None:
        return []
    paths = tuple((split, str(request.sst2 / name)) for split, name in FILES.items())
    task = task_of(TaskFiles(paths, FORM))
    about = {"sha256": content_hash(request.sst2 / FILES["train"])}
    return cells_of(request, Rows(task, PIECES, LENGTH), about)


def task_of(files: TaskFiles) -> Classification:
    """Returns the task on some files, resolved."""
    return Classification(files, pool="mean", dropout=0.5).resolve()


def cells_of(request: Request, rows: Rows, about: Mapping[str, Any]) -> list[Item]:
    """Returns the same for any files.

    Args:
      request: whose plays, if any, the language model reads too.
      rows: see there.
      about: says by content what the training texts are.
    """
    texts = [
        Measurement(
            "unlabelled sentences",
            {"text": "sentences", **about},
            functools.partial(_keep_sentences, request.cells, rows.task),
        )
    ]
    if (plays := request.shakespeare) is not None:
        texts.append(
            Measurement(
                "plays",
                {"text": "plays", "sha256": content_hash(plays)},
                functools.partial(_keep_plays, request.cells, plays),
            )
        )
    folders = [str(request.cells / text.key) for text in texts]
    items: list[Item] = []
    runs: list[Cell] = []
    for seed in range(request.seeds):
        settings = language_settings(rows, seed, folders)
        loop = LoopSettings(log_every=100, evaluate_every=500)
        language = Cell(LANGUAGE, settings, loop, needs=tuple(texts))
        items.append(language)
        runs.append(language)
        for way in WAYS:
            items.append(_measured(request, way, way, rows, seed, language, 1.0, STEPS))
        for share, steps in SHARES.items():
            if share < 1:
                for way in (SCRATCH, FULL):
                    name = shared(way, share)
                    args = (rows, seed, language, share, steps)
                    items.append(_measured(request, name, way, *args))
    first = runs[0]
    measured = {
        "measured": COSTS,
        "rows": [LANGUAGE, *WAYS],
        "repeats": REPEATS,
        "run": first.key,
    }
    measure = functools.partial(costs, request.cells, rows)
    return [*items, Measurement(COSTS, measured, measure, needs=(first,))]


def _measured(
    request: Request,
    name: str,
    way: str,
    rows: Rows,
    seed: int,
    language: Cell,
    share: float,
    steps: int,
) -> Measurement:
    task = rows.task
    files = dataclasses.replace(task.files, share=share, share_seed=seed if share < 1 else 0)
    rows = rows._replace(task=dataclasses.replace(task, files=files))
    settings = task_settings(way, rows, seed, steps, str(request.cells / language.key))
    loop = LoopSettings(
        log_every=50, evaluate_every=EVERY, checkpoint_every=EVERY, watch="-accuracy"
    )
    needs = () if settings.parent is None else (language,)
    cell = Cell(name, settings, loop, needs=needs)
    # That the figures are those of the test split is part of what was measured.
    measured = {"measured": "test", "run": cell.key, "seed": seed}
    return Measurement(
        name, measured, functools.partial(measure_test, request.cells), needs=(cell,)
    )


def measure_test(cells: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Measures the best checkpoint of a run, once, on the test split.

    Returns:
      Figures of `experiments.task_report`, and `curve`: (step, validation accuracy) of each
      evaluation.
    """
    folder = cells / settings["run"]
    curve = [
        (row["step"], row["accuracy"])
        for row in read_rows(folder / "metrics.jsonl")
        if row["kind"] == "evaluation"
    ]
    return {**report_task(folder), "curve": curve}


def costs(cells: Path, rows: Rows, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Times a step of every row in turn, and reads off what it holds in memory.

    Args:
      cells: folder of the runs.
      rows: see there.
      settings: with the key of a run, whose vocabulary is used.

    Returns:
      Row -> seconds, ratios to a step from scratch, bytes.
    """
    tokenizer = open_run(cells / settings["run"]).tokenizer
    runs = {}
    for name in settings["rows"]:
        language = name == LANGUAGE
        made = language_settings(rows, 0, ()) if language else task_settings(name, rows, 0, STEPS)
        runs[name] = (made, config_for(made.phases[0], tokenizer))
    times = step_times(runs, settings["repeats"], SCRATCH)
    return {name: {**times[name], "bytes": memory_of_step(*run)} for name, run in runs.items()}


def _keep_sentences(
    cells: Path, task: Classification, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes the training texts without their labels, a document each."""
    sentences = list(task.texts())
    content = "".join(json.dumps({"text": text}) + "\n" for text in sentences)
    _keep(cells, settings, "sentences.jsonl", content)
    return {"documents": len(sentences)}


def _keep_plays(cells: Path, path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    content = path.read_text(encoding="utf-8")
    _keep(cells, settings, "plays.txt", content)
    return {"characters": len(content)}


def _keep(cells: Path, settings: Mapping[str, Any], name: str, content: str) -> None:
    """A folder under the key of what it was made from, as the cells that read it name it."""
    out = cells / Measurement("", settings, dict).key
    if not out.exists():
        with made_at_once(out) as folder:
            folder.mkdir(parents=True)
            (folder / name).write_text(content, encoding="utf-8")


def shared(way: str, share: float) -> str:
    """Returns the name of a row.

    >>> shared("full", 1.0), shared("full", 0.1)
    ('full', 'full, 10% of the labels')
    """
    return way if share == 1 else f"{way}, {share:.0%} of the labels"
