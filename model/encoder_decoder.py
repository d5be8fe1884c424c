"""An encoder and a decoder of the same blocks (Vaswani et al. 2017, arXiv:1706.03762).

The encoder's blocks see the whole source: their prefix is the row. Those of the decoder also read
what the encoder made of it. Parameters are two stacks, `encoder/blocks/...` and
`decoder/blocks/...`; the tables of the vocabulary lie at the top, as those of `Transformer`.

Shapes: B batch, T target tokens, S source tokens, D width, V vocabulary, L layers of the decoder,
G key/value heads, K head width, N positions of any batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.attention import Attention, Visibility, across, dot_product_attention
from model.block import Block, BlockOutput, Constrain, Memory, no_constraint, norm
from model.cache import Cache
from model.config import EncoderDecoderConfig, TransformerConfig
from model.dropout import dropout_of, dropped
from model.head import logits_from, no_head_beside
from model.linear import take
from model.positions import rotation
from model.shortcuts import Beside, unit_rms
from model.stack import over_layers, remat, stacked
from model.transformer import Features, Table

CROSS = ("cross_k", "cross_v")
"""Parts of a cache that one call fills from the source and no later one changes."""


class EncoderDecoder(nn.Module):
    """A model of target tokens given source tokens, with the interface of `Transformer`.

    Attributes:
      config: shape and parts.
      attention: as in `Transformer`; it is also given queries and keys of different sequences.
      constrain: as in `Transformer`.

    >>> from model.presets import encoder_decoder_tiny
    >>> model = EncoderDecoder(encoder_decoder_tiny())
    >>> tokens = jnp.ones((2, 8), jnp.int32)
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> sorted(params), params["decoder"]["blocks"]["cross_attention"]["q"]["kernel"].shape
    (['decoder', 'encoder', 'token_embedding'], (2, 32, 32))
    >>> model.apply({"params": params}, tokens, source=tokens[:, :5]).shape
    (2, 8, 64)
    """

    config: EncoderDecoderConfig
    attention: Attention = dot_product_attention
    constrain: Constrain = no_constraint

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.parameter_dtype)
        normal = nn.initializers.normal(c.init_std)
        shape = (c.vocabulary_size, c.width)
        self.token_embedding = Table(shape, normal, "embedding", dtype, 0)
        if not c.tied_source:
            self.source_embedding = Table(shape, normal, "embedding", dtype, 0)
        no_head_beside(self, c.tied_head)
        if not c.tied_head:
            # Named by hand: `head` is a method here.
            self.head_table = Table(shape[::-1], normal, "kernel", dtype, 1, name="head")
        encoder = dataclasses.replace(c, layers=c.encoder_layers)
        self.encoder = Stack(encoder, False, self.attention, self.constrain)
        self.decoder = Stack(c, True, self.attention, self.constrain)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        source: jax.Array | None = None,
        source_segments: jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits [B, T, V]; see `features`. Without a source, tokens are their own."""
        final_BTD = self.features(
            tokens_BT,
            positions_BT,
            segments_BT,
            source=tokens_BT if source is None else source,
            source_segments=source_segments,
        ).final
        B, T, D = final_BTD.shape
        return self.head(final_BTD.reshape(B * T, D)).reshape(B, T, -1)

    def features(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: Cache | None = None,
        capture: Sequence[str] = (),
        source: jax.Array | None = None,
        source_segments: jax.Array | None = None,
        source_positions: jax.Array | None = None,
    ) -> Features:
        """Runs everything but the head.

        Args:
          tokens_BT: int32 ids of the target.
          positions_BT: int32, as in `Transformer.features`.
          segments_BT: int32, from 1; tokens see those of their own segment, and so of the source.
            By default all are 1.
          cache: from `model.cache.init_cache` together with a source, which fills it; or from an
            earlier call, without.
          capture: nothing can be captured.
          source: int32 [B, S] ids.
          source_segments: int32 [B, S], 0 for padding; by default all are 1.
          source_positions: int32 [B, S], by default the place in the row.

        Raises:
          ValueError: no source and no cache that knows one, or both; something to capture; segments
            together with a cache; rows longer than the learned positions.
        """
        c = self.config
        B, T = tokens_BT.shape
        self._check(T, source, segments_BT, cache, capture)
        dtype = jnp.dtype(c.dtype)
        states_BSD, filled = None, cache
        if source is not None:
            S = source.shape[1]
            if source_segments is None:
                source_segments = jnp.ones((B, S), jnp.int32)
            if source_positions is None:
                source_positions = jnp.arange(S)[None]
            table = self.token_embedding if c.tied_source else self.source_embedding
            whole = Visibility(segments=source_segments, prefix=jnp.full((B,), S, jnp.int32))
            embedded_BSD = take(table(), source, dtype)
            states_BSD, _ = self.encoder(embedded_BSD, source_positions, whole)
            if cache is not None:
                filled = {**cache, "source_segments": source_segments}
        elif cache is not None:
            source_segments = cache["source_segments"]
        assert source_segments is not None

        first_B = None if cache is None else cache["length"]
        if positions_BT is None:
            positions_BT = jnp.arange(T)[None]
            if first_B is not None:
                positions_BT = positions_BT + first_B[:, None]
        of_target = jnp.ones((B, T), jnp.int32) if segments_BT is None else segments_BT
        memory = Memory(across(of_target, source_segments), states_BSD)
        embedded_BTD = take(self.token_embedding(), tokens_BT, dtype)
        causal = Visibility(first_B, segments_BT)
        final_BTD, saved = self.decoder(embedded_BTD, positions_BT, causal, memory, cache)
        if cache is not None and filled is not None:
            filled = {**filled, **saved, "length": cache["length"] + T}
        return Features(final_BTD, cache=filled)

    def head(self, final_ND: jax.Array, padded: bool = False) -> jax.Array:
        """Returns logits [N, V] of normalised features [N, D]; see `model.head.logits_from`."""
        kernel_DV = self.token_embedding().T if self.config.tied_head else self.head_table()
        return logits_from(self.config, kernel_DV, final_ND, padded)

    def _check(self, T: int, source, segments_BT, cache: Cache | None, capture) -> None:
        c = self.config
        known = cache is not None and "source_segments" in cache
        if (source is not None) == known:
            raise ValueError(
                "the source was given again with a cache that knows it; leave it out"
                if known
                else "an encoder-decoder reads a source: give the batch `source` (and "
                "`source_segments`, 0 where it is padding), or a cache that an earlier call filled"
            )
        longest = max(T, 0 if source is None else source.shape[1])
        if c.positions == "learned" and longest > c.max_length:
            raise ValueError(
                f"{longest} tokens do not fit the {c.max_length} learned positions of this model; "
                "shorten the rows or train with a larger max_length"
            )
        if capture:
            raise ValueError(
                f"cannot capture {', '.join(capture)} of an encoder-decoder; use a decoder-only "
                "model, or leave out the loss that looks at it"
            )
        if cache is not None and segments_BT is not None:
            raise ValueError("segments and a cache do not go together: decode one document a row")


