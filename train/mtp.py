"""Multi-token prediction: heads that look further ahead, in training alone.

Head k predicts the token k places after the next one, by the model's own head from features that a
square kernel of its own has changed:

    z_k = f + f W_k,   loss_k = -log p(token t + 1 + k | z_k),   k from 1

after Gloeckle et al. 2024 (arXiv:2404.19737), whose heads are whole blocks; W_k starts at zero, so
that each begins as the model's own prediction. The kernels lie under `mtp/` beside the model's
parameters and are gone wherever the model is evaluated or opened.

Shapes: B batch, T time, D width, N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model.linear import linear
from model.transformer import Transformer, head
from train.plugs import Batch, Context, LossTerm, PyTree, View, WeightTransform

KEY = "mtp"


def with_heads(params: PyTree, heads: int, width: int, dtype: Any) -> PyTree:
    """Returns the parameters with `heads` kernels [D, D] of zeros beside them.

    >>> sorted(with_heads({}, 2, 4, jnp.float32)["mtp"])
    ['1', '2']
    """
    zeros = jnp.zeros((width, width), dtype)
    return {**params, KEY: {str(k): {"kernel": zeros} for k in range(1, heads + 1)}}


def training_only() -> WeightTransform:
    """The weight transform that takes the heads away where nothing is trained."""

    def apply(weights: PyTree, context: Context) -> PyTree:
        if context.rng is not None:
            return weights
        return {name: tree for name, tree in weights.items() if name != KEY}

    return WeightTransform(KEY, apply)


def ahead(batch: Batch, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns targets k places further and their weights, [B, T]; 0 where there is none.

    A target counts where the position that it belongs to counts, in the same document.

    >>> batch = {"targets": jnp.array([[5, 6, 7]]), "weights": jnp.ones((1, 3))}
    >>> [a.tolist() for a in ahead(batch, 1)]
    [[[6, 7, 0]], [[1.0, 1.0, 0.0]]]
    """

    def shift(a_BT: jax.Array) -> jax.Array:
        return jnp.pad(a_BT[:, k:], ((0, 0), (0, min(k, a_BT.shape[1]))))

    weights_BT = shift(batch["weights"])
    if "segments" in batch:
        weights_BT = jnp.where(shift(batch["segments"]) == batch["segments"], weights_BT, 0)
    return shift(batch["targets"]), weights_BT


def multi_token(model: Transformer, k: int, weight: float | Callable[..., Any]) -> LossTerm:
    """The cross-entropy of head k; all its logits are there at once, whatever the loss chunk."""

    def total(view: View, batch: Batch, context: Context) -> jax.Array:
        assert view.features is not None
        final_BTD = view.features.final
        final_ND = final_BTD.reshape(-1, final_BTD.shape[-1])
        z_ND = final_ND + linear(final_ND, view.weights[KEY][str(k)]["kernel"])
        weights = {name: tree for name, tree in view.weights.items() if name != KEY}
        logits_NV = head(model, weights, z_ND)
        targets_BT, weights_BT = ahead(batch, k)
        here_NV = jnp.arange(logits_NV.shape[-1])[None] == targets_BT.reshape(-1, 1)
        picked_N = jnp.where(here_NV, logits_NV, 0).sum(axis=-1)
        loss_N = jax.nn.logsumexp(logits_NV, axis=-1) - picked_N
        weights_N = weights_BT.reshape(-1).astype(loss_N.dtype)
        return jnp.where(weights_N > 0, loss_N * weights_N, 0).sum()

    def count(batch: Batch) -> jax.Array:
        return ahead(batch, k)[1].sum()

    # Prepared apart so that rows which are cut out of order, as over `context`, are refused.
    return LossTerm(
        f"{KEY}_{k}", total, count, weight, "features", prepare=_nothing, reads_head=True
    )


def _nothing(batch: Batch, context: Context) -> Batch:
    return {}
