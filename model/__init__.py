"""The Transformer and its parts, rules over parameter paths, weights in and out."""

from model.config import TransformerConfig, config_from_dict
from model.generate import Sampling, generate
from model.presets import PRESETS, preset
from model.transformer import Features, Transformer

__all__ = [
    "PRESETS",
    "Features",
    "Sampling",
    "Transformer",
    "TransformerConfig",
    "config_from_dict",
    "generate",
    "preset",
]