class Stack(nn.Module):
    """All blocks of one side, and the norm after them.

    Attributes:
      config: with the number of blocks of this side.
      reads: whether its blocks read a memory.
      attention: see `EncoderDecoder`.
      constrain: see there.
    """

    config: TransformerConfig
    reads: bool
    attention: Attention = dot_product_attention
    constrain: Constrain = no_constraint

    def setup(self):
        c = self.config
        self.blocks = stacked(self, _init_blocks, c, self.reads)
        self.final_norm = norm(c, "final_norm")
        if c.positions == "learned":
            normal = nn.initializers.normal(c.init_std)
            shape, dtype = (c.max_length, c.width), jnp.dtype(c.parameter_dtype)
            self.position_embedding = Table(shape, normal, "embedding", dtype)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        visibility: Visibility,
        memory: Memory | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Returns the normalised stream and what of the cache is by layer, with what is new."""
        c = self.config
        drops = c.dropout and self.has_rng("dropout")
        turn = None
        if c.positions == "learned":
            x_BTD = x_BTD + take(self.position_embedding(), positions_BT, x_BTD.dtype)
        else:
            turn = rotation(positions_BT, c.head_width_, c.rotary_base)
        if c.embedding_norm:
            x_BTD = unit_rms(x_BTD, c.norm_epsilon)
        x_BTD = dropped(x_BTD, dropout_of(self, c.dropout))
        x_BTD = self.constrain(x_BTD, ("batch", "time", "width"))
        # parent=None: the block is a function here, not a submodule with parameters of its own.
        block = Block(c, self.attention, self.constrain, parent=None)
        names = ("k", "v", *CROSS)
        layers = {
            "params": self.blocks,
            "key": jax.random.split(self.make_rng("dropout"), c.layers) if drops else None,
            "cache": None if cache is None else {n: cache[n] for n in names if n in cache},
        }

        def body(x_BTD: jax.Array, layer: dict[str, Any]) -> tuple[jax.Array, Any]:
            own, read = layer["cache"], memory
            if own is not None:
                if memory is not None and memory.states is None:
                    read = memory._replace(keys={name: own[name] for name in CROSS})
                own = {name: own[name] for name in ("k", "v")}
            args = (x_BTD, visibility, turn, own, Beside(), read)
            rngs = {} if layer["key"] is None else {"dropout": layer["key"]}
            made = block.apply({"params": layer["params"]}, *args, rngs=rngs)
            y_BTD, out = cast(tuple[jax.Array, BlockOutput], made)
            return self.constrain(y_BTD, ("batch", "time", "width")), out.cache

        y_BTD, saved = over_layers(c)(remat(body, c), x_BTD, layers)
        final_BTD = self.constrain(self.final_norm(y_BTD), ("batch", "branch", "width"))
        return final_BTD, {} if saved is None else saved


def _init_blocks(config: TransformerConfig, reads: bool) -> Callable[[jax.Array], Any]:
    """Returns the initializer of the stacked parameters of all blocks: every leaf [L, ...]."""

    def init(key: jax.Array) -> Any:
        block = Block(config, parent=None)
        x, one = jnp.zeros((1, 1, config.width), config.dtype), jnp.ones((1, 1), jnp.int32)
        turn = None
        if config.positions == "rotary":
            turn = rotation(0 * one, config.head_width_, config.rotary_base)
        memory = Memory(across(one, one), x) if reads else None
        args = (x, Visibility(), turn, None, Beside(), memory)
        keys = jax.random.split(key, config.layers)
        return jax.vmap(lambda k: block.init(k, *args)["params"])(keys)

    return init
