"""Multi30k English to German: BLEU over time from scratch, and greedy search against beams.

An encoder and a decoder of three layers each, 192 wide, on 29,000 pairs of captions under Muon;
after each part of the run the validation pairs are translated greedily. At the end the test pairs
of 2016 are translated by searches of several widths and length penalties, each with the weights
that did best on the validation pairs. Small models with much dropout do best on this set (Wu et
al. 2021, arXiv:2105.14462: four layers, 128 wide, dropout 0.3, 41.0 tokenised BLEU, where the base
Transformer has 38.3).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.grid import Cell, Measurement
from experiments.tables.markdown import grid, spread
from experiments.tables.table import Item, Request, Results, Table
from model.presets import encoder_decoder_mini
from train.loop import LoopSettings
from train.optimizers import Muon
from train.records import read_rows
from train.schedules import Linear
from train.settings import Phase, Settings
from train.tasks.task import TEST, TRAIN, VALID, TaskFiles
from train.tasks.translation import Translation

STEPS, EVALUATE_EVERY, WARMUP = 3000, 250, 100
ROWS, LENGTH = 32, 128
TOKENIZER = "sentencepiece:5000"
GOAL = 25.0  # BLEU on the test pairs, within two hours of two cores
SPLITS = {TRAIN: "train", VALID: "val", TEST: "test_2016_flickr"}
TRAINED = "encoder-decoder"
SEARCHES: dict[str, tuple[int, float]] = {
    "greedy": (1, 0.0),
    "2 beams": (2, 0.6),
    "4 beams": (4, 0.6),
    "8 beams": (8, 0.6),
    "4 beams, no length penalty": (4, 0.0),
    "4 beams, alpha 1": (4, 1.0),
}
"""Row -> (beams, alpha)."""


def files_of(folder: Path) -> TaskFiles:
    """Returns the files of Multi30k in a folder."""
    return TaskFiles(
        tuple(
            (split, f"{folder / name}.en.gz,{folder / name}.de.gz")
            for split, name in SPLITS.items()
        )
    )


def settings_of(task: Translation, pieces: str, seed: int) -> Settings:
    """Returns the run of a seed.

    Args:
      task: resolved.
      pieces: tokenizer, learned from both sides of the training pairs.
      seed: of everything that is drawn.
    """
    model = encoder_decoder_mini(
        layers=3, encoder_layers=3, width=192, heads=4, ffn_width=512, dropout=0.2
    )
    return Settings(
        phases=(Phase(STEPS, model, ROWS, LENGTH),),
        data=(),
        tokenizer=pieces,
        seed=seed,
        optimizer=Muon(),
        schedule=Linear(warmup_steps=WARMUP),
        label_smoothing=0.1,
        task=task,
    )


def cells(request: Request) -> list[Item]:
    """Returns a run for each seed, what it gave over time, and the searches."""
    if request.multi30k is None:
        return []
    return cells_of(request, Translation(files=files_of(request.multi30k)).resolve(), TOKENIZER)


def cells_of(request: Request, task: Translation, pieces: str) -> list[Item]:
    """Returns the same for any files; see `settings_of`."""
    loop = LoopSettings(50, EVALUATE_EVERY, EVALUATE_EVERY, watch=Translation.watch)
    found: list[Item] = []
    for seed in range(request.seeds):
        cell = Cell(TRAINED, settings_of(task, pieces, seed), loop)
        of = {"run": cell.key, "seed": seed}
        over_time = functools.partial(curve, request.cells)
        found.append(Measurement(TRAINED, {"what": "curve", **of}, over_time, needs=(cell,)))
        for name, (beams, alpha) in SEARCHES.items():
            asked = {"what": "search", "beams": beams, "alpha": alpha, **of}
            measure = functools.partial(search, request.cells)
            found.append(Measurement(name, asked, measure, needs=(cell,)))
    return found


def notes(request: Request) -> list[str]:
    """Returns a line where the files are not given."""
    if request.multi30k is not None:
        return []
    return ["Multi30k needs its files: --multi30k FOLDER (github.com/multi30k/dataset, task 1)."]


def curve(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a run measured on the validation pairs, by step and seconds."""
    names = ("step", "seconds", "loss", "bleu", "chrf")
    rows = read_rows(folder / settings["run"] / "metrics.jsonl")
    return {
        "evaluations": [
            {name: row[name] for name in names} for row in rows if row["kind"] == "evaluation"
        ]
    }


