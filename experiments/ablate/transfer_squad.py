"""Questions about paragraphs (SQuAD 1.1, split by article), against the sliding window.

One small model reads a question and 128 tokens of its paragraph under full attention, and points at
the answer. It is told which words both share, and reads the sentences that share most first (see
`train.tasks.squad_words`), as many as fit; one row is without that help, and reads the paragraph as
it stands, in windows that overlap. From scratch it is trained on the questions alone; from a
language model it starts from one of the same shape, which has read the training articles (the
questions of a paragraph, then the paragraph). Pieces are learned from the training articles.

Each seed has test articles of its own, a tenth of all; another tenth chooses the checkpoint, which
is measured once on the test articles. Rate and dropout are those of the same trials for scratch and
transferred, one run each on a seed apart, by F1 on articles which no seed is tested on as long as
there are fewer than ten; so is the longest answer. `--rows trial` runs the trials alone.

The floor is the sliding window of Richardson et al. 2013 on the same test articles
(`experiments.tasks.squad_floor`), 13.2 EM and 20.2 F1 on the whole development set in Rajpurkar et
al. 2016, arXiv:1606.05250. Exact match and F1 are in percent.

Data: one file of SQuAD, such as `dev-v1.1.json` or its `.zip`: 48 articles with 10,570 questions.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.folders import made_at_once
from experiments.grid import Cell, Measurement
from experiments.runs.run import best_step, open_run
from experiments.tables.table import Item, Request
from experiments.task_report import outputs_of, report_task
from experiments.tasks.squad_floor import LONGEST, sliding_window
from experiments.tasks.squad_metrics import span_metrics, squad_scores
from model.config import TransformerConfig
from model.presets import modern_mini
from train.loop import LoopSettings
from train.optimizers import AdamW
from train.records import read_rows
from train.schedules import Linear
from train.settings import Phase, Settings
from train.tasks.rows import content_hash
from train.tasks.squad import Squad
from train.tasks.squad_files import Question, file_of
from train.tasks.task import TEST, TRAIN, VALID, TaskFiles

PIECES = "sentencepiece:4096"
LENGTH, ROWS, STRIDE = 128, 32, 64
STEPS, EVERY, LOG = 1000, 100, 50
LANGUAGE_STEPS, WARMUP = 700, 50
TRIAL_SEED = 100

FLOOR, LANGUAGE = "sliding window", "language model"
PLAIN = "from scratch, paragraphs as they stand"
SCRATCH, TRANSFER = "from scratch", "from the language model"
WAYS = (PLAIN, SCRATCH, TRANSFER)
FIGURES = ("exact_match", "f1")


class Tuned(NamedTuple):
    """What trials choose."""

    rate: float
    dropout: float


TRIALS = (Tuned(1e-3, 0.1), Tuned(1e-3, 0.3), Tuned(2e-3, 0.3))
CHOSEN = {SCRATCH: Tuned(1e-3, 0.1), TRANSFER: Tuned(1e-3, 0.1)}
"""The best of the trials of each way; the way without help has that of the one with it."""
ANSWER_LENGTHS = (6, 10, 15, 30)
ANSWER_LENGTH, TRIAL_LENGTH = 30, 15
"""Tokens of an answer at most: the best of the trials, and what those watched their F1 under."""


def trial_of(way: str, tuned: Tuned) -> str:
    """Returns the name of a trial's row.

    >>> trial_of(SCRATCH, Tuned(1e-3, 0.1))
    'trial at from scratch, rate 0.001, dropout 0.1'
    """
    return f"trial at {way}, rate {tuned.rate:g}, dropout {tuned.dropout:g}"


def model_of(dropout: float) -> TransformerConfig:
    """Returns the model of all rows."""
    return modern_mini(layers=4, width=128, heads=4, max_length=256, dropout=dropout)


def language_settings(seed: int, texts: str) -> Settings:
    """Returns the run of the language model, on a folder with its texts."""
    return Settings(
        phases=(Phase(LANGUAGE_STEPS, model_of(0.1), ROWS, LENGTH),),
        data=(texts,),
        tokenizer=PIECES,
        seed=seed,
        optimizer=AdamW(learning_rate=3e-3, weight_decay=0.1),
        schedule=Linear(warmup_steps=WARMUP),
    )


def task_of(squad: Path, fold: int = 0, answer_length: int = ANSWER_LENGTH) -> Squad:
    """Returns the task on a file of SQuAD, with help.

    Args:
      squad: the file.
      fold: which articles are held out.
      answer_length: tokens of an answer at most.
    """
    return Squad(
        TaskFiles(((TRAIN, str(squad)),)),
        fold=fold,
        mark=True,
        order="shared",
        most_windows=1,
        stride=STRIDE,
        answer_length=answer_length,
    ).resolve()


def task_settings(
    way: str, tuned: Tuned, task: Squad, seed: int, parent: str | None = None
) -> Settings:
    """Returns the run of a way; that from the language model reads its pieces.

    Args:
      way: one of `WAYS`.
      tuned: rate and dropout.
      task: with help.
      seed: of all that is drawn.
      parent: run of the language model.
    """
    if way == PLAIN:
        task = dataclasses.replace(task, mark=False, order="text", most_windows=None)
    parent = parent if way == TRANSFER else None
    return Settings(
        phases=(Phase(STEPS, model_of(tuned.dropout), ROWS, LENGTH),),
        data=(),
        tokenizer=PIECES if parent is None else f"{parent}/tokenizer",
        seed=seed,
        optimizer=AdamW(learning_rate=tuned.rate, weight_decay=0.1),
        schedule=Linear(warmup_steps=WARMUP),
        parent=parent,
        task=task,
    )


def cells(request: Request) -> list[Item]:
    """Returns of each seed the floor and a measurement of every way, and the trials."""
    if request.squad is None:
        return []
    sha256 = content_hash(file_of(str(request.squad)))
    task = task_of(request.squad)
    items: list[Item] = []
    for seed in range(request.seeds):
        of_seed = dataclasses.replace(task, fold=seed)
        of = {"sha256": sha256, "fold": seed, "seed": seed}
        measured = {"measured": FLOOR, "longest": LONGEST, **of}
        items.append(Measurement(FLOOR, measured, functools.partial(floor, of_seed)))
        language = _language(request, of_seed, sha256, seed)
        about = {"measured": LANGUAGE, "run": language.key, "seed": seed}
        cost = functools.partial(language_figures, request.cells)
        items.append(Measurement(LANGUAGE, about, cost, needs=(language,)))
        for way in WAYS:
            tuned = CHOSEN[SCRATCH if way == PLAIN else way]
            cell = _run(request, way, way, tuned, of_seed, seed, language)
            about = {"measured": TEST, "run": cell.key, "seed": seed}
            measure = functools.partial(tested, request.cells)
            items.append(Measurement(way, about, measure, needs=(cell,)))
    task = task_of(request.squad, answer_length=TRIAL_LENGTH)
    language = _language(request, task, sha256, TRIAL_SEED)
    for way in CHOSEN:
        for tuned in TRIALS:
            name = trial_of(way, tuned)
            cell = _run(request, name, way, tuned, task, TRIAL_SEED, language)
            about = {"measured": VALID, "run": cell.key, "lengths": ANSWER_LENGTHS}
            measure = functools.partial(tried, request.cells)
            items.append(Measurement(name, about, measure, needs=(cell,)))
    return items


def _language(request: Request, task: Squad, sha256: str, seed: int) -> Cell:
    texts = Measurement(
        "texts of the training articles",
        {"text": "training articles", "sha256": sha256, "fold": task.fold},
        functools.partial(_keep_texts, request.cells, task),
    )
    settings = language_settings(seed, str(request.cells / texts.key))
    return Cell(LANGUAGE, settings, LoopSettings(LOG, evaluate_every=EVERY), needs=(texts,))


def _run(
    request: Request, name: str, way: str, tuned: Tuned, task: Squad, seed: int, language: Cell
) -> Cell:
    settings = task_settings(way, tuned, task, seed, str(request.cells / language.key))
    loop = LoopSettings(LOG, evaluate_every=EVERY, checkpoint_every=EVERY, watch="-f1")
    return Cell(name, settings, loop, needs=(language,) if settings.parent is not None else ())


def notes(request: Request) -> list[str]:
    """Returns a line where the file is not given."""
    if request.squad is not None:
        return []
    return ["SQuAD needs its file: --squad dev-v1.1.json (rajpurkar.github.io/SQuAD-explorer)."]


def floor(task: Squad, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the figures of the sliding window on the test articles, and by article."""
    questions, _ = task.questions(TEST)
    texts = {q.id: sliding_window(q.paragraph, q.text, settings["longest"]) for q in questions}
    references = {q.id: [answer.text for answer in q.answers] for q in questions}
    return {
        **squad_scores(texts, references),
        "questions": len(questions),
        "articles": by_article((q.title, texts[q.id], references[q.id]) for q in questions),
    }


