"""Compression for faster training: steps and seconds to the dense model's loss.

Every row trains the demo's model at a constant rate on the same batches. The dense run's steps were
fixed first, and its loss at their end (the mean over seeds) is the target; others may take half as
many steps again. Where a curve passes a target between two evaluations, the step is read off the
line between them. Seconds are those steps times the seconds of one, which are measured apart, all
rows in turn in one process: the runs themselves share the machine with other work. What is no step
of the row (a teacher's training, its cache, calibration to shrink by) is stated apart and in the
total.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.ablate.compress_costs import costs
from experiments.ablate.compress_students import WINDOWS, folder_of, student
from experiments.grid import Cell, Measurement
from experiments.methods.compression import LowPrecision, Rewire
from experiments.methods.distill import Distil
from experiments.methods.distill_cached import DistilCached
from experiments.methods.lowrank import LowRankKernels
from experiments.recipes import DEMO, recommended
from experiments.tables.markdown import grid
from experiments.tables.table import Item, Request, Results, Table
from train.loop import LoopSettings
from train.optimizers import Muon
from train.schedules import Constant
from train.settings import Settings, essential

# The default rates, of Muon: FEW_STEPS were chosen for a rate that falls to zero.
SIZE = dataclasses.replace(DEMO, optimizer=Muon())
STEPS = 240  # of the dense run
MOST = 360  # of any other
EVERY = 30
TEACHER_STEPS = 120
SHRINK_AT = 120
REPEATS = 12
EARLIER = (STEPS // 2, 3 * STEPS // 4)  # whose losses are further targets
SHRINK = "half of the neurons, by activation"
LOOP = LoopSettings(log_every=30, evaluate_every=EVERY)

DENSE = "dense"
SHRUNK = "progressive shrinking"
BEFORE_SHRINKING = "dense until it shrinks"
TEACHER = "smaller teacher"
ONLINE, CACHED = "taught by it, online", "taught by it, cached"
PLAIN: dict[str, Any] = {
    "low rank from the start, half of the weights": LowRankKernels(share=0.5),
    "RigL, half of the weights": Rewire(sparsity=0.5, every=20, until=STEPS),
    "int8 products, forward and input gradient": LowPrecision(),
}
ROWS = (DENSE, SHRUNK, *PLAIN, ONLINE, CACHED)
COSTS = "costs of a step"
# Equal weights, as the student outgrows its teacher; no temperature.
TAUGHT: dict[str, Any] = {"hard": (0.5,), "soft": (0.5,)}


def dense_settings(seed: int, steps: int) -> Settings:
    """Returns the settings of the dense run, for so many steps."""
    return dataclasses.replace(recommended(SIZE, steps, seed), schedule=Constant())


def _with_model(settings: Settings, **changes: Any) -> Settings:
    (phase,) = settings.phases
    model = dataclasses.replace(phase.model, **changes)
    return dataclasses.replace(settings, phases=(dataclasses.replace(phase, model=model),))


def _shrunk(seed: int, parent: str | None) -> Settings:
    settings = dense_settings(seed, MOST - SHRINK_AT)
    width = settings.phases[0].model.ffn_width_ // 2
    return dataclasses.replace(_with_model(settings, ffn_width=width), parent=parent)


def _teacher(seed: int) -> Settings:
    return _with_model(dense_settings(seed, TEACHER_STEPS), layers=SIZE.layers // 2)


def _taught(seed: int, name: str, teacher: str) -> Settings:
    kind: Any = Distil(teacher=teacher, temperature=(1.0,), **TAUGHT)
    if name == CACHED:
        kind = DistilCached(teacher=teacher, **TAUGHT)
    return dataclasses.replace(dense_settings(seed, MOST), methods=(kind,))


def cells(request: Request) -> list[Item]:
    """Returns all runs, and the measurement of what their steps cost."""
    items: list[Item] = []
    for seed in range(request.seeds):
        teacher = Cell(TEACHER, _teacher(seed), LOOP)
        before = Cell(BEFORE_SHRINKING, dense_settings(seed, SHRINK_AT), LOOP)
        made = student(request.cells, before, SHRINK)
        parent = str(folder_of(request.cells, made))
        items += [
            Cell(DENSE, dense_settings(seed, STEPS), LOOP),
            before,
            Cell(SHRUNK, _shrunk(seed, parent), LOOP, needs=(made,)),
            teacher,
        ]
        for name, method in PLAIN.items():
            settings = dataclasses.replace(dense_settings(seed, MOST), methods=(method,))
            items.append(Cell(name, settings, LOOP))
        for name in (ONLINE, CACHED):
            settings = _taught(seed, name, str(request.cells / teacher.key))
            items.append(Cell(name, settings, LOOP, needs=(teacher,)))
    run, timed = Cell("", _teacher(0), LOOP), timed_runs()
    measured = {
        "measured": "costs of a step",
        "run": run.key,
        "repeats": REPEATS,
        "steps": [STEPS, MOST],
        "windows": WINDOWS,
        "rows": {name: _told_apart(each) for name, each in timed.items()},
    }
    measure = functools.partial(costs, request.cells, timed, CACHED, DENSE)
    return [*items, Measurement(COSTS, measured, measure, needs=(run,))]


def _told_apart(settings: Settings) -> dict[str, Any]:
    # Methods with all their fields: one whose default changes is measured again.
    methods = [{"name": each.name, **dataclasses.asdict(each)} for each in settings.methods]
    return {"run": essential(settings), "methods": methods}


def timed_runs() -> dict[str, Settings]:
    """Returns the settings of every row whose step is timed; they name no folder."""
    runs = {
        DENSE: dense_settings(0, MOST),
        SHRUNK: _shrunk(0, None),
        TEACHER: _teacher(0),
        ONLINE: _taught(0, ONLINE, "teacher"),
        CACHED: _taught(0, CACHED, "teacher"),
    }
    for name, method in PLAIN.items():
        runs[name] = dataclasses.replace(dense_settings(0, MOST), methods=(method,))
    return runs


def crossing(evaluations: Sequence[Mapping[str, Any]], target: float) -> float | None:
    """Returns the step at which the line through the evaluations first meets a loss, or None.

    >>> crossing([{"step": 10, "loss": 4.0}, {"step": 20, "loss": 2.0}], 3.5)
    12.5
    """
    before: Mapping[str, Any] | None = None
    for row in evaluations:
        loss = float(row["loss"])
        if loss <= target:
            if before is None:
                return float(row["step"])
            high = float(before["loss"])
            share = (high - target) / (high - loss)
            return before["step"] + share * (row["step"] - before["step"])
        before = row
    return None


def curve(results: Results, name: str, seed: int) -> list[dict[str, Any]]:
    """Returns the evaluations of a row, those before it shrank among them."""
    rows = [dict(row) for row in results.by_name.get(name, {}).get(seed, {}).get("evaluations", [])]
    if name != SHRUNK or not rows:
        return rows
    first = results.by_name.get(BEFORE_SHRINKING, {}).get(seed, {}).get("evaluations", [])
    return [*first, *({**row, "step": row["step"] + SHRINK_AT} for row in rows)]


def seconds_to(step: float, name: str, costs: Mapping[str, Any]) -> float:
    """Returns the seconds of training up to a step, without what comes before the first."""
    own = costs["steps"][name]["seconds"] + (costs["look-up"] if name == CACHED else 0.0)
    if name != SHRUNK:
        return step * own
    return (
        min(step, SHRINK_AT) * costs["steps"][DENSE]["seconds"] + max(step - SHRINK_AT, 0.0) * own
    )


def besides(name: str, costs: Mapping[str, Any], step: float | None = None) -> float:
    """Returns the seconds that are no step of the row: a teacher's training, its cache, shrinking.

    Args:
      name: of the row.
      costs: as of `compress_costs.costs`.
      step: up to which; None for all.
    """
    if name == SHRUNK:
        return costs["shrink"] if step is None or step > SHRINK_AT else 0.0
    if name not in (ONLINE, CACHED):
        return 0.0
    taught = TEACHER_STEPS * costs["steps"][TEACHER]["seconds"]
    return taught + (MOST * costs["cache"] if name == CACHED else 0.0)


def render(results: Results) -> list[str]:
    """Returns the table for the target, and the ratios for earlier ones."""
    measured = next(iter(results.by_name.get(COSTS, {}).values()), None)
    seeds = sorted(results.by_name.get(DENSE, {}))
    if measured is None or not seeds:
        return []
    targets = {
        at: float(np.mean([_loss_at(curve(results, DENSE, seed), at) for seed in seeds]))
        for at in (*EARLIER, STEPS)
    }
    rows, later = [], []
    for name in ROWS:
        found = {at: _to(results, name, target, measured) for at, target in targets.items()}
        if not found[STEPS]["seeds"]:
            continue
        rows.append(_row(name, found[STEPS], measured))
        later.append([name, *(_ratio(found[at]["total ratios"], found[at]) for at in targets)])
    names = [
        "row",
        "step, to dense",
        "steps",
        "seconds",
        "faster",
        "besides, s",
        "faster in total",
    ]
    lines = [
        f"Target: {targets[STEPS]:.4f}, the dense run's mean loss after {STEPS} steps; others had "
        f"{MOST}. Means over the seeds that reached it; ratios are paired with the dense run of "
        "the seed, above 1 is faster.",
        "",
        *grid(names, rows, "lrrrrrr"),
        "",
        "In total, to the dense run's loss at earlier steps:",
        "",
    ]
    columns = [f"{target:.3f} (step {at})" for at, target in targets.items()]
    lines += grid(["row", *columns], later, "l" + "r" * len(columns))
    look_up, cache = measured["look-up"], measured["cache"]
    return [
        *lines,
        "",
        f"The smaller teacher has half of the layers and trained for {TEACHER_STEPS} steps. Its "
        f"cache takes {1000 * cache:.0f} ms a batch to write, {1000 * look_up:.1f} ms to look up. "
        f"Shrinking reads {WINDOWS} windows first. Compiling is in no row's seconds; what shrinks "
        "compiles twice.",
    ]


def _loss_at(rows: Sequence[Mapping[str, Any]], step: int) -> float:
    return float(next(row["loss"] for row in rows if row["step"] >= step))


def _to(results: Results, name: str, target: float, costs: Mapping[str, Any]) -> dict[str, Any]:
    """Where the seeds of a row meet a target, and how much faster than the dense run they are."""
    found: dict[str, Any] = {"steps": [], "ratios": [], "total ratios": [], "seeds": 0}
    for seed in results.shared(name, DENSE):
        found["seeds"] += 1
        dense = crossing(curve(results, DENSE, seed), target)
        ours = crossing(curve(results, name, seed), target)
        if dense is None:  # this seed of the dense run ends above the mean of all
            dense = float(STEPS)
        if ours is None:
            continue
        base, own = seconds_to(dense, DENSE, costs), seconds_to(ours, name, costs)
        found["steps"].append(ours)
        found["ratios"].append(base / own)
        found["total ratios"].append(base / (own + besides(name, costs, ours)))
    return found


def _row(name: str, found: Mapping[str, Any], costs: Mapping[str, Any]) -> list[str]:
    step = costs["steps"][name]
    first, last = step["quartiles"]
    cost = f"{step['ratio']:.2f}x ({first:.2f} to {last:.2f})"
    steps = float(np.mean(found["steps"])) if found["steps"] else None
    extra = besides(name, costs)
    return [
        name,
        cost,
        "not reached" if steps is None else f"{steps:.0f}",
        "" if steps is None else f"{seconds_to(steps, name, costs):.1f}",
        _ratio(found["ratios"], found),
        f"{extra:.1f}" if extra else "",
        _ratio(found["total ratios"], found),
    ]


def _ratio(ratios: Sequence[float], found: Mapping[str, Any]) -> str:
    if not ratios:
        return "not reached"
    text = f"{np.mean(ratios):.2f}x"
    if len(ratios) > 1:
        text += f" ± {np.std(ratios, ddof=1):.2f}"
    there = len(ratios)
    return text if there == found["seeds"] else f"{text} ({there} of {found['seeds']} seeds)"


def picture(results: Results) -> Any:
    """Draws the loss of every row by step, the first seed."""
    from matplotlib.figure import Figure

    if not results.by_name.get(DENSE):
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in ROWS:
        rows = curve(results, name, 0)
        if rows:
            losses = [float(row["loss"]) for row in rows]
            axes.plot([row["step"] for row in rows], losses, marker=".", label=name)
    axes.set(xlabel="step", ylabel="validation loss", yscale="log")
    axes.legend(fontsize=8)
    axes.grid(visible=True, which="both", alpha=0.3)
    return figure


TABLES: tuple[Table, ...] = (Table("training", "Training itself", cells, render, picture),)
