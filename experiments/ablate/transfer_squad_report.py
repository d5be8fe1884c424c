"""What the finished runs of `experiments.ablate.transfer_squad` say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.ablate import transfer_squad as squad
from experiments.ablate.transfer_squad import (
    CHOSEN,
    FIGURES,
    FLOOR,
    LANGUAGE,
    PLAIN,
    SCRATCH,
    TRANSFER,
    TRIALS,
    WAYS,
    Tuned,
    trial_of,
)
from experiments.tables.margins import margin
from experiments.tables.markdown import grid, spread
from experiments.tables.table import Results, Table
from train.tasks.task import TEST

DRAWS, PERCENT = 10_000, 95


class Interval(NamedTuple):
    """A mean difference over questions, and what the draw of the articles makes of it."""

    difference: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """For a line."""
        return f"{self.difference:+.1f} (95 % of draws of the articles: {self.low:+.1f} to " + (
            f"{self.high:+.1f})"
        )


def render(results: Results) -> list[str]:
    """Returns figures on the test articles, and what they say against the floor and scratch."""
    lines = [" ".join(part.split()) for part in (squad.__doc__ or "").split("\n\n")[1:4]]
    lines = [line for part in lines for line in (part, "")]
    rows = []
    for way in (FLOOR, *WAYS):
        seeds = list(results.by_name.get(way, {}).values())
        if not seeds:
            continue
        tests = [values[TEST] if way != FLOOR else values for values in seeds]
        row = [way, *(spread([test[name] for test in tests], 1) for name in FIGURES)]
        if way != FLOOR:
            row += [
                spread([test["loss"] for test in tests], 3),
                f"{np.mean([test['representable'] for test in tests]):.1f}",
                f"{np.mean([values['step'] for values in seeds]):.0f}",
            ]
        rows.append([*row, *[""] * (6 - len(row))])
    names = ["way", "exact match", "F1", "loss", "answers that a row can give, %", "best step"]
    lines += [*grid(names, rows, "l" + "r" * (len(names) - 1)), ""]
    lines += [*_claims(results), *_time_to_scratch(results)]
    return [*lines, *_trials(results)]


def paired(results: Results, way: str, other: str, figure: str) -> Interval | None:
    """Returns how much better one row is than another, over all questions of shared seeds.

    A question counts as often as it is asked; articles, which seeds do not share, are drawn with
    replacement (a paired cluster bootstrap; Efron & Tibshirani 1993, chapter 8).

    Returns:
      None where no seed has both rows.
    """
    pairs = []
    for seed in results.shared(way, other):
        articles, base = (results.by_name[name][seed]["articles"] for name in (way, other))
        for title, found in articles.items():
            pairs.append((found["questions"], found[figure] - base[title][figure]))
    return interval(pairs) if pairs else None


def interval(pairs: Sequence[tuple[float, float]]) -> Interval:
    """Returns the weighted mean of differences, and the middle of its bootstrap distribution.

    Args:
      pairs: (weight, difference) of each article.

    >>> interval([(10, 2.0), (30, 2.0)])
    Interval(difference=2.0, low=2.0, high=2.0)
    """
    weights, differences = np.array(pairs, float).T
    draws = np.random.default_rng(0).integers(len(pairs), size=(DRAWS, len(pairs)))
    sums = (weights * differences)[draws].sum(axis=1)
    low, high = np.percentile(
        sums / weights[draws].sum(axis=1), [50 - PERCENT / 2, 50 + PERCENT / 2]
    )
    mean = float(weights @ differences / weights.sum())
    return Interval(mean, float(low), float(high))


def _claims(results: Results) -> list[str]:
    lines = []
    for way in WAYS:
        found = [paired(results, way, FLOOR, figure) for figure in FIGURES]
        if found[0] is not None and found[1] is not None:
            lines.append(
                f"* {way.capitalize()} against the sliding window, over all test questions: "
                f"exact match {found[0].text}, F1 {found[1].text}."
            )
    for what, way, other in (
        ("What is told of shared words adds", SCRATCH, PLAIN),
        ("The language model adds", TRANSFER, SCRATCH),
    ):
        added = paired(results, way, other, "f1")
        if added is not None:
            seeds = results.shared(way, other)
            pair = [[results.by_name[one][n][TEST]["f1"] for n in seeds] for one in (way, other)]
            lines.append(
                f"* {what} {added.text} F1; over {len(seeds)} seeds in standard errors "
                f"{margin(*pair).text}."
            )
    return lines


class Times(NamedTuple):
    """Of one seed: target, and CPU-seconds to it; nan where it is not reached."""

    target: float
    scratch: float
    transfer: float
    language: float


def times_of(results: Results) -> dict[int, Times]:
    """Returns by seed how long each way takes to where training from scratch ends there."""
    found = {}
    for seed in results.shared(SCRATCH, TRANSFER, LANGUAGE):
        rows = {way: results.by_name[way][seed] for way in (SCRATCH, TRANSFER, LANGUAGE)}
        target = rows[SCRATCH]["curve"][-1]["f1"]
        seconds = {
            way: _step_to(rows[way]["curve"], target) * rows[way]["step_seconds"]
            for way in (SCRATCH, TRANSFER)
        }
        language = rows[LANGUAGE]["step"] * rows[LANGUAGE]["step_seconds"]
        found[seed] = Times(target, seconds[SCRATCH], seconds[TRANSFER], language)
    return found


def times_sooner(results: Results) -> tuple[list[float], list[float]]:
    """Returns how many times sooner the transferred model is there, by seed; nan for never.

    Without what the language model took, and with it.
    """
    found = list(times_of(results).values())
    alone = [times.scratch / times.transfer for times in found]
    return alone, [times.scratch / (times.transfer + times.language) for times in found]


def ratio_text(above: float, below: float) -> str:
    """Returns how many times sooner, "<1" where the second is never there.

    >>> ratio_text(10.0, 4.0), ratio_text(10.0, math.nan)
    ('2.50', '<1')
    """
    return "<1" if math.isnan(below) else f"{above / below:.2f}"


def _step_to(curve: Sequence[Mapping[str, float]], target: float) -> float:
    return next((row["step"] for row in curve if row["f1"] >= target), math.nan)


def _time_to_scratch(results: Results) -> list[str]:
    found = times_of(results)
    if not found:
        return []
    rows = [
        [
            str(seed),
            f"{times.target:.1f}",
            f"{times.scratch:.0f}",
            "not reached" if math.isnan(times.transfer) else f"{times.transfer:.0f}",
            ratio_text(times.scratch, times.transfer),
            f"{times.language:.0f}",
            ratio_text(times.scratch, times.transfer + times.language),
        ]
        for seed, times in found.items()
    ]
    names = [
        *("seed", "target: F1 where scratch ends, validation", "s from scratch"),
        *("s from the language model", "ratio", "s of the language model", "ratio with it"),
    ]
    about = (
        f"Time to the target, in CPU-seconds of training steps alone; first of the evaluations, "
        f"every {squad.EVERY} steps, that is there:"
    )
    return ["", about, "", *grid(names, rows, "r" * len(names))]


def best_trial(results: Results, way: str) -> Tuned | None:
    """Returns the trial of a way with the best F1 on the validation articles; None without any."""
    length = str(squad.ANSWER_LENGTH)
    scores = {
        tuned: max(values["f1"][length] for values in row.values())
        for tuned in TRIALS
        if (row := results.by_name.get(trial_of(way, tuned), {}))
    }
    return max(scores, key=lambda tuned: scores[tuned]) if scores else None


def _trials(results: Results) -> list[str]:
    rows, length = [], str(squad.ANSWER_LENGTH)
    for way in CHOSEN:
        for tuned in TRIALS:
            for values in results.by_name.get(trial_of(way, tuned), {}).values():
                f1 = values["f1"]
                mark = "yes" if CHOSEN[way] == tuned else ""
                each = (f"{f1[str(most)]:.1f}" for most in squad.ANSWER_LENGTHS)
                rows.append([way, f"{tuned.rate:g}", f"{tuned.dropout:g}", *each, mark])
    if not rows:
        return []
    names = ["way", "rate", "dropout", *(f"F1, {n} tokens" for n in squad.ANSWER_LENGTHS), "used"]
    lines = [
        "",
        "Trials, F1 on validation articles by the longest answer that is allowed "
        f"({length} is used):",
        "",
        *grid(names, rows, "l" + "r" * (len(names) - 1)),
    ]
    for way, chosen in CHOSEN.items():
        best = best_trial(results, way)
        if best is not None and best != chosen:
            lines += [
                "",
                f"Rows {way!r} do not have the best of their trials: {trial_of(way, best)}.",
            ]
    return lines


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


TABLE = Table(
    "squad", "Questions about paragraphs (SQuAD)", squad.cells, render, picture, squad.notes
)