def by_article(answered: Iterable[tuple[str, str, list[str]]]) -> dict[str, dict[str, float]]:
    """Returns how many questions an article has, their exact match and F1.

    Args:
      answered: (title, prediction, references) of each question.

    >>> by_article([("A", "red", ["red"]), ("A", "red", ["blue"]), ("B", "red", ["red"])])["A"]
    {'questions': 2, 'exact_match': 50.0, 'f1': 50.0}
    """
    found: dict[str, list[tuple[str, list[str]]]] = {}
    for title, text, references in answered:
        found.setdefault(title, []).append((text, references))
    figures = {}
    for title, pairs in found.items():
        texts = {str(number): text for number, (text, _) in enumerate(pairs)}
        references_of = {str(number): wanted for number, (_, wanted) in enumerate(pairs)}
        figures[title] = {"questions": len(pairs), **squad_scores(texts, references_of)}
    return figures


def language_figures(cells: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the loss of a language model at its end, and what it took."""
    rows = list(read_rows(cells / settings["run"] / "metrics.jsonl"))
    last = next(row for row in reversed(rows) if row["kind"] == "evaluation")
    return {"step": last["step"], "loss": last["loss"], "step_seconds": step_seconds(rows)}


def step_seconds(rows: Iterable[Mapping[str, Any]]) -> float:
    """Returns the CPU-seconds of a step, the median over what a run logged.

    Of processor time, since runs may share their machine with others.

    >>> rows = [{"kind": "train", "step": n * LOG, "cpu_seconds": n * 5.0} for n in (1, 2, 3)]
    >>> step_seconds(rows)
    0.2
    """
    logged = [row for row in rows if row["kind"] == "train"]
    starts = [0, *(row["step"] for row in logged)]
    each = [
        row["cpu_seconds"] / (row["step"] - start)
        for row, start in zip(logged, starts, strict=False)
    ]
    return statistics.median(each)


def tested(cells: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Measures the best checkpoint of a run, once, on the test articles.

    Returns:
      Figures of `experiments.task_report`; `articles`, by article; `curve`, what each evaluation
      found; and the CPU-seconds of a step.
    """
    folder = cells / settings["run"]
    rows = list(read_rows(folder / "metrics.jsonl"))
    figures = report_task(folder)
    with (folder / f"predictions-{TEST}.jsonl").open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return {
        **figures,
        "articles": by_article((x["title"], x["prediction"], x["answers"]) for x in lines),
        "curve": curve_of(rows),
        "step_seconds": step_seconds(rows),
    }


def tried(cells: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Measures the best checkpoint of a trial on the validation articles, and on nothing else.

    Returns:
      `step`, F1 by the longest answer allowed, and `curve`.
    """
    folder = cells / settings["run"]
    run = open_run(folder, best_step(folder))
    task: Any = run.settings.task
    examples = task.examples(VALID, run.tokenizer, run.settings.phases[0].sequence_length)
    f1 = {}
    for length in settings["lengths"]:
        of_length = dataclasses.replace(task, answer_length=length)
        changed = dataclasses.replace(run.settings, task=of_length)
        outputs = outputs_of(dataclasses.replace(run, settings=changed), examples, ROWS)
        f1[str(length)] = span_metrics(of_length, examples, outputs, run.tokenizer)["f1"]
    return {"step": run.step, "f1": f1, "curve": curve_of(read_rows(folder / "metrics.jsonl"))}


def curve_of(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Returns what each evaluation of a run found."""
    names = ("step", "loss", *FIGURES)
    return [{name: row[name] for name in names} for row in rows if row["kind"] == "evaluation"]


def _keep_texts(cells: Path, task: Squad, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the training paragraphs, each behind its questions, a document each."""
    questions, _ = task.questions(TRAIN)
    documents: dict[str, list[Question]] = {}
    for question in questions:
        documents.setdefault(question.paragraph, []).append(question)
    texts = ["\n".join([*(q.text for q in asked), p]) for p, asked in documents.items()]
    out = cells / Measurement("", settings, dict).key
    if not out.exists():
        with made_at_once(out) as folder:
            folder.mkdir(parents=True)
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (folder / "articles.jsonl").write_text(lines, encoding="utf-8")
    return {"documents": len(texts)}
