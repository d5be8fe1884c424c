"""Named configs: a preset is a function that returns one, a variant is an override."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from model.config import EncoderDecoderConfig, TransformerConfig


def gpt2(**overrides: Any) -> TransformerConfig:
    """GPT-2 124M (Radford et al. 2019), dropout 0.1 as published.

    >>> gpt2(dropout=0.0).layers
    12
    """
    return dataclasses.replace(TransformerConfig(dropout=0.1), **overrides)


def gpt2_medium(**overrides: Any) -> TransformerConfig:
    """GPT-2 355M."""
    return gpt2(**{"layers": 24, "width": 1024, "heads": 16} | overrides)


def gpt2_large(**overrides: Any) -> TransformerConfig:
    """GPT-2 774M."""
    return gpt2(**{"layers": 36, "width": 1280, "heads": 20} | overrides)


def gpt2_xl(**overrides: Any) -> TransformerConfig:
    """GPT-2 1.5B."""
    return gpt2(**{"layers": 48, "width": 1600, "heads": 25} | overrides)


def distilgpt2(**overrides: Any) -> TransformerConfig:
    """DistilGPT2 82M: GPT-2 with every second layer."""
    return gpt2(**{"layers": 6} | overrides)


def gpt2_mini(**overrides: Any) -> TransformerConfig:
    """A GPT-2 block for a laptop: 4 layers, width 128."""
    return gpt2(**{"layers": 4, "width": 128, "heads": 4, "max_length": 256} | overrides)


def gpt2_tiny(**overrides: Any) -> TransformerConfig:
    """A GPT-2 block for tests: 2 layers, width 32."""
    return gpt2(
        **{"vocabulary_size": 64, "max_length": 32, "layers": 2, "width": 32, "heads": 4}
        | overrides
    )


def llama(**overrides: Any) -> TransformerConfig:
    """The Llama block (Touvron et al. 2023), by default at the shape of Llama 2 7B.

    >>> llama(layers=2, width=64, heads=4, kv_heads=2, ffn_width=192).activation
    'swiglu'
    """
    shape: dict[str, Any] = {
        "vocabulary_size": 32_000,
        "max_length": 4096,
        "layers": 32,
        "width": 4096,
        "heads": 32,
        "ffn_width": 11_008,
    }
    parts: dict[str, Any] = {
        "positions": "rotary",
        "norm": "rmsnorm",
        "biases": False,
        "activation": "swiglu",
        "tied_head": False,
    }
    return TransformerConfig(**shape | parts | overrides)


def llama_tiny(**overrides: Any) -> TransformerConfig:
    """A Llama block for tests: 2 layers, width 32, grouped queries."""
    return llama(
        **{
            "vocabulary_size": 64,
            "max_length": 32,
            "layers": 2,
            "width": 32,
            "heads": 4,
            "kv_heads": 2,
            "ffn_width": 96,
        }
        | overrides
    )


def modern(**overrides: Any) -> TransformerConfig:
    """The block that trains fastest for us, by default at the shape of GPT-2 124M.

    Rotary positions, RMSNorm, no biases, squared ReLU, QK-norm, soft-capped logits, an untied head
    and output projections that start at zero.

    >>> modern().qk_norm
    True
    """
    parts: dict[str, Any] = {
        "positions": "rotary",
        "norm": "rmsnorm",
        "biases": False,
        "activation": "relu_squared",
        "qk_norm": True,
        "logit_softcap": 15.0,
        "tied_head": False,
        "zero_init_projections": True,
    }
    return TransformerConfig(**parts | overrides)


def modern_mini(**overrides: Any) -> TransformerConfig:
    """The modern block for a laptop: 4 layers, width 128."""
    return modern(**{"layers": 4, "width": 128, "heads": 4, "max_length": 256} | overrides)


def modern_tiny(**overrides: Any) -> TransformerConfig:
    """The modern block for tests: 2 layers, width 32."""
    return modern(
        **{"vocabulary_size": 64, "max_length": 32, "layers": 2, "width": 32, "heads": 4}
        | overrides
    )


def encoder_decoder(**overrides: Any) -> EncoderDecoderConfig:
    """The base Transformer of Vaswani et al. 2017, with the parts of `modern`.

    Rotary positions, RMSNorm before each branch, no biases, squared ReLU, QK-norm and output
    projections that start at zero; one table for source, target and head.

    >>> encoder_decoder(layers=3, encoder_layers=3, width=256, heads=4).encoder_layers
    3
    """
    parts: dict[str, Any] = {
        "vocabulary_size": 32_000,
        "max_length": 512,
        "layers": 6,
        "encoder_layers": 6,
        "width": 512,
        "heads": 8,
        "positions": "rotary",
        "norm": "rmsnorm",
        "biases": False,
        "activation": "relu_squared",
        "qk_norm": True,
        "zero_init_projections": True,
        "dropout": 0.1,
    }
    return EncoderDecoderConfig(**parts | overrides)


def encoder_decoder_mini(**overrides: Any) -> EncoderDecoderConfig:
    """An encoder-decoder for a laptop: 3 + 3 layers, width 256."""
    return encoder_decoder(
        **{"layers": 3, "encoder_layers": 3, "width": 256, "heads": 4, "max_length": 256}
        | overrides
    )


def encoder_decoder_tiny(**overrides: Any) -> EncoderDecoderConfig:
    """An encoder-decoder for tests: 2 + 2 layers, width 32."""
    return encoder_decoder(
        **{
            "vocabulary_size": 64,
            "max_length": 32,
            "layers": 2,
            "encoder_layers": 2,
            "width": 32,
            "heads": 4,
        }
        | overrides
    )


PRESETS: dict[str, Callable[..., TransformerConfig]] = {
    preset.__name__: preset
    for preset in (
        gpt2,
        gpt2_medium,
        gpt2_large,
        gpt2_xl,
        distilgpt2,
        gpt2_mini,
        gpt2_tiny,
        llama,
        llama_tiny,
        modern,
        modern_mini,
        modern_tiny,
        encoder_decoder,
        encoder_decoder_mini,
        encoder_decoder_tiny,
    )
}


def preset(name: str, **overrides: Any) -> TransformerConfig:
    """Returns the preset called `name`.

    Raises:
      ValueError: if there is none of that name; the names are listed.

    >>> preset("gpt2_mini", layers=2).width
    128
    >>> preset("gpt3")
    Traceback (most recent call last):
    ...
    ValueError: no model preset is called 'gpt3'; there are gpt2, gpt2_medium, gpt2_large, \
gpt2_xl, distilgpt2, gpt2_mini, gpt2_tiny, llama, llama_tiny, modern, modern_mini, modern_tiny, \
encoder_decoder, encoder_decoder_mini, encoder_decoder_tiny
    """
    if name not in PRESETS:
        raise ValueError(f"no model preset is called {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name](**overrides)
