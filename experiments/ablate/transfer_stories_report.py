"""What the finished runs of `experiments.ablate.transfer_stories` say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.ablate import transfer_stories as stories
from experiments.ablate.transfer_stories import (
    BEFORE,
    COSTS,
    EVERY,
    FULL,
    FULL_REPLAY,
    GROWN,
    GROWTH,
    LORA,
    LORA_REPLAY,
    SCRATCH,
)
from experiments.tables.margins import Claim, claims, margin
from experiments.tables.markdown import grid, spread
from experiments.tables.table import Results, Table

TUNED = (LORA, LORA_REPLAY, FULL, FULL_REPLAY)
DEEPER = (SCRATCH, GROWN, FULL)
_FORGOTTEN = ("stories", "token")
_NAMES = {FULL: "not grown (full)"}
TOLERANCE = 1e-4  # between the logits of a model and of what it grows into


def losses(results: Results, way: str, text: str, per: str, seeds: Sequence[int]) -> list[float]:
    """Returns the loss of a row on a text, "plays" or "stories", per "token" or "byte", by seed."""
    return [float(results.by_name[way][seed][text][per]) for seed in seeds]


def steps_to(curve: Sequence[Sequence[float]], target: float) -> float:
    """Returns the step of the first evaluation at or under the target; nan if none is.

    >>> steps_to([[25, 3.0], [50, 2.0], [75, 2.1]], 2.5), steps_to([[25, 3.0]], 2.5)
    (50, nan)
    """
    return next((step for step, loss in curve if loss <= target), math.nan)


def render(results: Results) -> list[str]:
    """Returns what each way learns of the plays and forgets of the stories."""
    parts = [" ".join(part.split()) for part in (stories.__doc__ or "").split("\n\n")]
    rows = []
    for way in (BEFORE, *TUNED):
        seeds = sorted(results.by_name.get(way, {}))
        if not seeds:
            continue
        both = results.shared(BEFORE, way)
        after, before = (losses(results, name, *_FORGOTTEN, both) for name in (way, BEFORE))
        rises = [a - b for a, b in zip(after, before, strict=True)]
        first = results.by_name[way][seeds[0]]
        trained = first.get("trained_parameters")
        rows.append(
            [
                way,
                "" if trained is None else f"{trained:,}",
                *(
                    spread(losses(results, way, text, per, seeds))
                    for text in ("plays", "stories")
                    for per in ("token", "byte")
                ),
                "" if way == BEFORE else spread(rises),
            ]
        )
    names = [
        *("way", "parameters that train"),
        *(f"{text}, nats a {per}" for text in ("plays", "stories") for per in ("token", "byte")),
        "stories forgotten, nats a token",
    ]
    lines = [parts[1], "", *grid(names, rows, "l" + "r" * (len(names) - 1))]
    expected = [
        _claim(results, "stories", way, replayed, "forgets more")
        for way, replayed in ((LORA, LORA_REPLAY), (FULL, FULL_REPLAY))
    ]
    expected.append(_claim(results, "stories", FULL, LORA, "forgets more"))
    expected += [
        _claim(results, "plays", replayed, way, "learns less")
        for way, replayed in ((LORA, LORA_REPLAY), (FULL, FULL_REPLAY))
    ]
    expected.append(_claim(results, "plays", LORA, FULL, "learns less"))
    if found := [claim for claim in expected if claim is not None]:
        lines += ["", "In nats a token, by seed:", "", *claims(found)]
    if measured := _one(results, COSTS):
        ratio = measured[LORA]["ratio"]
        lines += ["", f"A step of {LORA} takes {ratio:.2f} times as long as one of all parameters."]
    return lines


def _claim(results: Results, text: str, above: str, below: str, what: str) -> Claim | None:
    if not (seeds := results.shared(above, below)):
        return None
    high, low = (losses(results, way, text, "token", seeds) for way in (above, below))
    return Claim((f"{above} {what}: loss on {text}", high), (below, low))


def render_growth(results: Results) -> list[str]:
    """Returns whether growth kept the logits, and how soon it is where scratch ends."""
    lines = [
        "The model grows to twice its layers and goes on with the plays, beside as many layers of "
        f"the same kind from drawn parameters, for {stories.STEPS} steps each. The target is the "
        "validation loss that the run from scratch of the same seed ends at, looked for every "
        f"{EVERY} steps; the first evaluation at or under it counts, so that a ratio is at "
        "least what stands here. Seconds are those steps times the median seconds of one, measured "
        "apart, in turn.",
        "",
    ]
    if kept := _one(results, GROWTH):
        difference = kept["greatest difference"]
        word = "within" if difference <= TOLERANCE else "NOT within"
        old, new = kept["parameters"]
        lines += [
            f"Growth from {old:,} to {new:,} parameters: logits on the held-out plays differ by at "
            f"most {difference:.1e} (the greatest is {kept['greatest logit']:.1f}), {word} "
            f"{TOLERANCE:g}.",
            "",
        ]
    measured = _one(results, COSTS)
    rows = []
    for way in DEEPER:
        seeds = results.shared(way, SCRATCH)
        if not seeds:
            continue
        steps = [_steps(results, way, seed) for seed in seeds]
        reached = [step for step in steps if not math.isnan(step)]
        own = sorted(results.by_name[way])
        seconds, ratio = "", ""
        if measured is not None:
            times = {seed: _seconds(results, way, seed) for seed in seeds}
            there = [seed for seed in seeds if not math.isnan(times[seed])]
            seconds = spread([times[seed] for seed in there], 1)
            ratio = spread([_seconds(results, SCRATCH, n) / times[n] for n in there], 1)
        rows.append(
            [
                _NAMES.get(way, way),
                type(stories.WAYS[way].optimizer).__name__,
                f"{results.by_name[way][own[0]]['trained_parameters']:,}",
                *(spread(losses(results, way, "plays", per, own)) for per in ("token", "byte")),
                spread(reached, 0),
                f"{len(reached)} of {len(steps)}",
                seconds,
                ratio,
            ]
        )
    names = [
        *("way", "optimizer", "parameters", "plays at the end, nats a token", "nats a byte"),
        *("steps to the target", "seeds that reach it", "seconds to it", "times sooner"),
    ]
    lines += grid(names, rows, "ll" + "r" * (len(names) - 2))
    for way, other in ((GROWN, SCRATCH), (GROWN, FULL)):
        if seeds := results.shared(way, other):
            found = margin(*(losses(results, one, "plays", "token", seeds) for one in (way, other)))
            lines += [
                "",
                f"* {way.capitalize()} against {_NAMES.get(other, other)}: "
                f"{found.difference:+.3f} nats a token at the end, in standard errors "
                f"{found.text}.",
            ]
    return lines


def times_sooner(results: Results) -> list[float]:
    """Returns how many times sooner the grown model is where scratch ends, by seed; nan for never.

    Empty while steps have not been timed.
    """
    seeds = results.shared(SCRATCH, GROWN) if _one(results, COSTS) is not None else []
    return [_seconds(results, SCRATCH, n) / _seconds(results, GROWN, n) for n in seeds]


def _steps(results: Results, way: str, seed: int) -> float:
    """Steps to where the run from scratch of that seed ends."""
    target = float(results.by_name[SCRATCH][seed]["curve"][-1][1])
    return steps_to(results.by_name[way][seed]["curve"], target)


def _seconds(results: Results, way: str, seed: int) -> float:
    measured = _one(results, COSTS)
    assert measured is not None
    return _steps(results, way, seed) * float(measured[way]["seconds"])


def _one(results: Results, name: str) -> Mapping[str, Any] | None:
    return next(iter(results.by_name.get(name, {}).values()), None)


def picture(results: Results) -> Any:
    """Draws the loss on stories against that on plays, a mark a seed."""
    from matplotlib.figure import Figure

    if not any(results.by_name.get(way) for way in TUNED):
        return None
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, way in enumerate((BEFORE, *TUNED)):
        if seeds := sorted(results.by_name.get(way, {})):
            texts = (losses(results, way, text, "token", seeds) for text in ("plays", "stories"))
            mark = "k*" if way == BEFORE else f"C{(number - 1) // 2}{'o^'[(number - 1) % 2]}"
            axes.plot(*texts, mark, label=way, markersize=6, alpha=0.8)
    axes.set(xlabel="loss on plays, nats a token", ylabel="loss on stories, nats a token")
    _finish(axes)
    return figure


def picture_growth(results: Results) -> Any:
    """Draws the validation loss against steps, a line a seed."""
    from matplotlib.figure import Figure

    if not any(results.by_name.get(way) for way in (SCRATCH, GROWN)):
        return None
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for colour, way in zip(("tab:grey", "tab:orange", "tab:blue"), DEEPER, strict=True):
        for number, values in enumerate(results.by_name.get(way, {}).values()):
            label = None if number else _NAMES.get(way, way)
            axes.plot(*zip(*values["curve"], strict=True), color=colour, label=label, linewidth=1)
    axes.set(xlabel="step", ylabel="validation loss on plays, nats a token")
    _finish(axes)
    return figure


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)


TABLES: tuple[Table, ...] = (
    Table(
        "stories",
        "A model of stories learns plays: forgetting and replay",
        stories.cells,
        render,
        picture,
        stories.missing,
    ),
    Table(
        "stories-growth",
        "A model of stories grows to twice its depth",
        stories.cells,
        render_growth,
        picture_growth,
        stories.missing,
    ),
)
