"""Runs what a rung needs: baselines at their budget, rungs at the lengths that the search asks for.

All that is finished is gathered into one JSON a scale, a table there for each data set and split;
reports are made from it alone.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.baselines.cells import BaselineCell, read_baseline
from experiments.baselines.settings import TorchBaseline
from experiments.grid import Cell, Measurement, read_result
from experiments.json_files import read_json
from experiments.ladder.child import FACTS, Job, run_apart
from experiments.ladder.measure import last_bits, points_of
from experiments.ladder.recipe import Recipe
from experiments.ladder.rungs import RUNGS, below, first_recipe, recipe_of
from experiments.ladder.scales import Scale
from experiments.ladder.search import between_ends, next_length
from experiments.ladder.turns import pace
from experiments.tables.gathered import Gathered
from train.loop import LoopSettings
from train.settings import digest, essential

TORCH, TORCH_TUNED = "torch", "torch-tuned"
TORCH_COMPILED, TORCH_BFLOAT16 = "torch-tuned-compiled", "torch-tuned-bfloat16"
BASELINES = {
    TORCH: "Hugging Face GPT-2 in torch, Adam at a constant 1e-4, dropout 0.1",
    TORCH_TUNED: "the same model, AdamW with tuned rate, schedule, betas and decay, no dropout",
    TORCH_COMPILED: "that one through torch.compile",
    TORCH_BFLOAT16: "the tuned one under autocast to bfloat16",
}
"""What everything compares with; the losses of the first two are the targets."""

LEARNS_AS = {TORCH_COMPILED: TORCH_TUNED, TORCH_BFLOAT16: TORCH_TUNED}
"""Baselines that are the recipe of another one in another program, and take its lengths over.

They are given the target: a seed that ends a little above it, as rounding may have it, counts with
all of its run.
"""

HEADLINES = ("jax", "rate", "muon", "for-hf", "for-gguf")
"""Rungs that also look for the length that suits the first baseline's loss, besides the highest
that is kept; others stand in that table with the runs made for the second one's."""

LATER_FACTOR = 2**0.25
"""Between the lengths of a later seed, whose end lies near the target at that of the first."""

