"""What the settings of all optimizers share, and the ranges they are held to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import optax

from model.rules import match

BoolRules = tuple[tuple[str, bool], ...]
ScheduleOf = Callable[[float], optax.Schedule]
"""From a peak learning rate to the run's schedule with that peak."""

MATRICES: BoolRules = (("kernel|embedding", True),)
"""What decays by default: kernels and embeddings; no biases, norm scales or single numbers."""


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """What all optimizers share.

    Attributes:
      learning_rate: peak of the schedule.
      clip_norm: largest global norm of the gradient, above which it is scaled down to it; None
        leaves it alone and saves the pass over all gradients.
      learning_rate_rules: ``(regex, factor)`` pairs, first match wins, 1 otherwise: the rate of a
        parameter is ``factor`` times the scheduled one, weight decay included. May vary by layer.
      cautious: drop the elements of a step that go against the gradient (weight decay apart); see
        `train.optimizers.cautious.cautious`.
      tail_fraction: share of the run's updates, at its end, whose weights are averaged for the
        evaluation; see `train.optimizers.averaging`. None for no average.
    """

    learning_rate: float = 1e-3
    clip_norm: float | None = None
    learning_rate_rules: tuple[tuple[str, float], ...] = ()
    cautious: bool = False
    tail_fraction: float | None = None

    def __post_init__(self) -> None:
        _check(self)

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """The optimizer alone, its updates already times minus the learning rate."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class DecayingSettings(OptimizerSettings):
    """Settings with weight decay.

    Attributes:
      weight_decay: rate; decoupled unless the optimizer says otherwise, that is, each update also
        takes ``learning_rate * weight_decay`` of the weight itself (Loshchilov & Hutter,
        arXiv 1711.05101, as in PyTorch and Optax).
      decay_rules: ``(regex, whether it decays)`` pairs, first match wins, no decay otherwise.
      cautious_decay: decay only where it goes the way of the step; see
        `train.optimizers.cautious.cautious_decayed_weights`.
    """

    weight_decay: float = 0.0
    decay_rules: BoolRules = MATRICES
    cautious_decay: bool = False


def decay_mask(settings: DecayingSettings, weight_decay: float, params: Any) -> Any:
    """Tree of booleans: which parameters decay.

    None without weight decay: then the rules for it need not match anything.

    >>> import jax.numpy as jnp
    >>> params = {"head": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    >>> decay_mask(DecayingSettings(), 0.1, params)
    {'head': {'bias': False, 'kernel': True}}
    """
    return match(settings.decay_rules, params, default=False) if weight_decay else None


_POSITIVE = "a positive number", lambda x: 0.0 < x < math.inf
_NOT_NEGATIVE = "0 or a positive number", lambda x: 0.0 <= x < math.inf
_BELOW_ONE = "at least 0 and below 1", lambda x: 0.0 <= x < 1.0
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "learning_rate": _POSITIVE,
    "adam_learning_rate": _POSITIVE,
    "clip_norm": _POSITIVE,
    "consistent_rms": _POSITIVE,
    "decay_rate": _POSITIVE,
    "eps": _POSITIVE,
    "adam_eps": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_weight_decay": _NOT_NEGATIVE,
    "tail_fraction": ("above 0 and at most 1", lambda x: 0.0 < x <= 1.0),
    "shampoo_decay": _BELOW_ONE,
    "gamma": _NOT_NEGATIVE,
    "b1": _BELOW_ONE,
    "b2": _BELOW_ONE,
    "momentum": _BELOW_ONE,
    "momentum_start": _BELOW_ONE,
    "adam_b1": _BELOW_ONE,
    "adam_b2": _BELOW_ONE,
}


def _check(settings: OptimizerSettings) -> None:
    """ValueError for a setting out of range; None stands for "off" where it is allowed."""
    for field in dataclasses.fields(settings):
        name, value = field.name, getattr(settings, field.name)
        if value == field.default:  # an eps of 0 is the default of some
            continue
        if name in _RANGES and value is not None and not _RANGES[name][1](value):
            kind = type(settings).__name__
            raise ValueError(f"{name} of {kind} must be {_RANGES[name][0]}, not {value}")
    for regex, factor in settings.learning_rate_rules:
        if not 0.0 <= factor < math.inf:
            raise ValueError(
                f"the learning-rate factor of {regex!r} must be 0 or a positive number, "
                f"not {factor}"
            )
