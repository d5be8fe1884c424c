"""What the README says of transfer: a line a task, from the tables of `experiments.ablate`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.ablate import transfer_squad_report, transfer_sst2_report, transfer_stories_report
from experiments.ablate.transfer_multi30k import SEARCHES
from experiments.ablate.transfer_squad import FLOOR, TRANSFER
from experiments.ablate.transfer_squad import SCRATCH as SQUAD_SCRATCH
from experiments.ablate.transfer_sst2 import FULL, FULL_GRAMS, GRAMS
from experiments.ablate.transfer_sst2 import SCRATCH as SST2_SCRATCH
from experiments.ablate.transfer_stories import GROWN
from experiments.ablate.transfer_stories import SCRATCH as STORIES_SCRATCH
from experiments.headlines import CLAIM
from experiments.tables.margins import margin
from experiments.tables.markdown import grid, spread
from experiments.tables.report import read
from experiments.tables.table import Results
from train.tasks.task import TEST

FOREIGN = "not known"  # what somebody else's model took
BEAMS = "4 beams"


def transfer(path: Path) -> str:
    """Returns what training from scratch and from a start reach, and how much sooner the second is.

    Args:
      path: of the tables' JSON; Markdown lies beside it.
    """
    if not path.exists():
        return ""
    gathered = read(path)
    makers = {"sst2": _sst2, "squad": _squad, "stories-growth": _growth}
    rows = [row for name, make in makers.items() for row in make(gathered.results(name))]
    if not rows:
        return ""
    names = ["task", "figure", "from scratch", "from a start", "difference, in standard errors"]
    names += ["times sooner at scratch's last validation score", "with the start's own time"]
    missed = any("<1" in cell for row in rows for cell in row)
    return "\n".join(
        [
            "Small models, means over the seeds that both have ± standard deviations; fewer than "
            f"{CLAIM} seeds are an exploration and no claim."
            + (" `<1` is a seed that never gets there." if missed else ""),
            "",
            *grid(names, rows, "llrrrrr"),
            "",
            *_translation(gathered.results("multi30k")),
            "`python -m experiments.ablate transfer --sst2 FOLDER --shakespeare FILE --stories "
            "FOLDER --squad FILE --multi30k FOLDER`: all ways to tune, and what each costs, in "
            f"[{path.stem}.md](experiments/results/{path.stem}.md).",
        ]
    )


def sooner(ratios: Sequence[float]) -> str:
    """Ratios of times as text.

    >>> sooner([2.0, 4.0]), sooner([2.0, math.nan]), sooner([])
    ('3.0 ± 1.4', '<1, 2.0', '')
    """
    there = sorted(ratio for ratio in ratios if not math.isnan(ratio))
    if len(there) == len(ratios):
        return spread(ratios, 1 if all(ratio >= 1 for ratio in ratios) else 2)
    return ", ".join(["<1"] * (len(ratios) - len(there)) + [f"{ratio:.1f}" for ratio in there])


def _row(task: str, figure: str, scores: Iterable[list[float]], digits: int) -> list[str]:
    scratch, start = scores
    found = margin(start, scratch)
    said = f"{found.difference:+.{digits}f}, {found.text}"
    if len(start) > 1:
        said += f"; {len(start)} seeds"
    return [task, figure, spread(scratch, digits), spread(start, digits), said]


def _sst2(results: Results) -> list[list[str]]:
    rows = []
    for what, scratch, start in (("", SST2_SCRATCH, FULL), (", with n-grams", GRAMS, FULL_GRAMS)):
        if not (seeds := results.shared(scratch, start)):
            continue
        scores = (
            [100 * results.by_name[way][seed]["test"]["accuracy"] for seed in seeds]
            for way in (scratch, start)
        )
        times = transfer_sst2_report.times_sooner(results) if start == FULL else ([], [])
        row = _row(f"SST-2: sentiment{what}", "accuracy, %", scores, 1)
        rows.append([*row, *map(sooner, times)])
    return rows


def _squad(results: Results) -> list[list[str]]:
    ways = SQUAD_SCRATCH, TRANSFER
    if not (seeds := results.shared(*ways)):
        return []
    scores = ([results.by_name[way][seed][TEST]["f1"] for seed in seeds] for way in ways)
    floor = [v["f1"] for seed, v in results.by_name.get(FLOOR, {}).items() if seed in seeds]
    figure = f"F1 (a sliding window: {spread(floor, 1)})" if floor else "F1"
    times = transfer_squad_report.times_sooner(results)
    row = _row("SQuAD's development set, by article", figure, scores, 1)
    return [[*row, *map(sooner, times)]]


def _growth(results: Results) -> list[list[str]]:
    ways = STORIES_SCRATCH, GROWN
    if not (seeds := results.shared(*ways)):
        return []
    ends = (transfer_stories_report.losses(results, way, "plays", "token", seeds) for way in ways)
    row = _row("plays, by a model of stories grown to twice its depth", "nats a token", ends, 3)
    return [[*row, sooner(transfer_stories_report.times_sooner(results)), FOREIGN]]


def _translation(results: Results) -> list[str]:
    """A paragraph on Multi30k, which starts from nothing."""
    assert BEAMS in SEARCHES
    greedy, beams = (
        [v["bleu"] for v in results.by_name.get(search, {}).values()]
        for search in ("greedy", BEAMS)
    )
    if not greedy:
        return []
    said = f", {spread(beams, 1)} with {BEAMS}" if beams else ""
    return [
        f"Multi30k, English to German from scratch: BLEU {spread(greedy, 1)} on test 2016 with "
        f"greedy search{said} ({len(greedy)} seeds).",
        "",
    ]
