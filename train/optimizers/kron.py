"""PSGD-Kron: a learned whitening of gradients, one triangular factor for each side."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.lax.linalg import triangular_solve

from model.lapack import one_by_one
from train.optimizers.matrix import MatrixSettings, map_to
from train.optimizers.sides import side_sizes


@dataclasses.dataclass(frozen=True)
class Kron(MatrixSettings):
    """PSGD with Kronecker factors for the kernels of the blocks, AdamW for the rest.

    See `scale_by_kron`. Rate, decay and preconditioner's rate are the tuned ones of Wen et al.,
    arXiv 2509.02046; the schedule of its updates is that of the reference implementation.

    Attributes:
      preconditioner_rate: step size of the factors.
      least_updates: share of the updates that also move the factors, in the end; every one does up
        to number 500, then exponentially fewer.
      largest_side: a side of more rows or columns has a diagonal factor.
      clip_rms: largest root mean square of a preconditioned matrix.
      seed: of the probes.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.5
    b1: float = 0.95
    preconditioner_rate: float = 0.2
    least_updates: float = 0.1
    largest_side: int = 2048
    clip_rms: float = 1.1
    seed: int = 0

    def direction(self) -> optax.GradientTransformation:
        """See `MatrixSettings.direction`."""
        return scale_by_kron(
            self.b1,
            preconditioner_rate=self.preconditioner_rate,
            least_updates=self.least_updates,
            largest_side=self.largest_side,
            clip_rms=self.clip_rms,
            seed=self.seed,
        )


class KronState(NamedTuple):
    """What PSGD remembers.

    Attributes:
      count: updates made.
      due: updates of the factors that are due; one is made when it reaches 1.
      mu: mean gradient.
      left, right: factors, upper triangular [..., m, m] or diagonal [..., m].
    """

    count: jax.Array  # type: ignore[assignment]
    due: jax.Array
    mu: Any
    left: Any
    right: Any


def scale_by_kron(
    b1: float = 0.95,
    *,
    preconditioner_rate: float = 0.2,
    least_updates: float = 0.1,
    largest_side: int = 2048,
    clip_rms: float = 1.1,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Preconditions by ``P = Q^T Q``, ``Q = Q_L x Q_R``, learned to whiten the momentum.

    ::

        M <- b1 M + (1 - b1) G,                M' = M / (1 - b1^t)
        A = Q_L M' Q_R^T,    B = Q_L^-T V Q_R^-1,    V ~ N(0, 1)
        Q_L <- Q_L - rate * triu(A A^T - B B^T) Q_L / |A A^T + B B^T|
        Q_R <- Q_R - rate * triu(A^T A - B^T B) Q_R / |A^T A + B^T B|
        U = Q_L^T Q_L M' Q_R^T Q_R,            U <- U min(1, clip / rms(U))

    The factors rest where ``E[A A^T] = E[B B^T]``, that is, where ``P E[m m^T] P = 1`` (Li, arXiv
    1512.04202 and 1803.09383; the schedule of the reference implementation is
    ``max(least, exp(-0.001 (t - 500)))``, here by a running sum in place of a draw). ``|.|`` is a
    bound from below, the spectral norm seen by the longest column. After an update both factors are
    given the same largest element, which leaves P as it is.

    Args:
      b1: what an update leaves of the momentum.
      preconditioner_rate, least_updates, largest_side, clip_rms, seed: see `Kron`.

    Raises:
      ValueError: a value out of range.

    >>> tx = scale_by_kron()
    >>> g = jnp.ones((2, 3))
    >>> tx.init(g).left.tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if not (0 < preconditioner_rate < 1 and 0 < least_updates <= 1):
        raise ValueError(
            "preconditioner_rate must lie between 0 and 1 and least_updates be at most 1 and "
            f"positive, not {preconditioner_rate} and {least_updates}"
        )
    if largest_side < 1 or not clip_rms > 0:
        raise ValueError(
            f"largest_side must be at least 1 and clip_rms positive, not {largest_side} "
            f"and {clip_rms}"
        )

    def init(params):
        def ones(side):
            def of(p):
                batch, size = p.shape[:-2], p.shape[-2 + side]
                if not side_sizes(p.shape, largest_side)[side]:
                    return jnp.ones((*batch, size), jnp.float32)
                return jnp.broadcast_to(jnp.eye(size, dtype=jnp.float32), (*batch, size, size))

            return jax.tree.map(of, params)

        mu = optax.tree.zeros_like(params, dtype=jnp.float32)
        return KronState(jnp.int32(0), jnp.float32(0), mu, ones(0), ones(1))

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        t = count.astype(jnp.float32)
        due = state.due + jnp.clip(jnp.exp(-0.001 * (t - 500)), least_updates, 1.0)
        # of sums of tenths, 1 - 1e-6 is what rounding leaves of 1
        now = due >= 1.0 - 1e-6
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g.astype(jnp.float32), state.mu, updates)
        key = jax.random.fold_in(jax.random.key(seed), state.count)

        def one(g, m, left, right):
            m = m / (1 - b1**t)
            left, right = jax.lax.cond(
                now,
                lambda: _learned(m, left, right, key, preconditioner_rate),
                lambda: (left, right),
            )
            u = _applied(_applied(m, left, right), left, right, transposed=True)
            rms = jnp.sqrt(jnp.square(u).mean(axis=(-2, -1), keepdims=True))
            u = u * jnp.minimum(1.0, clip_rms / jnp.maximum(rms, 1e-30))
            return u.astype(g.dtype), left, right

        updates, left, right = map_to(3, one, updates, mu, state.left, state.right)
        due = due - now.astype(jnp.float32)
        return updates, KronState(count, due, mu, left, right)

    return optax.GradientTransformation(init, update)


