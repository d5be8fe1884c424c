"""Compression while training, as methods: `--method fake_quantize`, `prune`, `low_precision`.

Each turns settings that go through JSON into the functions of `compress/`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from compress.pruning.mask_trees import Selection, by_layer, targets_of, together
from compress.pruning.masks import blocks, n_of_m, unstructured
from compress.pruning.schedules import Rewiring, Schedule, cubic, iterative, one_shot
from compress.pruning.sparse_optimizer import at_random, by_gradient, rewire
from compress.pruning.sparse_step import Pruning, hard, mask_weights, straight_through
from compress.quantization.fake import fake_quantization
from compress.quantization.formats import format_of
from compress.quantization.int8_training import Kind, Products, low_precision_products
from compress.quantization.optimizer_state import BLOCK, SMALLEST, eight_bit
from compress.quantization.quantize import formats_by_path, weight_rules
from train.methods import Plugs, Setup
from train.plugs import Context, PyTree, WeightTransform

Rules = tuple[tuple[str, float], ...]

SELECTIONS: dict[str, Callable[[], Selection]] = {
    "layer": lambda: by_layer(unstructured),
    "global": lambda: together,
    "2:4": lambda: by_layer(n_of_m(4)),
    "4:8": lambda: by_layer(n_of_m(8)),
    "blocks": lambda: by_layer(blocks(4, 4)),
}
"""How scores become masks, by the name that a command line uses."""

SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "one_shot": lambda start, every, times: one_shot(start),
    "cubic": cubic,
    "iterative": iterative,
}
"""When masks are computed, from (first step, steps between, times)."""

APPLIED = {"hard": hard, "straight_through": straight_through}
GROWTH = {"rigl": by_gradient, "set": at_random}


@dataclass(frozen=True)
class FakeQuantize:
    """Trains with weights rounded to the grid of a format, so that quantizing later costs nothing.

    Attributes:
      format: of every kernel, of the token embedding and the head; see
        `compress.quantization.formats`.
      rules: `(regex, format)` pairs in its place, where formats differ; "none" leaves alone.
      gradient: "identity" or "clipped", see `compress.quantization.fake`.
      candidates: scales tried for each group.
    """

    name: ClassVar[str] = "fake_quantize"
    format: str = "q4_0"
    rules: tuple[tuple[str, str], ...] = ()
    gradient: Literal["identity", "clipped"] = "identity"
    candidates: int = 1

    def __post_init__(self) -> None:
        for each in (self.format, *(format for _, format in self.rules)):
            if each != "none":
                format_of(each)

    def build(self, setup: Setup) -> Plugs:
        """Rounds the weights inside the loss, straight through.

        Raises:
          ValueError: a format that does not fit a weight; rules that select nothing.
        """
        rules = [(regex, None if f == "none" else f) for regex, f in self.rules]
        rules = rules or weight_rules(setup.params, self.format)
        formats_by_path(setup.params, rules)
        apply = fake_quantization(rules, candidates=self.candidates, gradient=self.gradient)
        return Plugs(transforms=(WeightTransform(self.name, apply),))


@dataclass(frozen=True)
class Prune:
    """Masks weights inside the loss, more and more of them.

    Attributes:
      sparsity: final share of zeros of the blocks' kernels.
      rules: `(regex, final sparsity)` pairs in its place.
      pattern: a key of `SELECTIONS`: by layer, globally, or a pattern along the contraction axis.
      score: "magnitude", "saliency", "movement" or "random".
      schedule: a key of `SCHEDULES`.
      start: first step that prunes.
      every: steps between; by default a tenth of what the first half of the run leaves.
      times: how often after the first.
      masked: "hard" stops the gradient of masked weights, "straight_through" lets it through.
      seed: of random scores.
    """

    name: ClassVar[str] = "prune"
    sparsity: float = 0.5
    rules: Rules = ()
    pattern: Literal["layer", "global", "2:4", "4:8", "blocks"] = "layer"
    score: Literal["magnitude", "saliency", "movement", "random"] = "magnitude"
    schedule: Literal["one_shot", "cubic", "iterative"] = "cubic"
    start: int = 0
    every: int | None = None
    times: int = 10
    masked: Literal["hard", "straight_through"] = "hard"
    seed: int = 0

    def build(self, setup: Setup) -> Plugs:
        """Masks the weights inside the loss.

        Raises:
          ValueError: a sparsity or pattern that does not fit, a rule that matches nothing, or a
            schedule that ends after the run.
        """
        every = self.every or max(1, (setup.steps // 2 - self.start) // self.times)
        schedule = SCHEDULES[self.schedule](self.start, every, self.times)
        _ends_in_time(self.name, schedule.last, setup.steps)
        rules = self.rules or (("blocks/.*/kernel", self.sparsity),)
        targets_of(rules, setup.params)
        settings = Pruning(rules, schedule, self.score, SELECTIONS[self.pattern]())
        masks = mask_weights(
            jax.random.key(self.seed), settings, APPLIED[self.masked], name=self.name
        )
        return Plugs(transforms=(WeightTransform(*masks),))


@dataclass(frozen=True)
class Rewire:
    """Sparse from the first update to the last, the places of the weights moving (RigL, SET).

    Attributes:
      sparsity: share of zeros of the blocks' kernels.
      rules: `(regex, sparsity)` pairs in its place.
      growth: "rigl" grows where the gradient is largest, "set" at random.
      every: steps between moves.
      until: no move from this step on; by default three quarters of the run.
      share: of the kept weights that move at the start.
      seed: of the first places, and of random growth.
    """

    name: ClassVar[str] = "rewire"
    sparsity: float = 0.8
    rules: Rules = ()
    growth: Literal["rigl", "set"] = "rigl"
    every: int = 100
    until: int | None = None
    share: float = 0.3
    seed: int = 0

    def build(self, setup: Setup) -> Plugs:
        """Puts the sparse transformation behind the optimizer.

        Raises:
          ValueError: as `Prune`.
        """
        rules = self.rules or (("blocks/.*/kernel", self.sparsity),)
        targets_of(rules, setup.params)
        until = setup.steps * 3 // 4 if self.until is None else self.until
        _ends_in_time(self.name, until, setup.steps)
        rewiring = Rewiring(self.every, until, self.share)
        key = jax.random.key(self.seed)
        # Behind all updates, whatever else scales or drops them, and before weights are averaged:
        # an average of what is masked later would be dense.
        moves = rewire(key, rules, rewiring, GROWTH[self.growth])
        return Plugs(places=(moves,), settled=until)


@dataclass(frozen=True)
class LowPrecision:
    """Takes the products of kernels in 8 or 16 bits, forward and where wanted backward.

    Parameters stay what they are, evaluation and what is opened later computes in float.

    Attributes:
      forward: of the outputs: "bfloat16", "int8", "e4m3", "e5m2" or "float".
      input_gradient: of the gradient that goes on to the layer before.
      weight_gradient: of the kernel's own gradient.
      rounding: of gradients, "stochastic" is right on average.
      rules: regexes of the kernels; a head suffers from 8 bits, and embeddings take no product.
    """

    name: ClassVar[str] = "low_precision"
    forward: Kind = "int8"
    input_gradient: Kind = "int8"
    weight_gradient: Kind = "float"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    rules: tuple[str, ...] = ("blocks/.*/kernel",)

    def __post_init__(self) -> None:
        _ = self.products

    @property
    def products(self) -> Products:
        """In what numbers products are taken."""
        return Products(self.forward, self.input_gradient, self.weight_gradient, self.rounding)

    def build(self, setup: Setup) -> Plugs:
        """Gives chosen kernels products of their own.

        Raises:
          ValueError: a rule that matches nothing, or what is no kernel.
        """
        products = low_precision_products([(rule, self.products) for rule in self.rules])
        context = Context(jnp.int32(0), None, {}, {}, {})
        jax.eval_shape(lambda params: products(params, context), setup.params)

        def apply(weights: PyTree, context: Context) -> PyTree:
            return weights if context.rng is None else products(weights, context)

        return Plugs(transforms=(WeightTransform(self.name, apply),))


@dataclass(frozen=True)
class EightBitState:
    """Keeps the optimizer's moments in 8 bits, see `compress.quantization.optimizer_state`.

    Attributes:
      block: numbers that share a scale, at most.
      smallest: parameters with fewer numbers keep their moments as they are.
      rounding: "stochastic" is right on average; "nearest" leaves a moment where it is that moves
        by less than half of 9 % a step, such as the second one of Adam.
      seed: of stochastic rounding.
    """

    name: ClassVar[str] = "eight_bit_state"
    block: int = BLOCK
    smallest: int = SMALLEST
    rounding: Literal["nearest", "stochastic"] = "stochastic"
    seed: int = 0

    def build(self, setup: Setup) -> Plugs:
        """Wraps the optimizer.

        Raises:
          ValueError: a block below 1; when the state is made, if nothing would be kept in 8 bits.
        """
        key = jax.random.key(self.seed) if self.rounding == "stochastic" else None

        def wrapped(tx: optax.GradientTransformation) -> optax.GradientTransformation:
            return eight_bit(tx, block=self.block, smallest=self.smallest, key=key)

        wrapped(optax.identity())  # refuses a block that does not fit
        return Plugs(optimizer=wrapped)


def _ends_in_time(name: str, last: int, steps: int) -> None:
    if last >= steps:
        raise ValueError(
            f"{name} goes on until step {last}, and the run has {steps}; start it earlier, or let "
            "it do its work in fewer steps"
        )


COMPRESS_METHODS: dict[str, type[Any]] = {
    m.name: m for m in (FakeQuantize, Prune, Rewire, LowPrecision, EightBitState)
}
