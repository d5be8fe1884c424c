"""Learning-rate schedules by name: typed settings that build an Optax schedule.

A schedule is a function of the step alone, traceable under jit. Steps count the updates made so
far: the first update uses ``schedule(0)`` and the last of a run ``schedule(total_steps - 1)``. No
update is wasted at a rate of zero:

* warmup over W steps gives ``peak * (step + 1) / (W + 1)``, and the full ``peak`` first at step W;
* a decay ends at ``schedule(total_steps)``, one step after the last update, and stays there.

``final_fraction`` is the part of the peak that is left at that point.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, Protocol

import jax.numpy as jnp
import optax


class ScheduleSettings(Protocol):
    """What every schedule's settings offer."""

    def build(self, peak: float, total_steps: int) -> optax.Schedule:
        """The schedule: step (int, or a traced scalar) -> learning rate (float32 scalar)."""


@dataclasses.dataclass(frozen=True)
class Constant:
    """The peak throughout.

    >>> float(Constant().build(0.5, 10)(3))
    0.5
    """

    warmup_steps: int = 0

    def build(self, peak: float, total_steps: int) -> optax.Schedule:
        """See `ScheduleSettings.build`; ValueError for settings that do not fit the run."""
        _check(total_steps, self.warmup_steps)
        return _after_warmup(self.warmup_steps, peak, optax.constant_schedule(peak))


@dataclasses.dataclass(frozen=True)
class Linear:
    """Straight down from the peak to ``final_fraction`` of it at the end of the run.

    Down to zero beat a cosine to a tenth at equal compute (Bergsma et al., arXiv 2502.15938).

    >>> schedule = Linear(warmup_steps=1).build(1.0, 5)
    >>> [float(schedule(step)) for step in range(6)]
    [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    warmup_steps: int = 0
    final_fraction: float = 0.0

    def build(self, peak: float, total_steps: int) -> optax.Schedule:
        """See `ScheduleSettings.build`; ValueError for settings that do not fit the run."""
        _check(total_steps, self.warmup_steps, self.final_fraction)
        steps = total_steps - self.warmup_steps
        decay = optax.linear_schedule(peak, self.final_fraction * peak, steps)
        return _after_warmup(self.warmup_steps, peak, decay)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Half a cosine from the peak to ``final_fraction`` of it (Loshchilov & Hutter, 1608.03983).

    >>> schedule = Cosine(final_fraction=0.1).build(1.0, 100)
    >>> [round(float(schedule(step)), 3) for step in (0, 50, 100)]
    [1.0, 0.55, 0.1]
    """

    warmup_steps: int = 0
    final_fraction: float = 0.0

    def build(self, peak: float, total_steps: int) -> optax.Schedule:
        """See `ScheduleSettings.build`; ValueError for settings that do not fit the run."""
        _check(total_steps, self.warmup_steps, self.final_fraction)
        steps = total_steps - self.warmup_steps
        decay = optax.cosine_decay_schedule(peak, steps, alpha=self.final_fraction)
        return _after_warmup(self.warmup_steps, peak, decay)


