"""What is tried for the second baseline: AdamW on Hugging Face's GPT-2, every trial at one budget.

    python -m experiments.speedrun --scale cpu --tune torch-tuned

First every rate with every schedule; with the best of them every pair of betas; then every weight
decay. The budget is that of the baseline, fixed beforehand. Choices are made by the last loss on
the validation split; the test split is never opened. The trials lie in
experiments/results/speedrun-tuning-SCALE.json, and the grids in the Markdown beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.ladder.scales import Choices, Scale
from train.schedules import Cosine, Linear

# Around 2e-3, each about 1.7 times the one before it: the step that sees a factor of two.
RATES = (6e-4, 1e-3, 1.7e-3, 3e-3, 5e-3, 8e-3, 1.4e-2)
# The usual end of a cosine is a tenth of the peak, beside linear's zero.
SCHEDULES: Mapping[str, Any] = {"linear": Linear(), "cosine": Cosine(final_fraction=0.1)}
FIRST_MOMENTS = (0.8, 0.9, 0.95)
SECOND_MOMENTS = (0.95, 0.98, 0.999)
DECAYS = (0.0, 0.03, 0.1, 0.3, 1.0)


def rates_and_schedules(
    scale: Scale, rates: Sequence[float] = RATES, schedules: Mapping[str, Any] = SCHEDULES
) -> dict[str, Choices]:
    """Returns every rate with every schedule, by a title; all else as AdamW has it by default.

    Raises:
      ValueError: fewer than five rates or two schedules: too few to call the baseline tuned.

    >>> from experiments.ladder.scales import CPU
    >>> list(rates_and_schedules(CPU))[:2]
    ['linear 0.0006', 'linear 0.001']
    """
    if len(set(rates)) < 5 or len(schedules) < 2:
        raise ValueError(
            f"{len(set(rates))} rates and {len(schedules)} schedules do not tune a baseline; "
            "give at least 5 and 2"
        )
    plain = Choices().torch_adamw
    return {
        f"{name} {rate:g}": dataclasses.replace(
            scale.choices,
            torch_adamw=dataclasses.replace(plain, learning_rate=rate),
            torch_schedule=schedule,
        )
        for name, schedule in schedules.items()
        for rate in rates
    }


def betas(scale: Scale) -> dict[str, Choices]:
    """Returns every beta 1 with every beta 2, at the rate and schedule that were chosen."""
    return {
        f"b1 {b1:g}, b2 {b2:g}": _changed(scale, b1=b1, b2=b2)
        for b1 in FIRST_MOMENTS
        for b2 in SECOND_MOMENTS
    }


def decays(scale: Scale) -> dict[str, Choices]:
    """Returns every weight decay, with all that was chosen before."""
    return {f"decay {decay:g}": _changed(scale, weight_decay=decay) for decay in DECAYS}


def _changed(scale: Scale, **fields: Any) -> Choices:
    adamw = dataclasses.replace(scale.choices.torch_adamw, **fields)
    return dataclasses.replace(scale.choices, torch_adamw=adamw)
