"""Every optimizer at a rate of its own: one model, data and budget for all.

The modern block, 2 layers of width 96, over 300 steps of 16 x 64 tokens of the standard library's
source, at a rate that warms up for 15 steps and falls to zero. Who leads in the middle of a run
may well lose at its end, so all are compared at the end of the schedule. The mission's SGD, with
momentum 0.9 and weight decay, has the classic rate that goes down as 1 / (1 + 0.03 t).

Each has five rates to choose from (`train.optimizers.table.RATE_GRIDS`), tried with a seed that the
table does not use; where the best is the lowest or the highest, up to three more beyond it, so that
the numbers of trials differ. All losses are of the validation split: the test split is kept for
recipes that are chosen, and what stands here may become part of one. Steps and seconds are to the
mean loss that AdamW ends at, which AdamW takes all of its steps for. A seed of another that ends
above it would have taken more than all: such a row has > before its steps, and < before how much
faster it is. Seconds are steps times those of one, which are measured apart, in turn with AdamW's;
what was measured twice came out up to a tenth apart.

After a comma stands what is exchanged in the optimizer before it (`train.optimizers.table.
VARIANTS`); such a row is to be held against that optimizer's own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.ablate.compress_training import crossing
from experiments.ablate.steps import step_times
from experiments.grid import Cell, Measurement, read_result, run_cells
from experiments.runs.execute import Execution
from experiments.tables.markdown import grid, spread
from experiments.tables.table import Item, Request, Results, Table
from model.flops import abstract_params
from model.presets import modern_mini
from train.loop import LoopSettings
from train.optimizers import OPTIMIZERS, SGD, build
from train.optimizers.table import RATE_GRIDS, VARIANTS, at_rate
from train.schedules import InverseTime, Linear
from train.settings import Phase, Settings
from train.tokenizers.tokenizer import load_tokenizer

STEPS = 300
WARMUP = 15
EVALUATIONS = 10
DATA: tuple[str, ...] = ("stdlib",)
TOKENIZER, VOCABULARY = "sentencepiece:512", 512
MODEL = modern_mini(layers=2, width=96, heads=3, max_length=64)
ROWS, LENGTH = 16, 64
BEYOND = 3  # rates that may be tried beyond either end of the five
TUNING_SEED = 100  # one that the table does not use
REPEATS, AT_ONCE = 21, 5
FIRST = "adamw"
COSTS = "costs of a step"

CLASSIC = "sgd, decay, weight decay"
MISSION = (CLASSIC, "adam", "adamw", "adamax")
"""What the mission names; the others are measured against these."""

NAMES = (*MISSION, *(name for name in OPTIMIZERS if name not in MISSION), *VARIANTS)


def rates_of(name: str) -> tuple[float, ...]:
    """Returns the rates that an optimizer chooses from.

    >>> rates_of("adamw")
    (0.0005, 0.001, 0.002, 0.004, 0.008)
    """
    return RATE_GRIDS["sgd" if name == CLASSIC else name]


def settings_at(name: str, rate: float, seed: int) -> Settings:
    """Returns the run of an optimizer at a peak rate."""
    schedule: Any = Linear(warmup_steps=WARMUP)
    if name == CLASSIC:
        # A tenth of the rate is left at the end; the decay of weights is the customary one.
        optimizer: Any = SGD(learning_rate=rate, momentum=0.9, weight_decay=1e-4)
        schedule = InverseTime(warmup_steps=WARMUP, decay=9.0 / STEPS)
    else:
        optimizer = at_rate(name, rate)
    return Settings(
        phases=(Phase(STEPS, MODEL, ROWS, LENGTH),),
        data=DATA,
        tokenizer=TOKENIZER,
        seed=seed,
        optimizer=optimizer,
        schedule=schedule,
    )


def trials(name: str) -> list[Cell]:
    """Returns the runs that an optimizer's rate is chosen by."""
    return [trial(name, rate) for rate in rates_of(name)]


def trial(name: str, rate: float) -> Cell:
    """Returns the run that says what a rate is worth."""
    loop = LoopSettings(log_every=STEPS, checkpoint_every=STEPS)
    return Cell(f"{name} at {rate:g}", settings_at(name, rate, TUNING_SEED), loop)


def trial_cells(request: Request) -> list[Item]:
    """Returns the trials of all optimizers."""
    return [cell for name in NAMES for cell in trials(name)]


def cells(request: Request) -> list[Item]:
    """Returns a run of every optimizer and seed, each after its trials, and the costs of a step."""
    items: list[Item] = []
    for name in NAMES:
        tried = trials(name)
        for seed in range(request.seeds):
            about = {
                "optimizer": name,
                "seed": seed,
                "trials": [cell.key for cell in tried],
                "beyond": BEYOND,
                "evaluations": EVALUATIONS,
            }
            measure = functools.partial(tuned_run, request.cells)
            items.append(Measurement(name, about, measure, needs=tuple(tried)))
    about = {"measured": COSTS, "rows": list(NAMES), "repeats": REPEATS, "at once": AT_ONCE}
    about |= {"model": repr(MODEL)}
    return [*items, Measurement(COSTS, about, costs)]