Runner = Callable[[Job, Path], None]
Pace = Callable[[Job, Job], float]


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
      pace: times the steps of two cells in turn; returns how many times as many tokens the first
        learns from in a second.
    """

    scale: Scale
    folder: Path
    gathered: Gathered
    save: Callable[[], None] = lambda: None
    run: Runner = run_apart
    minutes: float | None = None
    pace: Pace = pace
    begun: float = field(default_factory=time.monotonic)

    @property
    def table(self) -> str:
        """The name of the data set in the JSON."""
        return data_name(self.scale)

    @property
    def on_validation(self) -> Site:
        """The same on the split that all is chosen on."""
        return dataclasses.replace(self, scale=self.scale.at(held_out="validation"))

    def begin(self, what: str) -> None:
        """Says what is run next.

        Raises:
          TimeoutError: the minutes are up.
        """
        spent = (time.monotonic() - self.begun) / 60
        if self.minutes is not None and spent > self.minutes:
            raise TimeoutError(f"{what}, is left for another time")
        print(f"\n{what}  ({spent:.1f} min)")

    def outcome(self, name: str, tokens: int, seed: int) -> Mapping[str, Any]:
        """Returns what a run gave, and runs it if it is not there.

        Args:
          name: of a rung or baseline.
          tokens: its budget.
          seed: of the run.

        Raises:
          TimeoutError: the minutes are up.
          RuntimeError: it failed.
        """
        job = job_of(self.scale, name, tokens, seed)
        return self.take(job, self.table, seed, recipe_key(self.scale, name))

    def take(self, job: Job, table: str, seed: int, recipe: str) -> Mapping[str, Any]:
        """Returns what a cell gave as part of a table, and runs it if it is not there.

        Args:
          job: the cell; its name is that of its row.
          table: in the JSON.
          seed: of the cell.
          recipe: hash of what it trains; rows of another one are no longer read.

        Raises:
          TimeoutError: the minutes are up.
          RuntimeError: it failed.
        """
        item = _item(job, seed)
        if not self.gathered.has(item):
            values = _values(job, self.folder)
            if values is None:
                self.begin(f"{job.name}, seed {seed}")
                self.run(job, self.folder)
                values = _values(job, self.folder)
                if values is None:
                    raise RuntimeError(f"{job.name}, seed {seed}, ended without a result")
            facts = values.pop("machine")
            self.gathered.add(item, {**values, "recipes": []}, facts)
        found = self.gathered.cells[item.key]["values"]
        seeds = self.gathered.index.setdefault(table, {}).setdefault(item.name, {})
        if seeds.get(str(seed)) != item.key or recipe not in found["recipes"]:
            seeds[str(seed)] = item.key
            # Two recipes may come to one run at a budget; then it is a run of both.
            found["recipes"] = sorted({*found["recipes"], recipe})
            self.save()
        return found


def data_name(scale: Scale) -> str:
    """Returns a short name of what a scale trains on, and of the split that it is measured on.

    >>> from experiments.ladder.scales import CPU
    >>> data_name(CPU), data_name(CPU.at(data=("texts/tale.txt",), tokenizer="bytes"))
    ('stdlib, sentencepiece:2048', 'tale.txt, bytes')
    >>> data_name(CPU.at(held_out="test"))
    'stdlib, sentencepiece:2048, test'
    """
    size = f"{scale.label}: " if scale.label else ""
    names = " + ".join(Path(spec).name for spec in scale.data)
    split = ", test" if scale.held_out == "test" else ""
    return f"{size}{names}, {scale.tokenizer}{split}"


def scale_named(scale: Scale, table: str) -> Scale:
    """Returns the scale on the data that a table of the JSON is called by.

    >>> from experiments.ladder.scales import CPU
    >>> found = scale_named(CPU, "tale.txt, bytes, test")
    >>> found.tokenizer, found.held_out
    ('bytes', 'test')
    """
    whole = table.removesuffix(", test")
    names, tokenizer = whole.rsplit(", ", 1)
    split: Any = "validation" if whole == table else "test"
    found = scale.at(data=tuple(names.split(" + ")), tokenizer=tokenizer, held_out=split)
    assert data_name(found) == table
    return found


def baselines_of(scale: Scale) -> tuple[str, ...]:
    """Returns the baselines of a scale: where all are compiled, or in bfloat16, none is so twice.

    >>> from experiments.ladder.scales import CPU, GPU
    >>> baselines_of(CPU), baselines_of(GPU)
    (('torch', 'torch-tuned', 'torch-tuned-compiled', 'torch-tuned-bfloat16'), \
('torch', 'torch-tuned'))
    """
    usual = _how(scale, TORCH_TUNED)
    return tuple(n for n in BASELINES if n not in LEARNS_AS or _how(scale, n) != usual)


def rows_of(scale: Scale) -> list[str]:
    """Returns the names of all rows of a scale, baselines first, from the bottom up."""
    return [*baselines_of(scale), *(rung.name for rung in RUNGS)]


def searched(name: str, baseline: str) -> bool:
    """Whether a row looks for the length that suits the loss of a baseline."""
    if name in BASELINES or baseline == TORCH_TUNED:
        return True
    return name in (*HEADLINES, [rung.name for rung in RUNGS if rung.kept][-1])


def recipe_for(scale: Scale, name: str) -> Recipe:
    """Returns the recipe of a rung or of a baseline."""
    if name == TORCH:
        return first_recipe(scale)
    if LEARNS_AS.get(name, name) == TORCH_TUNED:
        chosen, first = scale.choices, first_recipe(scale)
        tuned = dataclasses.replace(
            first,
            optimizer=chosen.torch_adamw,
            schedule=chosen.torch_schedule,
            warmup=chosen.torch_warmup,
            rows=chosen.torch_rows or scale.rows,
        )
        return tuned.with_model(dropout=0.0)
    return recipe_of(name, scale)


@functools.cache
def recipe_key(scale: Scale, name: str) -> str:
    """Returns a hash of all that makes a row what it is, but data, budget and seed.

    >>> from experiments.ladder.scales import CPU
    >>> recipe_key(CPU, "torch-tuned") == recipe_key(CPU, "torch-tuned-compiled")
    False
    """
    how = _how(scale, name) if name in BASELINES else ()
    return digest(essential([recipe_for(scale, name), *how]))


def job_of(scale: Scale, name: str, tokens: int, seed: int) -> Job:
    """Returns the cell of a rung or baseline at a budget."""
    evaluations = 4 * scale.evaluations if name in BASELINES else scale.evaluations
    return job_called(_title(name, tokens), scale, name, tokens, seed, evaluations)


def job_called(
    title: str, scale: Scale, name: str, tokens: int, seed: int, evaluations: int = 1
) -> Job:
    """Returns the cell of a rung or baseline at a budget, under a title, with some evaluations."""
    settings = recipe_for(scale, name).settings(scale.data, tokens, seed)
    settings = dataclasses.replace(settings, held_out=scale.held_out)
    loop = LoopSettings(
        log_every=max(1, settings.steps // 20),
        evaluate_every=max(1, settings.steps // evaluations),
        checkpoint_every=max(500, settings.steps),
    )
    if name in BASELINES:
        return BaselineCell(title, TorchBaseline(settings, *_how(scale, name)), loop)
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
    recorded = lengths_of(site, name, seed)
    if between_ends(rule, _ends(recorded), target):
        return recorded  # wherever that search began
    start = _start(site, name, seed, target)
    if seed:  # every seed has an end on either side of the target, the first one a little further
        rule = dataclasses.replace(rule, factor=LATER_FACTOR, shorter=LATER_FACTOR)
    tried: dict[int, Mapping[str, Any]] = {}
    while True:
        length = next_length(rule, _ends(tried), target, start)
        if length is None:
            return tried
        tried[length] = site.outcome(name, length, seed)


def _ends(runs: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    return {tokens: last_bits(values["points"]) for tokens, values in runs.items()}


def target_of(site: Site, baseline: str, seeds: int) -> float:
    """Returns the mean of a baseline's bits per byte at the end of its budget, and runs it."""
    ends = [
        last_bits(site.outcome(baseline, site.scale.tokens, seed)["points"])
        for seed in range(seeds)
    ]
    return float(np.mean(ends))


