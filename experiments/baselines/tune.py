"""What is tried for the second baseline: AdamW on Hugging Face's GPT-2, every trial at one budget.

    python -m experiments.speedrun --scale cpu --tune torch-tuned

First every rate with every schedule; with the best of them the batch sizes that our own recipe is
given, at that rate and at half of it, for as many seconds; then every pair of betas, every weight
decay, the warmup and the norm that gradients are clipped to; last the rate once more, a little
lower and higher, and a longer memory of squares, with all of these. The budget is that of the
baseline, fixed beforehand. Choices are made by the last loss on the validation split; the test
split is never opened. The trials lie in experiments/results/speedrun-tuning-SCALE.json, and the
grids in the Markdown beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.ladder.scales import Choices, Scale
from train.schedules import Cosine, Linear

# Around 3e-3, each twice the one before it.
RATES = (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2)
# The usual end of a cosine is a tenth of the peak, beside linear's zero.
SCHEDULES: Mapping[str, Any] = {"linear": Linear(), "cosine": Cosine(final_fraction=0.1)}
FIRST_MOMENTS = (0.7, 0.8, 0.9, 0.95)
SECOND_MOMENTS = (0.95, 0.98, 0.999)
# Share of the scale's batch, and factors on the rate. At the tuned rate the whole has run.
BATCHES = (*((share, (0.5, 1.0)) for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2)), (1.0, (1.0,)))
DECAYS = (0.0, 0.03, 0.1, 0.3, 1.0)
WARMUPS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4)
CLIPS = (0.25, 0.5, 1.0, 2.0, 4.0)
AGAIN = (0.5, 0.7, 1.0, 1.4)  # times the rate that was chosen first
LONGEST = 0.9995  # beyond the grid of second moments, whose highest is often the best


def rates_and_schedules(
    scale: Scale, rates: Sequence[float] = RATES, schedules: Mapping[str, Any] = SCHEDULES
) -> dict[str, Choices]:
    """Returns every rate with every schedule, by a title; all else as AdamW has it by default.

    Raises:
      ValueError: fewer than five rates or two schedules: too few to call the baseline tuned.

    >>> from experiments.ladder.scales import CPU
    >>> list(rates_and_schedules(CPU))[:2]
    ['linear 0.00075', 'linear 0.0015']
    """
    if len(set(rates)) < 5 or len(schedules) < 2:
        raise ValueError(
            f"{len(set(rates))} rates and {len(schedules)} schedules do not tune a baseline; "
            "give at least 5 and 2"
        )
    plain = Choices()
    return {
        f"{name} {rate:g}": dataclasses.replace(
            scale.choices,
            torch_adamw=dataclasses.replace(plain.torch_adamw, learning_rate=rate),
            torch_schedule=schedule,
            torch_warmup=plain.torch_warmup,
            torch_rows=None,
        )
        for name, schedule in schedules.items()
        for rate in rates
    }


def batches(scale: Scale) -> dict[str, Choices]:
    """Returns the batch sizes of `experiments.ladder.rungs`' own trials, for the baseline.

    From a sixteenth to a half of the scale's batch, each at the rate that was chosen and at half of
    it; and the whole one, which has run.

    >>> from experiments.ladder.scales import CPU
    >>> list(batches(CPU))[-1]
    '16 rows, rate 0.003'
    """
    rate = scale.choices.torch_adamw.learning_rate
    found = {}
    for factor, times in BATCHES:
        rows = max(1, round(scale.rows * factor))
        for each in times:
            choices = _changed(scale, learning_rate=rate * each)
            found[f"{rows} rows, rate {rate * each:g}"] = dataclasses.replace(
                choices, torch_rows=rows
            )
    return found


def with_rows(choices: Choices, rows: int) -> Choices:
    """Returns choices with so many rows in the baseline's batch."""
    return dataclasses.replace(choices, torch_rows=rows)


def betas(scale: Scale) -> dict[str, Choices]:
    """Returns every beta 1 with every beta 2, at the rate, schedule and batch that were chosen."""
    return {
        f"b1 {b1:g}, b2 {b2:g}": _changed(scale, b1=b1, b2=b2)
        for b1 in FIRST_MOMENTS
        for b2 in SECOND_MOMENTS
    }


def decays(scale: Scale) -> dict[str, Choices]:
    """Returns every weight decay, with all that was chosen before."""
    return {f"decay {decay:g}": _changed(scale, weight_decay=decay) for decay in DECAYS}


def warmups(scale: Scale) -> dict[str, Choices]:
    """Returns every share of the steps that the rate may rise over, with all that was chosen."""
    return {
        f"warmup {share:g}": dataclasses.replace(scale.choices, torch_warmup=share)
        for share in WARMUPS
    }


def clips(scale: Scale) -> dict[str, Choices]:
    """Returns every norm that gradients may be clipped to, with all that was chosen before."""
    return {f"clip {norm:g}": _changed(scale, clip_norm=norm) for norm in CLIPS}


def rates_again(scale: Scale) -> dict[str, Choices]:
    """Returns rates around the chosen one, with all that was chosen after it."""
    rate = scale.choices.torch_adamw.learning_rate
    return {f"rate x{times:g}": _changed(scale, learning_rate=times * rate) for times in AGAIN}


def second_moments_again(scale: Scale) -> dict[str, Choices]:
    """Returns a longer memory of squares beside the chosen one, at the end of all trials."""
    chosen = scale.choices.torch_adamw.b2
    return {f"b2 {b2:g}": _changed(scale, b2=b2) for b2 in sorted({chosen, LONGEST})}


def _changed(scale: Scale, **fields: Any) -> Choices:
    adamw = dataclasses.replace(scale.choices.torch_adamw, **fields)
    return dataclasses.replace(scale.choices, torch_adamw=adamw)
