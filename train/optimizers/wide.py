"""Arithmetic and state of an optimizer in float32 for parameters that hold fewer bits."""

from __future__ import annotations

from typing import Any

import jax
import optax

from model.linear import at_least_float32


def widened(tree: Any) -> Any:
    """Returns a tree of floating-point arrays in float32 at least.

    >>> import jax.numpy as jnp
    >>> widened({"w": jnp.ones(1, jnp.float16)})["w"].dtype.name
    'float32'
    """
    return jax.tree.map(lambda leaf: leaf.astype(at_least_float32(leaf.dtype)), tree)


def wide(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` computed in float32 at least, its updates in the types of the gradients.

    A second moment that forgets a thousandth a step does not move in bfloat16, whose neighbours lie
    0.4 % apart; squares of float16 overflow above 256 and vanish below 2e-4. Nothing changes for
    float32.

    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones(1, jnp.bfloat16)}
    >>> tx = wide(optax.scale_by_adam())
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params)
    >>> state.nu["w"].dtype.name, updates["w"].dtype.name
    ('float32', 'bfloat16')
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        return inner.init(widened(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        whole = None if params is None else widened(params)
        made, state = inner.update(widened(updates), state, whole, **extra_args)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), made, updates), state

    return optax.GradientTransformationExtraArgs(init, update)
