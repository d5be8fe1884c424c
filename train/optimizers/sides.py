"""The two sides of matrices: what Shampoo, SOAP and PSGD remember of rows and columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from parallel.spread import spread


def side_sizes(shape: tuple[int, ...], largest: int) -> tuple[int, int]:
    """Sizes of the rows' and the columns' own matrices; 0 for a side above the largest.

    >>> side_sizes((3, 8, 64), 32)
    (8, 0)
    """
    rows, columns = shape[-2:]
    return (rows if rows <= largest else 0), (columns if columns <= largest else 0)


def zeros_by_side(params: Any, largest: int) -> tuple[Any, Any]:
    """Zero matrices [..., m, m] and [..., n, n] for parameters [..., m, n]; [0] for a side without.

    Two trees like the parameters, with one array for each of them, so that state keeps their paths.
    """

    def of(side):
        def zeros(p):
            size = side_sizes(p.shape, largest)[side]
            return jnp.zeros((*p.shape[:-2], size, size) if size else (0,), jnp.float32)

        return jax.tree.map(zeros, params)

    return of(0), of(1)


def moments_by_side(
    g: jax.Array, left: jax.Array, right: jax.Array, decay: float
) -> tuple[jax.Array, jax.Array]:
    """The running means ``L <- decay L + (1 - decay) G G^T`` and ``R`` with ``G^T G``."""
    if left.size:
        left = decay * left + (1 - decay) * (g @ g.mT)
    if right.size:
        right = decay * right + (1 - decay) * (g.mT @ g)
    return left, right


def for_each_matrix(fn: Callable[..., jax.Array], *batches: jax.Array) -> jax.Array:
    """``fn`` of matrices [..., n, n] as [N, n, n], shared out over the devices of the mesh."""
    if not batches[0].size:
        return batches[0]
    flat = [b.reshape(-1, *b.shape[-2:]) for b in batches]
    return spread(fn, *flat).reshape(batches[0].shape)


def rotated(g: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """``left^T g right``, without the sides that have no matrix."""
    g = left.mT @ g if left.size else g
    return g @ right if right.size else g
