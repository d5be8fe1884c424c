"""Masks as a weight transform: the model runs with masked weights, the optimizer keeps them all.

    apply    weights -> mask * weights, inside the loss
    update   extra -> extra, once a step: adds to the scores, and at the steps that the schedule
             names computes the masks anew

`apply`, `init` and `update` have the shapes of the weight transforms of a training step; what they
carry (masks, scores, the key of random scores) is all in their extra. Because masked weights keep
their values, they can come back. `compress.pruning.sparse_optimizer` sets them to zero instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compress.pruning import masks as scoring
from compress.pruning.mask_trees import (
    Leaves,
    Selection,
    all_kept,
    block_kernels,
    by_layer,
    check_selection,
    flat,
    leaves_at,
    map_masked,
    nested,
    targets_of,
)
from compress.pruning.schedules import Schedule, cubic
from model.rules import Rules

PyTree = Any

# name -> what a step adds to the score, from (weight, raw gradient)
ACCUMULATED: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "saliency": scoring.saliency,
    "movement": scoring.movement,
}
SCORES = ("magnitude", *ACCUMULATED, "random")


@dataclass(frozen=True)
class Pruning:
    """What is pruned, by which score, how far and when.

    Attributes:
      rules: ordered `(regex, final sparsity)`; what none matches stays dense.
      schedule: steps at which masks are computed, and their sparsities. That by default reaches the
        final one at step 1,000: a shorter run needs another, whose `last` lies within it.
      score: "magnitude" of the weights at that step; "saliency" or "movement", added up from the
        raw gradients of all steps before; or "random", the same draw at every step.
      select: how scores become masks: `by_layer(pattern)` or `together`.
      decay: what of the accumulated score each step keeps: 1 for a sum, less for a moving average.

    Raises:
      ValueError: a score of another name, or a decay outside of (0, 1].

    >>> Pruning(score="luck")
    Traceback (most recent call last):
    ...
    ValueError: score 'luck' is unknown; choose one of magnitude, saliency, movement, random
    """

    rules: Rules = field(default_factory=lambda: block_kernels(0.5))
    schedule: Schedule = field(default_factory=lambda: cubic(start=0, every=100, times=10))
    score: str = "magnitude"
    select: Selection = field(default_factory=by_layer)
    decay: float = 1.0

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score {self.score!r} is unknown; choose one of {', '.join(SCORES)}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is {self.decay}; it must be above 0 and at most 1")


class MaskTransform(NamedTuple):
    """A weight transform: the fields of `train.plugs.WeightTransform`, in its order."""

    name: str
    apply: Callable[[PyTree, Any], PyTree]
    init: Callable[[PyTree, PyTree], PyTree]
    update: Callable[[PyTree, PyTree, PyTree, Any], PyTree]


def hard(w: jax.Array, mask: jax.Array) -> jax.Array:
    """mask * w: what is masked has no gradient, and no influence until it comes back.

    >>> jax.grad(lambda w: hard(w, jnp.array([True, False])).sum())(jnp.ones(2)).tolist()
    [1.0, 0.0]
    """
    return jnp.where(mask, w, jnp.zeros_like(w))


def straight_through(w: jax.Array, mask: jax.Array) -> jax.Array:
    """mask * w, with the gradient of w: masked weights go on training as if they counted.

    Bengio et al. 2013 (arXiv:1308.3432) for the estimator; Sanh et al. 2020 (arXiv:2005.07683)
    prune with it.

    >>> w, mask = jnp.array([2.0, 3.0]), jnp.array([True, False])
    >>> straight_through(w, mask).tolist()
    [2.0, 0.0]
    >>> jax.grad(lambda w: straight_through(w, mask).sum())(w).tolist()
    [1.0, 1.0]
    """
    return jnp.where(mask, w, w - jax.lax.stop_gradient(w))


def mask_weights(
    key: jax.Array,
    settings: Pruning,
    apply_mask: Callable[[jax.Array, jax.Array], jax.Array] = hard,
    name: str = "masks",
) -> MaskTransform:
    """Returns pruning as a weight transform.

    Masks keep everything at first. Those computed at the end of step t, from the weights before its
    update, hold from step t + 1 on. Steps are counted without those that were not finite.

    A masked weight has no gradient, and under AdamW, decay aside, it comes to rest. Not so where a
    step of a weight depends on more than its own gradient (Muon, SOAP) or not on its size (Lion):
    there it goes on moving under its mask, and may be picked again for that.

    Args:
      key: for random scores; kept in the extra.
      settings: see `Pruning`.
      apply_mask: `hard`, or `straight_through`, without which the gradient of a masked weight and
        so what saliency and movement add for it is zero.
      name: key in the extra of the state.

    Raises (by `init`):
      ValueError: as `targets_of`, or a pattern that does not fit a shape.

    >>> settings = Pruning(rules=[("kernel", 0.5)])
    >>> transform = mask_weights(jax.random.key(0), settings)
    >>> transform.init({"head": {"kernel": jnp.ones((2, 2))}}, {})["masks"]["head"]["kernel"].all()
    Array(True, dtype=bool)
    """

    def init(params: PyTree, frozen: PyTree) -> PyTree:
        return init_masks(key, settings, params)

    def apply(weights: PyTree, context: Any) -> PyTree:
        return map_masked(apply_mask, weights, context.extra[name]["masks"])

    def update(extra: PyTree, params: PyTree, grads: PyTree, context: Any) -> PyTree:
        return update_masks(settings, extra, params, grads, context.updates)

    return MaskTransform(name, apply, init, update)


def init_masks(key: jax.Array, settings: Pruning, params: PyTree) -> PyTree:
    """Returns what pruning carries: {"masks", "scores", "key"}; scores where they accumulate.

    Raises:
      ValueError: as `targets_of`, or a pattern that does not fit a shape.

    >>> sorted(init_masks(jax.random.key(0), Pruning([("head", 0.5)]), {"head": jnp.ones(4)}))
    ['key', 'masks', 'scores']
    """
    targets = targets_of(settings.rules, params)
    check_selection(settings.select, params, targets)
    leaves = leaves_at(params, targets) if settings.score in ACCUMULATED else {}
    zeros = {path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in leaves.items()}
    return {
        "masks": all_kept(params, targets),
        "scores": nested(zeros),
        "key": {"random": key} if settings.score == "random" else {},
    }


def update_masks(
    settings: Pruning, extra: PyTree, params: PyTree, grads: PyTree, step: jax.Array
) -> PyTree:
    """Returns the extra after a step: scores with its share, masks anew if the step is due.

    Args:
      settings: as for `init_masks`.
      extra: from `init_masks` or the last step.
      params: the weights that magnitude looks at, and that gradients are taken at.
      grads: the raw gradient; not looked at (None will do) by "magnitude" and "random".
      step: int32 scalar.

    Raises:
      ValueError: scores that need a gradient, without one.

    >>> settings = Pruning(rules=[("head", 0.5)], schedule=cubic(0, 1, 1, initial=0.25))
    >>> params = {"head": jnp.array([4.0, 1.0, 3.0, 2.0])}
    >>> extra = init_masks(jax.random.key(0), settings, params)
    >>> update_masks(settings, extra, params, None, jnp.int32(0))["masks"]["head"].tolist()
    [True, False, True, True]
    """
    masks = flat(extra["masks"])
    weights = leaves_at(params, masks)
    scores = accumulate(settings, extra["scores"], weights, grads)
    targets = _targets(settings, params)

    def recompute() -> Leaves:
        ranked = _ranked(settings, scores, extra["key"], weights)
        sparsities = {p: settings.schedule.sparsity(step, t) for p, t in targets.items()}
        return settings.select(ranked, sparsities)

    masks = jax.lax.cond(settings.schedule.due(step), recompute, lambda: masks)
    return {**extra, "masks": nested(masks), "scores": nested(scores)}


def accumulate(settings: Pruning, scores: PyTree, weights: Leaves, grads: PyTree) -> Leaves:
    """Returns the accumulated scores by path, with those of this step; {} where none accumulate.

    Raises:
      ValueError: scores that need a gradient, without one.
    """
    if settings.score not in ACCUMULATED:
        return {}
    if grads is None:
        raise ValueError(
            f"the score {settings.score!r} is made from gradients: pass the raw gradient as grads="
        )
    add, raw, old = ACCUMULATED[settings.score], leaves_at(grads, weights), flat(scores)
    return {p: settings.decay * old[p] + add(w, raw[p]) for p, w in weights.items()}


def _ranked(settings: Pruning, scores: Leaves, key: PyTree, weights: Leaves) -> Leaves:
    """The scores that this pruning goes by."""
    if settings.score in ACCUMULATED:
        return scores
    if settings.score == "magnitude":
        return {path: scoring.magnitude(w) for path, w in weights.items()}
    keys = jax.random.split(key["random"], len(weights))
    return {
        path: scoring.random_score(k, w.shape)
        for k, (path, w) in zip(keys, weights.items(), strict=True)
    }


def _targets(settings: Pruning, params: PyTree) -> Leaves:
    return {p: jnp.asarray(t) for p, t in targets_of(settings.rules, params).items()}
