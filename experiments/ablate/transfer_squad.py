"""Questions about paragraphs (SQuAD 1.1, split by article), against the sliding window.

One small model, its pieces learned from the training articles, reads a question and a window of 256
tokens under full attention, and points at the answer; where words are marked, those of the window
that the question has, too, stand behind a mark. From scratch it is trained on the questions alone;
from a language model it starts from one of the same shape, trained on the training articles (the
questions of a paragraph, then the paragraph) and the standard library's source. The best checkpoint
on the validation articles is measured once on the test articles.

The floor is the sliding window of Richardson et al. 2013 on the same test articles
(`experiments.tasks.squad_floor`), 13.2 EM and 20.2 F1 on the whole development set in Rajpurkar et
al. 2016, arXiv:1606.05250. Exact match and F1 are in percent.

Data: one file of SQuAD, such as `dev-v1.1.json` or its `.zip`: 48 articles with 10,570 questions.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ablate.transfer_sst2_report import steps_to
from experiments.folders import made_at_once
from experiments.grid import Cell, Measurement
from experiments.tables.margins import margin
from experiments.tables.markdown import grid, spread
from experiments.tables.table import Item, Request, Results, Table
from experiments.task_report import report_task
from experiments.tasks.squad_floor import LONGEST, floor_scores
from model.config import TransformerConfig
from model.presets import modern_mini
from train.loop import LoopSettings
from train.optimizers import AdamW
from train.records import read_rows
from train.schedules import Linear
from train.settings import Phase, Settings
from train.tasks.rows import content_hash
from train.tasks.squad import Squad
from train.tasks.squad_files import file_of
from train.tasks.task import TEST, TRAIN, VALID, TaskFiles

PIECES = "sentencepiece:4096"
LENGTH, ROWS = 256, 16
STEPS, EVERY = 600, 200
LANGUAGE_STEPS, WARMUP = 600, 50
SHARES = ((TRAIN, 0.85), (VALID, 0.05), (TEST, 0.10))

FLOOR, LANGUAGE = "sliding window", "language model"
PLAIN = "from scratch, nothing marked"
SCRATCH, TRANSFER = "from scratch, words marked", "from the language model, words marked"
WAYS = {PLAIN: (False, False), SCRATCH: (True, False), TRANSFER: (True, True)}
"""Row -> (whether words are marked, whether it starts from the language model)."""
FIGURES = ("exact_match", "f1")


def model_of() -> TransformerConfig:
    """Returns the model of all rows."""
    return modern_mini(layers=4, width=128, heads=4, max_length=LENGTH)


def language_settings(seed: int, texts: str) -> Settings:
    """Returns the run of the language model, on a folder with its texts."""
    return Settings(
        phases=(Phase(LANGUAGE_STEPS, model_of(), ROWS, LENGTH),),
        data=(texts, "stdlib"),  # in equal parts
        tokenizer=PIECES,
        seed=seed,
        optimizer=AdamW(learning_rate=3e-3, weight_decay=0.1),
        schedule=Linear(warmup_steps=WARMUP),
    )


def task_of(squad: Path) -> Squad:
    """Returns the task on a file of SQuAD."""
    return Squad(TaskFiles(((TRAIN, str(squad)),)), SHARES).resolve()


def task_settings(task: Squad, seed: int, parent: str | None = None) -> Settings:
    """Returns the run of a row; one with a parent reads its pieces."""
    return Settings(
        phases=(Phase(STEPS, model_of(), ROWS, LENGTH),),
        data=(),
        tokenizer=PIECES if parent is None else f"{parent}/tokenizer",
        seed=seed,
        optimizer=AdamW(learning_rate=1e-3, weight_decay=0.1),
        schedule=Linear(warmup_steps=WARMUP),
        parent=parent,
        task=task,
    )


def cells(request: Request) -> list[Item]:
    """Returns the floor, and a measurement for every row, which needs its run."""
    if request.squad is None:
        return []
    of = {"sha256": content_hash(file_of(str(request.squad))), "shares": SHARES}
    texts = Measurement(
        "texts of the training articles",
        {"text": "training articles", **of},
        functools.partial(_keep_texts, request.cells, request.squad),
    )
    measured = {"measured": FLOOR, "longest": LONGEST, **of}
    items: list[Item] = [Measurement(FLOOR, measured, functools.partial(floor, request.squad))]
    task = task_of(request.squad)
    tasks = {name: dataclasses.replace(task, mark=mark) for name, (mark, _) in WAYS.items()}
    loop = LoopSettings(log_every=50, evaluate_every=EVERY, checkpoint_every=EVERY, watch="-f1")
    for seed in range(request.seeds):
        language = Cell(
            LANGUAGE,
            language_settings(seed, str(request.cells / texts.key)),
            LoopSettings(log_every=50, evaluate_every=300),
            needs=(texts,),
        )
        items.append(language)
        for name, (_, transfers) in WAYS.items():
            parent = str(request.cells / language.key) if transfers else None
            needs = (language,) if transfers else ()
            cell = Cell(name, task_settings(tasks[name], seed, parent), loop, needs=needs)
            about = {"measured": TEST, "run": cell.key, "seed": seed}
            measure = functools.partial(tested, request.cells)
            items.append(Measurement(name, about, measure, needs=(cell,)))
    return items


def notes(request: Request) -> list[str]:
    """Returns a line where the file is not given."""
    if request.squad is not None:
        return []
    return ["SQuAD needs its file: --squad dev-v1.1.json (rajpurkar.github.io/SQuAD-explorer)."]


def floor(squad: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the figures of the sliding window on the test articles."""
    questions, _ = task_of(squad).questions(TEST)
    return {**floor_scores(questions, settings["longest"]), "questions": len(questions)}


