"""A method: plugs that belong together, made from typed settings once the model is known.

    settings.build(setup) -> Plugs          one for each method of a run
    combine(all of them) -> Plugs           what the step is made of

Settings of a method are a frozen dataclass with a `name`, so that they go through JSON like those
of an optimizer (`train.settings`). Which methods there are is for `experiments.methods` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import optax

from model.config import TransformerConfig
from train.plugs import Gradient, GradientFunction, LossTerm, PyTree, WeightTransform, merge


class Setup(NamedTuple):
    """What a method is built for.

    Attributes:
      config: of the model that trains, vocabulary size included.
      params: the abstract parameters of the whole model, before anything is frozen.
      steps: updates of the whole run, for schedules.
      micro_batches: parts of a batch, for a gradient function that goes through them by itself.
    """

    config: TransformerConfig
    params: PyTree
    steps: int
    micro_batches: int = 1


class FrozenTree(NamedTuple):
    """A tree that does not train: its shapes, known from the settings, and where it comes from.

    Attributes:
      abstract: `jax.ShapeDtypeStruct` leaves, so that a resumed run reads its own copy.
      load: called once, at the start of the run.
    """

    abstract: PyTree
    load: Callable[[], PyTree]


def everything_trains(params: PyTree) -> tuple[PyTree, PyTree]:
    """The `split` of a method that freezes nothing."""
    return params, {}


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Plugs:
    """What a method plugs in; each default changes nothing.

    Attributes:
      transforms: weight transforms, in order.
      terms: loss terms so far -> loss terms.
      gradient: a gradient function, or None to leave it to another method.
      optimizer: wraps the optimizer of the settings.
      split: `params -> (those that train, those that do not)`, traceable; the second part goes into
        `frozen["params"]`, and the loss merges it back.
      frozen: other trees that do not train, by their name in `frozen`.
    """

    transforms: tuple[WeightTransform, ...] = ()
    terms: Callable[[tuple[LossTerm, ...]], tuple[LossTerm, ...]] = _same
    gradient: Gradient | GradientFunction | None = None
    optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation] = _same
    split: Callable[[PyTree], tuple[PyTree, PyTree]] = everything_trains
    frozen: Mapping[str, FrozenTree] = field(default_factory=dict)


class MethodSettings(Protocol):
    """Settings of a method: a frozen dataclass."""

    name: ClassVar[str]

    def build(self, setup: Setup) -> Plugs:
        """Returns the plugs; ValueError where the settings do not fit the model."""


def combine(parts: Sequence[Plugs]) -> Plugs:
    """Returns the plugs of several methods as one, each applied after those before it.

    Raises:
      ValueError: two of them bring a gradient function, or a frozen tree of the same name.

    >>> head = Plugs(split=lambda p: ({"head": p["head"]}, {"table": p["table"]}))
    >>> combine([head, Plugs()]).split({"head": 1, "table": 2})
    ({'head': 1}, {'table': 2})
    """
    gradients = [part.gradient for part in parts if part.gradient is not None]
    if len(gradients) > 1:
        raise ValueError(
            f"{len(gradients)} methods bring a gradient function of their own, and a step has one: "
            "leave all but one out"
        )
    names = [name for part in parts for name in part.frozen]
    if len(set(names)) < len(names) or "params" in names:
        raise ValueError(f"frozen trees need names of their own besides 'params', not {names}")

    def terms(so_far: tuple[LossTerm, ...]) -> tuple[LossTerm, ...]:
        for part in parts:
            so_far = part.terms(so_far)
        return so_far

    def optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
        for part in parts:
            tx = part.optimizer(tx)
        return tx

    def split(params: PyTree) -> tuple[PyTree, PyTree]:
        frozen: PyTree = {}
        for part in parts:
            params, more = part.split(params)
            frozen = merge(frozen, more)
        return params, frozen

    return Plugs(
        tuple(transform for part in parts for transform in part.transforms),
        terms,
        gradients[0] if gradients else None,
        optimizer,
        split,
        {name: tree for part in parts for name, tree in part.frozen.items()},
    )