def _applied(
    x: jax.Array, left: jax.Array, right: jax.Array, transposed: bool = False
) -> jax.Array:
    """``Q_L x Q_R^T``, or ``Q_L^T x Q_R``."""
    full = left.ndim == x.ndim
    x = (left.mT if transposed else left) @ x if full else left[..., :, None] * x
    if right.ndim == x.ndim:
        return x @ (right if transposed else right.mT)
    return x * right[..., None, :]


def _learned(
    m: jax.Array, left: jax.Array, right: jax.Array, key: jax.Array, rate: float
) -> tuple[jax.Array, jax.Array]:
    """One step of both factors, and none where there has been no gradient: they would grow on and
    on, to whiten nothing."""
    seen = (m != 0).any(axis=(-2, -1))
    before = left, right
    a = _applied(m, left, right)
    # The same probe for all matrices of a shape, whether they lie in one stack or in several.
    probe = jnp.broadcast_to(jax.random.normal(key, m.shape[-2:], jnp.float32), m.shape)
    if left.ndim == m.ndim:
        b = one_by_one(
            functools.partial(triangular_solve, left_side=True, transpose_a=True), left, probe
        )
    else:
        b = probe / left[..., :, None]
    full = right.ndim == m.ndim
    b = one_by_one(triangular_solve, right, b) if full else b / right[..., None, :]
    left = _stepped(left, a, b, rate, m.ndim)
    right = _stepped(right, a.mT, b.mT, rate, m.ndim)
    sizes = [jnp.abs(q).max(axis=tuple(range(m.ndim - 2, q.ndim))) for q in (left, right)]
    shared = jnp.sqrt(sizes[0] * sizes[1])

    def scaled(q, size):
        return q * (shared / size).reshape(*size.shape, *[1] * (q.ndim - size.ndim))

    after = scaled(left, sizes[0]), scaled(right, sizes[1])

    def where_seen(new, old):
        return jnp.where(seen.reshape(*seen.shape, *[1] * (new.ndim - seen.ndim)), new, old)

    return where_seen(after[0], before[0]), where_seen(after[1], before[1])


def _stepped(q: jax.Array, a: jax.Array, b: jax.Array, rate: float, ndim: int) -> jax.Array:
    """``q - rate * triu(a a^T - b b^T) q / |a a^T + b b^T|``, or its diagonal form."""
    # The ratio is the same for any scale of both; near 1 their squares neither over- nor underflow.
    largest = [jnp.abs(x).max(axis=(-2, -1), keepdims=True) for x in (a, b)]
    scale = jnp.maximum(jnp.maximum(*largest), 1e-30)
    a, b = a / scale, b / scale
    if q.ndim < ndim:
        aa, bb = jnp.square(a).sum(-1), jnp.square(b).sum(-1)
        return q - rate * (aa - bb) / jnp.maximum((aa + bb).max(-1, keepdims=True), 1e-30) * q
    aa, bb = a @ a.mT, b @ b.mT
    bound = jnp.maximum(_norm_from_below(aa + bb), 1e-30)
    return q - rate / bound * (jnp.triu(aa - bb) @ q)


def _norm_from_below(s: jax.Array) -> jax.Array:
    """A lower bound on the spectral norm of symmetric matrices, [..., 1, 1]."""
    lengths = jnp.linalg.norm(s, axis=-2)
    longest = jnp.take_along_axis(s, lengths.argmax(-1)[..., None, None], axis=-1)
    size = jnp.maximum(jnp.linalg.norm(longest, axis=(-2, -1), keepdims=True), 1e-30)
    return jnp.linalg.norm(s @ (longest / size), axis=(-2, -1), keepdims=True)
