"""What a training step is made of: its state, its context, and the shapes of its plugs.

    batch -> apply(transforms(params), batch) -> loss terms -> gradient function -> optimizer

Each plug is a named tuple of pure functions, or one function; `train.step` runs them all under one
jit. Anything a method must remember lies in `State.extra` under the method's name, so that what
resumes a run resumes every method in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from model.transformer import Features

NONFINITE = "nonfinite"
"""Where in `State.extra` the step counts those that changed nothing."""

PyTree = Any
Batch = dict[str, jax.Array]
"""What a step reads: `tokens` int32 [B, T], `weights` float32 [B, T] (0: no loss), and `targets`
int32 [B, T], the tokens that follow, for a language model. Besides, as the model and the terms need
them, `positions` and `segments` int32 [B, T], and arrays of tasks."""
Metrics = dict[str, Any]


@flax.struct.dataclass
class State:
    """All that training changes, one pytree, donated to each step.

    Attributes:
      step: int32 scalar, batches seen.
      params: the floating-point leaves that train, and no others.
      optimizer: the optimizer's state.
      rng: the run's PRNG key; never changes, each step folds its number into it.
      extra: method name -> what that method carries from step to step.
    """

    step: jax.Array
    params: PyTree
    optimizer: PyTree
    rng: jax.Array
    extra: dict[str, PyTree]


class Context(NamedTuple):
    """What a plug may look at besides its arguments.

    Attributes:
      step: int32 scalar.
      rng: key of this step (of this micro-batch, inside a loss), or None in evaluation: no dropout.
      frozen: what does not train (a teacher, a LoRA base), or {}.
      extra: `State.extra`.
      counts: loss term name -> its count over the whole global batch, at least 1.
    """

    step: jax.Array
    rng: jax.Array | None
    frozen: PyTree
    extra: dict[str, PyTree]
    counts: dict[str, jax.Array]

    @property
    def updates(self) -> jax.Array:
        """int32 scalar, steps that changed the parameters so far: without those whose loss or
        gradient was not finite. For what is due at a step and must not be missed."""
        counters = self.extra.get(NONFINITE)
        return self.step if counters is None else self.step - counters["total"]


class View(NamedTuple):
    """What a loss term sees of the model.

    Attributes:
      logits: [N, V] of the positions at hand, for a term over logits; None otherwise.
      features: what the blocks computed for the whole (micro-)batch, for a term over features.
      weights: the parameters that the model ran with, after the weight transforms.
    """

    logits: jax.Array | None
    features: Features | None
    weights: PyTree


def position_count(batch: Batch) -> jax.Array:
    """The number of positions that carry loss: the sum of `weights`."""
    return batch["weights"].sum()


@dataclass(frozen=True)
class LossTerm:
    """Plug 2: a part of the loss, `weight(step) * total / count`.

    Attributes:
      name: what it is called in the metrics.
      total: `(view, batch, context) -> scalar`, a sum over what `count` counts. For a term over
        logits, `view.logits` is [N, V] and every array of the batch that is laid out by position
        has N rows: the term is written for a chunk of positions and never sees how many there are.
      count: `batch -> scalar`; sees the batch alone, so that it can be summed over micro-batches
        and devices before any gradient is taken.
      weight: a number, or a function of the step.
      over: "logits" or "features".
      capture: what of `Features` it needs ("hidden", "attention").
      prepare: `(batch, context) -> arrays`, by name, that are put beside the batch's own before it
        is laid out in chunks, once a micro-batch: what a teacher makes of it, say. No gradient goes
        through them; terms that share one function share its result.
      padded: whether `total` takes logits [N, V + padding] of a padded vocabulary, where padding
        has the lowest number that there is: nothing to a softmax. Without it they are cut off,
        which costs a pass over them, and one over their gradient.
      reads_head: whether `total` over features reads the language model's own head by itself.
    """

    name: str
    total: Callable[[View, Batch, Context], jax.Array]
    count: Callable[[Batch], jax.Array] = position_count
    weight: float | Callable[[jax.Array], jax.Array] = 1.0
    over: Literal["logits", "features"] = "logits"
    capture: tuple[str, ...] = ()
    prepare: Callable[[Batch, Context], Batch] | None = None
    padded: bool = False
    reads_head: bool = False


def _no_extra(params: PyTree, frozen: PyTree) -> PyTree:
    return {}


def _same_extra(extra: PyTree, params: PyTree, grads: PyTree, context: Context) -> PyTree:
    return extra


class WeightTransform(NamedTuple):
    """Plug 1: what happens to the parameters before the model sees them.

    Attributes:
      name: its key in `State.extra`.
      apply: `(weights, context) -> weights`, pure, inside the gradient.
      init: `(params, frozen) -> extra`.
      update: `(extra, params, grads, context) -> extra`, once a step, with the raw gradient.
    """

    name: str
    apply: Callable[[PyTree, Context], PyTree]
    init: Callable[[PyTree, PyTree], PyTree] = _no_extra
    update: Callable[[PyTree, PyTree, PyTree, Context], PyTree] = _same_extra


def check_batch(batch: Batch) -> None:
    """Refuses a batch whose arrays by position are not laid out as its tokens are.

    Raises:
      ValueError: no tokens or weights, or an array of another shape or type.

    >>> tokens = jnp.zeros((2, 4), jnp.int32)
    >>> check_batch({"tokens": tokens, "targets": tokens, "weights": jnp.ones((2, 4))})
    >>> check_batch({"tokens": tokens, "weights": jnp.ones(2)})
    Traceback (most recent call last):
    ...
    ValueError: weights are float32[2]; by position, as tokens [2, 4] are, they must be [2, 4]
    """
    if missing := [name for name in ("tokens", "weights") if name not in batch]:
        raise ValueError(
            f"the batch has no {' and no '.join(missing)}, but {', '.join(batch) or 'nothing'}; a "
            "step reads tokens, weights and, for a language model, targets, all [B, T]"
        )
    shape = jnp.shape(batch["tokens"])
    for name in ("tokens", "targets", "weights"):
        if name not in batch:
            continue
        array = jnp.asarray(batch[name])
        said = f"{name} are {array.dtype}{list(array.shape)}"
        if array.shape != shape:
            raise ValueError(
                f"{said}; by position, as tokens {list(shape)} are, they must be {list(shape)}"
            )
        if name != "weights" and not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{said}; they are numbers of tokens, so of an integer type")


class LossFunction(Protocol):
    """`(params, batch, context) -> (loss, metrics)`, both already divided by the global counts."""

    def __call__(
        self, params: PyTree, batch: Batch, context: Context
    ) -> tuple[jax.Array, Metrics]: ...


class GradientFunction(Protocol):
    """Plug 3a: `(loss, params, batch, context) -> (grads, metrics)`."""

    def __call__(
        self, loss: LossFunction, params: PyTree, batch: Batch, context: Context
    ) -> tuple[PyTree, Metrics]: ...


def whole(
    loss: LossFunction, params: PyTree, batch: Batch, context: Context
) -> tuple[PyTree, Metrics]:
    """The plain gradient function: that of the whole batch at once.

    >>> import jax.numpy as jnp
    >>> loss = lambda params, batch, context: (params * batch["x"].sum(), {})
    >>> float(whole(loss, jnp.float32(2), {"x": jnp.ones(3)}, None)[0])
    3.0
    """
    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, context)
    return grads, metrics


class Gradient(NamedTuple):
    """Plug 3a with a memory, such as the error that compression has left out so far.

    Attributes:
      name: its key in `State.extra`.
      init: `(params, frozen) -> carry`.
      apply: `(loss, params, batch, context, carry) -> (grads, metrics, carry)`.
    """

    name: str
    init: Callable[[PyTree, PyTree], PyTree]
    apply: Callable[..., tuple[PyTree, Metrics, PyTree]]


def with_memory(gradient: GradientFunction | Gradient) -> Gradient:
    """Returns a gradient function as one with a memory that is empty.

    >>> plug = with_memory(whole)
    >>> plug.init(None, None)
    {}
    """
    if isinstance(gradient, Gradient):
        return gradient

    def apply(
        loss: LossFunction, params: PyTree, batch: Batch, context: Context, carry: PyTree
    ) -> tuple[PyTree, Metrics, PyTree]:
        return *gradient(loss, params, batch, context), carry

    return Gradient("gradient", _no_extra, apply)


def merge(params: PyTree, frozen: PyTree, within: tuple[str, ...] = ()) -> PyTree:
    """Returns one nested dict out of the leaves that train and those that do not.

    Args:
      params: those that train.
      frozen: those that do not.
      within: names of the dicts around both, for the message.

    Raises:
      ValueError: a leaf is among both.

    >>> merge({"head": {"kernel": 1}}, {"head": {"bias": 2}, "table": 3})
    {'head': {'kernel': 1, 'bias': 2}, 'table': 3}
    """
    merged = dict(params)
    for name, value in frozen.items():
        both = isinstance(merged.get(name), dict) and isinstance(value, dict)
        if name in merged and not both:
            path = "/".join((*within, name))
            raise ValueError(f"{path!r} is among the parameters that train and among the frozen")
        merged[name] = merge(merged[name], value, (*within, name)) if both else value
    return merged
