"""Multi-token prediction as a method: further heads in the loss, none in what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from model.config import TransformerConfig
from model.flops import head_flops
from model.transformer import Transformer
from train.methods import Plugs, Setup
from train.mtp import multi_token, training_only, with_heads
from train.plugs import LossTerm, PyTree


@dataclass(frozen=True)
class MultiToken:
    """Predicts tokens after the next one as well (see `train.mtp`).

    Evaluations, exports and whoever opens the run see the model without these heads. Give it after
    methods that choose parameters by rule.

    Attributes:
      heads: tokens after the next one that are predicted.
      weight: of the first head's loss; the next one's is `decay` times that, and so on.
      decay: see `weight`.
      until: share of the run at whose end the weights have fallen to zero, in a straight line;
        1 keeps them as they are.
    """

    name: ClassVar[str] = "multi_token"
    heads: int = 1
    weight: float = 0.3
    decay: float = 0.5
    until: float = 1.0

    def __post_init__(self):
        if self.heads < 1:
            raise ValueError(f"heads is {self.heads}; it must be at least 1")
        if not self.weight > 0 or not 0 < self.decay <= 1 or not 0 < self.until <= 1:
            raise ValueError(
                f"weight {self.weight} must be positive, decay {self.decay} and until {self.until} "
                "above 0 and at most 1"
            )

    def training_flops_per_token(self, config: TransformerConfig) -> float:
        """Returns what the heads add to a training step for each token: a kernel and a head each.

        >>> from model.presets import gpt2
        >>> MultiToken().training_flops_per_token(gpt2()) / 3e6 > 77
        True
        """
        return 3.0 * self.heads * (2.0 * config.width**2 + head_flops(config))

    def build(self, setup: Setup) -> Plugs:
        """Adds kernels, loss terms, and the transform that hides them outside of training."""
        model, c = Transformer(setup.config), setup.config

        def split(params: PyTree) -> tuple[PyTree, PyTree]:
            return with_heads(params, self.heads, c.width, jnp.dtype(c.parameter_dtype)), {}

        def weight_of(k: int) -> Any:
            most = self.weight * self.decay ** (k - 1)
            if self.until == 1.0:
                return most

            def falling(step: jax.Array) -> jax.Array:
                done = step.astype(jnp.float32) / (self.until * setup.steps)
                return most * jnp.maximum(1 - done, 0.0)

            return falling

        def terms(so_far: tuple[LossTerm, ...]) -> tuple[LossTerm, ...]:
            further = range(1, self.heads + 1)
            return so_far + tuple(multi_token(model, k, weight_of(k)) for k in further)

        return Plugs(transforms=(training_only(),), terms=terms, split=split)