def search(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns BLEU of the test pairs by one search, with its signature, and what it took."""
    # Imported late: a table is asked for its cells with every command.
    from experiments.runs.run import open_run
    from experiments.task_report import outputs_of
    from experiments.tasks.translation_metrics import signatures, translation_metrics

    run = open_run(folder / settings["run"])
    task = dataclasses.replace(run.settings.task, beams=settings["beams"], alpha=settings["alpha"])
    run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, task=task))
    examples = task.examples(TEST, run.tokenizer, LENGTH)
    begun = time.perf_counter()
    outputs = outputs_of(run, examples, 2 * ROWS)
    seconds = time.perf_counter() - begun
    figures = translation_metrics(task, examples, outputs, run.tokenizer)
    return {
        **figures,
        "score": float(outputs["score"].mean()),
        "sentences_per_second": len(examples.rows) / seconds,
        "signature": signatures()["bleu"],
    }


def render(results: Results) -> list[str]:
    """Returns the searches and when the goal was passed."""
    return render_searches(results, [" ".join((__doc__ or "").split("\n\n", 1)[1].split())])


def render_searches(results: Results, about: Sequence[str]) -> list[str]:
    """Returns the same for any files.

    Args:
      results: of the table.
      about: paragraphs on what was run.
    """
    lines = [line for part in about for line in (part, "")]
    rows, signature = [], ""
    for name in SEARCHES:
        row = results.by_name.get(name, {})
        if not row:
            continue
        signature = next(iter(row.values()))["signature"]
        columns = ("bleu", "chrf", "length_ratio", "score", "sentences_per_second")
        digits = (2, 2, 3, 3, 1)
        rows.append(
            [
                name,
                *(spread(results.column(name, c), d) for c, d in zip(columns, digits, strict=True)),
                _against_greedy(results, name),
            ]
        )
    names = ["search", "BLEU", "chrF", "length / reference", "score", "sentences / s", "to greedy"]
    lines += [*grid(names, rows, "lrrrrrr"), ""]
    if signature:
        lines += [f"sacrebleu {signature}; compilation is in the seconds of the searches.", ""]
    rows = []
    for seed, values in sorted(results.by_name.get(TRAINED, {}).items()):
        rows += _passes(seed, values["evaluations"])
    names = ["seed", f"minutes to BLEU {GOAL:g} on validation", "minutes in all", "BLEU at its end"]
    return [*lines, *grid(names, rows, "rrrr")] if rows else lines


def _against_greedy(results: Results, name: str) -> str:
    ours, greedy = results.pair(name, "greedy", "bleu")
    return "" if name == "greedy" or not ours else f"{np.subtract(ours, greedy).mean():+.2f}"


def _passes(seed: int, rows: list[dict[str, Any]]) -> list[list[str]]:
    if not rows:
        return []
    passed = [row["seconds"] for row in rows if row["bleu"] >= GOAL]
    first = f"{passed[0] / 60:.1f}" if passed else "not reached"
    return [[str(seed), first, f"{rows[-1]['seconds'] / 60:.1f}", f"{rows[-1]['bleu']:.2f}"]]


def picture(results: Results) -> Any:
    """Draws BLEU on the validation pairs over minutes, a line a seed."""
    from matplotlib.figure import Figure

    runs = results.by_name.get(TRAINED, {})
    if not runs:
        return None
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for seed, values in sorted(runs.items()):
        rows = values["evaluations"]
        minutes = [row["seconds"] / 60 for row in rows]
        axes.plot(minutes, [row["bleu"] for row in rows], ".-", label=f"seed {seed}")
    axes.axhline(GOAL, color="grey", linewidth=0.8, linestyle=":")
    axes.annotate(f"goal {GOAL:g}", (0, GOAL), fontsize=7, va="bottom")
    axes.set(xlabel="minutes", ylabel="BLEU on validation, greedy", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    return figure


TABLE = Table("multi30k", "Translation: Multi30k", cells, render, picture, notes)
