"""Shampoo: gradients times roots of their covariances, the roots shared out over the devices."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from model.lapack import one_by_one
from train.optimizers.matrix import MatrixSettings, frobenius, map_to
from train.optimizers.sides import for_each_matrix, moments_by_side, zeros_by_side

GRAFTS = ("adam", "none")


@dataclasses.dataclass(frozen=True)
class Shampoo(MatrixSettings):
    """Distributed Shampoo with Adam's step size, for the kernels of the blocks; AdamW for the rest.

    See `scale_by_shampoo`. The rate and frequency are those of the 124M run in the optimizer track
    of modded-nanogpt, the decay rates those of AlgoPerf's winner (Shi et al., arXiv 2309.06497).

    Attributes:
      shampoo_decay: what an update leaves of the two covariances.
      frequency: updates between two computations of the roots.
      exponent: of the two covariances together 2 * exponent; 0.25 is Shampoo's.
      graft: "adam" gives each matrix the norm of Adam's update, "none" leaves Shampoo's.
      root_eps: added to the eigenvalues, relative to the largest.
      largest_side: a side of more rows or columns is left alone.
    """

    learning_rate: float = 1.5e-3
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    shampoo_decay: float = 0.95
    frequency: int = 5
    exponent: float = 0.25
    graft: Literal["adam", "none"] = "adam"
    root_eps: float = 1e-6
    largest_side: int = 2048

    def direction(self) -> optax.GradientTransformation:
        """See `MatrixSettings.direction`."""
        return scale_by_shampoo(
            self.b1,
            self.b2,
            self.eps,
            shampoo_decay=self.shampoo_decay,
            frequency=self.frequency,
            exponent=self.exponent,
            graft=self.graft,
            root_eps=self.root_eps,
            largest_side=self.largest_side,
        )


class ShampooState(NamedTuple):
    """What Shampoo remembers.

    Attributes:
      count: updates made.
      mu, nu: Adam's moments.
      left, right: covariances of rows and columns, or [0].
      left_root, right_root: their inverse roots, or [0].
    """

    count: jax.Array  # type: ignore[assignment]
    mu: Any
    nu: Any
    left: Any
    right: Any
    left_root: Any
    right_root: Any


def scale_by_shampoo(
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    shampoo_decay: float = 0.95,
    frequency: int = 5,
    exponent: float = 0.25,
    graft: Literal["adam", "none"] = "adam",
    root_eps: float = 1e-6,
    largest_side: int = 2048,
) -> optax.GradientTransformation:
    """Preconditions by rows and columns (Gupta et al., arXiv 1802.09568).

    ::

        L <- s L + (1 - s) G G^T,    R <- s R + (1 - s) G^T G
        M <- b1 M + (1 - b1) G
        U = L^-e (M / (1 - b1^t)) R^-e          roots anew every `frequency` updates
        U <- U |A| / |U|                        A: Adam's update from the same M, with b2

    with running means, grafting and the computation of the roots shared out over all devices as in
    Distributed Shampoo (Shi et al., arXiv 2309.06497). Covariances are divided by ``1 - s^t``. A
    matrix with one side too large has ``e = 2 * exponent`` on the other.

    Args:
      b1, b2, eps: Adam's.
      shampoo_decay: s.
      frequency, exponent, graft, root_eps, largest_side: see `Shampoo`.

    Raises:
      ValueError: a value that does not fit.

    >>> tx = scale_by_shampoo(graft="none")
    >>> g = jnp.array([[2.0, 0.0], [0.0, 0.1]])
    >>> jnp.round(tx.update(g, tx.init(g))[0], 2).tolist()  # (g g^T)^-1/4 g (g^T g)^-1/4
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if frequency < 1 or largest_side < 1 or not exponent > 0 or not root_eps > 0:
        raise ValueError(
            "frequency and largest_side must be at least 1, exponent and root_eps positive, not "
            f"{frequency}, {largest_side}, {exponent} and {root_eps}"
        )
    if graft not in GRAFTS:
        raise ValueError(f"graft must be one of {', '.join(GRAFTS)}, not {graft!r}")

    def init(params):
        moments = [optax.tree.zeros_like(params, dtype=jnp.float32) for _ in range(2)]
        sides = [*zeros_by_side(params, largest_side), *zeros_by_side(params, largest_side)]
        return ShampooState(jnp.int32(0), *moments, *sides)

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        t = count.astype(jnp.float32)

        def one(g, mu, nu, left, right, left_root, right_root):
            g32 = g.astype(jnp.float32)
            mu = b1 * mu + (1 - b1) * g32
            nu = b2 * nu + (1 - b2) * jnp.square(g32)
            left, right = moments_by_side(g32, left, right, shampoo_decay)
            power = exponent * (1 if left.size and right.size else 2)

            def root(m):
                return _inverse_root(m / (1 - shampoo_decay**t), power, root_eps)

            left_root, right_root = jax.lax.cond(
                state.count % frequency == 0,
                lambda: (for_each_matrix(root, left), for_each_matrix(root, right)),
                lambda: (left_root, right_root),
            )
            mean = mu / (1 - b1**t)
            u = left_root @ mean if left_root.size else mean
            u = u @ right_root if right_root.size else u
            if graft == "adam":
                adam = mean / (jnp.sqrt(nu / (1 - b2**t)) + eps)
                u = u * (frobenius(adam) / jnp.maximum(frobenius(u), 1e-30))
            return u.astype(g.dtype), mu, nu, left, right, left_root, right_root

        updates, *parts = map_to(7, one, updates, *state[1:])
        return updates, ShampooState(count, *parts)

    return optax.GradientTransformation(init, update)


def _inverse_root(matrices: jax.Array, power: float, eps: float) -> jax.Array:
    """``(A + eps * largest eigenvalue)^-power`` of symmetric positive matrices [..., n, n].

    The identity for a matrix of zeros, of which nothing is known: a root is kept for many updates,
    and one that is as large as numbers go would blow up the first gradient that comes.
    """
    values, vectors = one_by_one(jnp.linalg.eigh, matrices)
    largest = values[..., -1:]
    floor = jnp.where(largest > 0, jnp.maximum(eps * largest, 1e-30), 1.0)
    return (vectors * (jnp.maximum(values, 0.0) + floor)[..., None, :] ** -power) @ vectors.mT
