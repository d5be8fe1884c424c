"""The average of the weights over the tail of a run."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TailAverageState(NamedTuple):
    """Updates seen, and the average in float32 (the weights themselves before the tail)."""

    count: jax.Array  # type: ignore[assignment]
    average: Any


def tail_average(start: int, decay: float | None = None) -> optax.GradientTransformation:
    """Averages the weights after every update from number `start` on; changes no update.

    ::

        a_n = a_{n-1} + (w_n - a_{n-1}) / n                  uniform (Polyak & Juditsky, 1992)
        a_n = a_{n-1} + (w_n - a_{n-1}) * max(1/n, 1-decay)  forgetting, with its own warm-up

    n counts the updates of the tail. Must be the last transformation of a chain, as it takes
    ``params + updates`` for the new weights. Evaluate with `averaged`.

    Args:
      start: number of the first update whose result counts.
      decay: None for the uniform mean, else what an update leaves of the average.

    Raises:
      ValueError: `start` is negative, or `decay` not in [0, 1).

    >>> tx = optax.chain(optax.sgd(1.0), tail_average(1))
    >>> weights = jnp.zeros(1)
    >>> state = tx.init(weights)
    >>> for _ in range(3):
    ...     updates, state = tx.update(jnp.full(1, -1.0), state, weights)
    ...     weights = optax.apply_updates(weights, updates)
    >>> float(weights[0]), float(averaged(state, weights)[0])  # (2 + 3) / 2
    (3.0, 2.5)
    """
    if start < 0:
        raise ValueError(f"the tail starts at an update number of at least 0, not {start}")
    if decay is not None and not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must be None or at least 0 and below 1, not {decay}")

    def init(params):
        # a copy: donated buffers must appear once
        copies = jax.tree.map(lambda w: jnp.array(w, jnp.float32, copy=True), params)
        return TailAverageState(jnp.int32(0), copies)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("tail_average needs the parameters: update(updates, state, params)")
        number = (state.count - start + 1).astype(jnp.float32)
        share = 1.0 / jnp.maximum(number, 1.0)
        if decay is not None:
            share = jnp.maximum(share, 1.0 - decay)

        def average(a, w, u):
            new = w.astype(jnp.float32) + u.astype(jnp.float32)
            return a + (new - a) * share

        return updates, TailAverageState(
            optax.safe_increment(state.count), jax.tree.map(average, state.average, params, updates)
        )

    return optax.GradientTransformation(init, update)


def averaged(optimizer_state: Any, params: Any) -> Any:
    """The averaged weights that an optimizer's state holds, in the types of the parameters.

    Args:
      optimizer_state: of a chain with `tail_average` in it.
      params: the current weights, for structure and types.

    Raises:
      ValueError: the state holds no average, or several.
    """

    average = average_of(optimizer_state)[1]
    return jax.tree.map(lambda a, w: a.astype(w.dtype), average, params)


def average_of(optimizer_state: Any) -> tuple[str, Any]:
    """Where an optimizer's state holds its average of the weights, and the average, in float32.

    Returns:
      The keys that lead there, joined by "/", and the tree.

    Raises:
      ValueError: the state holds no average, or several.

    >>> average_of(tail_average(1).init({"w": jnp.zeros(1)}))
    ('average', {'w': Array([0.], dtype=float32)})
    """

    def is_average(node):
        return isinstance(node, TailAverageState)

    nodes = jax.tree_util.tree_leaves_with_path(optimizer_state, is_leaf=is_average)
    found = [(path, node) for path, node in nodes if is_average(node)]
    if len(found) != 1:
        raise ValueError(
            f"the optimizer's state holds {len(found)} averages of weights, not one; "
            "set tail_fraction, or put tail_average at the end of the chain"
        )
    path, node = found[0]
    keys = (*path, jax.tree_util.GetAttrKey("average"))
    return jax.tree_util.keystr(keys, simple=True, separator="/"), node.average
