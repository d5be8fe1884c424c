"""When to prune and how far: pure functions of the step, traced.

A schedule says at which steps masks are computed anew, and which sparsity they have after it. The
final sparsity is an argument, because rules give every parameter its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Schedule:
    """What pruning follows.

    Attributes:
      due: `step -> bool`, whether masks are computed at the end of this step.
      sparsity: `(step, final) -> float32`, like `final`: the share of zeros from then on.
      last: the last step that is due; from then on the sparsity is the final one.
    """

    due: Callable[[jax.Array], jax.Array]
    sparsity: Callable[[jax.Array, jax.Array], jax.Array]
    last: int


def one_shot(at: int) -> Schedule:
    """Everything at once at step `at`, and the same masks ever after.

    Raises:
      ValueError: a negative step.

    >>> schedule = one_shot(10)
    >>> [float(schedule.sparsity(jnp.int32(t), jnp.float32(0.5))) for t in (9, 10, 11)]
    [0.0, 0.5, 0.5]
    """
    _at_least("at", at, 0)

    def sparsity(step: jax.Array, final: jax.Array) -> jax.Array:
        return jnp.where(step >= at, final, jnp.zeros_like(final))

    return Schedule(lambda step: step == at, sparsity, at)


def cubic(start: int, every: int, times: int, initial: float = 0.0) -> Schedule:
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3, fast at first and slow at the end.

    For t = t_0, t_0 + dt, ..., t_0 + n dt, and constant between (Zhu & Gupta 2017,
    arXiv:1710.01878). Nothing is pruned before t_0.

    Args:
      start: t_0.
      every: dt, steps between masks.
      times: n; after `start` masks are computed so many times more.
      initial: s_i, the sparsity at t_0.

    Raises:
      ValueError: a negative start or initial sparsity, a sparsity of 1, or `every` or `times`
        below 1.

    >>> schedule = cubic(start=0, every=10, times=2)
    >>> [round(float(schedule.sparsity(jnp.int32(t), jnp.float32(0.8))), 4) for t in (9, 10, 20)]
    [0.0, 0.7, 0.8]
    """
    _at_least("start", start, 0)
    _at_least("every", every, 1)
    _at_least("times", times, 1)
    if not 0 <= initial < 1:
        raise ValueError(f"initial is {initial}; it is the share of zeros, 0 <= initial < 1")

    def sparsity(step: jax.Array, final: jax.Array) -> jax.Array:
        left = 1 - _round(step, start, every, times).astype(jnp.float32) / times
        # A parameter that ends denser than the others start is pruned once, and never regrown.
        first = jnp.minimum(jnp.float32(initial), final)
        value = final + (first - final) * left**3
        return jnp.where(step >= start, value, jnp.zeros_like(final))

    return Schedule(_due(start, every, times), sparsity, start + every * times)


def iterative(start: int, every: int, rounds: int) -> Schedule:
    """s_k = 1 - (1 - s_f)^(k / n): each round takes the same share of what is left.

    The schedule of lottery tickets (Frankle & Carbin 2019, arXiv:1803.03635), which train between
    rounds and rewind.

    Args:
      start: step of the first round, k = 1.
      every: steps between rounds.
      rounds: n.

    Raises:
      ValueError: a negative start, or `every` or `rounds` below 1.

    >>> schedule = iterative(start=5, every=5, rounds=2)
    >>> [round(float(schedule.sparsity(jnp.int32(t), jnp.float32(0.75))), 4) for t in (4, 5, 10)]
    [0.0, 0.5, 0.75]
    """
    _at_least("start", start, 0)
    _at_least("every", every, 1)
    _at_least("rounds", rounds, 1)

    def sparsity(step: jax.Array, final: jax.Array) -> jax.Array:
        done = 1 + _round(step, start, every, rounds - 1)
        value = 1 - (1 - final) ** (done.astype(jnp.float32) / rounds)
        value = jnp.where(done == rounds, final, value)  # to the last bit
        return jnp.where(step >= start, value, jnp.zeros_like(final))

    return Schedule(_due(start, every, rounds - 1), sparsity, start + every * (rounds - 1))


@dataclass(frozen=True)
class Rewiring:
    """When a sparse network changes places, and how many.

    Attributes:
      every: steps between changes.
      until: no change at this step or later.
      share: of the kept weights that move at step 0; it falls to 0 by half a cosine,
        `share / 2 * (1 + cos(pi t / until))` (Evci et al. 2020, arXiv:1911.11134, with 0.3 and
        `until` at three quarters of training).

    Raises:
      ValueError: `every` below 1, `until` below 0, or a share outside of 0 to 1.

    >>> rewiring = Rewiring(every=10, until=100)
    >>> [bool(rewiring.due(jnp.int32(t))) for t in (0, 5, 10, 100)]
    [False, False, True, False]
    >>> round(float(rewiring.fraction(jnp.int32(50))), 4)
    0.15
    """

    every: int = 100
    until: int = 1000
    share: float = 0.3

    def __post_init__(self) -> None:
        _at_least("every", self.every, 1)
        _at_least("until", self.until, 0)
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share}; it must lie between 0 and 1")

    def due(self, step: jax.Array) -> jax.Array:
        """Whether places change at the end of this step; never at step 0, where all are new."""
        return (step > 0) & (step % self.every == 0) & (step < self.until)

    def fraction(self, step: jax.Array) -> jax.Array:
        """The share of the kept weights that changes places at this step."""
        turn = jnp.cos(jnp.pi * step.astype(jnp.float32) / max(self.until, 1))
        return jnp.float32(self.share / 2) * (1 + turn)


def fixed() -> Schedule:
    """Never: masks that were chosen at the start and stay.

    >>> bool(fixed().due(jnp.int32(3)))
    False
    """
    return dataclasses.replace(one_shot(0), due=lambda step: jnp.zeros_like(step, bool))


def _round(step: jax.Array, start: int, every: int, times: int) -> jax.Array:
    """How many times masks were computed anew after the first."""
    return jnp.clip((step - start) // every, 0, times)


def _due(start: int, every: int, times: int) -> Callable[[jax.Array], jax.Array]:
    def due(step: jax.Array) -> jax.Array:
        after = step - start
        return (after >= 0) & (after % every == 0) & (after <= every * times)

    return due


def _at_least(name: str, value: int, least: int) -> None:
    if not math.isfinite(value) or value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
