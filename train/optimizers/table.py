"""Optimizers by name: typed settings, built from Optax.

Every one is assembled the same way, and takes and may ignore the extra arguments of the step::

    clip by global norm -> the optimizer, at its scheduled rate -> learning rates by rule
    -> what methods do to the updates -> average of the weights

What depends on a parameter is chosen by rules over its path (`model.rules`), never by its number of
axes: stacked biases and norm scales are two-dimensional too. By default only kernels and embeddings
decay.

Steps count the updates made, so that an update that the step skipped does not move the schedule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from model.rules import match_per_layer
from train.optimizers.adam_mini import AdamMini
from train.optimizers.averaging import tail_average
from train.optimizers.first_order import (
    SGD,
    Adafactor,
    Adam,
    Adamax,
    AdamaxW,
    AdamW,
    Lion,
    NAdamW,
)
from train.optimizers.from_optax import FROM_OPTAX
from train.optimizers.hyperball import AdamH, MuonH
from train.optimizers.kron import Kron
from train.optimizers.mars import Mars
from train.optimizers.matrix import MatrixSettings
from train.optimizers.muon import Muon
from train.optimizers.normuon import NorMuon
from train.optimizers.scion import Scion
from train.optimizers.settings import OptimizerSettings
from train.optimizers.shampoo import Shampoo
from train.optimizers.soap import Soap
from train.optimizers.wide import wide
from train.schedules import ScheduleSettings

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
    "normuon": NorMuon,
    "muonh": MuonH,
    "adamh": AdamH,
    "scion": Scion,
    "soap": Soap,
    "shampoo": Shampoo,
    "kron": Kron,
    "mars": Mars,
    "adam_mini": AdamMini,
    **FROM_OPTAX,
}
"""Settings class of each optimizer, by the name that a command line uses."""

VARIANTS: dict[str, OptimizerSettings] = {
    "muon, Polar Express": Muon(newton_schulz_coefficients="polar_express"),
    "muon, cautious decay": Muon(cautious_decay=True),
    "adamw, cautious steps": AdamW(cautious=True),
    "adamw, tail average": AdamW(tail_fraction=0.2),
}
"""Settings that are techniques of their own, to be compared with those optimizers as they are."""


_HALVES = (0.25, 0.5, 1.0, 2.0, 4.0)
_WIDE = (0.1, 0.3, 1.0, 3.0, 10.0)  # where no published rate fits models of our size
RATE_GRIDS: dict[str, tuple[float, ...]] = {
    name: tuple(
        float(f"{kind().learning_rate * factor:.3g}")
        for factor in (_WIDE if name in FROM_OPTAX or name in ("sgd", "scion") else _HALVES)
    )
    for name, kind in OPTIMIZERS.items()
}
"""Learning rates to try for each optimizer or variant, five for all, around that of its settings.

For an optimizer of matrices the rate of its AdamW part goes along: `at_rate`.
"""
RATE_GRIDS |= {name: RATE_GRIDS[name.split(", ")[0]] for name in VARIANTS}


def at_rate(name: str, learning_rate: float) -> Any:
    """The settings of an optimizer at a rate, its AdamW part's changed in proportion.

    >>> at_rate("muon", 0.032).adam_learning_rate
    0.0064
    """
    settings = settings_named(name)
    changes = {"learning_rate": learning_rate}
    if isinstance(settings, MatrixSettings):
        factor = learning_rate / settings.learning_rate
        changes["adam_learning_rate"] = settings.adam_learning_rate * factor
    return dataclasses.replace(settings, **changes)


def settings_named(name: str) -> Any:
    """The settings of an optimizer as they are, or of a variant.

    >>> settings_named("adamw, cautious steps").cautious
    True
    """
    return VARIANTS[name] if name in VARIANTS else optimizer_named(name)()


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
    further: Sequence[optax.GradientTransformation] = (),
) -> optax.GradientTransformationExtraArgs:
    """The optimizer for one phase of a run.

    Args:
      settings: of an optimizer, one of `OPTIMIZERS`.
      schedule_settings: of a schedule, one of ``train.schedules.SCHEDULES``.
      total_steps: updates that the schedule spans; those of the whole run, as the state's step
        count goes on from phase to phase.
      params_abstract: the parameters that train, or their shapes (``jax.eval_shape``).
      further: what else happens to the updates, before weights are averaged.

    Returns:
      ``init(params)`` and ``update(grads, state, params, value=, grads=)``; the updates are to be
      added. The state is a plain pytree of arrays.

    Raises:
      ValueError: a rule that matches nothing, settings that do not fit, or anything but settings.

    >>> from train.schedules import Constant
    >>> params = {"head": {"kernel": jnp.ones((2, 3))}}
    >>> tx = build(AdamW(learning_rate=0.5, weight_decay=0.2), Constant(), 10, params)
    >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    >>> round(float(updates["head"]["kernel"][0, 0]), 3)  # no gradient, so only the decay
    -0.1
    """
    if isinstance(settings, type) or not hasattr(settings, "transformation"):
        raise ValueError(
            f"the optimizer is {settings!r}; give settings such as AdamW(), of one of "
            f"{', '.join(OPTIMIZERS)}"
        )
    if isinstance(schedule_settings, type) or not hasattr(schedule_settings, "build"):
        raise ValueError(
            f"the schedule is {schedule_settings!r}; give settings of train.schedules, such as "
            "Cosine()"
        )
    stages = []
    if settings.clip_norm is not None:
        stages.append(wide(optax.clip_by_global_norm(settings.clip_norm)))
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
    stages += further
    if settings.tail_fraction is not None:
        stages.append(tail_average(total_steps - round(settings.tail_fraction * total_steps)))
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


def _scaled(update: jax.Array, factor: float | tuple[float, ...]) -> jax.Array:
    """The update times its factor, or each layer times its own."""
    if isinstance(factor, tuple):
        by_layer = np.asarray(factor).reshape(-1, *[1] * (update.ndim - 1))
        return update * jnp.asarray(by_layer, update.dtype)
    return update * factor
