"""Further optimizers of Optax, their settings made from the arguments of their functions."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from model.rules import path_of
from train.optimizers.cautious import cautious
from train.optimizers.per_layer import per_layer
from train.optimizers.settings import OptimizerSettings, ScheduleOf


@dataclasses.dataclass(frozen=True)
class OptaxSettings(OptimizerSettings):
    """Settings of an optimizer of Optax; see its documentation for the fields of its own.

    A ``weight_decay`` goes to kernels and embeddings alone; optimizers that would let it loose on
    all parameters have none here. ``cautious`` also drops what decay adds against the gradient.
    """

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """See `OptimizerSettings.transformation`."""
        entry = _ENTRIES[_NAMES[type(self)]]
        shared = {field.name for field in dataclasses.fields(OptimizerSettings)}
        more: dict[str, Any] = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in shared
        }
        mask = _mask_argument(entry.make)
        if mask is not None and more["weight_decay"]:
            more[mask] = _decaying
        tx = entry.make(**{entry.rate: schedule_of(self.learning_rate)}, **more)
        tx = _keeping_types(per_layer(tx) if entry.by_layer else tx)
        if self.cautious:
            return optax.chain(cautious(optax.chain(tx, optax.scale(-1.0))), optax.scale(-1.0))
        return tx


def _keeping_types(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Gives updates the types of the gradients, where an optimizer answers bfloat16 in float32."""
    tx = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra_args):
        made, state = tx.update(updates, state, params, **extra_args)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), made, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _decaying(tree: Any) -> Any:
    """Which of these parameters decay; `per_layer` shows an optimizer some of them at a time."""
    return jax.tree_util.tree_map_with_path(
        lambda key_path, _: not {"kernel", "embedding"}.isdisjoint(path_of(key_path).split("/")),
        tree,
    )


def _mask_argument(make: Callable[..., Any]) -> str | None:
    """The name of its argument for what decays, if it has one."""
    arguments = inspect.signature(make).parameters
    return next((name for name in ("mask", "weight_decay_mask") if name in arguments), None)


def _sm3(learning_rate: optax.Schedule, momentum: float = 0.9) -> Any:
    """`optax.sm3`, which takes no schedule by itself."""
    return optax.chain(optax.scale_by_sm3(momentum), optax.scale_by_learning_rate(learning_rate))


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A function of Optax, the rate that its settings begin with, and how it sees parameters."""

    make: Callable[..., Any]
    learning_rate: float
    by_layer: bool = False
    rate: str = "learning_rate"


# Rates: those of the papers or of Optax's examples where they have one. Those that estimate the
# rate themselves multiply their estimate by it.
_ENTRIES: dict[str, _Entry] = {
    "adabelief": _Entry(optax.adabelief, 1e-3),
    "adadelta": _Entry(optax.adadelta, 1.0),
    "adagrad": _Entry(optax.adagrad, 1e-2),
    "adan": _Entry(optax.adan, 1e-3),
    "amsgrad": _Entry(optax.amsgrad, 1e-3),
    "fromage": _Entry(optax.fromage, 1e-2, by_layer=True),
    "lamb": _Entry(optax.lamb, 2e-3, by_layer=True),
    "lars": _Entry(optax.lars, 0.1, by_layer=True),
    "novograd": _Entry(optax.novograd, 1e-2, by_layer=True),
    "optimistic_adam": _Entry(optax.optimistic_adam_v2, 1e-3),
    "polyak_sgd": _Entry(optax.polyak_sgd, 1.0, rate="scaling"),
    "radam": _Entry(optax.radam, 1e-3),
    "rmsprop": _Entry(optax.rmsprop, 1e-3),
    "signum": _Entry(optax.signum, 5e-4),
    "sm3": _Entry(_sm3, 0.1, by_layer=True),
    "yogi": _Entry(optax.yogi, 1e-2),
    "acprop": _Entry(optax.contrib.acprop, 1e-3),
    "ademamix": _Entry(optax.contrib.ademamix, 1e-3),
    "simplified_ademamix": _Entry(optax.contrib.simplified_ademamix, 1e-5),
    "adopt": _Entry(optax.contrib.adopt, 1e-3),
    "cocob": _Entry(optax.contrib.cocob, 1.0),
    "dadapt_adamw": _Entry(optax.contrib.dadapt_adamw, 1.0),
    "dog": _Entry(optax.contrib.dog, 1.0),
    "dowg": _Entry(optax.contrib.dowg, 1.0),
    "madgrad": _Entry(optax.contrib.madgrad, 1e-3),
    "momo": _Entry(optax.contrib.momo, 1.0),
    "momo_adam": _Entry(optax.contrib.momo_adam, 1e-2),
    "prodigy": _Entry(optax.contrib.prodigy, 1.0),
}


def _settings_of(name: str, entry: _Entry) -> type[OptaxSettings]:
    """A settings class with a field for each number and switch among the function's arguments."""
    fields: list[Any] = [
        ("learning_rate", float, dataclasses.field(default=entry.learning_rate)),
    ]
    maskable = _mask_argument(entry.make) is not None
    for argument in inspect.signature(entry.make).parameters.values():
        if argument.name in ("learning_rate", entry.rate):
            continue
        value = argument.default
        if argument.name == "weight_decay":
            if maskable:
                fields.append((argument.name, float, dataclasses.field(default=value or 0.0)))
        elif type(value) in (bool, int, float):
            kind = float if type(value) is int else type(value)
            fields.append((argument.name, kind, dataclasses.field(default=kind(value))))
    kind = dataclasses.make_dataclass(
        "".join(part.capitalize() for part in name.split("_")),
        fields,
        bases=(OptaxSettings,),
        frozen=True,
        namespace={
            "__module__": __name__,
            "__doc__": f"`optax.{entry.make.__name__.lstrip('_')}`; see Optax for its arguments.",
        },
    )
    _NAMES[kind] = name
    return kind


_NAMES: dict[type[Any], str] = {}
FROM_OPTAX: dict[str, type[Any]] = {
    name: _settings_of(name, entry) for name, entry in _ENTRIES.items()
}
"""Settings class of each further optimizer of Optax, by name."""

LEFT_OUT: dict[str, str] = {
    "lbfgs": "its line search evaluates the loss again at other weights (value_fn)",
    "sophia": "needs a Hutchinson estimate of the Hessian from the loss function (obj_fn)",
    "sam": "takes its gradient at weights that it moves to itself",
    "schedule_free": "evaluates at other weights than it trains, found from its state",
    "mechanize": "a wrapper around another optimizer, not one of its own",
    "reduce_on_plateau": "a schedule; those of train.schedules are functions of the step",
    "noisy_sgd": "draws from a seed in its state; for privacy use the gradient per_example",
    "dpsgd": "needs one gradient per example; that is the gradient function per_example",
    "galore": "projects every matrix of two axes; stacked kernels have three",
    "rprop": "its rate is only the first step size, and so knows no schedule",
    "optimistic_gradient_descent": "sgd with a fixed extrapolation; optimistic_adam has it",
    "sign_sgd": "signum with momentum 0",
    "nadam, nadamw, adamaxw": "in the table under their own settings",
}
"""What Optax has besides, and why the table of optimizers does not."""
