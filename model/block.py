"""One block: attention and feed-forward, each normalised before and added to the stream.

Shapes: B batch, T time, D width, H query heads, G key/value heads, K head width, F feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from model import cache as kv
from model.attention import Attention, Visibility, dot_product_attention
from model.config import TransformerConfig
from model.dropout import dropout_of, dropped
from model.linear import Linear, recomputed_on_gpu
from model.norm import Norm
from model.positions import Rotation, rotate
from model.prefix import KEY as PREFIX
from model.prefix import attend_with_prefix
from model.shortcuts import Beside, Shortcut, gated_value

# name -> (function, whether it multiplies a gate with a second product)
ACTIVATIONS: dict[str, tuple[Callable[[jax.Array], jax.Array], bool]] = {
    "gelu": (jax.nn.gelu, False),
    "gelu_exact": (lambda x: jax.nn.gelu(x, approximate=False), False),
    "relu_squared": (lambda x: jnp.square(jax.nn.relu(x)), False),
    "swiglu": (jax.nn.silu, True),
}


Constrain = Callable[[jax.Array, tuple[str, ...]], jax.Array]
"""`(array, logical axis names) -> array`: how a mesh lays out activations."""


def no_constraint(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The `Constrain` of a model that is not laid out on a mesh."""
    return x


class BlockOutput(NamedTuple):
    """What a block gives beside the stream: its new cache and whatever was to be captured."""

    cache: dict[str, jax.Array] | None
    captured: dict[str, jax.Array]


class Memory(NamedTuple):
    """What a block of a decoder reads of the source.

    Attributes:
      visibility: which of its tokens each query sees, see `model.attention.across`.
      states: [B, S, D], the output of the encoder; or None, and then
      keys: {"cross_k", "cross_v": [B, S, G, K]} that an earlier call has made of it.
    """

    visibility: Visibility
    states: jax.Array | None = None
    keys: dict[str, jax.Array] | None = None


class SelfAttention(nn.Module):
    """Projects to heads, attends, projects back: [B, T, D] -> [B, T, D]."""

    config: TransformerConfig
    attention: Attention = dot_product_attention
    constrain: Constrain = no_constraint

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        visibility: Visibility,
        turn: Rotation | None,
        cache: dict[str, jax.Array] | None,
        beside: Beside = Beside(),  # noqa: B008 (an immutable tuple)
    ) -> tuple[jax.Array, dict[str, jax.Array] | None, dict[str, jax.Array]]:
        c = self.config
        B, T, D = x_BTD.shape
        heads = {"q": c.heads, "k": c.kv_heads_, "v": c.kv_heads_}
        by_head = ("batch", "branch", "heads", "head_width")
        q, k, v = (
            self.constrain(
                _linear(c, name, n * c.head_width_)(x_BTD).reshape(B, T, n, c.head_width_), by_head
            )
            for name, n in heads.items()
        )
        if beside.value is not None:
            v = v + self.constrain(gated_value(x_BTD, beside), by_head)
        if c.qk_norm:
            q, k = norm(c, "q_norm", "rmsnorm")(q), norm(c, "k_norm", "rmsnorm")(k)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        captured = {"q": q, "k": k, "v": v}
        if cache is not None:
            assert visibility.first is not None
            k, v = (
                kv.write(cache[name], new, visibility.first) for name, new in (("k", k), ("v", v))
            )
            cache = {"k": k, "v": v}
        dropout = dropout_of(self, c.dropout)
        keys = (q, k.astype(q.dtype), v.astype(q.dtype), visibility, dropout)
        if self.has_variable("params", PREFIX):  # trained beside the weights, in no config
            prefix: Any = self.get_variable("params", PREFIX)
            y = attend_with_prefix(self.attention, *keys, prefix)
        else:
            y = self.attention(*keys)
        y = self.constrain(y, by_head)
        y = y.reshape(B, T, c.heads * c.head_width_)
        return _linear(c, "o", D, projection=True)(y), cache, captured


