"""Runs what a rung needs: baselines at their budget, rungs at the lengths that the search asks for.

All that is finished is gathered into one JSON a scale, a table there for each data set; reports are
made from it alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ablate.gathered import Gathered
from experiments.baselines.cells import BaselineCell, read_baseline
from experiments.baselines.settings import TorchBaseline
from experiments.grid import Cell, Measurement, read_result
from experiments.ladder.child import FACTS, Job, run_apart
from experiments.ladder.measure import last_bits, points_of
from experiments.ladder.recipe import Recipe
from experiments.ladder.rungs import below, first_recipe, recipe_of
from experiments.ladder.scales import Scale
from experiments.ladder.search import next_length
from experiments.run import read_json
from train.loop import LoopSettings

TORCH, TORCH_TUNED = "torch", "torch-tuned"
BASELINES = {
    TORCH: "Hugging Face GPT-2 in torch, Adam at a constant 1e-4, dropout 0.1",
    TORCH_TUNED: "the same model, AdamW with tuned rate, schedule and decay, no dropout",
}
"""The two that everything compares with."""

Runner = Callable[[Job, Path], None]


@dataclass
class Site:
    """Where runs lie, what is finished, and how others are run.

    Attributes:
      scale: with its data.
      folder: of the runs.
      gathered: what is finished.
      save: keeps it.
      run: runs a cell under a folder.
      minutes: no further run is begun after so long.
    """

    scale: Scale
    folder: Path
    gathered: Gathered
    save: Callable[[], None] = lambda: None
    run: Runner = run_apart
    minutes: float | None = None
    begun: float = field(default_factory=time.monotonic)

    @property
    def table(self) -> str:
        """The name of the data set in the JSON."""
        return data_name(self.scale)

    def outcome(self, name: str, tokens: int, seed: int) -> Mapping[str, Any]:
        """Returns what a run gave, and runs it if it is not there.

        Args:
          name: of a rung or baseline.
          tokens: its budget.
          seed: of the run.

        Raises:
          TimeoutError: the minutes are up.
        """
        job = job_of(self.scale, name, tokens, seed)
        item = _item(job, name, tokens, seed)
        if not self.gathered.has(item):
            values = _values(job, self.folder)
            if values is None:
                if self.minutes is not None and time.monotonic() - self.begun > 60 * self.minutes:
                    raise TimeoutError(f"{job.name}, seed {seed}, is left for another time")
                spent = (time.monotonic() - self.begun) / 60
                print(f"\n{job.name}, seed {seed}  ({spent:.1f} min)")
                self.run(job, self.folder)
                values = _values(job, self.folder)
                assert values is not None
            facts = values.pop("machine")
            self.gathered.add(item, values, facts)
        seeds = self.gathered.index.setdefault(self.table, {}).setdefault(item.name, {})
        if seeds.get(str(seed)) != item.key:
            seeds[str(seed)] = item.key
            self.save()
        return self.gathered.cells[item.key]["values"]


def data_name(scale: Scale) -> str:
    """Returns a short name of what a scale trains on.

    >>> from experiments.ladder.scales import CPU
    >>> data_name(CPU), data_name(CPU.at(data=("texts/tale.txt",), tokenizer="bytes"))
    ('stdlib, sentencepiece:2048', 'tale.txt, bytes')
    """
    size = f"{scale.label}: " if scale.label else ""
    names = " + ".join(Path(spec).name for spec in scale.data)
    split = "" if scale.held_out == "test" else f", {scale.held_out}"
    return f"{size}{names}, {scale.tokenizer}{split}"


def recipe_for(scale: Scale, name: str) -> Recipe:
    """Returns the recipe of a rung or of a baseline."""
    if name == TORCH:
        return first_recipe(scale)
    if name == TORCH_TUNED:
        chosen, first = scale.choices, first_recipe(scale)
        tuned = dataclasses.replace(
            first,
            optimizer=chosen.torch_adamw,
            schedule=chosen.torch_schedule,
            warmup=chosen.torch_warmup,
        )
        return tuned.with_model(dropout=0.0)
    return recipe_of(name, scale)


def job_of(scale: Scale, name: str, tokens: int, seed: int) -> Job:
    """Returns the cell of a rung or baseline at a budget."""
    settings = recipe_for(scale, name).settings(scale.data, tokens, seed)
    settings = dataclasses.replace(settings, held_out=scale.held_out)
    loop = LoopSettings(
        log_every=max(1, settings.steps // 20),
        evaluate_every=max(1, settings.steps // _evaluations(scale, name)),
        checkpoint_every=max(500, settings.steps),
    )
    title = _title(name, tokens)
    if name in BASELINES:
        torch = TorchBaseline(settings, scale.mode, scale.device, scale.precision)
        return BaselineCell(title, torch, loop)
    return Cell(title, settings, loop)


def climb(site: Site, name: str, seed: int, target: float) -> dict[int, Mapping[str, Any]]:
    """Runs a rung at the lengths that the search asks for; returns what each gave, by tokens.

    Args:
      site: where.
      name: of a rung or baseline.
      seed: of the runs; seeds after the first start at the length that suited the first.
      target: bits per byte to end at.
    """
    rule = site.scale.search
    start = _start(site, name, seed, target)
    if seed:  # one length is enough for them, unless it is too short
        rule = dataclasses.replace(rule, close=float("inf"))
    tried: dict[int, Mapping[str, Any]] = {}
    while True:
        losses = {tokens: last_bits(values["points"]) for tokens, values in tried.items()}
        if seed and any(loss <= target for loss in losses.values()):
            return tried
        length = next_length(rule, losses, target, start)
        if length is None:
            return tried
        tried[length] = site.outcome(name, length, seed)


def target_of(site: Site, baseline: str, seeds: int) -> float:
    """Returns the mean of a baseline's bits per byte at the end of its budget, and runs it."""
    ends = [
        last_bits(site.outcome(baseline, site.scale.tokens, seed)["points"])
        for seed in range(seeds)
    ]
    return float(np.mean(ends))


