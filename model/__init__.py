"""The Transformer and its parts, rules over parameter paths, weights in and out."""

from model.beam import Beam, beam_search
from model.build import build_model
from model.config import EncoderDecoderConfig, TransformerConfig, config_from_dict
from model.encoder_decoder import EncoderDecoder
from model.generate import Sampling, generate
from model.presets import PRESETS, preset
from model.transformer import Features, Transformer

__all__ = [
    "PRESETS",
    "Beam",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "Features",
    "Sampling",
    "Transformer",
    "TransformerConfig",
    "beam_search",
    "build_model",
    "config_from_dict",
    "generate",
    "preset",
]
