"""MARS: AdamW on a gradient corrected by its change."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train.optimizers.matrix import MatrixSettings, map_to
from train.optimizers.settings import BoolRules
from train.optimizers.wide import wide


@dataclasses.dataclass(frozen=True)
class Mars(MatrixSettings):
    """MARS-AdamW, approximate (Yuan et al., arXiv 2411.10438, algorithm 2) for all matrices.

    ::

        c = g + gamma * b1 / (1 - b1) * (g - g_previous)
        c <- c / max(1, |c|)                                 over one matrix
        W <- W - rate * (adam(c; b1, b2) + weight_decay * W)

    Approximate: ``g_previous`` is the gradient of the previous batch at the previous weights, where
    the exact method computes it anew on this batch. As in the authors' code, embeddings and head
    are matrices too, and vectors get AdamW at half the rate.

    Attributes:
      gamma: share of the correction.
    """

    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    b1: float = 0.95
    b2: float = 0.99
    eps: float = 1e-8
    gamma: float = 0.025
    matrix_rules: BoolRules = (("kernel|embedding", True),)
    adam_learning_rate: float = 1.5e-3
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_weight_decay: float = 0.01

    def direction(self) -> optax.GradientTransformation:
        """See `MatrixSettings.direction`."""
        return optax.chain(
            correct_by_change(self.gamma * self.b1 / (1 - self.b1)),
            wide(optax.scale_by_adam(self.b1, self.b2, self.eps)),
        )


class ChangeState(NamedTuple):
    """Updates made, and the last gradient."""

    count: jax.Array  # type: ignore[assignment]
    previous: Any


def correct_by_change(factor: float) -> optax.GradientTransformation:
    """Adds a multiple of the gradient's change to it, and clips each matrix [..., m, n] to norm 1.

    Args:
      factor: of the change; the first gradient has none.

    >>> tx = correct_by_change(0.5)
    >>> _, state = tx.update(jnp.full((1, 1), 0.2), tx.init(jnp.zeros((1, 1))))
    >>> round(float(tx.update(jnp.full((1, 1), 0.4), state)[0][0, 0]), 3)
    0.5
    """

    def init(params):
        return ChangeState(jnp.int32(0), optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        def one(g, previous):
            change = jnp.where(state.count == 0, jnp.zeros_like(g), g - previous)
            corrected = g + factor * change
            norm = jnp.linalg.norm(corrected.astype(jnp.float32), axis=(-2, -1), keepdims=True)
            return (corrected / jnp.maximum(norm, 1.0).astype(g.dtype),)

        (corrected,) = map_to(1, one, updates, state.previous)
        return corrected, ChangeState(optax.safe_increment(state.count), updates)

    return optax.GradientTransformation(init, update)
