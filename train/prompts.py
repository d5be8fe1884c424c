"""Trained vectors before the text, and trained keys and values in every layer.

Prompt tuning (Lester et al. 2021, arXiv:2104.08691) trains P vectors that stand before the embedded
tokens. Attention being causal, what the blocks make of them depends on nothing that follows: their
keys and values are computed once, for all rows, and every query sees them (`model.prefix`). That
equals P vectors at the head of each row, at the P places before its first token, without their
cost in every row and without taking places away. They get no learned position: they are trained.

Prefix tuning (Li & Liang 2021, arXiv:2101.00190) trains those keys and values themselves.

A window does not hide a prompt, and of several documents in one row each sees it.

Shapes: P prompt, D width, L layers, G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from model.config import EncoderDecoderConfig, TransformerConfig
from model.linear import take
from model.prefix import KEY as PREFIX
from model.transformer import Transformer, features
from train.plugs import Context, PyTree, WeightTransform

PROMPT = "prompt"
"""Name of the vectors beside the model's parameters: `prompt/vectors`."""

Init = Literal["vocabulary", "random"]


def first_vectors(
    key: jax.Array, params: PyTree, config: TransformerConfig, length: int, init: Init
) -> jax.Array:
    """Returns P vectors [P, D] to begin with, traceable.

    Args:
      key: of the draws.
      params: with the token embedding, for "vocabulary".
      config: of the model.
      length: P.
      init: "vocabulary" takes the embeddings of P tokens at random, which Lester et al. found
        better in small models; "random" draws N(0, init_std^2).

    Raises:
      ValueError: the token embedding is not among the parameters.
    """
    dtype = jnp.dtype(config.parameter_dtype)
    if init == "random":
        std = jnp.asarray(config.init_std, dtype)
        return std * jax.random.normal(key, (length, config.width), dtype)
    table = params.get("token_embedding", {}).get("embedding")
    if table is None:
        raise ValueError(
            "a prompt begins as embeddings of tokens, and a method before this one has taken the "
            "embedding away; give this method first, or init random"
        )
    return take(table, jax.random.randint(key, (length,), 0, config.vocabulary_size), dtype)


def keys_and_values(
    config: TransformerConfig, weights: PyTree, vectors_PD: jax.Array
) -> dict[str, jax.Array]:
    """Returns what the blocks make of the vectors: "k" and "v", [L, P, G, K].

    Args:
      config: of the model.
      weights: that the model runs with.
      vectors_PD: in place of embedded tokens, at the places -P .. -1.
    """
    P, D = vectors_PD.shape
    # Asked of the model as it is: of a table whose P rows are the vectors it embeds the ids 0..P-1.
    config = dataclasses.replace(config, vocabulary_size=P)
    weights = {**weights, "token_embedding": {"embedding": vectors_PD}}
    places_1P = jnp.arange(-P, 0)[None]
    if config.positions == "learned":
        config = dataclasses.replace(config, max_length=P)
        weights["position_embedding"] = {"embedding": jnp.zeros((P, D), vectors_PD.dtype)}
        places_1P = jnp.zeros((1, P), jnp.int32)
    ids_1P = jnp.arange(P)[None]
    out = features(Transformer(config), weights, ids_1P, places_1P, capture=("attention",))
    assert out.attention is not None
    return {name: out.attention[name][:, 0] for name in ("k", "v")}


def with_prefix(weights: PyTree, prefix: dict[str, jax.Array]) -> PyTree:
    """Returns the weights with keys and values [L, P, G, K] beside those of each attention."""
    blocks = weights["blocks"]
    attention = {**blocks["attention"], PREFIX: prefix}
    return {**weights, "blocks": {**blocks, "attention": attention}}


def prompting(config: TransformerConfig) -> WeightTransform:
    """The weight transform that turns `prompt/vectors` into a prefix."""

    def apply(weights: PyTree, context: Context) -> PyTree:
        rest = {name: tree for name, tree in weights.items() if name != PROMPT}
        return with_prefix(rest, keys_and_values(config, rest, weights[PROMPT]["vectors"]))

    return WeightTransform(PROMPT, apply)


def refuse_prefix(params: PyTree, whose: str) -> None:
    """Raises ValueError for parameters with a prefix in them, which no model has by itself."""
    if PREFIX in params.get("blocks", {}).get("attention", {}):
        raise ValueError(
            f"{whose} was trained with a prompt or a prefix, which belongs to that run alone; take "
            "the run that it started from"
        )


def check_promptable(config: TransformerConfig, length: int) -> None:
    """Raises ValueError for a model that a prompt does not fit."""
    if isinstance(config, EncoderDecoderConfig):
        raise ValueError(
            "a prompt stands before the text of a decoder alone, and this model has an encoder; "
            "tune it with lora or bitfit"
        )
    if length < 1:
        raise ValueError(f"length is {length}; a prompt has at least 1 vector")
    if config.positions == "learned" and length > config.max_length:
        raise ValueError(
            f"a prompt of {length} vectors is longer than the {config.max_length} positions of the "
            "model; give a shorter one"
        )
    if config.value_embeddings:
        raise ValueError(
            "the blocks of this model read value embeddings of each token, and a vector of a "
            "prompt is no token; use a model without value_embeddings, or tune it with lora"
        )
    if config.bigram_rows is not None:
        raise ValueError(
            "this model looks up pairs of tokens, and a vector of a prompt is no token; use a "
            "model without bigram_rows, or tune it with lora"
        )
