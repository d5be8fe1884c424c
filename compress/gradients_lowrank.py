"""PowerSGD's share of `parallel.reduce_factored`: rank, warm start, orthogonalisation.

Shapes: L layers, [N, M] a matrix of gradients, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.lapack import one_by_one


class Factors(NamedTuple):
    """What a low-rank scheme decides.

    Attributes:
      rank: R.
      start: `(leaf number, L, M, dtype) -> Q [L, M, R]`, before the first step.
      orthogonalise: `P [L, N, R] -> [L, N, R]` with orthonormal columns.
    """

    rank: int
    start: Callable[[int, int, int, Any], jax.Array]
    orthogonalise: Callable[[jax.Array], jax.Array]


def power_sgd(rank: int, key: jax.Array) -> Factors:
    """Rank-R gradients by one step of a power iteration (Vogels et al. 2019, arXiv:1905.13727).

    The first Q is drawn from a standard normal distribution, later ones are the factor of the step
    before. Columns are made orthonormal by a QR decomposition (there: by Gram-Schmidt, the same up
    to signs), which gives unit vectors for a P of zeros: a matrix without gradient for one step,
    as behind a projection that starts at zero, is not lost for the steps after.

    Args:
      rank: R, 1 to 4 in the paper.
      key: for the first Q.

    Raises:
      ValueError: for a rank below 1.

    >>> factors = power_sgd(2, jax.random.key(0))
    >>> factors.start(0, 3, 8, jnp.float32).shape
    (3, 8, 2)
    >>> P = factors.orthogonalise(jax.random.normal(jax.random.key(1), (3, 5, 2)))
    >>> bool(jnp.allclose(P.mT @ P, jnp.eye(2), atol=1e-6))
    True
    """
    if rank < 1:
        raise ValueError(f"the rank is {rank}; it must be at least 1")

    def start(number: int, layers: int, columns: int, dtype: Any) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, number), (layers, columns, rank), dtype)

    def orthogonalise(p_LNR: jax.Array) -> jax.Array:
        return one_by_one(jnp.linalg.qr, p_LNR)[0]

    return Factors(rank, start, orthogonalise)
