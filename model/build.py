"""The model that a config describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from model.attention import Attention, dot_product_attention
from model.block import Constrain, no_constraint
from model.config import EncoderDecoderConfig, TransformerConfig
from model.encoder_decoder import EncoderDecoder
from model.transformer import Stage, Transformer


def build_model(
    config: TransformerConfig,
    attention: Attention = dot_product_attention,
    constrain: Constrain = no_constraint,
    pipeline: Callable[[Stage], Stage] | None = None,
) -> Transformer:
    """Returns the `Transformer`, or the `EncoderDecoder`, of a config.

    To type checkers both are a `Transformer`, whose interface they share (`model.transformer.Model`
    is what of it the training step needs).

    Raises:
      ValueError: an encoder-decoder was asked for as a pipeline.

    >>> from model.presets import encoder_decoder_tiny, gpt2_tiny
    >>> [type(build_model(config)).__name__ for config in (gpt2_tiny(), encoder_decoder_tiny())]
    ['Transformer', 'EncoderDecoder']
    """
    if not isinstance(config, EncoderDecoderConfig):
        return Transformer(config, attention, constrain, pipeline)
    if pipeline is not None:
        raise ValueError(
            "an encoder-decoder has two stacks of layers, and a pipeline divides one; use a mesh "
            "without the axis pipeline"
        )
    return cast(Any, EncoderDecoder(config, attention, constrain))
