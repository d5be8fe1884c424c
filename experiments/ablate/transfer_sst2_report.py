"""What the finished runs of `experiments.ablate.transfer_sst2` say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.ablate import transfer_sst2 as sst2
from experiments.ablate.transfer_sst2 import BAG, COSTS, FULL, LANGUAGE, SCRATCH, TFIDF, shared
from experiments.tables.margins import Margin, margin
from experiments.tables.markdown import grid, spread
from experiments.tables.table import Request, Results, Table


def target_of(results: Results) -> float:
    """Returns the mean validation accuracy that training from scratch ends at."""
    ends = [values["curve"][-1][1] for values in results.by_name.get(SCRATCH, {}).values()]
    return float(np.mean(ends)) if ends else math.nan


def steps_to(curve: list[list[float]], target: float) -> float:
    """Returns the step of the first evaluation at or above the target; nan if none is.

    >>> steps_to([[100, 0.7], [200, 0.8], [300, 0.79]], 0.75), steps_to([[100, 0.7]], 0.75)
    (200, nan)
    """
    return next((step for step, accuracy in curve if accuracy >= target), math.nan)


def render(results: Results) -> list[str]:
    """Returns the ways to tune, what they reach and cost, and whether scratch beats TF-IDF."""
    about = [" ".join(part.split()) for part in (sst2.__doc__ or "").split("\n\n")[1:3]]
    return render_ways(results, about, TFIDF)


def render_ways(results: Results, about: Sequence[str], tfidf: float) -> list[str]:
    """Returns the same for any files.

    Args:
      results: of the table.
      about: paragraphs on what was run.
      tfidf: accuracy of TF-IDF and logistic regression on the test split, nan if unknown.
    """
    target = target_of(results)
    measured = next(iter(results.by_name.get(COSTS, {}).values()), None)
    rows = []
    for way in sst2.WAYS:
        seeds = results.by_name.get(way, {})
        if not seeds:
            continue
        first = next(iter(seeds.values()))
        steps = [steps_to(values["curve"], target) for values in seeds.values()]
        reached = [step for step in steps if not math.isnan(step)]
        seconds, memory = "", ""
        if measured is not None:
            memory = f"{measured[way]['bytes'] / 2**20:.1f}"
            seconds = spread([step * measured[way]["seconds"] for step in reached], 1)
        rows.append(
            [
                way,
                _percent([values["test"]["accuracy"] for values in seeds.values()]),
                f"{first['trained_parameters']:,}",
                f"{(first['gradient_bytes'] + first['optimizer_bytes']) / 2**20:.2f}",
                memory,
                f"{np.mean(reached):.0f}" if reached else "",
                f"{len(reached)} of {len(steps)}",
                seconds,
            ]
        )
    names = [
        *("way", "test accuracy, %", "parameters that train", "their gradient and state, MiB"),
        *("peak of a step, MiB", "steps to the target", "seeds that reach it", "seconds to it"),
    ]
    lines = [line for part in about for line in (part, "")]
    lines += [f"Target: {target:.1%} on the validation split.", ""]
    lines += grid(names, rows, "l" + "r" * (len(names) - 1))
    return [*lines, "", *_claims(results, measured, target, tfidf)]


def _claims(
    results: Results, measured: Mapping[str, Any] | None, target: float, tfidf: float
) -> list[str]:
    """What the rows say: against TF-IDF, what transfer adds, and the ratio of the times."""
    lines = []
    seeds = results.shared(SCRATCH, FULL)
    accuracy = {
        way: [results.by_name[way][seed]["test"]["accuracy"] for seed in seeds]
        for way in (SCRATCH, FULL)
        if seeds
    }
    for way in (SCRATCH, BAG):
        if (own := results.by_name.get(way)) and not math.isnan(tfidf):
            mean = float(np.mean([values["test"]["accuracy"] for values in own.values()]))
            gap = 100 * (mean - tfidf)
            word = "above" if gap > 0 else "below"
            lines.append(
                f"* {way.capitalize()}: {abs(gap):.1f} points {word} the {tfidf:.1%} of TF-IDF and "
                "logistic regression on words."
            )
    if accuracy:
        found: Margin = margin(accuracy[FULL], accuracy[SCRATCH])
        lines.append(
            f"* Full fine-tuning is {100 * found.difference:+.1f} points from scratch, in standard "
            f"errors {found.text}."
        )
    if measured is not None and seeds:
        ratios = []
        for seed in seeds:
            time = {
                way: steps_to(results.by_name[way][seed]["curve"], target)
                * measured[way]["seconds"]
                for way in (SCRATCH, FULL)
            }
            ratios.append(time[SCRATCH] / time[FULL])
        both = [ratio for ratio in ratios if not math.isnan(ratio)]
        before = sst2.LANGUAGE_STEPS * measured[LANGUAGE]["seconds"]
        lines.append(
            f"* Time to the target from scratch over that of full fine-tuning: {spread(both, 2)} "
            f"(seeds in which both reach it: {len(both)} of {len(ratios)}). The language model "
            f"took {before:.0f} s before."
        )
    return lines


def render_shares(results: Results) -> list[str]:
    """Returns the accuracy by the share of the labels, from scratch and transferred."""
    rows = []
    for share in sst2.SHARES:
        by_way = [results.by_name.get(shared(way, share), {}) for way in (SCRATCH, FULL)]
        if not all(by_way):
            continue
        both = sorted(set(by_way[0]) & set(by_way[1]))
        values = [[seeds[seed]["test"]["accuracy"] for seed in both] for seeds in by_way]
        found = margin(values[1], values[0])
        rows.append(
            [f"{share:.0%}", *map(_percent, values), f"{100 * found.difference:+.1f}", found.text]
        )
    names = ["labels", SCRATCH, "transferred (full)", "difference", "in standard errors"]
    return [
        "Test accuracy, %. The rows that keep their label are drawn anew for each seed, the same "
        "for both ways; pieces and language model have seen all training sentences without labels, "
        "and the checkpoint is chosen on the whole validation split.",
        "",
        *grid(names, rows, "lrrrr"),
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
            axes.plot(steps, 100 * mean, ".-", color=f"C{number}", label=way, linewidth=1)
    if not math.isnan(target := target_of(results)):
        axes.axhline(100 * target, color="black", linewidth=0.6, linestyle=":")
    axes.set(xlabel="step", ylabel="validation accuracy, %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    return figure


def _percent(values: list[float]) -> str:
    return spread([100 * value for value in values], 1)


def _missing(request: Request) -> list[str]:
    if request.sst2 is None or request.shakespeare is None:
        return ["Runs with the data at hand: `--sst2 FOLDER --shakespeare FILE`."]
    return []


TABLES: tuple[Table, ...] = (
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
