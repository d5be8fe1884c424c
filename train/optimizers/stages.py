"""From a direction to a step: caution, weight decay, the learning rate."""

from __future__ import annotations

from typing import Any

import optax

from train.optimizers.cautious import cautious, cautious_decayed_weights
from train.optimizers.settings import DecayingSettings, OptimizerSettings, decay_mask


def decayed(
    direction: optax.GradientTransformation,
    settings: OptimizerSettings,
    weight_decay: float,
    params: Any,
) -> optax.GradientTransformation:
    """A direction that goes along the gradient, with the caution and the decay of the settings.

    Args:
      direction: what the learning rate multiplies and the step subtracts.
      settings: say whether directions and decay are cautious, and what decays.
      weight_decay: times the weights, is added to the direction.
      params: parameters or their shapes, for the rules.
    """
    stages = [cautious(direction) if settings.cautious else direction]
    if weight_decay and isinstance(settings, DecayingSettings):
        decay = cautious_decayed_weights if settings.cautious_decay else optax.add_decayed_weights
        stages.append(decay(weight_decay, decay_mask(settings, weight_decay, params)))
    return optax.chain(*stages) if len(stages) > 1 else stages[0]


def stepped(
    direction: optax.GradientTransformation,
    settings: OptimizerSettings,
    schedule: optax.Schedule,
    params: Any,
    weight_decay: float | None = None,
) -> optax.GradientTransformation:
    """The optimizer ``w <- w - rate * (direction + weight_decay * w)``.

    Args:
      direction, settings, params: see `decayed`.
      schedule: update number -> rate.
      weight_decay: None for that of the settings, if they have one.

    >>> import jax.numpy as jnp
    >>> params = {"head": {"kernel": jnp.ones((1, 1))}}
    >>> settings = DecayingSettings(weight_decay=0.5)
    >>> tx = stepped(optax.scale_by_sign(), settings, lambda step: 0.1, params)
    >>> updates, _ = tx.update({"head": {"kernel": jnp.ones((1, 1)) * 3}}, tx.init(params), params)
    >>> round(float(updates["head"]["kernel"][0, 0]), 3)  # -0.1 * (1 + 0.5)
    -0.15
    """
    if weight_decay is None:
        weight_decay = settings.weight_decay if isinstance(settings, DecayingSettings) else 0.0
    return optax.chain(
        decayed(direction, settings, weight_decay, params), optax.scale_by_learning_rate(schedule)
    )
