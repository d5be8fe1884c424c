"""The Transformer language model: pure functions of (variables, tokens) behind one Linen module.

All blocks are one stack of parameters, `blocks/...` with a leading layer axis; whether they run
under `lax.scan` or in a Python loop is a setting and changes no parameter.

Shapes: B batch, T time, D width, V vocabulary, L layers, N positions of any batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from model.attention import Attention, Visibility, dot_product_attention
from model.bigrams import BigramTable, tokens_before, tokens_before_cached
from model.block import (
    Block,
    BlockOutput,
    Constrain,
    no_constraint,
    norm,
)
from model.cache import Cache
from model.config import TransformerConfig
from model.drop import RunBlock, sometimes, survival, thinned
from model.dropout import dropout_of, dropped
from model.head import logits_from, no_head_beside
from model.linear import take, weight
from model.lookup import Form
from model.positions import rotation
from model.shortcuts import Beside, ValueTable, beside_of, unit_rms
from model.stack import ends_whole, over_layers, remat, stacked

CAPTURES = ("hidden", "attention")
Stage = Callable[[Any, Any], Any]
"""`(layers, rows) -> rows`: some layers of the stack (leaves [L', ...]), run on some rows."""


class Features(NamedTuple):
    """What the blocks compute.

    Attributes:
      final: [B, T, D], normalised; what the head reads.
      hidden: [L + 1, B, T, D], the stream before each block and after the last, if captured.
      attention: {"q": [L, B, T, H, K], "k": ..., "v": ...} as attended with, if captured.
      cache: the cache with the new tokens in it, if one was given.
    """

    final: jax.Array
    hidden: jax.Array | None = None
    attention: dict[str, jax.Array] | None = None
    cache: Cache | None = None


class Model(Protocol):
    """What the rest of the code asks of a model: see `Transformer`, `EncoderDecoder`."""

    @property
    def config(self) -> TransformerConfig:
        """Shape and parts."""

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Draws the variables."""

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs a method of the model on variables."""


class Transformer(nn.Module):
    """A decoder-only language model.

    Attributes:
      config: shape and parts.
      attention: the attention function, `model.attention.dot_product_attention` by default; ring or
        fused attention is passed in here.
      constrain: `(array, logical axis names) -> array`, applied to the stream after the embedding
        and after each block, and to what lies between the products of a block; a mesh lays out
        activations through it.
      pipeline: how the stack is run, or None for layer after layer: gets the function that runs
        some layers on some rows, and returns the one that runs all layers on all rows.
      lookup: how the gradients of the embeddings are made, see `model.lookup`; None for what suits
        the platform.

    >>> from model.presets import gpt2_tiny
    >>> model = Transformer(gpt2_tiny())
    >>> tokens = jnp.zeros((2, 8), jnp.int32)
    >>> variables = model.init(jax.random.key(0), tokens)
    >>> variables["params"]["blocks"]["attention"]["q"]["kernel"].shape
    (2, 32, 32)
    >>> model.apply(variables, tokens).shape
    (2, 8, 64)
    """

    config: TransformerConfig
    attention: Attention = dot_product_attention
    constrain: Constrain = no_constraint
    pipeline: Callable[[Stage], Stage] | None = None
    lookup: Form | None = None

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.parameter_dtype)
        normal = nn.initializers.normal(c.init_std)
        self.token_embedding = Table((c.vocabulary_size, c.width), normal, "embedding", dtype, 0)
        if c.positions == "learned":
            self.position_embedding = Table((c.max_length, c.width), normal, "embedding", dtype)
        if c.value_embeddings:
            self.value_embedding = ValueTable(c)
        if c.bigram_rows is not None:
            self.bigram_embedding = BigramTable(c, self.lookup)
        self.blocks = stacked(self, _init_blocks, c)
        self.final_norm = norm(c, "final_norm")
        no_head_beside(self, c.tied_head)
        if not c.tied_head:
            # Named by hand: `head` is a method here.
            shape = (c.width, c.vocabulary_size)
            self.head_table = Table(shape, normal, "kernel", dtype, 1, name="head")

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits [B, T, V] for token ids [B, T]; see `features`."""
        final_BTD = self.features(tokens_BT, positions_BT, segments_BT).final
        B, T, D = final_BTD.shape
        return self.head(final_BTD.reshape(B * T, D)).reshape(B, T, -1)

    def features(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: Cache | None = None,
        capture: Sequence[str] = (),
        prefix: jax.Array | None = None,
    ) -> Features:
        """Runs everything but the head.

        Args:
          tokens_BT: int32 ids.
          positions_BT: int32 position of each token, by default its place in the row (after what
            the cache holds).
          segments_BT: int32 document of each token; tokens see their own document only.
          cache: from `model.cache.init_cache` or an earlier call; the tokens follow what it holds.
          capture: any of "hidden", "attention".
          prefix: int32 [B], tokens at the start of each row that see each other, and are seen by
            all: a prefix LM (Raffel et al. 2020, arXiv:1910.10683). Or int32 [B, T], 1 for the
            tokens of prefixes, each seen in its own segment. With a cache, a prefix has to go in
            with one call.

        Raises:
          ValueError: if the row is longer than the learned positions, a name in `capture` is
            unknown, segments are given together with a cache, tokens of a prefix would pass by
            blocks, or a pipeline is asked for a cache or captures.
        """
        c = self.config
        B, T = tokens_BT.shape
        self._check(T, segments_BT, cache, capture, prefix)
        first_B = None if cache is None else cache["length"]
        before_BT, ids_BS = None, None
        if c.bigram_rows is not None and cache is not None:
            before_BT, ids_BS = tokens_before_cached(tokens_BT, cache)
        elif c.bigram_rows is not None:
            before_BT = tokens_before(tokens_BT, positions_BT, segments_BT)
        counted = positions_BT is not None or cache is not None  # else from 0, the same in all rows
        if positions_BT is None:
            positions_BT = jnp.arange(T)[None]
            if first_B is not None:
                positions_BT = positions_BT + first_B[:, None]
        dtype = jnp.dtype(c.dtype)
        x_BTD = take(self.token_embedding(), tokens_BT, dtype, self.lookup)
        if c.positions == "learned":
            x_BTD = x_BTD + take(self.position_embedding(), positions_BT, dtype, self.lookup)
        if before_BT is not None:
            x_BTD = x_BTD + self.bigram_embedding(tokens_BT, before_BT)
        if c.embedding_norm:
            x_BTD = unit_rms(x_BTD, c.norm_epsilon)
        drops = c.random and self.has_rng("dropout")
        x_BTD = dropped(x_BTD, dropout_of(self, c.dropout))
        x_BTD = self.constrain(x_BTD, ("batch", "time", "width"))

        # parent=None: the block is a function here, not a submodule with parameters of its own.
        block = Block(c, self.attention, self.constrain, parent=None)
        layers = {
            "params": self.blocks,
            "key": jax.random.split(self.make_rng("dropout"), c.layers) if drops else None,
            # Numbers of NumPy stay plain numbers in a Python loop over layers.
            "window": np.array(c.window) if isinstance(c.window, tuple) else None,
            "survival": survival(c.layers, c.layer_drop) if c.layer_drop and drops else None,
            "cache": None if cache is None else {"k": cache["k"], "v": cache["v"]},
        }
        if c.value_embeddings:
            values_BTnGK, gate_LCG, table_L, share_L = self.value_embedding(tokens_BT)
            layers |= {"gate": gate_LCG, "table": table_L, "share": share_L}

        def run(layers: Any, rows: Any) -> tuple[jax.Array, dict[str, Any]]:
            names = ("segments", "start", "values", "prefix")
            beside = {name: rows[name] for name in names if name in rows}
            if c.positions == "rotary":
                places_BT = rows.get("positions", jnp.arange(T)[None])
                beside["turn"] = rotation(places_BT, c.head_width_, c.rotary_base)

            def body(x_BTD: jax.Array, layer: dict[str, Any], token_drop: float = 0.0):
                window: Any = c.window if layer["window"] is None else layer["window"]
                window = int(window) if isinstance(window, np.integer) else window
                key = layer["key"]

                def run_block(x_BTD: jax.Array, beside: Any) -> tuple[jax.Array, BlockOutput]:
                    seen = (first_B, beside.get("segments"), window, beside.get("prefix"))
                    visibility = Visibility(*seen)
                    more = beside_of(layer, beside)
                    turn, rngs = beside.get("turn"), {} if key is None else {"dropout": key}
                    args = (x_BTD, visibility, turn, layer["cache"], more)
                    made = block.apply({"params": layer["params"]}, *args, rngs=rngs)
                    return cast(tuple[jax.Array, BlockOutput], made)

                runs: RunBlock = run_block
                if token_drop:
                    runs = thinned(runs, token_drop, jax.random.fold_in(key, 1))
                if layer["survival"] is not None:
                    runs = sometimes(runs, layer["survival"], jax.random.fold_in(key, 2))
                y_BTD, out = runs(x_BTD, beside)
                y_BTD = self.constrain(y_BTD, ("batch", "time", "width"))
                saved = {
                    "cache": None if out is None else out.cache,
                    "hidden": x_BTD if "hidden" in capture else None,
                    "attention": out.captured if "attention" in capture else None,
                }
                return y_BTD, saved

            run_layers = over_layers(c)
            whole = remat(body, c)
            if not (c.token_drop and drops):
                return run_layers(whole, rows["stream"], layers)
            thin = remat(functools.partial(body, token_drop=c.token_drop), c)
            return ends_whole(run_layers, whole, thin, rows["stream"], layers)

        # What blocks need of each row goes with it.
        rows = {"stream": x_BTD}
        if counted and c.positions == "rotary":
            rows["positions"] = jnp.broadcast_to(positions_BT, (B, T))
        if segments_BT is not None:
            rows["segments"] = segments_BT
        if prefix is not None:
            rows["prefix"] = prefix if prefix.ndim == 1 else prefix != 0
        if c.embedding_shortcut is not None:
            rows["start"] = unit_rms(x_BTD, c.norm_epsilon)
        if c.value_embeddings:
            rows["values"] = values_BTnGK
        if self.pipeline is None:
            y_BTD, saved = run(layers, rows)
        else:
            stage = self.pipeline(lambda layers, rows: {**rows, "stream": run(layers, rows)[0]})
            y_BTD, saved = stage(layers, rows)["stream"], dict.fromkeys(("hidden", "attention"))
        hidden = saved["hidden"]
        if hidden is not None:
            hidden = jnp.concatenate([hidden, y_BTD[None]])
        if cache is not None:
            cache = {**cache, **saved["cache"], "length": cache["length"] + T}
            cache |= {} if ids_BS is None else {"tokens": ids_BS}
        final_BTD = self.constrain(self.final_norm(y_BTD), ("batch", "branch", "width"))
        return Features(final_BTD, hidden, saved["attention"], cache)

    def head(self, final_ND: jax.Array, padded: bool = False) -> jax.Array:
        """Returns logits [N, V] of normalised features [N, D]; see `model.head.logits_from`."""
        kernel_DV = self.token_embedding().T if self.config.tied_head else self.head_table()
        return logits_from(self.config, kernel_DV, final_ND, padded)

    def _check(
        self, T: int, segments_BT, cache: Cache | None, capture: Sequence[str], prefix
    ) -> None:
        c = self.config
        if c.positions == "learned" and T > c.max_length:
            raise ValueError(
                f"{T} tokens do not fit the {c.max_length} learned positions of this model; "
                "shorten the sequence or train with a larger max_length"
            )
        if unknown := [name for name in capture if name not in CAPTURES]:
            raise ValueError(f"cannot capture {unknown}; choose from {', '.join(CAPTURES)}")
        if cache is not None and segments_BT is not None:
            raise ValueError("segments and a cache do not go together: decode one document a row")
        if prefix is not None and prefix.ndim > 1 and cache is not None:
            raise ValueError("with a cache, give the prefix as the number of tokens, int32 [B]")
        if prefix is not None and c.token_drop and self.has_rng("dropout"):
            raise ValueError(
                "token_drop takes tokens out of rows whose prefix is counted; train a prefix LM "
                "without it"
            )
        if c.token_drop and self.has_rng("dropout") and (c.layers < 3 or c.window is not None):
            raise ValueError(
                f"token_drop leaves the first and the last block whole and its rows have gaps, "
                f"which does not go with {c.layers} layers and window={c.window}; use at least 3 "
                "layers and no window, or leave token_drop out"
            )
        if self.has_rng("dropout") and (c.token_drop or c.layer_drop) and "attention" in capture:
            raise ValueError(
                "blocks that are left out, or leave tokens out, have no attention to capture; "
                "train without layer_drop and token_drop, or without the loss that looks at it"
            )
        if self.pipeline is not None and (cache is not None or capture):
            what = "a cache" if cache is not None else " and ".join(capture)
            raise ValueError(
                f"{what} was asked for of a model whose layers run as a pipeline, which passes on "
                "the stream alone; run it without one"
            )


def features(
    model: Model,
    params: Any,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    *,
    cache: Cache | None = None,
    capture: Sequence[str] = (),
    dropout_key: jax.Array | None = None,
    **more: jax.Array,
) -> Features:
    """`Transformer.features` as a plain function; dropout is on where a key is given.

    What else goes by name is what this model alone takes: a prefix, a source.
    """
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    args = (tokens_BT, positions_BT, segments_BT, cache, tuple(capture))
    made = model.apply({"params": params}, *args, rngs=rngs, method="features", **more)
    return cast(Features, made)


def head(model: Model, params: Any, final_ND: jax.Array, padded: bool = False) -> jax.Array:
    """`Transformer.head` as a plain function: logits [N, V] of features [N, D]."""
    return cast(jax.Array, model.apply({"params": params}, final_ND, padded, method="head"))


class Table(nn.Module):
    """A parameter of its own, in a scope of its own."""

    shape: tuple[int, int]
    init_table: Callable[..., jax.Array]
    leaf: str
    parameter_dtype: Any
    vocabulary_axis: int | None = None

    @nn.compact
    def __call__(self) -> Any:
        """Returns the weight."""
        shape, dtype = self.shape, self.parameter_dtype
        return weight(
            self, self.leaf, self.init_table, shape, dtype, vocabulary_axis=self.vocabulary_axis
        )


def _init_blocks(config: TransformerConfig) -> Callable[[jax.Array], Any]:
    """Returns the initializer of the stacked parameters of all blocks: every leaf [L, ...]."""

    def init(key: jax.Array) -> Any:
        block = Block(config, parent=None)
        x = jnp.zeros((1, 1, config.width), config.dtype)
        turn = None
        if config.positions == "rotary":
            turn = rotation(jnp.zeros((1, 1), jnp.int32), config.head_width_, config.rotary_base)
        args = (x, Visibility(), turn, None, Beside(x))
        keys = jax.random.split(key, config.layers)
        return jax.vmap(lambda k: block.init(k, *args)["params"])(keys)

    return init
