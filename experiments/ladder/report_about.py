"""What stands above the tables of a ladder: protocol, text, threads, rungs, and the trials."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.busy import TOLERATED
from experiments.ladder.climb import (
    BASELINES,
    TORCH_TUNED,
    Site,
    baselines_of,
    data_name,
    lengths_of,
    recipe_for,
)
from experiments.ladder.measure import BEYOND
from experiments.ladder.rungs import RUNGS
from experiments.ladder.scales import SCALES
from experiments.ladder.side_by_side import busy, clock_of, processors, timed
from experiments.ladder.techniques import OUTSIDE_TRIALS
from experiments.ladder.trials import SEED, Chosen, changes, edges, tuned_on
from experiments.ladder.tune import counts, on_record, tuning_path
from experiments.tables.report import read


def about(site: Site, path: Path) -> list[str]:
    """Returns the lines that say what was measured, and how.

    Args:
      site: of a data set and split.
      path: of the ladder's JSON.
    """
    scale = site.scale
    lines = [
        f"Budget of a baseline: {scale.steps:,} steps of {scale.rows} x {scale.length} tokens "
        f"({scale.tokens / 1e6:.2f} M), fixed before anything was tuned. A target is the mean loss "
        f"of a baseline at the end of that budget, over seeds 0 to {scale.target_seeds - 1}, "
        "however many a rung has. Every rung looks for the length of its schedule by one rule "
        f"(`experiments/ladder/search.py`), with at most {scale.search.runs} runs a seed; its "
        "costs are interpolated between the two that end on either side of the target "
        "(`experiments/ladder/measure.py`), and where there are no such two between evaluations of "
        f"a run, {scale.evaluations} of them. "
        "Figures are means over seeds ± standard errors; those of seconds and of tokens a second "
        "have the error of the pace to the tuned baseline's in them, whose own pace counts as "
        "exact; ratios are of paired seeds, above 1 is "
        "faster, p is of a two-sided paired t-test of their logarithms. "
        f"{_seconds(site)} {_split(site)}",
        "",
        *_tuned_batch(site),
        *_facts(site),
        *_a_seed(site),
        *(f"* {name}: {BASELINES[name]}" for name in baselines_of(scale)),
        *(f"* {rung.name}: {rung.about}" for rung in RUNGS),
    ]
    return [*lines, "", *_trials(site, path)]


def _seconds(site: Site) -> str:
    if not timed(site):
        return (
            "Seconds are those of the runs, of the hour they ran in, and decide nothing: steps "
            "have not been timed in turn (`--side-by-side`). Cold: from the start of the process, "
            "imports, compilation, evaluations and checkpoints included."
        )
    return (
        "Seconds are those that the tokens take at the pace of steps that were timed in turn, "
        f"rung and tuned baseline, with {_beside(site)} on the machine ({processors(site)[0]}); "
        "the runs that found how many tokens a rung needs may have shared it. Compiling: the first "
        "step of every phase. Cold: from the start of the process, imports and compilation "
        "included, without reading the data, evaluations and checkpoints. The ratio of a rung to "
        "the one below is of the steps of these two in turn where they were, and so need not be "
        "that of their seconds. A row without seconds "
        'has not been timed on that machine; what others have timed stands under "Steps in turn".'
    )


def _beside(site: Site) -> str:
    cores = busy(site)
    return "nothing else" if cores <= TOLERATED else f"up to {cores:.1f} cores busy otherwise"


def _split(site: Site) -> str:
    if site.scale.held_out == "validation":
        return (
            "Losses are of the validation split, on which lengths, rates and what is kept are "
            "chosen: the figures to report are those of the test split, where there is one."
        )
    return (
        "Losses are of the test split, which no trial and no search has seen: the lengths are "
        "those that suited the validation split, and its runs were trained once more; a target "
        f"up to {BEYOND:g} times the tokens past them is read off the same line."
    )


def _tuned_batch(site: Site) -> Iterable[str]:
    """The batch of the tuned baseline, where it is not that of the scale."""
    rows, scale = recipe_for(site.scale, TORCH_TUNED).rows, site.scale
    if rows != scale.rows:
        steps = scale.tokens // (rows * scale.length)
        yield f"* the tuned baseline's batch: {steps:,} steps of {rows} x {scale.length} tokens"


def _facts(site: Site) -> Iterable[str]:
    """The text by its hash, and the threads of either side."""
    texts: dict[str, set[str]] = {}
    threads: dict[str, set[int]] = {"torch": set(), "ours": set()}
    for title, values in _runs(site):
        for name, sha256 in values.get("texts", {}).items():
            texts.setdefault(name, set()).add(sha256)
        if values.get("threads"):
            side = "torch" if title.partition(", ")[0] in BASELINES else "ours"
            threads[side].add(values["threads"])
    for name, found in texts.items():
        warning = "" if len(found) == 1 else " (**runs of different texts stand in one table**)"
        yield f"* text: {name}, sha256 {', '.join(sorted(found))}{warning}"
    if said := [f"{side} {_listed(found)}" for side, found in threads.items() if found]:
        yield f"* threads: {', '.join(said)}"


def _a_seed(site: Site) -> Iterable[str]:
    """What the first seed of all rungs took, for whoever wants to run one."""
    counted = {}
    for rung in RUNGS:
        clock, lengths = clock_of(site, rung.name), lengths_of(site, rung.name, 0)
        if clock is not None and lengths:
            training, compiling = clock.token * sum(lengths), clock.compiling * len(lengths)
            counted[rung.name] = len(lengths), training, compiling
    if counted:
        runs, training, compiling = map(sum, zip(*counted.values(), strict=True))
        yield (
            f"* the first seed of {len(counted)} rungs, to both targets where a row has both: "
            f"{runs} runs on record, {training / 60:.0f} minutes of training at this pace and "
            f"{compiling / 60:.0f} of compilation, without evaluations and baselines"
        )


def _runs(site: Site) -> Iterable[tuple[str, Mapping[str, Any]]]:
    for title, seeds in site.gathered.index.get(site.table, {}).items():
        for key in seeds.values():
            if (cell := site.gathered.cells.get(key)) is not None:
                yield title, cell["values"]


def _trials(site: Site, path: Path) -> list[str]:
    """The trials on record: how many on either side, their grids, and whether they are heeded."""
    plain = SCALES[site.scale.name]
    guess = "The choices are guesses and no figure is a claim: no trials are on record"
    found = [chosen for chosen in on_record(path, site) if chosen.bits]
    if not found:
        return [f"{guess} (`python -m experiments.speedrun --scale {plain.name} --tune all`)."]
    there = tuned_on(read(tuning_path(path, plain)), site.scale)
    lines = [f"{counts(found)} One run each of seed {SEED}, on the validation split."]
    lines[0] += " Ours take betas, decay, clipping and warmup of AdamW over from the baseline's."
    if data_name(there) != data_name(site.scale.at(held_out="validation")):
        lines[0] += (
            f" They are of {data_name(there.at(held_out='validation'))}: rates, schedules and batch"
            " are taken over from there on both sides, and nothing was tuned on this text."
        )
    if new := changes(site.scale.choices, on_record(path, site)[-1].after):
        lines[0] += f" **The rows below do not have what they chose: {', '.join(new)}.**"
    if more := OUTSIDE_TRIALS.get(plain.name):
        lines[0] += f" Ours outside of them: {'; '.join(more)}."
    lines.append("")
    for chosen in found:
        lines.append(f"* {chosen.group.name} ({len(chosen.bits)}): {_grid(chosen)}")
        lines += [f"    * at an edge: {edge}" for edge in edges(chosen)]
    return lines


def _grid(chosen: Chosen) -> str:
    """Every trial with its bits per byte, the chosen one in bold."""
    cells = []
    for title in chosen.trials:
        if title in chosen.bits:
            bits = chosen.bits[title]
            text = f"{title}: {bits:.4f}" if math.isfinite(bits) else f"{title}: diverged"
            cells.append(f"**{text}**" if title == chosen.best else text)
    missing = len(chosen.trials) - len(chosen.bits)
    return "; ".join(cells) + (f"; {missing} missing" if missing else "")


def _listed(found: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(found)))
