"""Wanda: pruning by weight times activation, once, without training (Sun et al. 2023).

    score_ij = |w_ij| ||x_i||        x_i: what input i was on calibration data

Weights of one output are compared with each other (arXiv:2306.11695). One pass over the calibration
data, layer by layer, each on what the pruned layers before it give.

Shapes: I inputs, O outputs of a kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.calibrate import sequential
from compress.pruning.mask_trees import by_layer, check_selection, flat, nested
from compress.pruning.masks import Pattern, check_sparsity, magnitude, unstructured
from model.rules import STACK
from model.transformer import Transformer

PyTree = Any


def wanda_score(w_IO: jax.Array, square_sum_I: jax.Array) -> jax.Array:
    """|w| times the norm of the input, [I, O].

    Args:
      w_IO: kernel.
      square_sum_I: sum of the squares of each input.

    >>> wanda_score(jnp.array([[1.0, -2.0], [3.0, 0.5]]), jnp.array([4.0, 1.0])).tolist()
    [[2.0, 4.0], [3.0, 0.5]]
    """
    return magnitude(w_IO) * jnp.sqrt(square_sum_I.astype(jnp.float32))[:, None]


def by_output(score_IO: jax.Array, sparsity: jax.Array | float) -> jax.Array:
    """Pattern: equally many zeros in every output, where its scores are lowest.

    >>> by_output(jnp.array([[1.0, 8.0], [2.0, 9.0]]), 0.5).tolist()
    [[False, False], [True, True]]
    """
    return jax.vmap(lambda score: unstructured(score, sparsity), in_axes=1, out_axes=1)(score_IO)


def wanda(
    model: Transformer,
    params: PyTree,
    batches: Iterable[Any],
    sparsity: float,
    pattern: Pattern = by_output,
) -> PyTree:
    """Returns the parameters with zeros in the kernels of all blocks.

    Args:
      model: the Transformer.
      params: its parameters, plain arrays.
      batches: token ids, int [B, T] each, such as from `compress.calibrate.windows`.
      sparsity: the share of zeros in every kernel.
      pattern: `by_output`, or `compress.pruning.masks.n_of_m(4)` for 2:4.

    Raises:
      ValueError: a sparsity outside of [0, 1), a pattern that does not fit, or no batch.

    >>> from model.presets import gpt2_tiny
    >>> model, tokens = Transformer(gpt2_tiny()), jnp.arange(16).reshape(2, 8)
    >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    >>> pruned = wanda(model, params, [tokens], 0.5)
    >>> int((pruned["blocks"]["mlp"]["up"]["kernel"] == 0).sum())
    4096
    """
    check_sparsity(sparsity, "the kernels")
    shares = {
        path: np.full(leaf.shape[:1], sparsity, np.float32)
        for path, leaf in flat(params).items()
        if path.startswith(f"{STACK}/") and path.endswith("/kernel")
    }
    check_selection(by_layer(pattern), params, shares)

    @jax.jit
    def prune(w_IO: jax.Array, square_sum_I: jax.Array) -> jax.Array:
        mask = pattern(wanda_score(w_IO, square_sum_I), sparsity)
        return jnp.where(mask, w_IO, jnp.zeros_like(w_IO))

    def replace(number: int, layer: PyTree, seen: Any) -> PyTree:
        pruned = {path: prune(flat(layer)[path], seen[path]["square_sum"]) for path in seen}
        return nested({**flat(layer), **pruned})

    return sequential(model, params, batches, ("square_sum",), replace).params
