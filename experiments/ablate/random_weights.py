"""Random weights at a visible scale, where only shapes matter: sizes and times."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import TransformerConfig
from model.flops import abstract_params
from model.rules import path_of
from train.settings import essential

PyTree = Any


def fields_of(config: TransformerConfig) -> dict[str, Any]:
    """Returns what of a config is not at its default, for `model.config.config_from_dict`.

    So a measurement keeps its key when configs get a field, as runs keep theirs.

    >>> from model.presets import gpt2
    >>> fields_of(gpt2(layers=6))
    {'layers': 6, 'dropout': 0.1}
    """
    return {name: value for name, value in essential(config).items() if name != "class"}


def random_weights(config: TransformerConfig, seed: int = 0, std: float = 0.05) -> PyTree:
    """Returns parameters of which none is 0 or 1: norm scales near 1, everything else near 0.

    Args:
      config: of the model, vocabulary size included.
      seed: of the draws.
      std: their standard deviation.

    >>> from model.presets import gpt2_tiny
    >>> params = random_weights(gpt2_tiny())
    >>> bool(params["final_norm"]["scale"].mean() > 0.9), params["final_norm"]["bias"].shape
    (True, (32,))
    """
    return like(abstract_params(config), seed, std)


def like(shapes: PyTree, seed: int = 0, std: float = 0.05) -> PyTree:
    """Returns random weights of these shapes and types, as `random_weights`."""
    rng = np.random.default_rng(seed)

    def draw(key_path: tuple[Any, ...], leaf: Any) -> jax.Array:
        drawn = std * rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(drawn + path_of(key_path).endswith("scale"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)
