"""SmoothQuant: outliers of activations are moved into the weights, which bear them better.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

divides input j where it is made and multiplies row j of the kernels (Xiao et al. 2022,
arXiv:2211.10438). The model stays the same function; its activations fit 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from compress.calibrate import sequential
from compress.observed import ByPath
from compress.quantization.folding import at_least, fold, leaf_at, sites_of
from model.config import TransformerConfig
from model.transformer import Transformer

PyTree = Any


def smooth_layer(
    config: TransformerConfig, layer: PyTree, seen: ByPath, alpha: float = 0.5
) -> PyTree:
    """Returns one block, smoothed; `seen` holds "absmax" of the inputs of its kernels."""
    for site in sites_of(config):
        x_I = at_least(seen[site.kernels[0]]["absmax"])
        rows = [jnp.abs(leaf_at(layer, path)).max(axis=1) for path in site.kernels]
        w_I = at_least(jnp.stack(rows).max(axis=0).astype(jnp.float32))
        layer = fold(layer, site, x_I**alpha / w_I ** (1 - alpha))
    return layer


def smooth_params(
    model: Transformer, params: PyTree, batches: Iterable[Any], *, alpha: float = 0.5
) -> PyTree:
    """Returns plain parameters of the same function whose activations have smaller outliers.

    Args:
      model: the Transformer.
      params: plain parameters.
      batches: calibration tokens, int [B, T] each (see `compress.calibrate.windows`).
      alpha: how much of the difficulty the weights take, 0 to 1.

    Raises:
      ValueError: alpha outside 0 to 1, quantized parameters, or as `sequential`.

    >>> from compress.calibrate import windows
    >>> from model.presets import gpt2_tiny
    >>> model = Transformer(gpt2_tiny())
    >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> smooth = smooth_params(model, params, windows(range(64), length=16, batch=4))
    >>> smooth["blocks"]["mlp_norm"]["scale"].shape
    (2, 32)
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must lie between 0 and 1")
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(params)):
        raise ValueError("these parameters are quantized; smooth the plain ones, then quantize")

    def one(number: int, layer: PyTree, seen: ByPath) -> PyTree:
        return smooth_layer(model.config, layer, seen, alpha)

    seen = [site.kernels[0] for site in sites_of(model.config)]
    return sequential(model, params, batches, ("absmax",), one, kernels=seen).params