def lengths_of(site: Site, name: str, seed: int) -> dict[int, Mapping[str, Any]]:
    """Returns all finished runs of a rung as it is today, by tokens, whatever they were run for."""
    found: dict[int, Mapping[str, Any]] = {}
    today = recipe_key(site.scale, name)
    for title, seeds in site.gathered.index.get(site.table, {}).items():
        if not title.startswith(f"{name}, "):
            continue
        cell = site.gathered.cells.get(seeds.get(str(seed), ""))
        if cell is not None and today in cell["values"].get("recipes", []):
            tokens = title.removeprefix(f"{name}, ").removesuffix(" tokens")
            found[int(tokens.replace(",", ""))] = cell["values"]
    return dict(sorted(found.items()))


def changed_since(site: Site) -> dict[str, int]:
    """Returns how many runs of the table are of recipes that are no more, which nothing reads."""
    found: dict[str, int] = {}
    known = {*BASELINES, *(rung.name for rung in RUNGS)}
    for title, seeds in site.gathered.index.get(site.table, {}).items():
        if (name := title.partition(", ")[0]) in known:
            cells = [site.gathered.cells[key] for key in seeds.values()]
            today = recipe_key(site.scale, name)
            old = sum(today not in cell["values"].get("recipes", []) for cell in cells)
            found |= {name: found.get(name, 0) + old} if old else {}
    return found


def _start(site: Site, name: str, seed: int, target: float) -> float:
    """The length to begin with: for seeds after the first the one that suited it; for a rung a
    little under that of the rung below.

    It depends on runs alone that are finished before the first of this row and seed, so that a
    command that is given again asks for the same ones.
    """
    if seed and (first := enough(site, name, 0, target)):
        return first
    if name in BASELINES:
        return site.scale.tokens
    under = below(name)
    while under is not None:
        if found := enough(site, under, 0, target):
            return found / site.scale.search.factor**0.5
        under = below(under)
    return site.scale.tokens


def bracket(site: Site, name: str, seed: int, target: float) -> set[int]:
    """Returns the shortest length of a seed that was enough for a target and the longest under it.

    Empty where none was enough.
    """
    best = enough(site, name, seed, target)
    under = [n for n in lengths_of(site, name, seed) if best is not None and n < best]
    return {best, *sorted(under)[-1:]} if best is not None else set()


def enough(site: Site, name: str, seed: int, target: float) -> int | None:
    """Returns the shortest length of a seed whose run ended at a target or under it; or None."""
    runs = lengths_of(site, name, seed)
    ended = [tokens for tokens, v in runs.items() if last_bits(v["points"]) <= target]
    return min(ended) if ended else None


def _how(scale: Scale, name: str) -> tuple[Any, Any, Any]:
    """Mode, device and precision of a baseline."""
    mode = "compile" if name == TORCH_COMPILED else scale.mode
    return mode, scale.device, "bfloat16" if name == TORCH_BFLOAT16 else scale.precision


def _title(name: str, tokens: int) -> str:
    return f"{name}, {tokens:,} tokens"


def _item(job: Job, seed: int) -> Cell | Measurement:
    if isinstance(job, Cell):
        return job
    about = {"baseline": job.key, "seed": seed}
    return Measurement(job.name, about, dict, needs=(settings_cell(job),))


def settings_cell(job: Job) -> Cell:
    """Returns a cell with the settings of a job of either side: what its result comes from."""
    if isinstance(job, Cell):
        return job
    return Cell(job.name, job.baseline.settings, job.loop)


def _values(job: Job, folder: Path) -> dict[str, Any] | None:
    read: Any = read_baseline if isinstance(job, BaselineCell) else read_result
    result = read(job, folder)
    if result is None:
        return None
    facts = read_json(result.folder / FACTS)
    texts = result.folder / "data.json"
    return {
        "reason": result.reason,
        "points": points_of(result, facts.get("outside")),
        "peak_bytes": facts["peak_bytes"],
        "threads": facts.get("threads"),
        "texts": {f["name"]: f["sha256"] for f in read_json(texts)} if texts.exists() else {},
        "machine": facts["machine"],
    }