@dataclasses.dataclass(frozen=True)
class InverseSqrt:
    """``peak * sqrt(timescale / (timescale + t))``, t counted from the end of the warmup.

    With ``timescale`` equal to the warmup this is Vaswani et al.'s rate (arXiv 1706.03762), which
    knows no end of the run. ``None`` takes the warmup, or a tenth of the run if there is none.

    >>> schedule = InverseSqrt(warmup_steps=100).build(1.0, 10_000)
    >>> [round(float(schedule(step)), 3) for step in (100, 400, 10_000)]
    [1.0, 0.5, 0.1]
    """

    warmup_steps: int = 0
    timescale: int | None = None

    def build(self, peak: float, total_steps: int) -> optax.Schedule:
        """See `ScheduleSettings.build`; ValueError for settings that do not fit the run."""
        _check(total_steps, self.warmup_steps)
        timescale = self.timescale
        if timescale is None:
            # Without a warmup to set the scale: 1 / sqrt(11) = 0.3 of the peak is left at the end.
            timescale = self.warmup_steps or max(1, total_steps // 10)
        if timescale < 1:
            raise ValueError(f"timescale must be at least 1 step, not {timescale}")
        return _after_warmup(
            self.warmup_steps, peak, lambda t: peak * (timescale / (timescale + t)) ** 0.5
        )


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay:
    """The peak, then down to ``final_fraction`` of it over the last ``decay_fraction`` of the run.

    Hu et al., arXiv 2404.06395; Hagele et al., 2405.18392. The default ``decay_fraction`` is what
    tuning chose for Muon at 130M parameters, where 0.2 cost 0.05 nats (Wen et al., 2509.02046).

    >>> schedule = WarmupStableDecay(decay_fraction=0.5).build(1.0, 8)
    >>> [float(schedule(step)) for step in range(9)]
    [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    warmup_steps: int = 0
    decay_fraction: float = 0.8
    final_fraction: float = 0.0
    decay_shape: Literal["linear", "cosine"] = "linear"

    def build(self, peak: float, total_steps: int) -> optax.Schedule:
        """See `ScheduleSettings.build`; ValueError for settings that do not fit the run."""
        _check(total_steps, self.warmup_steps, self.final_fraction)
        if not 0.0 < self.decay_fraction <= 1.0:
            raise ValueError(
                f"decay_fraction must lie in (0, 1], not {self.decay_fraction}; without a decay "
                "use the schedule 'constant'"
            )
        decay_steps = max(1, round(self.decay_fraction * total_steps))
        stable_steps = total_steps - self.warmup_steps - decay_steps
        if stable_steps < 0:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} and a decay over {decay_steps} steps "
                f"(decay_fraction {self.decay_fraction}) do not fit into {total_steps} steps; "
                "lower one of them"
            )
        if self.decay_shape == "linear":
            decay = optax.linear_schedule(peak, self.final_fraction * peak, decay_steps)
        elif self.decay_shape == "cosine":
            decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=self.final_fraction)
        else:
            raise ValueError(f"decay_shape must be 'linear' or 'cosine', not {self.decay_shape!r}")
        stable_then_decay = optax.join_schedules(
            [optax.constant_schedule(peak), decay], [stable_steps]
        )
        return _after_warmup(self.warmup_steps, peak, stable_then_decay)


@dataclasses.dataclass(frozen=True)
class InverseTime:
    """``peak / (1 + decay * t)``, t counted from the end of the warmup: the classic one of SGD.

    Robbins & Monro (1951) ask of a rate that its sum diverges and the sum of its squares does not,
    and this one does both. The default halves the rate after 1,000 steps.

    >>> schedule = InverseTime(decay=0.5).build(1.0, 10)
    >>> [float(schedule(step)) for step in (0, 2, 6)]
    [1.0, 0.5, 0.25]
    """

    warmup_steps: int = 0
    decay: float = 1e-3

    def build(self, peak: float, total_steps: int) -> optax.Schedule:
        """See `ScheduleSettings.build`; ValueError for settings that do not fit the run."""
        _check(total_steps, self.warmup_steps)
        if not (self.decay >= 0.0 and math.isfinite(self.decay)):
            raise ValueError(f"decay must be 0 or a positive number per step, not {self.decay}")
        return _after_warmup(self.warmup_steps, peak, lambda t: peak / (1.0 + self.decay * t))


SCHEDULES: dict[str, type[Any]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "inverse_sqrt": InverseSqrt,
    "warmup_stable_decay": WarmupStableDecay,
    "inverse_time": InverseTime,
}
"""Settings class of each schedule, by the name that a command line uses."""


def schedule_named(name: str) -> type[Any]:
    """The settings class of a schedule.

    Raises:
      ValueError: the name is unknown; the message lists those that there are.

    >>> schedule_named("cosine")(warmup_steps=10)
    Cosine(warmup_steps=10, final_fraction=0.0)
    """
    if name not in SCHEDULES:
        raise ValueError(f"no schedule {name!r}; the schedules are {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def _check(total_steps: int, warmup_steps: int, final_fraction: float = 0.0) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, not {total_steps}")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps must lie between 0 and total_steps - 1 = {total_steps - 1}, so that the "
            f"peak is reached, not {warmup_steps}"
        )
    if not 0.0 <= final_fraction <= 1.0:
        raise ValueError(f"final_fraction must lie between 0 and 1, not {final_fraction}")


def _after_warmup(warmup_steps: int, peak: float, after: optax.Schedule) -> optax.Schedule:
    """Linear warmup, then ``after``, which counts its steps from the end of the warmup."""
    if warmup_steps:
        warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
        # Both sides of the boundary are evaluated: kept from negative steps, neither can be NaN.
        after_warmup = optax.join_schedules(
            [warmup, lambda t: after(jnp.maximum(t, 0.0))], [warmup_steps]
        )
    else:
        after_warmup = after

    def schedule(step):
        # Float steps, exact to 2**24, so that the schedule also holds under strict promotion.
        return jnp.asarray(after_warmup(jnp.asarray(step, jnp.float32)), jnp.float32)

    return schedule
