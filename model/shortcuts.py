"""Shortcuts past the blocks: the embedding mixed in again, and values looked up by token.

Shapes: B batch, T time, D width, G key/value heads, K head width, V vocabulary, L layers, n layers
with a value embedding, C inputs of a value gate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from model.config import TransformerConfig
from model.linear import at_least_float32, linear, take, weight


class Beside(NamedTuple):
    """What a block reads besides the stream, in models that have such shortcuts.

    Attributes:
      start: [B, T, D], what entered the first block, normalised; for `embedding_shortcut`.
      value: [B, T, G, K] to be added to the values, or None in a layer without.
      gate: [C, G], the kernel of its gate.
      share: 0.0 or 1.0, whether the layer has one where all layers are one program; else None.
    """

    start: jax.Array | None = None
    value: jax.Array | None = None
    gate: jax.Array | None = None
    share: jax.Array | None = None


class Shortcut(nn.Module):
    """`a x + b e`: the stream with the embedding mixed in again, by two learned numbers."""

    start_b: float
    parameter_dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array, start_BTD: jax.Array) -> jax.Array:
        a, b = (
            weight(self, name, nn.initializers.constant(value), (), self.parameter_dtype)
            for name, value in (("stream_scale", 1.0), ("embedding_scale", self.start_b))
        )
        return a.astype(x_BTD.dtype) * x_BTD + b.astype(x_BTD.dtype) * start_BTD


class ValueTable(nn.Module):
    """The value embeddings of all layers that have one, as one table [V, n G K], and their gates.

    Kernels outside the blocks, so that optimizers of matrices leave them alone as they do the token
    embedding.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array, np.ndarray, np.ndarray]:
        """Returns values [B, T, n, G, K] and, by layer, gate [C, G], table and whether it has one.

        The gates start at 0, where `2 sigmoid` is 1.
        """
        c = self.config
        n, heads, dtype = len(c.value_layers), c.kv_heads_, jnp.dtype(c.parameter_dtype)
        normal = nn.initializers.normal(c.init_std)
        shape = (c.vocabulary_size, n * heads * c.head_width_)
        table = weight(self, "embedding", normal, shape, dtype, vocabulary_axis=0)
        zeros, shape = nn.initializers.zeros_init(), (c.value_gate_inputs, n * heads)
        gate = weight(self, "gate", zeros, shape, dtype)
        values = take(table, tokens_BT, jnp.dtype(c.dtype))
        gate_nCG = gate.reshape(c.value_gate_inputs, n, heads).transpose(1, 0, 2)
        table_L = np.searchsorted(c.value_layers, np.arange(c.layers))  # of the next that has one
        share_L = np.asarray(np.isin(np.arange(c.layers), c.value_layers), np.float32)
        shape_BTnGK = (*tokens_BT.shape, n, heads, c.head_width_)
        return values.reshape(shape_BTnGK), gate_nCG[table_L], table_L, share_L


def beside_of(layer: dict[str, Any], rows: dict[str, Any]) -> Beside:
    """What the block of a layer reads besides the stream."""
    if "values" not in rows:
        return Beside(rows.get("start"))
    table, share = layer["table"], layer["share"]
    if isinstance(share, np.floating):  # known while tracing: the other layers do nothing
        if not share:
            return Beside(rows.get("start"))
        return Beside(rows.get("start"), rows["values"][:, :, int(table)], layer["gate"])
    value = jax.lax.dynamic_index_in_dim(rows["values"], table, axis=2, keepdims=False)
    return Beside(rows.get("start"), value, layer["gate"], share)


def gated_value(x_BTD: jax.Array, beside: Beside) -> jax.Array:
    """Returns the value embedding times `2 sigmoid(x[:C] @ gate)`, one gate a head."""
    assert beside.value is not None
    assert beside.gate is not None
    gate_BTG = 2 * jax.nn.sigmoid(linear(x_BTD[..., : beside.gate.shape[0]], beside.gate))
    if beside.share is not None:
        gate_BTG = gate_BTG * beside.share.astype(gate_BTG.dtype)
    return gate_BTG[..., None] * beside.value


def unit_rms(x: jax.Array, epsilon: float) -> jax.Array:
    """Returns x [..., D] over the root of its mean square along D; in at least float32 inside.

    >>> unit_rms(jnp.array([3.0, 3.0]), 0.0).tolist()
    [1.0, 1.0]
    """
    y = x.astype(at_least_float32(x.dtype))
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)
