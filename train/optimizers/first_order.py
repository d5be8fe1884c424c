"""The first-order optimizers that Optax has, with settings of their own."""

from __future__ import annotations

import dataclasses
from typing import Any

import optax

from train.optimizers.per_layer import per_layer
from train.optimizers.settings import DecayingSettings, OptimizerSettings, ScheduleOf, decay_mask
from train.optimizers.stages import stepped
from train.optimizers.wide import wide


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
        if self.cautious_decay:
            raise ValueError(
                "SGD's decay is part of the gradient and has no step to be cautious of"
            )

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """See `OptimizerSettings.transformation`."""
        # without momentum, no memory for it either
        momentum = optax.trace(self.momentum, self.nesterov) if self.momentum else optax.identity()
        direction = optax.chain(
            optax.add_decayed_weights(
                self.weight_decay, decay_mask(self, self.weight_decay, params)
            ),
            momentum,
        )
        return stepped(direction, self, schedule_of(self.learning_rate), params, weight_decay=0.0)


@dataclasses.dataclass(frozen=True)
class Adam(OptimizerSettings):
    """Adam (Kingma & Ba, arXiv 1412.6980) with its own defaults. For weight decay use AdamW."""

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """See `OptimizerSettings.transformation`."""
        direction = wide(optax.scale_by_adam(self.b1, self.b2, self.eps))
        return stepped(direction, self, schedule_of(self.learning_rate), params)


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
        direction = wide(optax.scale_by_adam(self.b1, self.b2, self.eps))
        return stepped(direction, self, schedule_of(self.learning_rate), params)


@dataclasses.dataclass(frozen=True)
class Adamax(OptimizerSettings):
    """Adam with the largest gradient in place of the second moment (section 7 of 1412.6980)."""

    learning_rate: float = 2e-3  # the paper's
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """See `OptimizerSettings.transformation`."""
        direction = wide(optax.scale_by_adamax(self.b1, self.b2, self.eps))
        return stepped(direction, self, schedule_of(self.learning_rate), params)


@dataclasses.dataclass(frozen=True)
class AdamaxW(AdamW):
    """Adamax with decoupled weight decay; rate, decay and clipping as in `AdamW`."""

    b2: float = 0.999

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """See `OptimizerSettings.transformation`."""
        direction = wide(optax.scale_by_adamax(self.b1, self.b2, self.eps))
        return stepped(direction, self, schedule_of(self.learning_rate), params)


@dataclasses.dataclass(frozen=True)
class NAdamW(AdamW):
    """AdamW with Nesterov momentum (Dozat, 2016); b1 and b2 as tuned in arXiv 2509.02046."""

    b1: float = 0.95

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """See `OptimizerSettings.transformation`."""
        direction = wide(optax.scale_by_adam(self.b1, self.b2, self.eps, nesterov=True))
        return stepped(direction, self, schedule_of(self.learning_rate), params)


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
        direction = optax.scale_by_lion(self.b1, self.b2)
        return stepped(direction, self, schedule_of(self.learning_rate), params)


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
        direction = per_layer(
            optax.chain(
                optax.adafactor(
                    learning_rate=None,
                    decay_rate=self.decay_rate,
                    clipping_threshold=self.clipping_threshold,
                    min_dim_size_to_factor=self.min_dim_size_to_factor,
                    multiply_by_parameter_scale=self.multiply_by_parameter_scale,
                ),
                optax.scale(-1.0),  # it has already turned the sign
            )
        )
        return stepped(direction, self, schedule_of(self.learning_rate), params)
