"""Masks as an Optax transformation: what is masked is zero in the parameters themselves.

    u' = mask * (p + u) - p      so that p + u' = mask * (p + u)

Put last in a chain, after the learning rate, it makes any optimizer sparse; momentum and decay
cannot move what is masked. Its state (masks, scores, step, key) is a pytree of arrays at the places
of the parameters and of their shapes, so it is laid out and saved with them.

`prune` follows a schedule to fewer and fewer weights. `rewire` keeps their number and changes
places: RigL and SET. Optimizers before it go on seeing the whole gradient, so a weight that is
grown starts at zero with the moments that its gradient has had all along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from compress.pruning.mask_trees import (
    Leaves,
    Selection,
    by_layer,
    check_selection,
    flat,
    leaves_at,
    nested,
    targets_of,
)
from compress.pruning.masks import keep_top, magnitude, random_score, zeros_of
from compress.pruning.schedules import Rewiring
from compress.pruning.sparse_step import Pruning, init_masks, update_masks
from model.rules import Rules, is_stacked, path_of

PyTree = Any
GrowthScore = Callable[[jax.Array, jax.Array | None, jax.Array], jax.Array]
"""`(key, raw gradient or None, weight) -> score` of one matrix, by which weights are grown."""


class PruneState(NamedTuple):
    """State of `prune`.

    Attributes:
      step: int32, updates so far.
      masks: nested dicts of bool arrays, True where kept.
      scores: accumulated scores like the masks, or {}.
      key: {"random": key} for random scores, or {}.
    """

    step: jax.Array
    masks: PyTree
    scores: PyTree
    key: PyTree


class RewireState(NamedTuple):
    """State of `rewire`.

    Attributes:
      step: int32, updates so far.
      masks: nested dicts of bool arrays, True where kept.
      key: of all draws to come.
    """

    step: jax.Array
    masks: PyTree
    key: jax.Array


def prune(key: jax.Array, settings: Pruning) -> optax.GradientTransformationExtraArgs:
    """Sets weights to zero by a schedule, and keeps them there until masks are computed anew.

    Masks look at the weights before the update, like those of `mask_weights`. A weight that
    was masked is zero, so by magnitude it does not come back.

    Args:
      key: for random scores.
      settings: see `compress.pruning.sparse_step.Pruning`. Saliency and movement need the raw
        gradient, `update(..., grads=)`.

    Raises (by `init`):
      ValueError: as `targets_of`, or a pattern that does not fit a shape.

    >>> from compress.pruning.schedules import one_shot
    >>> settings = Pruning(rules=[("w", 0.5)], schedule=one_shot(0))
    >>> tx = optax.chain(optax.sgd(0.1), prune(jax.random.key(0), settings))
    >>> params = {"w": jnp.array([1.0, -3.0, 0.5, 2.0])}
    >>> updates, _ = tx.update({"w": jnp.ones(4)}, tx.init(params), params)
    >>> [round(float(w), 4) for w in optax.apply_updates(params, updates)["w"]]
    [0.0, -3.1, 0.0, 1.9]
    """

    def init(params: PyTree) -> PruneState:
        extra = init_masks(key, settings, params)
        return PruneState(jnp.int32(0), extra["masks"], extra["scores"], extra["key"])

    def update(updates, state, params=None, *, grads=None, **unused):
        params = _present(params, "prune")
        extra = {"masks": state.masks, "scores": state.scores, "key": state.key}
        extra = update_masks(settings, extra, params, grads, state.step)
        new = PruneState(state.step + 1, extra["masks"], extra["scores"], extra["key"])
        return mask_updates(updates, params, new.masks), new

    return optax.GradientTransformationExtraArgs(init, update)


def rewire(
    key: jax.Array, rules: Rules, rewiring: Rewiring, growth: GrowthScore
) -> optax.GradientTransformationExtraArgs:
    """Trains a network that is sparse from the start and moves its weights to better places.

    Where a step is due, in every layer by itself, the share `rewiring.fraction(step)` of the kept
    weights is dropped, those that are smallest after the update. As many are grown among all that
    are then not kept, the ones with the highest growth score; where that was kept before, it goes
    on as it was, otherwise it starts at zero. So the number of weights never changes.

    The first masks are random. Parameters are dense until the first update: start from
    `masked(params, state.masks)` where the first loss matters.

    Args:
      key: for the first masks and all later draws.
      rules: ordered `(regex, sparsity)`, see `targets_of`.
      rewiring: when and how many; `Rewiring(until=0)` for masks that stay.
      growth: `by_gradient` (RigL) or `at_random` (SET).

    Raises (by `init`):
      ValueError: as `targets_of`.

    >>> tx = rewire(jax.random.key(0), [("w", 0.75)], Rewiring(every=1, until=10), at_random)
    >>> params = {"w": jnp.ones((4, 4))}
    >>> updates, state = tx.update({"w": jnp.zeros((4, 4))}, tx.init(params), params)
    >>> float(optax.apply_updates(params, updates)["w"].sum())
    4.0
    """

    def init(params: PyTree) -> RewireState:
        targets = targets_of(rules, params)
        select: Selection = by_layer()
        check_selection(select, params, targets)
        start, rest = jax.random.split(key)
        leaves = leaves_at(params, targets)
        keys = jax.random.split(start, len(leaves))
        scores = {
            p: random_score(k, w.shape) for k, (p, w) in zip(keys, leaves.items(), strict=True)
        }
        wanted = {path: jnp.asarray(target) for path, target in targets.items()}
        return RewireState(jnp.int32(0), nested(jax.jit(select)(scores, wanted)), rest)

    def update(updates, state, params=None, *, grads=None, **unused):
        params = _present(params, "rewire")
        masks = flat(state.masks)
        old, steps = leaves_at(params, masks), leaves_at(updates, masks)
        raw = dict.fromkeys(masks) if grads is None else leaves_at(grads, masks)
        next_key, now = jax.random.split(state.key)

        def move() -> Leaves:
            keys = jax.random.split(now, len(masks))
            share = rewiring.fraction(state.step)
            moved = {}
            for k, (path, mask) in zip(keys, masks.items(), strict=True):
                weight = old[path] + steps[path].astype(old[path].dtype)
                args = (share, growth, k, mask, weight, raw[path])
                moved[path] = _over_layers(path, _move)(*args)
            return moved

        new = jax.lax.cond(rewiring.due(state.step), move, lambda: masks)
        # Both: a weight that was just grown starts at zero, whatever its moments say.
        alive = {path: new[path] & mask for path, mask in masks.items()}
        state = RewireState(state.step + 1, nested(new), next_key)
        return mask_updates(updates, params, nested(alive)), state

    return optax.GradientTransformationExtraArgs(init, update)


def rigl(key: jax.Array, rules: Rules, rewiring: Rewiring) -> optax.GradientTransformationExtraArgs:
    """Drops by magnitude, grows by the magnitude of the raw gradient (the `grads=` of the step).

    Evci et al. 2020, arXiv:1911.11134.

    >>> tx = rigl(jax.random.key(0), [("w", 0.5)], Rewiring())
    >>> int(tx.init({"w": jnp.ones(8)}).masks["w"].sum())
    4
    """
    return rewire(key, rules, rewiring, by_gradient)


def sparse_evolution(
    key: jax.Array, rules: Rules, rewiring: Rewiring
) -> optax.GradientTransformationExtraArgs:
    """SET: drops by magnitude, grows at random (Mocanu et al. 2018, arXiv:1707.04780).

    The paper moves a constant share; here it falls as for RigL, and a weight is grown at zero.

    >>> tx = sparse_evolution(jax.random.key(0), [("w", 0.5)], Rewiring())
    >>> int(tx.init({"w": jnp.ones(8)}).masks["w"].sum())
    4
    """
    return rewire(key, rules, rewiring, at_random)


def by_gradient(key: jax.Array, grad: jax.Array | None, weight: jax.Array) -> jax.Array:
    """Growth score |g|, of the raw gradient.

    Raises:
      ValueError: if the update was not given `grads=`.

    >>> by_gradient(jax.random.key(0), jnp.array([-2.0]), jnp.array([0.0])).tolist()
    [2.0]
    """
    if grad is None:
        raise ValueError(
            "weights are grown by their gradient: call update(..., grads=raw gradient)"
        )
    return magnitude(grad)


def at_random(key: jax.Array, grad: jax.Array | None, weight: jax.Array) -> jax.Array:
    """Growth score drawn from the key.

    >>> at_random(jax.random.key(0), None, jnp.zeros((2, 3))).shape
    (2, 3)
    """
    return random_score(key, weight.shape)


def mask_updates(updates: PyTree, params: PyTree, masks: PyTree) -> PyTree:
    """Returns u' with `p + u' = mask * (p + u)`: u where kept and -p elsewhere.

    So what is masked becomes exactly zero, and what is kept moves by exactly u.

    Args:
      updates: what would be added to the parameters.
      params: like updates.
      masks: for some of them.

    >>> u, p = {"w": jnp.array([0.5, 0.5])}, {"w": jnp.array([1.0, 2.0])}
    >>> mask_updates(u, p, {"w": jnp.array([True, False])})["w"].tolist()
    [0.5, -2.0]
    """
    by_path = flat(masks)
    weights = leaves_at(params, by_path)

    def at(key_path: tuple[Any, ...], u: jax.Array) -> jax.Array:
        path = path_of(key_path)
        if path not in by_path:
            return u
        # In the wider type: -p rounded to bfloat16 would not cancel a float32 p.
        dtype = jnp.promote_types(u.dtype, weights[path].dtype)
        return jnp.where(by_path[path], u.astype(dtype), -weights[path].astype(dtype))

    return jax.tree_util.tree_map_with_path(at, updates)


def _move(
    share: jax.Array,
    growth: GrowthScore,
    key: jax.Array,
    mask: jax.Array,
    weight: jax.Array,
    grad: jax.Array | None,
) -> jax.Array:
    """The new mask of one matrix."""
    kept = mask.sum(dtype=jnp.int32)
    moving = zeros_of(share, kept)
    # All scores are at least 0, so what must not win gets less.
    size = jnp.where(mask, magnitude(weight), -1.0)
    (stay,) = keep_top([size], kept - moving)
    (grown,) = keep_top([jnp.where(stay, -1.0, growth(key, grad, weight))], moving)
    return stay | grown


def _over_layers(path: str, move: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`move` for each layer of a stacked parameter, with a key of its own."""
    if not is_stacked(path):
        return move

    def each(share, growth, key, mask, weight, grad):
        keys = jax.random.split(key, mask.shape[0])
        one = lambda k, m, w, g: move(share, growth, k, m, w, g)  # noqa: E731
        return jax.vmap(one)(keys, mask, weight, grad)

    return each


def _present(params: PyTree, name: str) -> PyTree:
    if params is None:
        raise ValueError(f"{name} needs the parameters: call update(updates, state, params)")
    return params
