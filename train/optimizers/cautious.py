"""Caution: no step against the gradient, and no decay against the step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from model.rules import is_stacked, path_of

_SMALLEST_SHARE = 1e-3  # of elements that agree, for the rescaling; as in the authors' code


def cautious(direction: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keeps the elements of a direction that have the sign of the gradient.

    ::

        mask = [u * g > 0],    u <- u * mask / max(mean(mask), 0.001)

    with the mean over one parameter (one layer of a stacked one), so that the size of the whole
    step stays about what it was. Liang et al., arXiv 2411.16085, algorithm 1.

    Args:
      direction: a transformation whose result goes along the gradient, before the learning rate
        turns it.

    >>> tx = cautious(optax.trace(0.9))
    >>> weights = jnp.zeros(2)
    >>> _, state = tx.update(jnp.array([1.0, 1.0]), tx.init(weights), weights)
    >>> updates, _ = tx.update(jnp.array([0.1, -0.1]), state, weights)
    >>> updates.tolist()  # the momentum of the second says up, its gradient down
    [2.0, 0.0]
    """
    direction = optax.with_extra_args_support(direction)

    def update(updates, state, params=None, **extra_args):
        grads = updates
        updates, state = direction.update(updates, state, params, **extra_args)

        def kept(key_path, u, g):
            agree = jnp.sign(u) * jnp.sign(g) > 0  # a product of small numbers would underflow
            axes = tuple(range(1 if is_stacked(path_of(key_path)) else 0, u.ndim))
            share = agree.astype(jnp.float32).mean(axis=axes, keepdims=True)
            scale = (1.0 / jnp.maximum(share, _SMALLEST_SHARE)).astype(u.dtype)
            return jnp.where(agree, u * scale, jnp.zeros_like(u))

        return jax.tree_util.tree_map_with_path(kept, updates, grads), state

    return optax.GradientTransformationExtraArgs(direction.init, update)


def cautious_decayed_weights(weight_decay: float, mask: Any = None) -> optax.GradientTransformation:
    """Weight decay where it goes the way of the step: ``u <- u + decay * w * [u * w >= 0]``.

    Elsewhere the step already lengthens the weight, and decay would only take back part of it.
    Chen et al., arXiv 2510.12402. Stands where `optax.add_decayed_weights` does.

    Args:
      weight_decay: rate.
      mask: tree of booleans, which parameters decay; None for all.

    >>> tx = cautious_decayed_weights(0.5)
    >>> updates, _ = tx.update(jnp.array([1.0, -1.0]), tx.init(None), jnp.array([2.0, 2.0]))
    >>> updates.tolist()
    [2.0, -1.0]
    """

    def update(updates, params):
        def decay(u, w):
            along = jnp.where(u * w >= 0, w, jnp.zeros_like(w))
            return u + weight_decay * along.astype(u.dtype)

        return jax.tree.map(decay, updates, params)

    tx = optax.stateless(update)
    return tx if mask is None else optax.masked(tx, mask)
