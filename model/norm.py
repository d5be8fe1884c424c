"""LayerNorm and RMSNorm, computed in float32 whatever the type of the rest."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.linear import along_last, at_least_float32, weight


class Norm(nn.Module):
    """Normalises the last axis of x [..., D], then scales it, if scaled, and shifts it, if biased.

    LayerNorm: `scale * (x - mean(x)) / sqrt(var(x) + epsilon) + bias` (Ba et al. 2016,
    arXiv:1607.06450). RMSNorm: `scale * x / sqrt(mean(x^2) + epsilon)` (Zhang & Sennrich 2019,
    arXiv:1910.07467).
    """

    kind: Literal["layernorm", "rmsnorm"]
    epsilon: float
    biases: bool
    parameter_dtype: Any
    scaled: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = (x.shape[-1],)
        dtype = at_least_float32(x.dtype)
        y = x.astype(dtype)
        if self.kind == "layernorm":
            y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        if self.scaled:
            ones = nn.initializers.ones_init()
            y = y * along_last(weight(self, "scale", ones, width, self.parameter_dtype), y)
        if self.biases and self.kind == "layernorm":
            zeros = nn.initializers.zeros_init()
            y = y + along_last(weight(self, "bias", zeros, width, self.parameter_dtype), y)
        return y.astype(x.dtype)