def lengths_of(site: Site, name: str, seed: int) -> dict[int, Mapping[str, Any]]:
    """Returns all finished runs of a rung, by tokens, whatever they were run for."""
    found = {}
    for title, seeds in site.gathered.index.get(site.table, {}).items():
        rung, _, rest = title.partition(", ")
        cell = site.gathered.cells.get(seeds.get(str(seed), ""))
        if rung == name and cell is not None:
            found[int(rest.removesuffix(" tokens").replace(",", ""))] = cell["values"]
    return dict(sorted(found.items()))


def _start(site: Site, name: str, seed: int, target: float) -> float:
    """The length to begin with: for seeds after the first the one that suited it; for a rung a
    little under that of the rung below.

    It depends on runs alone that are finished before the first of this row and seed, so that a
    command that is given again asks for the same ones.
    """
    if seed and (first := _enough(site, name, 0, target)):
        return first
    if name in BASELINES:
        return site.scale.tokens
    under = below(name)
    while under is not None:
        if found := _enough(site, under, 0, target):
            return found / site.scale.search.factor**0.5
        under = below(under)
    return site.scale.tokens


def _enough(site: Site, name: str, seed: int, target: float) -> int | None:
    runs = lengths_of(site, name, seed)
    enough = [tokens for tokens, v in runs.items() if last_bits(v["points"]) <= target]
    return min(enough) if enough else None


def _evaluations(scale: Scale, name: str) -> int:
    return 4 * scale.evaluations if name in BASELINES else scale.evaluations


def _title(name: str, tokens: int) -> str:
    return f"{name}, {tokens:,} tokens"


def _item(job: Job, name: str, tokens: int, seed: int) -> Cell | Measurement:
    if isinstance(job, Cell):
        return job
    return Measurement(_title(name, tokens), {"baseline": job.key, "seed": seed}, dict)


def _values(job: Job, folder: Path) -> dict[str, Any] | None:
    read: Any = read_baseline if isinstance(job, BaselineCell) else read_result
    result = read(job, folder)
    if result is None:
        return None
    facts = read_json(result.folder / FACTS)
    return {
        "reason": result.reason,
        "points": points_of(result),
        "peak_bytes": facts["peak_bytes"],
        "machine": facts["machine"],
    }
