"""A rate tuned at one width, at others: as it is, and carried over by muP.

The modern block, 2 layers deep, 64 to 512 wide with heads 32 wide, over 200 steps of 16 x 64 tokens
under AdamW, rates a factor of two apart. "Standard" takes rate and initial scales as they are;
"muP" carries them over from width 128 (`train.mup`), so that there both are one run. What shall
hold is that the best rate stays where it is: within a factor of two over the widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.grid import Cell
from experiments.tables.markdown import grid
from experiments.tables.table import Item, Request, Results, Table
from model.presets import modern
from train.loop import LoopSettings
from train.mup import MuP
from train.optimizers import AdamW
from train.schedules import Linear
from train.settings import Phase, Settings

WIDTHS = (64, 128, 256, 512)
TUNED, WIDE = 128, 512  # what is claimed: a rate tuned at the one, muP's base, holds at the other
RATES = tuple(2.0**n for n in range(-11, -3))  # 0.0005 to 0.063
STEPS = 200
DATA: tuple[str, ...] = ("stdlib",)
TOKENIZER = "sentencepiece:512"
ROWS, LENGTH, HEAD = 16, 64, 32
WAYS = ("standard", "muP")


def settings_at(width: int, rate: float, way: str, seed: int) -> Settings:
    """Returns the run of a width at a peak rate.

    QK-norm and the soft-cap would hide what a wrong scale does, so both are off; so is the zero
    start of the last kernel of a branch, which muP scales.
    """
    model = modern(
        layers=2,
        width=width,
        heads=width // HEAD,
        max_length=LENGTH,
        qk_norm=False,
        logit_softcap=None,
        zero_init_projections=False,
    )
    return Settings(
        phases=(Phase(STEPS, model, ROWS, LENGTH),),
        data=DATA,
        tokenizer=TOKENIZER,
        seed=seed,
        optimizer=AdamW(learning_rate=rate, weight_decay=0.0),
        schedule=Linear(),
        mup=MuP(base_width=TUNED) if way == "muP" else None,
    )


def cells(request: Request) -> list[Item]:
    """Returns a run for every width, rate and way."""
    loop = LoopSettings(log_every=STEPS, checkpoint_every=STEPS)
    return [
        Cell(_name(way, width, rate), settings_at(width, rate, way, seed), loop)
        for seed in range(request.seeds)
        for way in WAYS
        for width in WIDTHS
        for rate in RATES
    ]


def best_rate(losses: Mapping[float, float]) -> float:
    """Returns the rate at the bottom of the parabola through the best one and its neighbours.

    In log(rate); the best rate itself at an edge of those tried, or beside a run that diverged.

    >>> round(best_rate({1.0: 3.0, 2.0: 2.0, 4.0: 3.0}), 6), best_rate({1.0: 2.0, 2.0: 3.0})
    (2.0, 1.0)
    """
    rates = sorted(rate for rate, loss in losses.items() if math.isfinite(loss))
    if not rates:
        return math.nan
    at = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if not 0 < at < len(rates) - 1:
        return rates[at]
    xs = [math.log(rates[i]) for i in (at - 1, at, at + 1)]
    a, b, _ = np.polyfit(xs, [losses[rates[i]] for i in (at - 1, at, at + 1)], 2)
    return float(math.exp(-b / (2 * a))) if a > 0 else rates[at]


def curves(results: Results, way: str) -> dict[int, dict[float, float]]:
    """Returns width -> rate -> mean loss at the end, for what is finished."""
    found: dict[int, dict[float, float]] = {}
    for width in WIDTHS:
        for rate in RATES:
            if losses := results.column(_name(way, width, rate), "loss"):
                found.setdefault(width, {})[rate] = float(np.mean(losses))
    return found


def loss_of_tuned(found: Mapping[int, Mapping[float, float]]) -> list[float]:
    """Returns by how much the best rate of width 128 ends above the best one at every width.

    >>> loss_of_tuned({128: {0.1: 2.0, 0.2: 3.0}, 512: {0.1: 2.5, 0.2: 2.25}})
    [0.0, 0.25]
    """
    tuned = found.get(TUNED, {})
    if not tuned:
        return []
    kept = min(tuned, key=lambda rate: _finite(tuned[rate]))
    return [
        losses[kept] - min(map(_finite, losses.values()))
        for losses in found.values()
        if kept in losses
    ]


def render(results: Results) -> list[str]:
    """Returns losses by rate, and how far the best rate wanders."""
    lines = [" ".join((__doc__ or "").split("\n\n", 1)[1].split())]
    summary = []
    for way in WAYS:
        found = curves(results, way)
        if not found:
            continue
        best = {width: best_rate(losses) for width, losses in found.items()}
        rows = [
            [str(width), *_losses(losses), f"{best[width]:.4f}"] for width, losses in found.items()
        ]
        names = ["width", *(f"{rate:.4f}" for rate in RATES), "best"]
        lines += ["", f"Loss at the end, {way}:", "", *grid(names, rows, "r" * len(names))]
        wander = max(best.values()) / min(best.values())
        lost = loss_of_tuned(found)
        carried = f"{best[WIDE] / best[TUNED]:.2f}x" if {TUNED, WIDE} <= set(best) else ""
        summary.append([way, f"{wander:.2f}x", carried, f"{max(lost):.3f}" if lost else ""])
    names = [
        *("way", "best rates lie within", f"best at {WIDE}, to that at {TUNED}"),
        f"lost at most by the best rate of width {TUNED}",
    ]
    return [*lines, "", *grid(names, summary, "lrrr")]


def picture(results: Results) -> Any:
    """Draws loss against rate for every width, a panel a way."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    if not any(curves(results, way) for way in WAYS):
        return None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, way in zip(figure.subplots(1, 2, sharey=True), WAYS, strict=True):
        for number, (width, losses) in enumerate(curves(results, way).items()):
            colour = colormaps["viridis"](number / len(WIDTHS))
            axes.plot(list(losses), list(losses.values()), ".-", color=colour, label=f"{width}")
            axes.axvline(best_rate(losses), color=colour, linewidth=0.6, linestyle=":")
        axes.set(xscale="log", xlabel="rate", title=way)
        axes.set_xticks(RATES, [f"{rate:.3g}" for rate in RATES], fontsize=7)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(title="width", fontsize=7, frameon=False)
    figure.axes[0].set(ylabel="validation loss at the end")
    return figure


def _losses(losses: Mapping[float, float]) -> list[str]:
    return [f"{losses[rate]:.3f}" if rate in losses else "" for rate in RATES]


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _name(way: str, width: int, rate: float) -> str:
    return f"{way}, width {width}, rate {rate:.4g}"


TABLES: tuple[Table, ...] = (
    Table("widths", "A rate carried over to other widths", cells, render, picture),
)
