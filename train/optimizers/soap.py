"""SOAP: Adam in the eigenbasis of Shampoo."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from model.lapack import one_by_one
from train.optimizers.matrix import MatrixSettings, map_to
from train.optimizers.sides import for_each_matrix, moments_by_side, rotated, zeros_by_side


@dataclasses.dataclass(frozen=True)
class Soap(MatrixSettings):
    """Adam in the eigenbasis of Shampoo, for the kernels of the blocks; AdamW for the rest.

    See `scale_by_soap`. Defaults of the paper (Vyas et al., arXiv 2409.11321), but for the decay,
    which is that of Wen et al., arXiv 2509.02046. The first update only fills the bases.

    Attributes:
      shampoo_decay: what an update leaves of the two covariances.
      frequency: updates between two refreshes of the bases.
      largest_side: a side of more rows or columns keeps its own axes, as identity.
    """

    learning_rate: float = 3e-3
    b1: float = 0.95
    b2: float = 0.95
    eps: float = 1e-8
    shampoo_decay: float = 0.95
    frequency: int = 10
    largest_side: int = 2048

    def direction(self) -> optax.GradientTransformation:
        """See `MatrixSettings.direction`."""
        return scale_by_soap(
            self.b1,
            self.b2,
            self.eps,
            shampoo_decay=self.shampoo_decay,
            frequency=self.frequency,
            largest_side=self.largest_side,
        )


class SoapState(NamedTuple):
    """What SOAP remembers.

    Attributes:
      count: updates made.
      mu: mean gradient, in the parameter's own axes.
      nu: mean squared gradient, in the eigenbasis.
      left, right: covariances of rows and columns, or [0].
      left_basis, right_basis: their eigenvectors, in columns, or [0].
    """

    count: jax.Array  # type: ignore[assignment]
    mu: Any
    nu: Any
    left: Any
    right: Any
    left_basis: Any
    right_basis: Any


def scale_by_soap(
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    shampoo_decay: float = 0.95,
    frequency: int = 10,
    largest_side: int = 2048,
) -> optax.GradientTransformation:
    """Adam on rotated gradients (Vyas et al., arXiv 2409.11321, algorithms 3 and 4).

    ::

        G' = Q_L^T G Q_R
        M <- b1 M + (1 - b1) G,    V <- b2 V + (1 - b2) G' * G'
        U = Q_L [ (Q_L^T M Q_R / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps) ] Q_R^T
        L <- s L + (1 - s) G G^T,  R <- s R + (1 - s) G^T G
        every `frequency` updates: Q <- orthogonal factor of  L Q  (one power iteration)

    As in the authors' code, the first update is zero and takes the eigenvectors of its own L and R,
    and a refresh first sorts the columns of Q by ``diag(Q^T L Q)``, V along with them.

    Args:
      b1, b2, eps: Adam's.
      shampoo_decay: s.
      frequency: updates between refreshes, which are shared out over the devices of the mesh.
      largest_side: a side with more rows or columns is not rotated.

    Raises:
      ValueError: a frequency or a largest side below 1.

    >>> tx = scale_by_soap()
    >>> g = jnp.array([[0.0, 4.0], [-3.0, 0.0]])
    >>> _, state = tx.update(g, tx.init(g))
    >>> u, state = tx.update(g, state)  # the axes are its singular vectors, so this is Adam's
    >>> jnp.round(u, 3).tolist()
    [[0.0, 1.0], [-1.0, 0.0]]
    """
    if frequency < 1 or largest_side < 1:
        raise ValueError(
            f"frequency and largest_side must be at least 1, not {frequency} and {largest_side}"
        )

    def init(params):
        moments = [optax.tree.zeros_like(params, dtype=jnp.float32) for _ in range(2)]
        sides = [*zeros_by_side(params, largest_side), *zeros_by_side(params, largest_side)]
        return SoapState(jnp.int32(0), *moments, *sides)

    def update(updates, state, params=None):
        first = state.count == 0

        def one(g, mu, nu, left, right, left_basis, right_basis):
            g32 = g.astype(jnp.float32)
            mu = jnp.where(first, mu, b1 * mu + (1 - b1) * g32)
            in_basis = rotated(g32, left_basis, right_basis)
            nu = jnp.where(first, nu, b2 * nu + (1 - b2) * jnp.square(in_basis))
            mean = rotated(mu, left_basis, right_basis)
            t = jnp.maximum(state.count, 1).astype(jnp.float32)
            scaled = mean / (1 - b1**t) / (jnp.sqrt(nu / (1 - b2**t)) + eps)
            back = (b.mT if b.size else b for b in (left_basis, right_basis))
            u = jnp.where(first, 0.0, rotated(scaled, *back)).astype(g.dtype)
            left, right = moments_by_side(g32, left, right, shampoo_decay)
            kind = jnp.where(first, 2, (state.count % frequency == 0).astype(jnp.int32))
            nu, left_basis, right_basis = jax.lax.switch(
                kind, (_as_they_are, _refreshed, _fresh), nu, left, right, left_basis, right_basis
            )
            return u, mu, nu, left, right, left_basis, right_basis

        updates, *parts = map_to(7, one, updates, *state[1:])
        return updates, SoapState(optax.safe_increment(state.count), *parts)

    return optax.GradientTransformation(init, update)


def _as_they_are(nu, left, right, left_basis, right_basis):
    return nu, left_basis, right_basis


def _fresh(nu, left, right, left_basis, right_basis):
    """Eigenvectors, those of the largest eigenvalues first."""

    def vectors(matrices):
        return one_by_one(jnp.linalg.eigh, matrices)[1][..., ::-1]

    return nu, for_each_matrix(vectors, left), for_each_matrix(vectors, right)


def _refreshed(nu, left, right, left_basis, right_basis):
    """One power iteration from the bases, sorted by eigenvalue."""
    bases = []
    for matrices, basis, axis in ((left, left_basis, -2), (right, right_basis, -1)):
        if basis.size:
            values = jnp.einsum("...ij,...ik,...kj->...j", basis, matrices, basis)
            order = jnp.argsort(-values, axis=-1)
            nu = jnp.take_along_axis(nu, jnp.expand_dims(order, -3 - axis), axis=axis)
            basis = jnp.take_along_axis(basis, order[..., None, :], axis=-1)
            basis = for_each_matrix(
                lambda m, q: one_by_one(jnp.linalg.qr, m @ q)[0], matrices, basis
            )
        bases.append(basis)
    return nu, *bases
