"""Sentiment of sentences (SST-2): from scratch, and from a language model in several ways.

One small model, its pieces learned from the training sentences. From scratch it is trained on the
labels alone; all others start from a language model of the same shape, trained on the standard
library's source, tiny Shakespeare and the training sentences without their labels. Two rows add
hashed n-grams of pieces to the head (`train.tasks.grams`), a linear model of short phrases; from
scratch it reads half as many pieces, which are shorter. The best checkpoint on the validation split
(of those every 100 steps) is measured on the test split.

Rate and dropout of every way are the best of as many trials, four rates and two dropouts, in
`experiments.ablate.transfer_sst2_tuning`, on rows of the training file that are held out there.
Decay, steps and lengths come from trials of an earlier version, from scratch alone, whose test
figures were seen. N-grams were chosen by five-fold cross-validation over the training file.

Each seed has a target of its own: the validation accuracy that its run from scratch ends at. A
row's seconds to it are its steps to the first evaluation at or above it, looked for every 20 steps,
times the seconds of one step, which are measured apart, all rows in turn in one process: the runs
share the machine with other work. What the language model cost before stands beside them; many
tasks share it.

Data: one folder with `stsa.binary.train`, `.dev` and `.test`, lines of `label text`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.ablate.steps import memory_of_step, step_times
from experiments.ablate.tfidf import BASELINE, baseline
from experiments.ablate.transfer_sst2_texts import keep_plays, keep_sentences
from experiments.grid import Cell, Measurement
from experiments.methods.lora import Lora
from experiments.methods.table import Freeze
from experiments.runs.run import config_for, open_run
from experiments.runs.task_data import read_task
from experiments.tables.table import Item, Request
from experiments.task_report import outputs_of, report_task
from model.config import TransformerConfig
from model.presets import modern_mini
from train.loop import LoopSettings
from train.optimizers import AdamW
from train.optimizers.settings import MATRICES
from train.records import read_rows
from train.schedules import Linear
from train.settings import Phase, Settings
from train.tasks.classification import Classification
from train.tasks.rows import RowFormat, content_hash
from train.tasks.rowwise import template_for
from train.tasks.task import TRAIN, TaskFiles

FILES = {"train": "stsa.binary.train", "valid": "stsa.binary.dev", "test": "stsa.binary.test"}
FORM = RowFormat(separator=" ", names=("label", "text"))
PIECES, FEWEST_PIECES = "sentencepiece:4096", 512
LENGTH, ROWS = 48, 32  # nine in ten sentences are shorter
STEPS, EVERY, KEEP_EVERY = 1200, 20, 100
ORDER, BUCKETS, GRAM_RATE = 3, 2**19, 0.03
LANGUAGE_STEPS, LANGUAGE_ROWS = 3000, 32
RANKS = (1, 4, 16, 64)
# Share of the labels -> steps: more epochs where there are fewer rows.
SHARES = {0.01: 300, 0.1: 600, 1.0: STEPS}
REPEATS = 12

LANGUAGE = "language model"
SCRATCH, FULL, HEAD = "from scratch", "full", "frozen, head alone"
BAG = "from scratch, mean of the embeddings"  # blocks as they begin: each adds nothing
GRAMS, FULL_GRAMS = "from scratch, mean and n-grams", "full, with n-grams"
LORA = "LoRA, rank"
COSTS = "costs of a step"
FROM_SCRATCH = (SCRATCH, BAG, GRAMS)
SHARED = (SCRATCH, GRAMS, FULL, FULL_GRAMS)  # with fewer labels
WAYS = (*FROM_SCRATCH, HEAD, *(f"{LORA} {rank}" for rank in RANKS), FULL, FULL_GRAMS)


class Recipe(NamedTuple):
    """What is tuned of a way.

    Attributes:
      rate: peak learning rate of all but the n-grams.
      dropout: of the model and of the features that the head reads.
    """

    rate: float
    dropout: float


RECIPES: Mapping[str, Recipe] = {
    SCRATCH: Recipe(3e-3, 0.5),
    BAG: Recipe(3e-3, 0.5),
    GRAMS: Recipe(1e-3, 0.5),
    HEAD: Recipe(1e-3, 0.1),
    **{f"{LORA} {rank}": Recipe(3e-3 if rank < 64 else 3e-4, 0.1) for rank in RANKS},
    FULL: Recipe(3e-4, 0.1),
    FULL_GRAMS: Recipe(1e-3, 0.5),
}
"""What the trials chose, see `experiments.ablate.transfer_sst2_tuning`."""


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


def recipe_of(way: str) -> Recipe:
    """Returns what was tuned of a way.

    >>> recipe_of("full").dropout
    0.1

    Raises:
      ValueError: a way that there is not.
    """
    if way not in RECIPES:
        raise ValueError(f"no way is called {way!r}; there are {', '.join(WAYS)}")
    return RECIPES[way]


def pieces_of(way: str, rows: Rows) -> str:
    """Returns the tokenizer of a way from scratch: n-grams say what half as many pieces do not.

    >>> pieces_of(GRAMS, Rows(Classification(), "sentencepiece:4096", 48))
    'sentencepiece:2048'
    """
    kind, _, size = rows.pieces.partition(":")
    if way != GRAMS or not size or int(size) < 2 * FEWEST_PIECES:
        return rows.pieces
    return f"{kind}:{int(size) // 2}"


def task_settings(
    way: str,
    rows: Rows,
    seed: int,
    steps: int,
    parent: str | None = None,
    recipe: Recipe | None = None,
) -> Settings:
    """Returns the run of a row.

    Args:
      way: one of `WAYS`.
      rows: see there.
      seed: of everything that is drawn.
      steps: updates.
      parent: run of the language model, whose pieces are read too.
      recipe: by default what was tuned.

    Raises:
      ValueError: a way that there is not.
    """
    recipe = recipe or recipe_of(way)
    decay = 0.1
    methods: tuple[Any, ...] = ()
    rate_rules: tuple[tuple[str, float], ...] = ()
    if way in (BAG, GRAMS):
        decay, methods = 1.0, (Freeze(rules=("blocks",)),)
    elif way == HEAD:
        methods = (Freeze(rules=(".*",)),)
    elif way.startswith(LORA):
        methods = (Lora(rank=int(way.split()[-1])),)
    task = dataclasses.replace(rows.task, dropout=recipe.dropout)
    if way in (GRAMS, FULL_GRAMS):
        task = dataclasses.replace(task, grams=ORDER, buckets=BUCKETS)
        rate_rules = (("score/grams", GRAM_RATE / recipe.rate),)
    parent = None if way in FROM_SCRATCH else parent
    return Settings(
        phases=(Phase(steps, model_of(recipe.dropout, rows.length), ROWS, rows.length),),
        data=(),
        tokenizer=pieces_of(way, rows) if parent is None else f"{parent}/tokenizer",
        seed=seed,
        optimizer=AdamW(
            learning_rate=recipe.rate,
            weight_decay=decay,
            learning_rate_rules=rate_rules,
            decay_rules=(("score/grams", False), *MATRICES) if rate_rules else MATRICES,
        ),
        schedule=Linear(),
        methods=methods,
        parent=parent,
        task=task,
    )


def cells(request: Request) -> list[Item]:
    """Returns a measurement for every row, which needs its run."""
    if request.sst2 is None or request.shakespeare is None:
        return []
    paths = tuple((split, str(request.sst2 / name)) for split, name in FILES.items())
    task = task_of(TaskFiles(paths, FORM))
    linear = Measurement(
        BASELINE,
        {"measured": BASELINE, "sha256": list(task.files.sha256)},
        lambda settings: baseline(task),
    )
    about = {"sha256": content_hash(request.sst2 / FILES["train"])}
    return [linear, *cells_of(request, Rows(task, PIECES, LENGTH), about)]


def task_of(files: TaskFiles) -> Classification:
    """Returns the task on some files, resolved.

    Texts begin with a space, so that a word has the same pieces there as further on.
    """
    template = template_for(Classification(files)).replace("{text", " {text")
    return Classification(files, template=template, pool="mean").resolve()


def cells_of(request: Request, rows: Rows, about: Mapping[str, Any]) -> list[Item]:
    """Returns the same for any files.

    Args:
      request: whose plays, if any, the language model reads too.
      rows: see there.
      about: says by content what the training texts are.
    """
    items: list[Item] = []
    runs: list[Cell] = []
    for seed in range(request.seeds):
        language = language_cell(request, rows, seed, about)
        items.append(language)
        runs.append(language)
        for way in WAYS:
            items.append(_measured(request, way, way, rows, seed, language, 1.0, STEPS))
        for share, steps in SHARES.items():
            if share < 1:
                for way in SHARED:
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


def language_cell(request: Request, rows: Rows, seed: int, about: Mapping[str, Any]) -> Cell:
    """Returns the run of a language model, and what it needs: the texts.

    Args:
      request, rows, about: as for `cells_of`.
      seed: of the run.
    """
    texts = [
        Measurement(
            "unlabelled sentences",
            {"text": "sentences", "template": rows.task.template, **about},
            functools.partial(keep_sentences, request.cells, rows.task),
        )
    ]
    if (plays := request.shakespeare) is not None:
        texts.append(
            Measurement(
                "plays",
                {"text": "plays", "sha256": content_hash(plays)},
                functools.partial(keep_plays, request.cells, plays),
            )
        )
    settings = language_settings(rows, seed, [str(request.cells / text.key) for text in texts])
    loop = LoopSettings(log_every=100, evaluate_every=500)
    return Cell(LANGUAGE, settings, loop, needs=tuple(texts))


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
        log_every=50, evaluate_every=EVERY, checkpoint_every=KEEP_EVERY, watch="-accuracy"
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
      Figures of `experiments.task_report`; (step, validation accuracy) of each evaluation, `curve`,
      and (step, validation loss), `losses`; accuracy of that checkpoint on the training rows,
      `fitted`.
    """
    folder = cells / settings["run"]
    return {**report_task(folder), **curves(folder), "fitted": fitted(folder)}


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns `curve` and `losses` of a run, see `measure_test`."""
    found = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "evaluation"]
    names = {"curve": "accuracy", "losses": "loss"}
    return {name: [(row["step"], row[kind]) for row in found] for name, kind in names.items()}


def fitted(folder: Path) -> float:
    """Returns the accuracy of a run's best checkpoint on its training rows."""
    run = open_run(folder)
    phase = run.settings.phases[-1]
    data = read_task(run.settings.task, run.tokenizer, phase.sequence_length)
    examples = data.splits[TRAIN]
    logits = outputs_of(run, examples, phase.batch_size)["logits"]
    return float((np.argmax(logits, axis=-1) == examples.arrays["labels"]).mean())


def costs(cells: Path, rows: Rows, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Times a step of every row in turn, and reads off what it holds in memory.

    All have the vocabulary of the language model here, `GRAMS` too.

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


def shared(way: str, share: float) -> str:
    """Returns the name of a row.

    >>> shared("full", 1.0), shared("full", 0.1)
    ('full', 'full, 10% of the labels')
    """
    return way if share == 1 else f"{way}, {share:.0%} of the labels"