def chosen_rate(tried: Mapping[float, float]) -> float:
    """Returns the rate with the lowest loss; the lowest of all rates if every run diverged.

    >>> chosen_rate({0.1: 3.0, 0.2: 2.5, 0.4: math.nan})
    0.2
    """
    finite = {rate: loss for rate, loss in tried.items() if math.isfinite(loss)}
    return min(finite, key=finite.__getitem__) if finite else min(tried)


def further_rate(tried: Mapping[float, float], most: int) -> float | None:
    """Returns a rate beyond those that were tried, as far as the last two are apart, or None.

    None where the best one is neither the lowest nor the highest, or `most` have been tried.

    >>> further_rate({0.1: 3.0, 0.2: 2.5}, 3), further_rate({0.1: 3.0, 0.2: 2.5}, 2)
    (0.4, None)
    """
    rates, best = sorted(tried), chosen_rate(tried)
    if len(rates) >= most or best not in (rates[0], rates[-1]):
        return None
    beside = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best * best / beside:.3g}")


def tuned_run(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Runs an optimizer at the best of the rates that were tried.

    Args:
      folder: of the runs, those of the trials among them.
      settings: with "optimizer" and "seed".

    Returns:
      The rate, what was tried, how the run went, and the bytes of the optimizer's state.
    """
    name = settings["optimizer"]
    tried = {}
    for rate, cell in zip(rates_of(name), trials(name), strict=True):
        result = read_result(cell, folder)
        assert result is not None  # it is among what the measurement needs
        tried[rate] = result.loss
    quiet = Execution(keep_last=1, keep_best=0, progress=False)
    while (further := further_rate(tried, len(rates_of(name)) + BEYOND)) is not None:
        (result,) = run_cells([trial(name, further)], folder, execution=quiet)
        tried[further] = result.loss
    rate = chosen_rate(tried)
    run = settings_at(name, rate, settings["seed"])
    loop = LoopSettings(STEPS, max(1, STEPS // EVALUATIONS), STEPS)
    (result,) = run_cells([Cell(name, run, loop)], folder, execution=quiet)
    size = load_tokenizer(result.folder / "tokenizer").vocabulary_size
    parameters, state = state_bytes(run, size)
    rows = result.evaluations
    return {
        "rate": rate,
        "tried": [[each, loss] for each, loss in tried.items()],
        "reason": result.reason,
        "loss": result.loss,
        "bits per byte": float(rows[-1]["bits_per_byte"]) if rows else math.nan,
        "evaluations": [{"step": row["step"], "loss": row["loss"]} for row in rows],
        "parameters": parameters,
        "state bytes": state,
    }


def state_bytes(settings: Settings, vocabulary_size: int) -> tuple[int, int]:
    """Returns the number of parameters, and the bytes of the optimizer's state beside them."""
    phase = settings.phases[0]
    params = abstract_params(dataclasses.replace(phase.model, vocabulary_size=vocabulary_size))
    tx = build(settings.optimizer, settings.schedule, settings.steps, params)
    state = jax.eval_shape(tx.init, params)
    return (
        sum(leaf.size for leaf in jax.tree.leaves(params)),
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
    )


def costs(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Times a step of every optimizer, a few in turn with AdamW.

    Not all at once: measured so, of fifty programs in one process, three took 1.5 times AdamW's
    time that take as long as it beside a few others.
    """
    config = dataclasses.replace(MODEL, vocabulary_size=VOCABULARY)
    others = [name for name in settings["rows"] if name != FIRST]
    found: dict[str, dict[str, Any]] = {}
    base = []
    for first in range(0, len(others), settings["at once"]):
        few = others[first : first + settings["at once"]]
        pairs = {n: (settings_at(n, rates_of(n)[0], 0), config) for n in (FIRST, *few)}
        taken = step_times(pairs, settings["repeats"], FIRST)
        base.append(taken[FIRST]["seconds"])
        found |= taken
    seconds = statistics.median(base)  # one clock for all: the machine's pace wanders
    return {"steps": {n: {**each, "seconds": seconds * each["ratio"]} for n, each in found.items()}}


def render(results: Results) -> list[str]:
    """Returns the table, the lowest loss first."""
    named = [name for name in results.by_name if name != COSTS and results.by_name[name]]
    measured: Mapping[str, Any] = next(iter(results.by_name.get(COSTS, {}).values()), {})
    steps = measured.get("steps", {})
    target = float(np.mean(results.column(FIRST, "loss"))) if FIRST in named else math.nan
    order = sorted(named, key=lambda name: _last(results.column(name, "loss")))
    rows = [_row(results, name, target, steps) for name in order]
    names = [
        *("optimizer", "rate", "trials", "loss at the end", "bits per byte", "steps to AdamW's"),
        *("a step, ms", "seconds to AdamW's", "a step, to AdamW's", "faster to AdamW's loss"),
        *("state, bytes a parameter", "ended"),
    ]
    return [
        " ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        "",
        "In bold what the mission names. A rate with an arrow is the lowest or highest of those "
        "tried, so that a better one may lie beyond it. `train.optimizers.from_optax.LEFT_OUT` "
        "says what of Optax is not here, and why.",
        "",
        *grid(names, rows, "lrrrrrrrrrrl"),
    ]


def _last(losses: Sequence[float]) -> tuple[bool, float]:
    """Sorts by the mean, what diverged at the end."""
    mean = float(np.mean(losses))
    return math.isnan(mean), mean


def _row(
    results: Results, name: str, target: float, steps: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    seeds = results.by_name[name]
    values = next(iter(seeds.values()))
    reached = [crossing(each["evaluations"], target) for each in seeds.values()]
    if name == FIRST:
        reached = [STEPS] * len(reached)  # which the target is the mean end of
    there = sum(step is not None for step in reached)
    missed = f" ({there} of {len(reached)})" if there < len(reached) else ""
    more, less = ("> ", "< ") if missed else ("", "")
    taken = float(np.mean([STEPS if step is None else step for step in reached]))
    timed: Mapping[str, float] = steps.get(name, {})
    both = bool(there and timed)
    parameters = values["parameters"]
    return [
        f"**{name}**" if name in MISSION else name,
        _rate(values),
        str(len(values["tried"])),
        spread(results.column(name, "loss")),
        spread(results.column(name, "bits per byte")),
        f"{more}{taken:.0f}{missed}" if there else "not reached",
        f"{1e3 * timed['seconds']:.1f}" if timed else "",
        f"{more}{taken * timed['seconds']:.1f}" if both else "",
        f"{timed['ratio']:.2f}x" if timed else "",
        f"{less}{STEPS / (taken * timed['ratio']):.2f}x" if both else "",
        f"{values['state bytes'] / parameters:.1f}",
        ", ".join(sorted({each["reason"] for each in seeds.values()})),
    ]


def _rate(values: Mapping[str, Any]) -> str:
    rate, rates = values["rate"], [each for each, _ in values["tried"]]
    edge = " ↓" if rate == min(rates) else " ↑" if rate == max(rates) else ""
    return f"{rate:g}{edge}"


def picture(results: Results) -> Any:
    """Draws the losses, and what a step costs, the lowest loss on top."""
    from matplotlib.figure import Figure

    named = [name for name in results.by_name if name != COSTS and results.by_name[name]]
    losses = {name: results.column(name, "loss") for name in named}
    order = sorted(named, key=lambda name: _last(losses[name]), reverse=True)
    order = [name for name in order if math.isfinite(np.mean(losses[name]))]
    if not order:
        return None
    measured: Mapping[str, Any] = next(iter(results.by_name.get(COSTS, {}).values()), {})
    figure = Figure(figsize=(9, 1.5 + 0.18 * len(order)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    for place, name in enumerate(order):
        colour = "tab:red" if name in MISSION else "tab:blue"
        left.plot(losses[name], [place] * len(losses[name]), ".", color=colour)
        if ratio := measured.get("steps", {}).get(name, {}).get("ratio"):
            right.barh(place, ratio, color=colour, height=0.6)
    left.set_yticks(range(len(order)), order, fontsize=7)
    left.set(xlabel="validation loss at the end, a point a seed")
    right.set(xlabel="time of a step, to AdamW's")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def render_trials(results: Results) -> list[str]:
    """Returns the losses of all rates that were tried."""
    rows = []
    for name in NAMES:
        found = _losses(results, name)
        if any(found):
            cells = [f"{rate:g}: {loss}" for rate, loss in zip(rates_of(name), found, strict=True)]
            rows.append([name, *cells])
    about = (
        f"Validation loss at the end by each of the first five rates, seed {TUNING_SEED}; the "
        "chosen rates stand in the table above."
    )
    return [about, "", *grid(["optimizer", *"12345"], rows, "lrrrrr")]


def _losses(results: Results, name: str) -> Sequence[str]:
    found = []
    for rate in rates_of(name):
        values = results.by_name.get(f"{name} at {rate:g}", {})
        found.append("".join(f"{float(each['loss']):.3f}" for each in values.values()))
    return found


TABLES: tuple[Table, ...] = (
    Table("optimizers", "Optimizers at their own rates", cells, render, picture),
    Table("rates", "Rates that were tried", trial_cells, render_trials),
)
