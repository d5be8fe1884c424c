"""Multi30k English to German: BLEU over time from scratch, and greedy search against beams.

An encoder and a decoder of three layers each, 192 wide, on pairs of captions under Muon, some 8
epochs with dropout 0.3; evaluations have the average of the weights over the last fifth of the run.
After each part of the run the validation pairs are translated greedily. At the end the test pairs
of 2016 are translated by searches of several widths and length penalties, each with the weights
that did best on the validation pairs. Small models with much dropout do best on this set (Wu et
al. 2021, arXiv:2105.14462: four layers, 128 wide, dropout 0.3, 41.0 tokenised BLEU, where the base
Transformer has 38.3).

Minutes are those of training and of evaluation alone, compilation apart: what the loop's clock gave
for a step between two evaluations, and for an evaluation, in the median, times their number. Others
at work on the machine make them longer.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.grid import Cell, Measurement
from experiments.tables.markdown import grid, spread
from experiments.tables.table import Item, Request, Results, Table
from model.beam import length_penalty
from model.presets import encoder_decoder_mini
from train.loop import LoopSettings
from train.optimizers import Muon
from train.records import read_rows
from train.schedules import Linear
from train.settings import Phase, Settings
from train.tasks.task import TEST, TRAIN, VALID, TaskFiles
from train.tasks.translation import Translation

STEPS, EVALUATE_EVERY, WARMUP = 1000, 125, 50
ROWS, LENGTH = 32, 128
TOKENIZER = "sentencepiece:5000"
GOAL, WITHIN = 25.0, 120  # BLEU on the test pairs; minutes of two cores
TAIL = 0.2  # of the run, whose weights are averaged
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
        layers=3, encoder_layers=3, width=192, heads=4, ffn_width=512, dropout=0.3
    )
    return Settings(
        phases=(Phase(STEPS, model, ROWS, LENGTH),),
        data=(),
        tokenizer=pieces,
        seed=seed,
        optimizer=Muon(tail_fraction=TAIL),
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
    """Returns what a run measured on the validation pairs, what it took, and what it left out.

    Returns:
      `evaluations`: figures by step, with the `minutes` up to there; `minutes` in all, of them
      `evaluation`; and `cut`: how many pairs of each split were longer than a row, and how many
      there are.
    """
    # Imported late: a table is asked for its cells with every command.
    from experiments.runs.run import open_run

    rows = list(read_rows(folder / settings["run"] / "metrics.jsonl"))
    run = open_run(folder / settings["run"])
    task: Any = run.settings.task
    cut = {}
    for split, _ in task.files.paths:
        examples = task.examples(split, run.tokenizer, run.settings.phases[0].sequence_length)
        cut[split] = [examples.cut, len(examples.rows)]
    return {**over_time(rows), "cut": cut}


def over_time(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the evaluations of a record by minutes, see the module.

    >>> figures = {"loss": 1.0, "bleu": 25.0, "chrf": 50.0}
    >>> clock = {"step": 60.0, "evaluation": 30.0}
    >>> found = over_time([{"kind": "evaluation", "step": 1, "clock": clock, **figures}])
    >>> found["minutes"], found["evaluation"], found["evaluations"][0]["minutes"]
    (1.5, 0.5, 1.5)
    """
    measured = [row for row in rows if row["kind"] == "evaluation"]
    begun: dict[str, Any] = {"step": 0, "clock": {"step": 0.0, "evaluation": 0.0}}
    pairs = list(itertools.pairwise([begun, *measured]))

    def spent(kind: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
        return (after["clock"][kind] - before["clock"][kind]) / 60

    step = statistics.median(spent("step", a, b) / (b["step"] - a["step"]) for a, b in pairs)
    each = statistics.median(spent("evaluation", a, b) for a, b in pairs)
    names = ("step", "loss", "bleu", "chrf")
    evaluations = [
        {**{name: row[name] for name in names}, "minutes": step * row["step"] + each * number}
        for number, row in enumerate(measured, start=1)
    ]
    last = evaluations[-1]["minutes"]
    return {"evaluations": evaluations, "minutes": last, "evaluation": each * len(evaluations)}


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
        "log_p": log_p_a_token(outputs, settings["alpha"]),
        "sentences_per_second": len(examples.rows) / seconds,
        "signature": signatures()["bleu"],
    }


