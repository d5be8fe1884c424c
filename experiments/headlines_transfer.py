"""What the README says of transfer: a line a task, from the tables of `experiments.ablate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from experiments.ablate import (
    transfer_squad,
    transfer_squad_report,
    transfer_sst2,
    transfer_sst2_report,
    transfer_stories,
    transfer_stories_report,
)
from experiments.tables.markdown import grid, spread
from experiments.tables.report import read
from experiments.tables.table import Results
from train.tasks.task import TEST


def transfer(path: Path) -> str:
    """Returns what training from scratch and from a start reach, and how much sooner the second is.

    Args:
      path: of the tables' JSON; Markdown lies beside it.
    """
    if not path.exists():
        return ""
    gathered = read(path)
    makers = {
        "sst2": _sst2,
        "squad": _squad,
        "multi30k": _multi30k,
        "stories-growth": _growth,
    }
    rows = [row for name, make in makers.items() if (row := make(gathered.results(name)))]
    if not rows:
        return ""
    names = ["task", "figure", "from scratch", "from a start", "times sooner where scratch ends"]
    return "\n".join(
        [
            "Small models on the published data, means over seeds ± standard deviations; `<1` is a "
            "seed that never gets there. What the start itself took is not in the times, and "
            "stands in the tables.",
            "",
            *grid(names, rows, "llrrr"),
            "",
            f"`python -m experiments.ablate transfer`: all ways to tune, costs and differences in "
            f"standard errors in [{path.stem}.md](experiments/results/{path.stem}.md).",
        ]
    )


def sooner(ratios: Sequence[float]) -> str:
    """Ratios of times as text.

    >>> sooner([2.0, 4.0]), sooner([2.0, math.nan]), sooner([])
    ('3.0 ± 1.4', '<1, 2.0', '')
    """
    if not any(map(math.isnan, ratios)):
        return spread(ratios, 1) if ratios else ""
    return ", ".join(
        "<1" if math.isnan(r) else f"{r:.1f}" for r in sorted(ratios, key=_never_first)
    )


def _never_first(ratio: float) -> float:
    return -math.inf if math.isnan(ratio) else ratio


def _sst2(results: Results) -> list[str]:
    def accuracy(way: str) -> str:
        values = results.by_name.get(way, {}).values()
        return spread([100 * value["test"]["accuracy"] for value in values], 1)

    if not results.shared(transfer_sst2.SCRATCH, transfer_sst2.FULL):
        return []
    scratch, grams = accuracy(transfer_sst2.SCRATCH), accuracy(transfer_sst2.GRAMS)
    return [
        "SST-2: sentiment",
        "accuracy, %",
        f"{scratch}; with n-grams {grams}" if grams else scratch,
        accuracy(transfer_sst2.FULL),
        sooner(transfer_sst2_report.times_sooner(results)),
    ]


def _squad(results: Results) -> list[str]:
    def f1(way: str) -> str:
        return spread([value[TEST]["f1"] for value in results.by_name[way].values()], 1)

    ways = transfer_squad.SCRATCH, transfer_squad.TRANSFER
    if not results.shared(*ways):
        return []
    floor = [value["f1"] for value in results.by_name.get(transfer_squad.FLOOR, {}).values()]
    said = f"F1 (sliding window: {spread(floor, 1)})" if floor else "F1"
    ratios = transfer_squad_report.times_sooner(results)
    return ["SQuAD: answers in paragraphs", said, *map(f1, ways), sooner(ratios)]


def _multi30k(results: Results) -> list[str]:
    def bleu(search: str) -> str:
        return spread([v["bleu"] for v in results.by_name.get(search, {}).values()], 1)

    greedy, beams = bleu("greedy"), bleu("4 beams")  # of `transfer_multi30k.SEARCHES`
    if not greedy:
        return []
    said = f"{greedy} greedy" + (f", {beams} with 4 beams" if beams else "")
    return ["Multi30k: English to German", "BLEU, test 2016", said, "", ""]


def _growth(results: Results) -> list[str]:
    ways = transfer_stories.SCRATCH, transfer_stories.GROWN
    seeds = results.shared(*ways)
    if not seeds:
        return []
    ends = [
        spread(transfer_stories_report.losses(results, way, "plays", "token", seeds))
        for way in ways
    ]
    ratios = transfer_stories_report.times_sooner(results)
    return ["a model of stories, grown, learns plays", "nats a token", *ends, sooner(ratios)]
