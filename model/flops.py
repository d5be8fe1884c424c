"""What a model costs by arithmetic: parameters and floating-point operations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from model.build import build_model
from model.config import EncoderDecoderConfig, TransformerConfig
from model.drop import kept_tokens, survival


def abstract_params(config: TransformerConfig) -> Any:
    """Returns the parameter tree as shapes and types, computing nothing."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(build_model(config).init, jax.random.key(0), tokens)["params"]


def parameter_count(config: TransformerConfig) -> int:
    """Returns the number of parameters, embeddings included.

    >>> from model.presets import gpt2
    >>> parameter_count(gpt2())
    124439808
    """
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def flops_per_token(config: TransformerConfig, length: int) -> float:
    """Returns the mean floating-point operations of a forward pass over one of `length` tokens.

    Counted are the matrix products that the model needs, two operations for each multiply-add: all
    kernels, the head, and scores and values for the keys that a causal query really sees (half of
    the square, less under a window). Lookups, norms and activations are not counted. A training
    step costs three times as much (forward, and two products in the backward pass for each).

    Of an encoder-decoder it is that of a token of the target and one of the source, rows of both
    being of that length.

    >>> from model.presets import gpt2
    >>> round(flops_per_token(gpt2(), 1024) / 1e6)
    266
    """
    return block_flops(config, length) + head_flops(config) + _bigram_flops(config)


def training_flops_per_token(config: TransformerConfig, length: int) -> float:
    """Returns what a training step costs for each token: three times the forward pass.

    Blocks that `layer_drop` leaves out count by their chance to stay, and the tokens that
    `token_drop` lets pass by a block do not count there.

    >>> from model.presets import gpt2
    >>> training_flops_per_token(gpt2(), 1024) == 3 * flops_per_token(gpt2(), 1024)
    True
    >>> half = gpt2(layer_drop=0.5)  # 0.73 of the blocks
    >>> round(training_flops_per_token(half, 1024) / 3e6)
    215
    """
    if isinstance(config, EncoderDecoderConfig):
        return 3.0 * flops_per_token(config, length)
    chances = survival(config.layers, config.layer_drop)
    total = head_flops(config) + _bigram_flops(config)
    for layer, chance in enumerate(chances):
        inner = config.token_drop and 0 < layer < config.layers - 1
        kept = kept_tokens(length, config.token_drop) if inner else length
        total += float(chance) * layer_flops(config, layer, kept) * kept / length
    return 3.0 * total


def block_flops(config: TransformerConfig, length: int) -> float:
    """Returns what of `flops_per_token` the blocks take.

    >>> from model.presets import gpt2
    >>> round(block_flops(gpt2(), 1024) / 1e6)
    189
    """
    layers = sum(layer_flops(config, layer, length) for layer in range(config.layers))
    if not isinstance(config, EncoderDecoderConfig):
        return layers
    # The square is seen whole by the encoder and across, where layer_flops counts half of it.
    D, K, H, G = config.width, config.head_width_, config.heads, config.kv_heads_
    scores = 4.0 * H * K * length
    of_encoder = layer_flops(config, 0, length) + scores - 4.0 * H * K * _mean_visible(length, None)
    cross = 2.0 * D * K * (2 * H + 2 * G) + scores
    return layers + config.layers * cross + config.encoder_layers * of_encoder


def layer_flops(config: TransformerConfig, layer: int, length: int) -> float:
    """Returns what of `block_flops` block number `layer` takes."""
    D, F, K = config.width, config.ffn_width_, config.head_width_
    H, G = config.heads, config.kv_heads_
    kernels = D * K * (2 * H + 2 * G) + D * F * (3 if config.activation == "swiglu" else 2)
    if layer in config.value_layers:
        kernels += config.value_gate_inputs * G
    window = config.window[layer] if isinstance(config.window, tuple) else config.window
    return 2.0 * kernels + 4.0 * H * K * _mean_visible(length, window)


def head_flops(config: TransformerConfig) -> float:
    """Returns what of `flops_per_token` the head takes.

    >>> from model.presets import gpt2
    >>> round(head_flops(gpt2()) / 1e6)
    77
    """
    return 2.0 * config.width * config.vocabulary_size


def _bigram_flops(config: TransformerConfig) -> float:
    return 0.0 if config.bigram_rows is None else 2.0 * config.bigram_width * config.width


def _mean_visible(length: int, window: int | None) -> float:
    w = length if window is None else min(window, length)
    return (w * (w + 1) / 2 + (length - w) * w) / length
