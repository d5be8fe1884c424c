"""Structured pruning after training: what is removed, by what importance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from compress.distillation.students import distilgpt2_style, minitron_style
from compress.pruning.structured_gates import part_shape
from compress.pruning.structured_importance import (
    by_activation,
    by_loss,
    by_magnitude,
    by_taylor,
    keep_best,
)
from model.config import TransformerConfig
from model.transformer import Transformer

PyTree = Any
Batches = Sequence[Any]
PARTS = ("layers", "width", "groups", "neurons")


@dataclass(frozen=True)
class Structured:
    """A smaller model: how many of each part to keep, None for all.

    Attributes:
      layers: blocks.
      width: features of the stream.
      groups: key/value heads, with their query heads.
      neurons: of a feed-forward layer.
      importance: what decides who stays.
    """

    layers: int | None = None
    width: int | None = None
    groups: int | None = None
    neurons: int | None = None
    importance: Literal["magnitude", "activation", "taylor", "loss"] = "activation"

    def __call__(
        self, model: Transformer, params: PyTree, batches: Batches
    ) -> tuple[TransformerConfig, PyTree]:
        """Removes layers, then features, heads and neurons, each judged in what is left by then."""
        keep, config = _to_keep(model.config, self), model.config
        for part, count in keep.items():
            now = model.clone(config=config)
            scores = IMPORTANCE[self.importance](now, params, batches, part)
            config, params = keep_best(config, params, part, scores, count)
        return config, params


@dataclass(frozen=True)
class DistilGPT2Style:
    """Half of the layers, evenly spread (Sanh et al. 2019, arXiv:1910.01108).

    Then train it with --method distil and the hard, the soft and the hidden term.
    """

    def __call__(
        self, model: Transformer, params: PyTree, batches: Batches
    ) -> tuple[TransformerConfig, PyTree]:
        """Takes the layers; needs no calibration."""
        return distilgpt2_style(model.config, params)


@dataclass(frozen=True)
class MinitronStyle:
    """The most important parts by activation, and all but a late run of the layers.

    Unlike `Structured`, all is judged in the whole model (Muralidharan et al. 2024,
    arXiv:2407.14679). Then train it with --method distil and the soft term alone.

    Attributes:
      layers: blocks to keep, None for all.
      width: features of the stream.
      groups: key/value heads, with their query heads.
      neurons: of a feed-forward layer.
    """

    layers: int | None = None
    width: int | None = None
    groups: int | None = None
    neurons: int | None = None

    def __call__(
        self, model: Transformer, params: PyTree, batches: Batches
    ) -> tuple[TransformerConfig, PyTree]:
        """Judges all parts, then removes what is least."""
        keep = _to_keep(model.config, self)
        judged = [part for part in keep if part != "layers"]
        importance = {part: by_activation(model, params, batches, part) for part in judged}
        return minitron_style(model.config, params, importance, keep)


def _to_keep(config: TransformerConfig, asked: Any) -> dict[str, int]:
    """Part -> how many, once it is known that there are as many."""
    keep = {part: n for part in PARTS if (n := getattr(asked, part)) is not None}
    if not keep:
        raise ValueError(f"nothing is to be removed; say how many {', '.join(PARTS)} to keep")
    for part, count in keep.items():
        there = part_shape(config, part)[-1]
        if not 1 <= count <= there:
            raise ValueError(f"{count} {part} cannot be kept: there are {there}, keep 1 or more")
    return keep


def loss_on(model: Transformer, batches: Batches) -> Callable[[PyTree], jax.Array]:
    """Returns `params -> mean cross-entropy` of the next tokens of some batches, traceable.

    >>> from model.presets import gpt2_tiny
    >>> model, tokens = Transformer(gpt2_tiny()), jnp.arange(16).reshape(2, 8)
    >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    >>> bool(loss_on(model, [tokens])(params) > 3)
    True
    """
    tokens = [jnp.asarray(batch) for batch in batches]
    count = sum(ids[:, 1:].size for ids in tokens)

    @jax.jit
    def loss(params: PyTree) -> jax.Array:
        total = jnp.float32(0)
        for ids in tokens:
            logits: Any = model.apply({"params": params}, ids[:, :-1])
            total += optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).sum()
        return total / count

    return loss


def _by_loss(rank: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def scores(model: Transformer, params: PyTree, batches: Batches, part: str) -> jax.Array:
        return rank(loss_on(model, batches), model.config, params, part)

    return scores


IMPORTANCE: dict[str, Callable[..., jax.Array]] = {
    "magnitude": lambda model, params, batches, part: by_magnitude(model.config, params, part),
    "activation": by_activation,
    "taylor": _by_loss(by_taylor),
    "loss": _by_loss(by_loss),
}
"""`(model, params, batches, part) -> importance`, by name."""