def log_p_a_token(outputs: Mapping[str, np.ndarray], alpha: float) -> float:
    """Returns log p of the translations over their tokens, whatever penalty they were found with.

    >>> outputs = {"score": np.array([-3.0]), "translation_lengths": np.array([7])}
    >>> log_p_a_token(outputs, alpha=1.0)  # the penalty is 2
    -0.857...
    """
    lengths = outputs["translation_lengths"]
    log_p = outputs["score"] * np.asarray(length_penalty(jnp.asarray(lengths), alpha))
    return float(log_p.sum() / lengths.sum())


def render(results: Results) -> list[str]:
    """Returns the searches and whether the goal was reached."""
    return render_searches(
        results, [" ".join(part.split()) for part in (__doc__ or "").split("\n\n")[1:]], GOAL
    )


def render_searches(results: Results, about: Sequence[str], goal: float | None = None) -> list[str]:
    """Returns the same for any files.

    Args:
      results: of the table.
      about: paragraphs on what was run.
      goal: BLEU that greedy translations of the test pairs shall have.
    """
    lines = [line for part in about for line in (part, "")]
    if goal is not None and (said := _reached(results, goal)):
        lines += [said, ""]
    rows, signature = [], ""
    for name in SEARCHES:
        row = results.by_name.get(name, {})
        if not row:
            continue
        signature = next(iter(row.values()))["signature"]
        columns = ("bleu", "chrf", "length_ratio", "log_p", "sentences_per_second")
        digits = (2, 2, 3, 3, 1)
        rows.append(
            [
                name,
                *(spread(results.column(name, c), d) for c, d in zip(columns, digits, strict=True)),
                _against_greedy(results, name),
            ]
        )
    names = ["search", "BLEU", "chrF", "length / reference", "log p a token", "sentences / s"]
    names.append("to greedy")
    lines += [*grid(names, rows, "lrrrrrr"), ""]
    if signature:
        lines += [f"sacrebleu {signature}; compilation is in the seconds of the searches.", ""]
    runs = sorted(results.by_name.get(TRAINED, {}).items())
    rows = [
        [
            str(seed),
            f"{values['minutes'] - values['evaluation']:.1f}",
            f"{values['evaluation']:.1f}",
            f"{values['evaluations'][-1]['bleu']:.2f}",
            *(f"{cut:,} of {count:,}" for cut, count in values["cut"].values()),
        ]
        for seed, values in runs
    ]
    if not rows:
        return lines
    names = ["seed", "minutes of training", "of evaluation", "validation BLEU at the end"]
    names += [f"{split}: pairs cut at {LENGTH} tokens" for split in runs[0][1]["cut"]]
    return [*lines, *grid(names, rows, "r" * len(names))]


def _reached(results: Results, goal: float) -> str:
    """One line: what greedy translations of the test pairs have, after how long."""
    seeds = results.shared("greedy", TRAINED)
    if not seeds:
        return ""
    bleu = results.column("greedy", "bleu", seeds)
    minutes = results.column(TRAINED, "minutes", seeds)
    there = sum(b >= goal and m <= WITHIN for b, m in zip(bleu, minutes, strict=True))
    word = "reached" if there == len(seeds) else f"reached by {there} of {len(seeds)} seeds"
    return (
        f"At least {goal:g} BLEU on the test pairs within {WITHIN} minutes: {word}. Greedy "
        f"translations have {spread(bleu, 2)} after {spread(minutes, 1)} minutes of training and "
        "evaluation."
    )


def _against_greedy(results: Results, name: str) -> str:
    ours, greedy = results.pair(name, "greedy", "bleu")
    return "" if name == "greedy" or not ours else f"{np.subtract(ours, greedy).mean():+.2f}"


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
        minutes = [row["minutes"] for row in rows]
        axes.plot(minutes, [row["bleu"] for row in rows], ".-", label=f"seed {seed}")
    axes.axhline(GOAL, color="grey", linewidth=0.8, linestyle=":")
    axes.annotate(f"goal, on the test pairs: {GOAL:g}", (0, GOAL), fontsize=7, va="bottom")
    axes.set(
        xlabel="minutes of training and evaluation",
        ylabel="BLEU on validation, greedy",
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    return figure


TABLE = Table("multi30k", "Translation: Multi30k", cells, render, picture, notes)
