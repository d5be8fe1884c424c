"""Optimizers by name: typed settings, built from Optax.

Every one is assembled the same way, and takes and may ignore the extra arguments of the step::

    clip by global norm -> the optimizer, at its scheduled rate -> learning rates by rule

What depends on a parameter is chosen by rules over its path (`model.rules`), never by its number of
axes: stacked biases and norm scales are two-dimensional too. By default only kernels and embeddings
decay.

Steps count the updates made, so that an update that the step skipped does not move the schedule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from model.rules import match_per_layer
from train.muon import Muon
from train.optimizer_settings import DecayingSettings, OptimizerSettings, ScheduleOf, decay_mask
from train.per_layer import per_layer
from train.schedules import ScheduleSettings


@dataclasses.dataclass(frozen=True)
class SGD(DecayingSettings):
    """Stochastic gradient descent with momentum, ``m = momentum * m + g``, plain or Nesterov's.

    Weight decay is the classic coupled one: ``weight_decay * w`` is added to the gradient, after
    clipping, and so goes through the momentum.
    """

    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov has no effect without momentum; give momentum, e.g. 0.9")

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """See `OptimizerSettings.transformation`."""
        return optax.chain(
            optax.add_decayed_weights(
                self.weight_decay, decay_mask(self, self.weight_decay, params)
            ),
            optax.sgd(
                schedule_of(self.learning_rate),
                momentum=self.momentum or None,  # without momentum, no memory for it either
                nesterov=self.nesterov,
            ),
        )


@dataclasses.dataclass(frozen=True)
class Adam(OptimizerSettings):
    """Adam (Kingma & Ba, arXiv 1412.6980) with its own defaults. For weight decay use AdamW."""

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """See `OptimizerSettings.transformation`."""
        return optax.adam(schedule_of(self.learning_rate), b1=self.b1, b2=self.b2, eps=self.eps)


@dataclasses.dataclass(frozen=True)
class AdamW(DecayingSettings):
    """Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101).

    b2, weight decay and clipping are those that tuning chose for 130M parameters, where the best
    rate was 8e-3 at half a million tokens a step (Wen et al., arXiv 2509.02046); the default rate
    is lower because our batches are smaller.
    """

    learning_rate: float = 2e-3
    clip_norm: float | None = 1.0
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """See `OptimizerSettings.transformation`."""
        return _decoupled(optax.adamw, self, schedule_of, params, eps=self.eps)


@dataclasses.dataclass(frozen=True)
class Adamax(OptimizerSettings):
    """Adam with the largest gradient in place of the second moment (section 7 of 1412.6980)."""

    learning_rate: float = 2e-3  # the paper's
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """See `OptimizerSettings.transformation`."""
        return optax.adamax(schedule_of(self.learning_rate), b1=self.b1, b2=self.b2, eps=self.eps)


@dataclasses.dataclass(frozen=True)
class AdamaxW(AdamW):
    """Adamax with decoupled weight decay; rate, decay and clipping as in `AdamW`."""

    b2: float = 0.999

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """See `OptimizerSettings.transformation`."""
        return _decoupled(optax.adamaxw, self, schedule_of, params, eps=self.eps)


@dataclasses.dataclass(frozen=True)
class NAdamW(AdamW):
    """AdamW with Nesterov momentum (Dozat, 2016); b1 and b2 as tuned in arXiv 2509.02046."""

    b1: float = 0.95

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """See `OptimizerSettings.transformation`."""
        return _decoupled(optax.nadamw, self, schedule_of, params, eps=self.eps)


@dataclasses.dataclass(frozen=True)
class Lion(DecayingSettings):
    """The sign of an interpolated momentum (Chen et al., arXiv 2302.06675).

    Every element moves by the whole rate, hence a lower rate and a higher decay than AdamW's;
    the defaults are the tuned ones of arXiv 2509.02046.
    """

    learning_rate: float = 5e-4
    clip_norm: float | None = 1.0
    weight_decay: float = 0.6
    b1: float = 0.9
    b2: float = 0.98

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """See `OptimizerSettings.transformation`."""
        return _decoupled(optax.lion, self, schedule_of, params)


@dataclasses.dataclass(frozen=True)
class Adafactor(DecayingSettings):
    """Adam's second moment in factored form, and no first (Shazeer & Stern, arXiv 1804.04235).

    Each layer of a stacked leaf is factored and clipped by itself. Weight decay goes with the
    learning rate as in AdamW (``optax.adafactor`` by itself takes ``weight_decay`` of the weight at
    every step, whatever the rate).

    Attributes:
      decay_rate: the second moment's memory at update t is ``1 - t ** -decay_rate``.
      clipping_threshold: largest root mean square of a parameter's update before the rate; None
        for no clipping.
      min_dim_size_to_factor: matrices with a smaller side keep their whole second moment.
      multiply_by_parameter_scale: take the rate relative to the root mean square of the parameter
        (at least 1e-3), as the paper does. Off, unlike in Optax, so that the rate is a step size
        as everywhere else, and weights that start at zero leave it.
    """

    learning_rate: float = 2e-3
    decay_rate: float = 0.8
    clipping_threshold: float | None = 1.0
    min_dim_size_to_factor: int = 128
    multiply_by_parameter_scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clipping_threshold is not None and not self.clipping_threshold >= 1.0:
            raise ValueError(
                "clipping_threshold must be None or at least 1, the root mean square that updates "
                f"have by themselves, not {self.clipping_threshold}"
            )

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """See `OptimizerSettings.transformation`."""
        return optax.chain(
            per_layer(
                optax.adafactor(
                    learning_rate=None,
                    decay_rate=self.decay_rate,
                    clipping_threshold=self.clipping_threshold,
                    min_dim_size_to_factor=self.min_dim_size_to_factor,
                    multiply_by_parameter_scale=self.multiply_by_parameter_scale,
                )
            ),
            # Adafactor has already turned the sign, so the decay is subtracted.
            optax.add_decayed_weights(
                -self.weight_decay, decay_mask(self, self.weight_decay, params)
            ),
            optax.scale_by_learning_rate(schedule_of(self.learning_rate), flip_sign=False),
        )


OPTIMIZERS: dict[str, type[Any]] = {
    "sgd": SGD,
    "adam": Adam,
    "adamw": AdamW,
    "adamax": Adamax,
    "adamaxw": AdamaxW,
    "nadamw": NAdamW,
    "lion": Lion,
    "adafactor": Adafactor,
    "muon": Muon,
}
"""Settings class of each optimizer, by the name that a command line uses."""


def optimizer_named(name: str) -> type[Any]:
    """The settings class of an optimizer.

    Raises:
      ValueError: the name is unknown; the message lists those that there are.

    >>> optimizer_named("sgd")(momentum=0.0).momentum
    0.0
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimizer {name!r}; the optimizers are {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def build(
    settings: OptimizerSettings,
    schedule_settings: ScheduleSettings,
    total_steps: int,
    params_abstract: Any,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer for one phase of a run.

    Args:
      settings: of an optimizer, one of `OPTIMIZERS`.
      schedule_settings: of a schedule, one of ``train.schedules.SCHEDULES``.
      total_steps: updates that the schedule spans; those of the whole run, as the state's step
        count goes on from phase to phase.
      params_abstract: the parameters that train, or their shapes (``jax.eval_shape``).

    Returns:
      ``init(params)`` and ``update(grads, state, params, value=, grads=)``; the updates are to be
      added. The state is a plain pytree of arrays.

    Raises:
      ValueError: a rule that matches nothing, or settings that do not fit.

    >>> from train.schedules import Constant
    >>> params = {"head": {"kernel": jnp.ones((2, 3))}}
    >>> tx = build(AdamW(learning_rate=0.5, weight_decay=0.2), Constant(), 10, params)
    >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    >>> round(float(updates["head"]["kernel"][0, 0]), 3)  # no gradient, so only the decay
    -0.1
    """
    stages = []
    if settings.clip_norm is not None:
        stages.append(optax.clip_by_global_norm(settings.clip_norm))
    stages.append(
        settings.transformation(
            lambda peak: schedule_settings.build(peak, total_steps), params_abstract
        )
    )
    if settings.learning_rate_rules:
        factors = match_per_layer(settings.learning_rate_rules, params_abstract, default=1.0)
        stages.append(
            optax.stateless(lambda updates, params: jax.tree.map(_scaled, updates, factors))
        )
    return optax.with_extra_args_support(optax.chain(*stages))


def learning_rate_at(
    settings: OptimizerSettings, schedule_settings: ScheduleSettings, total_steps: int
) -> optax.Schedule:
    """The learning rate as a function of the updates made, for the log; jit knows it as well.

    It is the one before `learning_rate_rules`, and for Muon that of its own part; the AdamW part's
    is the same curve times ``adam_learning_rate / learning_rate``.

    >>> from train.schedules import Linear
    >>> float(learning_rate_at(Adam(learning_rate=1.0), Linear(), 10)(5))
    0.5
    """
    return schedule_settings.build(settings.learning_rate, total_steps)


def _decoupled(
    optimizer: Callable[..., optax.GradientTransformation],
    settings: Any,
    schedule_of: ScheduleOf,
    params: Any,
    **more: float,
) -> optax.GradientTransformation:
    """An optimizer of Optax with two moments and decoupled weight decay."""
    return optimizer(
        schedule_of(settings.learning_rate),
        b1=settings.b1,
        b2=settings.b2,
        weight_decay=settings.weight_decay,
        mask=decay_mask(settings, settings.weight_decay, params),
        **more,
    )


def _scaled(update: jax.Array, factor: float | tuple[float, ...]) -> jax.Array:
    """The update times its factor, or each layer times its own."""
    if isinstance(factor, tuple):
        by_layer = np.asarray(factor).reshape(-1, *[1] * (update.ndim - 1))
        return update * jnp.asarray(by_layer, update.dtype)
    return update * factor
