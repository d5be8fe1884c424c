"""Hyperball: steps along the sphere of each matrix's initial norm."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train.optimizers.matrix import MatrixSettings, frobenius, map_to
from train.optimizers.muon import Muon
from train.optimizers.stages import decayed
from train.optimizers.wide import wide

_START_RMS = 0.02  # GPT-2's initial deviation, for matrices that start at zero
_ON_SPHERE = 0.99  # of the radius; below it a matrix is still growing from zero


class HyperballState(NamedTuple):
    """Updates made, and the radius of each matrix [..., 1, 1]."""

    count: jax.Array  # type: ignore[assignment]
    radius: Any


def hyperball(
    direction: optax.GradientTransformation, learning_rate: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """Takes each matrix a share of its own norm along a direction, and back to that norm.

    ::

        W' = W - rate * R * u / |u|,    W <- R * W' / |W'|

    with ``|.|`` the Frobenius norm and R that of the initial matrix, so that the rate is an angle
    and weight decay has no part (Wen et al., "Fantastic pretraining optimizers and where to find
    them 2: hyperball optimization", 2025). A matrix that starts at zero has no sphere: its R is
    ``0.02 * sqrt(in * out)``, and it is left alone until it has grown to that norm.

    Args:
      direction: goes along the gradient; its size does not matter.
      learning_rate: update number -> rate.

    Returns:
      A transformation of matrices [..., in, out] whose updates are to be added.

    >>> tx = hyperball(optax.identity(), lambda step: 1.0)
    >>> weights = jnp.array([[3.0, 4.0]])
    >>> updates, _ = tx.update(jnp.array([[-8.0, 6.0]]), tx.init(weights), weights)
    >>> new = weights + updates
    >>> [round(float(x), 3) for x in (*new[0], jnp.linalg.norm(new))]
    [4.95, 0.707, 5.0]
    """
    direction = optax.with_extra_args_support(direction)

    def init(params):
        def radius(w):
            size = frobenius(w.astype(jnp.float32))
            return jnp.where(size > 0, size, _START_RMS * (w.shape[-2] * w.shape[-1]) ** 0.5)

        return direction.init(params), HyperballState(jnp.int32(0), jax.tree.map(radius, params))

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("hyperball needs the parameters: update(updates, state, params)")
        inner, own = state
        updates, inner = direction.update(updates, inner, params, **extra_args)
        rate = learning_rate(own.count)

        def one(u, w, radius):
            old, u32 = w.astype(jnp.float32), u.astype(jnp.float32)
            new = old - rate * radius * u32 / jnp.maximum(frobenius(u32), 1e-30)
            size = frobenius(new)
            bound = (frobenius(old) >= _ON_SPHERE * radius) | (size > radius)
            new = jnp.where(bound, new * (radius / jnp.maximum(size, 1e-30)), new)
            return ((new - old).astype(w.dtype),)

        (updates,) = map_to(1, one, updates, params, own.radius)
        return updates, (inner, HyperballState(optax.safe_increment(own.count), own.radius))

    return optax.GradientTransformationExtraArgs(init, update)


def _without_decay(settings: MatrixSettings) -> None:
    if settings.weight_decay:
        raise ValueError(
            f"weight_decay has no effect on matrices of constant norm; leave it 0 in "
            f"{type(settings).__name__}, not {settings.weight_decay} (adam_weight_decay is for the "
            "other parameters)"
        )


@dataclasses.dataclass(frozen=True)
class AdamH(MatrixSettings):
    """Adam's direction on the hyperball for the kernels of the blocks, AdamW for the rest.

    See `hyperball`. The rate is relative to the norm of the matrix; 0.018 is that of the tuned
    124M run in the optimizer track of modded-nanogpt.
    """

    learning_rate: float = 0.018
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _without_decay(self)

    def direction(self) -> optax.GradientTransformation:
        """See `MatrixSettings.direction`."""
        return wide(optax.scale_by_adam(self.b1, self.b2, self.eps))

    def matrix_part(self, schedule: optax.Schedule, params: Any) -> optax.GradientTransformation:
        """See `MatrixSettings.matrix_part`."""
        return hyperball(decayed(self.direction(), self, 0.0, params), schedule)


@dataclasses.dataclass(frozen=True)
class MuonH(Muon):
    """Muon's direction on the hyperball for the kernels of the blocks, AdamW for the rest.

    See `hyperball`. A rate for Muon of r with decay d is about ``sqrt(r * d)`` here.
    """

    learning_rate: float = 0.04  # sqrt(0.016 * 0.1), from Muon's
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _without_decay(self)

    def matrix_part(self, schedule: optax.Schedule, params: Any) -> optax.GradientTransformation:
        """See `MatrixSettings.matrix_part`."""
        return hyperball(decayed(self.orthogonal(), self, 0.0, params), schedule)