class CrossAttention(nn.Module):
    """Queries of the stream, keys and values of the source: [B, T, D] -> [B, T, D]."""

    config: TransformerConfig
    attention: Attention = dot_product_attention
    constrain: Constrain = no_constraint

    @nn.compact
    def __call__(self, x_BTD: jax.Array, memory: Memory) -> tuple[jax.Array, dict[str, jax.Array]]:
        c = self.config
        by_head = ("batch", "branch", "heads", "head_width")

        def heads(name: str, n: int, of: jax.Array) -> jax.Array:
            y = _linear(c, name, n * c.head_width_)(of)
            return self.constrain(y.reshape(*y.shape[:2], n, c.head_width_), by_head)

        q = heads("q", c.heads, x_BTD)
        q = norm(c, "q_norm", "rmsnorm")(q) if c.qk_norm else q
        keys = memory.keys
        if memory.states is not None:
            k, v = (heads(name, c.kv_heads_, memory.states) for name in ("k", "v"))
            k = norm(c, "k_norm", "rmsnorm")(k) if c.qk_norm else k
            keys = {"cross_k": k, "cross_v": v}
        assert keys is not None
        dropout = dropout_of(self, c.dropout)
        k, v = (keys[name].astype(q.dtype) for name in ("cross_k", "cross_v"))
        y = self.constrain(self.attention(q, k, v, memory.visibility, dropout), by_head)
        y = y.reshape(*x_BTD.shape[:2], c.heads * c.head_width_)
        return _linear(c, "o", x_BTD.shape[-1], projection=True)(y), keys


class FeedForward(nn.Module):
    """Two kernels around an activation, or three with a gate: [B, T, D] -> [B, T, D]."""

    config: TransformerConfig
    constrain: Constrain = no_constraint

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        activate, gated = ACTIVATIONS[c.activation]
        activate = recomputed_on_gpu(activate)
        h_BTF = _linear(c, "up", c.ffn_width_)(x_BTD)
        if gated:
            h_BTF = activate(_linear(c, "gate", c.ffn_width_)(x_BTD)) * h_BTF
        else:
            h_BTF = activate(h_BTF)
        h_BTF = self.constrain(h_BTF, ("batch", "branch", "ffn"))
        return _linear(c, "down", x_BTD.shape[-1], projection=True)(h_BTF)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    With a memory, x + cross_attention(norm(x), memory) between them.
    """

    config: TransformerConfig
    attention: Attention = dot_product_attention
    constrain: Constrain = no_constraint

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        visibility: Visibility,
        turn: Rotation | None,
        cache: dict[str, jax.Array] | None,
        beside: Beside | None = None,
        memory: Memory | None = None,
    ) -> tuple[jax.Array, BlockOutput]:
        c = self.config
        if beside is None:
            if c.embedding_shortcut is not None or c.value_embeddings:
                raise ValueError(
                    "the blocks of this model read the embedding or value embeddings besides the "
                    "stream, and here they run on the stream alone; use a model without "
                    "embedding_shortcut and value_embeddings"
                )
            beside = Beside()

        def drop(y_BTD: jax.Array) -> jax.Array:
            return dropped(y_BTD, dropout_of(self, c.dropout))

        # Time may be divided in the stream that is not inside a branch, where heads are.
        inside, stream = ("batch", "branch", "width"), ("batch", "time", "width")

        if c.embedding_shortcut is not None:
            dtype = jnp.dtype(c.parameter_dtype)
            mix = Shortcut(c.embedding_shortcut, dtype, name="shortcut")
            assert beside.start is not None
            x_BTD = mix(x_BTD, beside.start)
        h_BTD = self.constrain(norm(c, "attention_norm")(x_BTD), inside)
        attend = SelfAttention(c, self.attention, self.constrain, name="attention")
        y_BTD, cache, captured = attend(h_BTD, visibility, turn, cache, beside)
        x_BTD = x_BTD + drop(self.constrain(y_BTD, stream))

        if memory is not None:
            h_BTD = self.constrain(norm(c, "cross_attention_norm")(x_BTD), inside)
            read = CrossAttention(c, self.attention, self.constrain, name="cross_attention")
            y_BTD, keys = read(h_BTD, memory)
            cache = None if cache is None else {**cache, **keys}
            x_BTD = x_BTD + drop(self.constrain(y_BTD, stream))

        h_BTD = self.constrain(norm(c, "mlp_norm")(x_BTD), inside)
        y_BTD = FeedForward(c, self.constrain, name="mlp")(h_BTD)
        return x_BTD + drop(self.constrain(y_BTD, stream)), BlockOutput(cache, captured)


def norm(config: TransformerConfig, name: str, kind: Any = None) -> Norm:
    """Returns the norm that `config` asks for, or one of `kind`."""
    kind = config.norm if kind is None else kind
    dtype = jnp.dtype(config.parameter_dtype)
    return Norm(kind, config.norm_epsilon, config.biases, dtype, config.norm_scale, name=name)


def _linear(
    config: TransformerConfig, name: str, width: int, *, projection: bool = False
) -> Linear:
    std = config.init_std
    if projection:  # GPT-2: keeps the variance of the stream from growing with depth
        std = 0.0 if config.zero_init_projections else std * (2 * config.layers) ** -0.5
    init = nn.initializers.normal(std) if std else nn.initializers.zeros_init()
    return Linear(width, init, config.biases, jnp.dtype(config.parameter_dtype), name=name)
