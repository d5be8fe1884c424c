"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

Shapes: B batch, T time, N heads, K head width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.linear import at_least_float32


class Rotation(NamedTuple):
    """Cosines and sines of the angles, both [B or 1, T, K / 2], float32."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions: jax.Array, head_width: int, base: float) -> Rotation:
    """Returns the angles for integer positions [B or 1, T]: `position * base^(-2i / K)`.

    >>> rotation(jnp.arange(3)[None], head_width=4, base=10_000.0).cos.shape
    (1, 3, 2)
    """
    exponent = jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width
    angles = positions[..., None].astype(jnp.float32) * (base**-exponent)[None, None]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x_BTNK: jax.Array, by: Rotation) -> jax.Array:
    """Turns pair (i, i + K/2) of every head by its angle (the pairing Llama's weights expect).

    >>> x = jnp.ones((1, 1, 1, 4))
    >>> bool((rotate(x, rotation(jnp.zeros((1, 1), int), 4, 10_000.0)) == x).all())
    True
    """
    dtype = at_least_float32(x_BTNK.dtype)
    cos, sin = (a[:, :, None, :].astype(dtype) for a in by)
    x, y = jnp.split(x_BTNK.astype(dtype), 2, axis=-1)
    turned = jnp.concatenate([x * cos - y * sin, y * cos + x * sin], axis=-1)
    return turned.astype(x_BTNK.dtype)
