"""Less work in training: blocks that are left out at random, and tokens that pass by them.

Both wrap the function that runs one block, `(x, beside) -> (x, out)`, where `beside` holds what the
block reads of each row. Neither changes a parameter, and without a key neither is there.

Shapes: B batch, T time, R tokens that stay, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Rows = Any
RunBlock = Callable[[jax.Array, Rows], tuple[jax.Array, Any]]


def survival(layers: int, rate: float) -> np.ndarray:
    """Returns the chance of each block to stay: `1 - rate * l / L` for l from 1 to L.

    Early blocks make what all later ones read, so they go least often (Huang et al. 2016,
    arXiv:1603.09382, equation 4).

    >>> [round(float(chance), 2) for chance in survival(4, 0.4)]
    [0.9, 0.8, 0.7, 0.6]
    """
    return np.asarray(1 - rate * np.arange(1, layers + 1) / layers, np.float32)


def sometimes(block: RunBlock, chance: jax.Array, key: jax.Array) -> RunBlock:
    """Returns the block that is the identity with probability `1 - chance`, for the whole batch.

    Otherwise what it adds is divided by `chance`, so that the expected stream is that of the model
    without dropping. The work is really saved: the program branches. It gives no `out`.

    >>> block = lambda x, beside: (x + 2.0, None)
    >>> drawn = [sometimes(block, jnp.float32(0.5), jax.random.key(i)) for i in range(8)]
    >>> sorted({float(run(jnp.zeros(1), None)[0][0]) for run in drawn})
    [0.0, 4.0]
    """

    def run(x: jax.Array, beside: Rows) -> tuple[jax.Array, None]:
        def stays(x: jax.Array) -> jax.Array:
            return x + (block(x, beside)[0] - x) / chance.astype(x.dtype)

        return jax.lax.cond(jax.random.bernoulli(key, chance), stays, lambda x: x, x), None

    return run


def kept_tokens(length: int, rate: float) -> int:
    """Returns how many of `length` tokens a block with `token_drop` sees.

    >>> kept_tokens(128, 0.25), kept_tokens(2, 0.9)
    (96, 1)
    """
    return max(1, round(length * (1 - rate)))


def thinned(block: RunBlock, rate: float, key: jax.Array) -> RunBlock:
    """Returns the block that sees only some tokens of each row, the others passing by unchanged.

    Which ones is drawn for each row; they keep their order, their positions and their segments, so
    attention stays causal (Yao et al. 2022, arXiv:2211.11586). It gives no `out`.

    Args:
      block: `(x [B, T, D], beside) -> (x, out)`; leaves of `beside` are [B or 1, T, ...].
      rate: share of the tokens that pass by.
      key: of the draw.

    >>> block = lambda x, beside: (x + 1.0, None)
    >>> float(thinned(block, 0.75, jax.random.key(0))(jnp.zeros((1, 8, 1)), {})[0].sum())
    2.0
    """

    def run(x_BTD: jax.Array, beside: Rows) -> tuple[jax.Array, None]:
        B, T = x_BTD.shape[:2]
        order_BT = jnp.argsort(jax.random.uniform(key, (B, T)), axis=1)
        stay_BR = jnp.sort(order_BT[:, : kept_tokens(T, rate)], axis=1)

        def of(a: jax.Array) -> jax.Array:
            wide = jnp.broadcast_to(a, (B, *a.shape[1:]))
            index = stay_BR.reshape(*stay_BR.shape, *[1] * (a.ndim - 2))
            return jnp.take_along_axis(wide, index, axis=1)

        y_BRD, _ = block(of(x_BTD), jax.tree.map(of, beside))
        return x_BTD.at[jnp.arange(B)[:, None], stay_BR].set(y_BRD), None

    return run
