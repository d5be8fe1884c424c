"""Delayed gradients inside one program: the asynchronous parameter server, simulated (plug 3a).

    g_t = sum_w  gradient of worker w's rows at  params_{t - s_w},   s_w <= bound

Workers of an asynchronous server compute at parameters that others have moved on from (Recht et al.
2011, "Hogwild!", arXiv:1106.5730; Ho et al. 2013, "More Effective Distributed ML via a Stale
Synchronous Parallel Parameter Server"). Here the age is a setting and its draws come from the
run's key, so what staleness alone does to training can be measured, and measured again.

Shapes: W workers, K the largest staleness, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from parallel.per_worker import LocalGradient, Loss, whole

PyTree = Any

# Folded into the step's key for the draws of staleness, so that they are not those of dropout.
_STALENESS = 0x57A1E


class Staleness(NamedTuple):
    """How old the parameters are that a worker computes at.

    Attributes:
      bound: the largest, K, in steps; that many copies of the parameters are kept.
      draw: `(key, workers) -> int32 [W]`, each from 0 to the bound.
    """

    bound: int
    draw: Callable[[jax.Array, int], jax.Array]


class Delayed(NamedTuple):
    """The plug: `train.plugs.Gradient(*delayed(...))`.

    Attributes:
      name: its key in `State.extra`.
      init: `(params, frozen) -> History`.
      apply: `(loss, params, batch, context, carry) -> (grads, metrics, carry)`.
    """

    name: str
    init: Callable[[PyTree, PyTree], History]
    apply: Callable[..., tuple[PyTree, PyTree, History]]


class History(NamedTuple):
    """The parameters of the last K steps.

    Attributes:
      params: leaves [K, ...], a ring: those of step t lie in row t mod K.
      step: int32 scalar, the steps so far.
    """

    params: PyTree
    step: jax.Array


def constant(steps: int) -> Staleness:
    """Every gradient is as old, that many steps.

    Raises:
      ValueError: for less than 0.

    >>> constant(3).draw(jax.random.key(0), 2).tolist()
    [3, 3]
    """
    _check_bound(steps)
    return Staleness(steps, lambda key, workers: jnp.full(workers, steps, jnp.int32))


def uniform(bound: int) -> Staleness:
    """Each worker's gradient has an age of its own, 0 to `bound` steps with equal chance.

    Raises:
      ValueError: for a bound less than 0.

    >>> ages = uniform(2).draw(jax.random.key(0), 1000)
    >>> sorted(set(ages.tolist()))
    [0, 1, 2]
    """
    _check_bound(bound)
    return Staleness(
        bound, lambda key, workers: jax.random.randint(key, (workers,), 0, bound + 1, jnp.int32)
    )


def delayed(
    staleness: Staleness, workers: int = 1, local: LocalGradient = whole, name: str = "delayed"
) -> Delayed:
    """Returns the gradient function that computes at old parameters.

    Before there are steps that old, the oldest there is stands in. With several workers, row r of
    the batch belongs to worker r mod W, whose random key is its own; their gradients, of a loss
    that is divided by counts over the whole batch, are summed, and so are the metrics. No mesh is
    asked for: rows may lie over any axes.

    Args:
      staleness: from `constant` or `uniform`.
      workers: W.
      local: the gradient function of a worker; micro-batches go in here, since the history moves
        on once a call.
      name: its key in `State.extra`.

    Raises:
      ValueError: for less than one worker; when called, if W does not divide the rows, or the
        context has no key.

    >>> loss = lambda params, batch, context: (params**2 * batch.sum(), {})
    >>> class Context(NamedTuple):
    ...     rng: jax.Array
    >>> plug, context = delayed(constant(1)), Context(jax.random.key(0))
    >>> carry = plug.init(jnp.float32(1), {})
    >>> for w in (1.0, 2.0, 3.0):  # the gradient is 2 w, of the w before
    ...     grads, _, carry = plug.apply(loss, jnp.float32(w), jnp.ones(1), context, carry)
    ...     print(float(grads))
    2.0
    2.0
    4.0
    """
    if workers < 1:
        raise ValueError(f"{workers} workers; there must be at least 1")
    bound = staleness.bound

    def init(params: PyTree, frozen: PyTree) -> History:
        rows = jax.tree.map(lambda p: jnp.zeros((bound, *p.shape), p.dtype), params)
        return History(rows, jnp.int32(0))

    def apply(
        loss: Loss, params: PyTree, batch: PyTree, context: Any, carry: History
    ) -> tuple[PyTree, PyTree, History]:
        if context.rng is None:
            raise ValueError("delayed draws from context.rng, which is None; give the step's key")
        _check_rows(batch, workers)
        ages_W = staleness.draw(jax.random.fold_in(context.rng, _STALENESS), workers)
        ages_W = jnp.minimum(ages_W, carry.step)

        def compute(age: jax.Array, batch: PyTree, context: Any) -> tuple[PyTree, PyTree]:
            old = params if not bound else _old(params, carry, age)
            return local(loss, old, batch, context)

        if workers == 1:
            grads, metrics = compute(ages_W[0], batch, context)
        else:
            # Rows in turn, so that where they lie over devices every worker has some of each.
            parts = jax.tree.map(
                lambda a: a.reshape(-1, workers, *a.shape[1:]).swapaxes(0, 1), batch
            )

            def worker(number: jax.Array, age: jax.Array, batch: PyTree) -> tuple[PyTree, PyTree]:
                rng = jax.random.fold_in(context.rng, number)
                return compute(age, batch, context._replace(rng=rng))

            # One after the other: the activations of one worker at a time.
            shape = jax.eval_shape(worker, ages_W[0], ages_W[0], jax.tree.map(_first, parts))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
            (grads, metrics), _ = lax.scan(
                lambda total, each: (jax.tree.map(jnp.add, total, worker(*each)), None),
                zeros,
                (jnp.arange(workers, dtype=jnp.int32), ages_W, parts),
            )
        return grads, metrics, _push(params, carry, bound)

    return Delayed(name, init, apply)


def _old(params: PyTree, carry: History, age: jax.Array) -> PyTree:
    """The parameters of `age` steps ago, at most K."""

    def choose(now: jax.Array, rows: jax.Array) -> jax.Array:
        row = (carry.step - age) % rows.shape[0]
        then = lax.dynamic_index_in_dim(rows, row, 0, keepdims=False)
        return lax.select_n(age > 0, now, then)

    return jax.tree.map(choose, params, carry.params)


def _push(params: PyTree, carry: History, bound: int) -> History:
    if not bound:
        return carry._replace(step=carry.step + 1)
    rows = jax.tree.map(
        lambda rows, now: lax.dynamic_update_index_in_dim(rows, now, carry.step % bound, 0),
        carry.params,
        params,
    )
    return History(rows, carry.step + 1)


def _first(leaf: jax.Array) -> jax.Array:
    return leaf[0]


def _check_bound(steps: int) -> None:
    if steps < 0:
        raise ValueError(f"a staleness of {steps} steps; it is at least 0, a fresh gradient")


def _check_rows(batch: PyTree, workers: int) -> None:
    for rows in {leaf.shape[0] for leaf in jax.tree.leaves(batch)}:
        if rows % workers:
            raise ValueError(
                f"a batch of {rows} rows does not divide over {workers} workers; "
                f"make it a multiple of {workers}"
            )