def tested(cells: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Measures the best checkpoint of a run, once, on the test articles.

    Returns:
      Figures of `experiments.task_report`, and `curve`: what each evaluation found.
    """
    folder = cells / settings["run"]
    curve = [
        {name: row[name] for name in ("step", "seconds", "loss", *FIGURES)}
        for row in read_rows(folder / "metrics.jsonl")
        if row["kind"] == "evaluation"
    ]
    return {**report_task(folder), "curve": curve}


def _keep_texts(cells: Path, squad: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the training paragraphs, each behind its questions, a document each."""
    questions, _ = task_of(squad).questions(TRAIN)
    documents: dict[str, list[str]] = {}
    for question in questions:
        documents.setdefault(question.paragraph, []).append(question.text)
    texts = ["\n".join([*asked, paragraph]) for paragraph, asked in documents.items()]
    out = cells / Measurement("", settings, dict).key
    if not out.exists():
        with made_at_once(out) as folder:
            folder.mkdir(parents=True)
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (folder / "articles.jsonl").write_text(lines, encoding="utf-8")
    return {"documents": len(texts)}


# From the results alone


def render(results: Results) -> list[str]:
    """Returns figures on the test articles, and what they say against the floor and scratch."""
    lines = [" ".join(part.split()) for part in (__doc__ or "").split("\n\n")[1:3]]
    found = next(iter(results.by_name.get(FLOOR, {}).values()), None)
    rows = []
    if found is not None:
        rows.append([FLOOR, *(f"{found[name]:.1f}" for name in FIGURES), "", "", ""])
    for way in WAYS:
        seeds = list(results.by_name.get(way, {}).values())
        if not seeds:
            continue
        tests = [values[TEST] for values in seeds]
        rows.append(
            [
                way,
                *(spread([test[name] for test in tests], 1) for name in FIGURES),
                spread([test["loss"] for test in tests], 3),
                f"{np.mean([test['representable'] for test in tests]):.1f}",
                f"{np.mean([values['step'] for values in seeds]):.0f}",
            ]
        )
    names = ["way", "exact match", "F1", "loss", "answers that pieces give back, %", "best step"]
    lines = [lines[0], "", lines[1], "", *grid(names, rows, "l" + "r" * (len(names) - 1)), ""]
    return [*lines, *_claims(results, found)]


def _claims(results: Results, found: Mapping[str, Any] | None) -> list[str]:
    lines = []
    for way in WAYS:
        tests = [values[TEST] for values in results.by_name.get(way, {}).values()]
        if tests and found is not None:
            gaps = {n: float(np.mean([t[n] for t in tests])) - found[n] for n in FIGURES}
            lines.append(
                f"* {way.capitalize()}: {gaps['exact_match']:+.1f} exact match and "
                f"{gaps['f1']:+.1f} F1 against the sliding window."
            )
    for what, way, other in (
        ("Marked words add", SCRATCH, PLAIN),
        ("The language model adds", TRANSFER, SCRATCH),
    ):
        if seeds := results.shared(way, other):
            pair = [[results.by_name[one][n][TEST]["f1"] for n in seeds] for one in (way, other)]
            found_margin = margin(*pair)
            lines.append(
                f"* {what} {found_margin.difference:+.1f} F1, in standard errors "
                f"{found_margin.text}."
            )
    return [*lines, *_time_to_scratch(results)]


def _time_to_scratch(results: Results) -> list[str]:
    """How much sooner the language model's row is where training from scratch ends.

    In steps, which are the same work in both rows.
    """
    seeds = results.shared(SCRATCH, TRANSFER)
    if not seeds:
        return []
    curves = {
        way: [
            [[row["step"], row["f1"]] for row in results.by_name[way][seed]["curve"]]
            for seed in seeds
        ]
        for way in (SCRATCH, TRANSFER)
    }
    target = float(np.mean([curve[-1][1] for curve in curves[SCRATCH]]))
    steps = {way: np.array([steps_to(c, target) for c in found]) for way, found in curves.items()}
    ratios = steps[SCRATCH] / steps[TRANSFER]
    both = ratios[np.isfinite(ratios)]
    said = spread(both.tolist(), 2) if len(both) else "none"
    return [
        f"* Steps to {target:.1f} F1 on the validation articles, where training from scratch ends, "
        f"over those from the language model: {said} (seeds in which both reach it: {len(both)} of "
        f"{len(seeds)}; looked at every {EVERY} steps). A step is the same work in both; the "
        f"language model took {LANGUAGE_STEPS} of about the same before."
    ]


def picture(results: Results) -> Any:
    """Draws F1 on the validation articles by step."""
    from matplotlib.figure import Figure

    curves = {
        way: [values["curve"] for values in results.by_name.get(way, {}).values()] for way in WAYS
    }
    if not any(curves.values()):
        return None
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    colours = ("tab:grey", "tab:blue", "tab:orange")
    for colour, (way, seeds) in zip(colours, curves.items(), strict=True):
        for number, curve in enumerate(seeds):
            steps, values = ([row[name] for row in curve] for name in ("step", "f1"))
            axes.plot(steps, values, ".-", color=colour, label=way if not number else None)
    axes.set(xlabel="step", ylabel="F1 on the validation articles, %", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return figure


TABLE = Table("squad", "Questions about paragraphs (SQuAD)", cells, render, picture, notes)
