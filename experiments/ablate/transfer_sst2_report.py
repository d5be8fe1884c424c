"""What the finished runs of `experiments.ablate.transfer_sst2` say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.ablate import transfer_sst2 as sst2
from experiments.ablate import transfer_sst2_tuning
from experiments.ablate.tfidf import BASELINE
from experiments.ablate.transfer_sst2 import (
    COSTS,
    FROM_SCRATCH,
    FULL,
    FULL_GRAMS,
    GRAMS,
    LANGUAGE,
    SCRATCH,
    shared,
)
from experiments.tables.margins import Margin, margin
from experiments.tables.markdown import grid, spread
from experiments.tables.table import Request, Results, Table

PUBLISHED: Mapping[tuple[str, ...], float] = {
    (
        "71c04bcc41291fa47454dd670df701b14ee9249156babeaac404cfe2c8d74338",
        "02fedc82855dbdcabe82c65ed1af6c6570788eaac51073cdb35ee8c7784426d1",
        "6a80dc9b9a0db2d3b37f2f809304febad31c90ab67a5b4157b7d9f881c53ef5b",
    ): 0.810
}
"""Hashes of files for training, validation and test -> what their notes say that TF-IDF reaches."""


def target_of(results: Results, seed: int) -> float:
    """Returns the validation accuracy that the run from scratch of a seed ends at, nan for none."""
    values = results.by_name.get(SCRATCH, {}).get(seed)
    return float(values["curve"][-1][1]) if values else math.nan


def steps_to(curve: Sequence[Sequence[float]], target: float) -> float:
    """Returns the step of the first evaluation at or above the target; nan if none is.

    >>> steps_to([[100, 0.7], [200, 0.8], [300, 0.79]], 0.75), steps_to([[100, 0.7]], 0.75)
    (200, nan)
    """
    return next((step for step, accuracy in curve if accuracy >= target), math.nan)


def steps_of(results: Results, way: str, seed: int) -> float:
    """Returns the steps of a row to the target of its seed; nan if it does not reach it."""
    return steps_to(results.by_name[way][seed]["curve"], target_of(results, seed))


def render(results: Results) -> list[str]:
    """Returns the ways to tune, what they reach and cost, and whether scratch beats TF-IDF."""
    about = [" ".join(part.split()) for part in (sst2.__doc__ or "").split("\n\n")[1:4]]
    found = next(iter(results.by_name.get(BASELINE, {}).values()), None)
    lines = render_ways(results, about, math.nan if found is None else found["accuracy"])
    if found is not None and (said := PUBLISHED.get(tuple(found["sha256"]))) is not None:
        lines.append(
            f"* The notes of these files give {said:.1%} for TF-IDF and logistic regression: "
            + "; ".join(
                f"{way} is {_gap(accuracy, said)} it" for way, accuracy in _means(results).items()
            )
            + "."
        )
    return lines


def render_ways(results: Results, about: Sequence[str], tfidf: float) -> list[str]:
    """Returns the same for any files.

    Args:
      results: of the table.
      about: paragraphs on what was run.
      tfidf: accuracy of TF-IDF and logistic regression on the test split, nan if unknown.
    """
    measured = next(iter(results.by_name.get(COSTS, {}).values()), None)
    rows = []
    for way in sst2.WAYS:
        seeds = results.by_name.get(way, {})
        if not seeds:
            continue
        first = next(iter(seeds.values()))
        steps = [steps_of(results, way, seed) for seed in results.shared(SCRATCH, way)]
        reached = [step for step in steps if not math.isnan(step)]
        seconds, memory = "", ""
        if measured is not None and way in measured:
            memory = f"{measured[way]['bytes'] / 2**20:.1f}"
            seconds = spread([step * measured[way]["seconds"] for step in reached], 1)
        recipe = sst2.recipe_of(way)
        rows.append(
            [
                way,
                f"{recipe.rate:g}, {recipe.dropout:g}",
                _percent([values["test"]["accuracy"] for values in seeds.values()]),
                f"{first['trained_parameters']:,}",
                f"{(first['gradient_bytes'] + first['optimizer_bytes']) / 2**20:.2f}",
                memory,
                spread(reached, 0),
                f"{len(reached)} of {len(steps)}",
                seconds,
            ]
        )
    names = [
        *("way", "rate, dropout", "test accuracy, %", "parameters that train"),
        *("their gradient and state, MiB", "peak of a step, MiB"),
        *("steps to the target", "seeds that reach it", "seconds to it"),
    ]
    targets = [target_of(results, seed) for seed in sorted(results.by_name.get(SCRATCH, {}))]
    lines = [line for part in about for line in (part, "")]
    if targets:
        said = ", ".join(f"{target:.1%}" for target in targets)
        lines += [f"Targets by seed, on the validation split: {said}.", ""]
    lines += grid(names, rows, "ll" + "r" * (len(names) - 2))
    return [*lines, "", *_against_tfidf(results, tfidf), *_transfer(results, measured)]


def _means(results: Results) -> dict[str, float]:
    """Way from scratch -> mean test accuracy."""
    return {
        way: float(np.mean([values["test"]["accuracy"] for values in seeds.values()]))
        for way in FROM_SCRATCH
        if (seeds := results.by_name.get(way))
    }


def _gap(accuracy: float, other: float) -> str:
    gap = 100 * (accuracy - other)
    return f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'}"


def _against_tfidf(results: Results, tfidf: float) -> list[str]:
    """How far each way from scratch is from TF-IDF, and what it made of its training rows."""
    lines = []
    linear = next(iter(results.by_name.get(BASELINE, {}).values()), None)
    for way, accuracy in _means(results).items():
        values = list(results.by_name[way].values())
        line = f"* {way.capitalize()}: "
        if not math.isnan(tfidf):
            line += (
                f"{_gap(accuracy, tfidf)} the {tfidf:.1%} that TF-IDF and logistic regression on "
                "words reach on the same split. "
            )
        lowest = [min(value["losses"], key=lambda pair: pair[1]) for value in values]
        fitted = np.mean([value["fitted"] for value in values])
        end = np.mean([value["losses"][-1][1] for value in values])
        line += (
            f"It has {fitted:.1%} of its training rows right; its validation loss is "
            f"lowest, {np.mean([loss for _, loss in lowest]):.3f}, at step "
            f"{np.mean([step for step, _ in lowest]):.0f} of {values[0]['losses'][-1][0]} and "
            f"{end:.3f} at the end."
        )
        lines.append(line)
    if lines and linear is not None and "train" in linear:
        lines.append(
            f"* TF-IDF and logistic regression have {linear['train']:.1%} of their training rows "
            f"right, {linear['valid']:.1%} on the validation split, which chose their settings."
        )
    return lines


def _transfer(results: Results, measured: Mapping[str, Any] | None) -> list[str]:
    """What transfer adds to accuracy, with and without n-grams, and the ratios of the times."""
    lines = []
    for way, scratch in ((FULL, SCRATCH), (FULL_GRAMS, GRAMS)):
        if seeds := results.shared(scratch, way):
            found = _margin(results, way, scratch, seeds)
            lines.append(
                f"* {way.capitalize()}, against {scratch}: {100 * found.difference:+.1f} points, "
                f"in standard errors {found.text}."
            )
    if measured is not None and (seeds := results.shared(SCRATCH, FULL)):
        before = sst2.LANGUAGE_STEPS * measured[LANGUAGE]["seconds"]
        for what, more in (("", 0.0), (", those of the language model included", before)):
            ratios = [_ratio(results, measured, seed, more) for seed in seeds]
            there = [ratio for ratio in ratios if not math.isnan(ratio)]
            said = ", ".join("<1" if math.isnan(r) else f"{r:.2f}" for r in ratios)
            mean = f"; mean {spread(there, 2)}" if 1 < len(there) == len(ratios) else ""
            lines.append(
                f"* Seconds to the target from scratch over those of full fine-tuning{what}, by "
                f"seed: {said}{mean} (seeds in which it reaches it: {len(there)} of {len(ratios)})."
            )
        lines.append(f"* The language model took {before:.0f} s of steps before.")
    return lines


def times_sooner(results: Results) -> tuple[list[float], list[float]]:
    """Returns how many times sooner full fine-tuning is where scratch ends, by seed; nan for never.

    Without what the language model took, and with it. Empty while steps have not been timed.
    """
    measured = next(iter(results.by_name.get(COSTS, {}).values()), None)
    seeds = results.shared(SCRATCH, FULL)
    if measured is None:
        return [], []
    before = sst2.LANGUAGE_STEPS * measured[LANGUAGE]["seconds"]
    alone, whole = ([_ratio(results, measured, n, more) for n in seeds] for more in (0.0, before))
    return alone, whole


def _ratio(results: Results, measured: Mapping[str, Any], seed: int, more: float) -> float:
    """Seconds from scratch over those of full fine-tuning; nan where that misses the target."""
    scratch, full = (
        steps_of(results, way, seed) * measured[way]["seconds"] for way in (SCRATCH, FULL)
    )
    return float(scratch / (full + more))


def _margin(results: Results, way: str, other: str, seeds: Sequence[int]) -> Margin:
    """Of test accuracy, paired by seed."""
    values = [
        [results.by_name[name][seed]["test"]["accuracy"] for seed in seeds] for name in (way, other)
    ]
    return margin(*values)


def render_shares(results: Results) -> list[str]:
    """Returns the accuracy by the share of the labels, from scratch and transferred."""
    pairs = ((FULL, SCRATCH), (FULL_GRAMS, GRAMS))
    rows = []
    for share in sst2.SHARES:
        names = {way: shared(way, share) for way in sst2.SHARED}
        seeds = results.shared(*names.values())
        if not seeds:
            continue
        row = [f"{share:.0%}"]
        for name in names.values():
            row.append(
                _percent([results.by_name[name][seed]["test"]["accuracy"] for seed in seeds])
            )
        for way, other in pairs:
            found = _margin(results, names[way], names[other], seeds)
            row += [f"{100 * found.difference:+.1f}", found.text]
        rows.append(row)
    columns = ["labels", *sst2.SHARED]
    for way, _ in pairs:
        columns += [f"{way}: difference", "in standard errors"]
    return [
        "Test accuracy, %, and the difference of each transferred way from scratch with the same "
        "head. The rows that keep their label are drawn anew for each seed, the same for all ways; "
        "pieces and language model have seen all training sentences without labels, and the "
        "checkpoint is chosen on the whole validation split.",
        "",
        *grid(columns, rows, "l" + "r" * (len(columns) - 1)),
    ]


def picture(results: Results) -> Any:
    """Draws validation accuracy against steps, a line a way."""
    from matplotlib.figure import Figure

    if not any(results.by_name.get(way) for way in sst2.WAYS):
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, way in enumerate(sst2.WAYS):
        curves = [values["curve"] for values in results.by_name.get(way, {}).values()]
        if curves:
            steps = [step for step, _ in curves[0]]
            mean = np.mean([[accuracy for _, accuracy in curve] for curve in curves], axis=0)
            axes.plot(steps, 100 * mean, color=f"C{number}", label=way, linewidth=1)
    targets = [target_of(results, seed) for seed in results.by_name.get(SCRATCH, {})]
    if targets:
        axes.axhline(100 * float(np.mean(targets)), color="black", linewidth=0.6, linestyle=":")
    axes.set(xlabel="step", ylabel="validation accuracy, %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    return figure


def _percent(values: list[float]) -> str:
    return spread([100 * value for value in values], 1)


def _missing(request: Request) -> list[str]:
    if request.sst2 is None or request.shakespeare is None:
        return ["Runs with the data at hand: `--sst2 FOLDER --shakespeare FILE`."]
    return []


TABLES: tuple[Table, ...] = (
    transfer_sst2_tuning.TABLE,
    Table("sst2", "Sentiment of sentences: ways to tune", sst2.cells, render, picture, _missing),
    Table(
        "labels",
        "Sentiment of sentences: fewer labels",
        sst2.cells,
        render_shares,
        None,
        _missing,
    ),
)
