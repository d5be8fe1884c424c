"""A method: plugs that belong together, made from typed settings once the model is known.

    settings.build(setup) -> Plugs          one for each method of a run
    combine(all of them) -> Plugs           what the step is made of

Settings of a method are a frozen dataclass with a `name`, so that they go through JSON like those
of an optimizer (`train.settings`). Which methods there are is for `experiments/methods` to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import optax

from model.config import TransformerConfig
from train.plugs import (
    Gradient,
    GradientFunction,
    LossTerm,
    PyTree,
    State,
    WeightTransform,
    merge,
)
from train.step import Step

OpenRun = Callable[[str], Any]
"""A run by its name, "RUN" or "RUN@STEP": what methods learn from other runs, they are handed."""


class Setup(NamedTuple):
    """What a method is built for.

    Attributes:
      config: of the model that trains, vocabulary size included.
      params: the abstract parameters of the whole model, before anything is frozen.
      steps: updates of the whole run, for schedules.
      micro_batches: parts of a batch; a gradient function of a method goes through them by itself.
      workers: how many there are of what works on rows of its own: the places along the mesh axis
        `data`. Not known where a run is only opened, and nothing but memory may depend on it.
    """

    config: TransformerConfig
    params: PyTree
    steps: int
    micro_batches: int = 1
    workers: int = 1


class Around(NamedTuple):
    """Another loop around the step, which calls it.

    Attributes:
      init: the state of one step -> the state of the run; `params` are those that are evaluated.
      step: the step of that state -> that of the run, both `(state, frozen, batch) -> (state,
        metrics)`.
      sees: the weight transforms of all methods -> what then takes the place of `step`, for a loop
        that runs the model itself; or None.
    """

    init: Callable[[State], State]
    step: Callable[[Step], Step]
    sees: Callable[[tuple[WeightTransform, ...]], Callable[[Step], Step]] | None = None


class Reading(NamedTuple):
    """What a method sees of the data, for `read(reading) -> (batch -> batch)`.

    A method with such a function puts arrays beside those of each training batch, before it goes to
    the devices. What it returns must depend on the batch alone, so that a resumed run meets the
    same; it is called in threads, ahead of the step.

    Attributes:
      settings: of the run.
      fingerprints: JSON values that name the data, by content, and its tokenizer.
      dataset: phase -> what has the batch of step number n of the run under n.
      windows: every window of the training data once, in batches.
      out: folder of the run.
      open_run: opens another.
    """

    settings: Any
    fingerprints: list[Any]
    dataset: Callable[[Any], Any]
    windows: Callable[[], Any]
    out: Any
    open_run: OpenRun


class FrozenTree(NamedTuple):
    """A tree that does not train: its shapes, known from the settings, and where it comes from.

    Attributes:
      abstract: `jax.ShapeDtypeStruct` leaves, so that a resumed run reads its own copy.
      load: called once, at the start of the run, with what opens another.
    """

    abstract: PyTree
    load: Callable[[OpenRun], PyTree]


def everything_trains(params: PyTree) -> tuple[PyTree, PyTree]:
    """The `split` of a method that freezes nothing."""
    return params, {}


def one_side(params: PyTree, chosen: PyTree, side: bool) -> PyTree:
    """Returns the leaves whose choice is `side`, in nested dicts without empty branches.

    >>> one_side({"a": {"x": 1, "y": 2}}, {"a": {"x": True, "y": False}}, True)
    {'a': {'x': 1}}
    """
    if not isinstance(params, dict):
        return params if chosen is side else {}
    parts = {name: one_side(value, chosen[name], side) for name, value in params.items()}
    return {name: p for name, p in parts.items() if not (isinstance(p, dict) and not p)}


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Plugs:
    """What a method plugs in; each default changes nothing.

    Attributes:
      transforms: weight transforms, in order.
      terms: loss terms so far -> loss terms.
      gradient: a gradient function that goes through the micro-batches of `setup` by itself, or
        None to leave it to another method.
      optimizer: wraps the optimizer of the settings.
      updates: what further happens to the updates, after rates and weight decay, and before weights
        are averaged.
      places: the same, behind the updates of all methods: what says where weights may lie.
      settled: update from which those places stay; an average of the weights may not begin before.
      split: `params -> (those that train, those that do not)`, traceable; the second part goes into
        `frozen["params"]`, and the loss merges it back.
      frozen: other trees that do not train, by their name in `frozen`.
      around: another loop around the step, or None.
      workers: a number of workers that the mesh axis `data` must divide, or None.
      rows: the batch must have a multiple of so many rows.
      redistribute: name in `State.extra` -> `(what is there, workers) -> the same` for another
        number of workers.
    """

    transforms: tuple[WeightTransform, ...] = ()
    terms: Callable[[tuple[LossTerm, ...]], tuple[LossTerm, ...]] = _same
    gradient: Gradient | GradientFunction | None = None
    optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation] = _same
    updates: tuple[optax.GradientTransformation, ...] = ()
    places: tuple[optax.GradientTransformation, ...] = ()
    settled: int = 0
    split: Callable[[PyTree], tuple[PyTree, PyTree]] = everything_trains
    frozen: Mapping[str, FrozenTree] = field(default_factory=dict)
    around: Around | None = None
    workers: int | None = None
    rows: int = 1
    redistribute: Mapping[str, Callable[[Any, int], Any]] = field(default_factory=dict)


class MethodSettings(Protocol):
    """Settings of a method: a frozen dataclass."""

    name: ClassVar[str]

    def build(self, setup: Setup) -> Plugs:
        """Returns the plugs; ValueError where the settings do not fit the model."""


def combine(parts: Sequence[Plugs]) -> Plugs:
    """Returns the plugs of several methods as one, each applied after those before it.

    Raises:
      ValueError: two of them bring a gradient function, or a loop around the step, or a frozen
        tree of the same name.

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
    loops = [part for part in parts if part.around is not None]
    if len(loops) > 1:
        raise ValueError(
            f"{len(loops)} methods bring a loop around the step, and a run has one: "
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

    transforms = tuple(transform for part in parts for transform in part.transforms)
    around = loops[0].around if loops else None
    if around is not None and around.sees is not None:
        around = around._replace(step=around.sees(transforms))
    return Plugs(
        transforms,
        terms,
        gradients[0] if gradients else None,
        optimizer,
        tuple(stage for part in parts for stage in part.updates),
        tuple(stage for part in parts for stage in part.places),
        max((part.settled for part in parts), default=0),
        split,
        {name: tree for part in parts for name, tree in part.frozen.items()},
        around,
        loops[0].workers if loops else None,
        math.lcm(*(part.rows for part in parts)),
        {name: rule for part in parts for name, rule in part.redistribute.items()},
    )
