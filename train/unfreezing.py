"""Rates and freezing by depth: layer-wise rate decay, and layers that begin to train one by one.

Both are arrays over the layer axis of the stacked parameters, so that one compilation has them all.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from train.partition import along_first, below_head
from train.plugs import Context, PyTree, WeightTransform


def layer_decay(decay: float, layers: int) -> optax.GradientTransformation:
    """Multiplies each update by decay^(steps below the head), weight decay included.

    1 for the head, decay^(L - l) for block l = 0 .. L - 1, decay^(L + 1) for the embeddings: the
    layers that have learned the most general things move least (Howard & Ruder 2018,
    arXiv:1801.06146; as one factor a layer in Clark et al. 2020, arXiv:2003.10555).

    Args:
      decay: above 0 and at most 1.
      layers: blocks of the model, L.

    >>> tx = layer_decay(0.5, 2)
    >>> updates = {"blocks": {"up": {"bias": jnp.ones((2, 1))}}, "head": {"kernel": jnp.ones(1)}}
    >>> scaled, _ = tx.update(updates, tx.init(updates))
    >>> scaled["blocks"]["up"]["bias"][:, 0].tolist(), scaled["head"]["kernel"].tolist()
    ([0.25, 0.5], [1.0])
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay is {decay}; it must be above 0 and at most 1")

    def scale(updates: PyTree, params: PyTree | None) -> PyTree:
        def one(update: jax.Array, depth) -> jax.Array:
            factor = along_first(decay ** jnp.asarray(depth, jnp.float32), update)
            return update * factor.astype(update.dtype)

        return jax.tree.map(one, updates, below_head(updates, layers))

    return optax.stateless(scale)


class UnfreezingState(NamedTuple):
    """Updates made, int32 scalar."""

    made: jax.Array


def unfreezing_updates(start: int, every: int, layers: int) -> optax.GradientTransformation:
    """Drops the updates of what does not train yet: see `unfreezing`.

    Weight decay and moments would move it even without a gradient.

    >>> tx = unfreezing_updates(0, 5, 2)
    >>> updates = {"blocks": {"up": {"bias": jnp.ones((2, 1))}}, "head": {"kernel": jnp.ones(1)}}
    >>> kept, _ = tx.update(updates, UnfreezingState(jnp.int32(4)))
    >>> kept["blocks"]["up"]["bias"][:, 0].tolist(), kept["head"]["kernel"].tolist()
    ([0.0, 1.0], [1.0])
    """

    def init(params: PyTree) -> UnfreezingState:
        return UnfreezingState(jnp.int32(0))

    def update(updates: PyTree, state: UnfreezingState, params: PyTree | None = None):
        def one(update: jax.Array, depth) -> jax.Array:
            on = along_first(_trains(depth, state.made, start, every), update)
            return jnp.where(on, update, jnp.zeros_like(update))

        kept = jax.tree.map(one, updates, below_head(updates, layers))
        return kept, UnfreezingState(state.made + 1)

    return optax.GradientTransformation(init, update)


def unfreezing(name: str, start: int, every: int, layers: int) -> WeightTransform:
    """Stops the gradient of what does not train yet.

    The head trains from the first step, the last block from `start`, each block below it `every`
    steps later, and the embeddings after the first block (Howard & Ruder 2018, arXiv:1801.06146,
    who unfreeze a layer an epoch). So moments, norms and clipping see zeros until then; with
    `unfreezing_updates` nothing moves either. Adam's count of updates runs on meanwhile, so that
    the bias of its moments is not corrected for a layer that begins late: its first updates are
    larger, up to 1.6 times the rate at b2 0.95 and 6.5 times at 0.999.

    Args:
      name: key in `State.extra`, where it keeps nothing.
      start: step at which the last block begins.
      every: steps between two blocks.
      layers: blocks of the model, L.
    """

    def apply(weights: PyTree, context: Context) -> PyTree:
        if context.rng is None:  # no gradient in evaluation
            return weights

        def one(weight, depth):
            if not isinstance(weight, jax.Array) or not jnp.issubdtype(weight.dtype, jnp.floating):
                return weight
            on = along_first(_trains(depth, context.step, start, every), weight)
            return jnp.where(on, weight, jax.lax.stop_gradient(weight))

        return jax.tree.map(one, weights, below_head(weights, layers))

    return WeightTransform(name, apply)


def last_to_begin(start: int, every: int, layers: int) -> int:
    """The step from which everything trains.

    >>> last_to_begin(2, 10, 4)  # blocks at 2, 12, 22, 32, embeddings at 42
    42
    """
    return start + layers * every


def _trains(depth, step: jax.Array, start: int, every: int) -> jax.Array:
    depth = jnp.asarray(depth, jnp.int32)
    return (depth == 0) | (step >= start + (depth - 1) * every)
