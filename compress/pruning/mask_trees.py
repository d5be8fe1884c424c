"""Masks of a whole model: rules choose parameters and sparsities, a selection ranks scores.

Masks are nested dicts of boolean arrays at the places of the pruned parameters, and of their
shapes, so that they are laid out and saved like them. What is not pruned has no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from compress.lora import factors_among
from compress.pruning.masks import Pattern, check_sparsity, keep_top, unstructured, zeros_of
from model.rules import Rules, is_stacked, leaf_paths, match_per_layer, path_of

PyTree = Any
Leaves = dict[str, jax.Array]
"""Parameter path -> array, of the pruned parameters alone."""

Selection = Callable[[Leaves, Leaves], Leaves]
"""`(scores, sparsities [] or [L]) -> masks`."""


def block_kernels(sparsity: float) -> Rules:
    """Rules that prune the kernels of the blocks, and no embedding, head, norm or bias.

    >>> block_kernels(0.5)
    (('blocks/.*/kernel', 0.5),)
    """
    return (("blocks/.*/kernel", sparsity),)


def targets_of(rules: Rules, params: PyTree) -> dict[str, np.ndarray]:
    """Returns by path the final sparsity of each parameter that is pruned, layer by layer.

    Args:
      rules: ordered `(regex, sparsity)`; what none matches, and what gets 0, is not pruned.
      params: nested dicts of parameters, or their shapes.

    Returns:
      float32 [L] for stacked parameters, [] for others.

    Raises:
      ValueError: a sparsity that is not in [0, 1), a rule that matches nothing, rules that prune
        nothing, factors of an adapted matrix, a parameter that is not floating point, or, where
        parameters are concrete, one that holds a NaN or an infinity.

    >>> params = {"blocks": {"up": {"kernel": jnp.ones((2, 4, 4))}}}
    >>> targets_of([("blocks/1/.*", 0.5)], params)
    {'blocks/up/kernel': array([0. , 0.5], dtype=float32)}
    """
    for regex, sparsity in rules:
        check_sparsity(sparsity, f"rule {regex!r}")
    values = match_per_layer(rules, params, default=0.0)
    # A tuple is one value a layer; a named tuple is a node, like what optax.masked puts for a leaf.
    is_value = lambda x: type(x) is tuple  # noqa: E731
    by_path = dict(zip(leaf_paths(params), jax.tree.leaves(values, is_leaf=is_value), strict=True))
    targets = {path: np.asarray(value, np.float32) for path, value in by_path.items()}
    targets = {path: target for path, target in sorted(targets.items()) if target.any()}
    if not targets:
        raise ValueError(
            f"the rules {list(rules)} prune nothing: every sparsity is 0. Paths are "
            f"{', '.join(by_path)}"
        )
    if factors := factors_among(targets, params):
        raise ValueError(
            f"the rules prune {factors[0]}, a factor of an adapted matrix, whose zeros leave none "
            "in the product; prune the model before it is adapted, or give factors the sparsity 0"
        )
    for path, leaf in leaves_at(params, targets).items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{path!r} is {leaf.dtype}; only floating-point weights are pruned")
        finite = jnp.isfinite(leaf).all() if isinstance(leaf, jax.Array) else True
        if not isinstance(finite, jax.core.Tracer) and not bool(finite):
            raise ValueError(f"{path!r} holds NaN or infinity and cannot be ranked")
    return targets


def leaves_at(tree: PyTree, paths: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of a tree at these paths.

    Raises:
      ValueError: a path that the tree does not have.

    >>> leaves_at({"head": {"kernel": 1, "bias": 2}}, {"head/kernel": None})
    {'head/kernel': 1}
    """
    leaves = dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))
    if missing := [path for path in paths if path not in leaves]:
        raise ValueError(f"no parameter at {', '.join(missing)}; there are {', '.join(leaves)}")
    return {path: leaves[path] for path in paths}


def flat(masks: PyTree) -> Leaves:
    """Returns masks by path, in the order of their paths.

    >>> flat({"head": {"kernel": True}})
    {'head/kernel': True}
    """
    return dict(sorted(flax.traverse_util.flatten_dict(masks, sep="/").items()))


def nested(leaves: Mapping[str, Any]) -> PyTree:
    """Returns leaves by path as nested dicts: the inverse of `flat`.

    >>> nested({"head/kernel": True})
    {'head': {'kernel': True}}
    """
    return flax.traverse_util.unflatten_dict(dict(leaves), sep="/")


def by_layer(pattern: Pattern = unstructured) -> Selection:
    """Returns the selection that ranks each matrix, and each layer of a stack, by itself.

    >>> scores = {"blocks/up/kernel": jnp.arange(8.0).reshape(2, 2, 2)}
    >>> masks = by_layer()(scores, {"blocks/up/kernel": jnp.array([0.25, 0.5])})
    >>> masks["blocks/up/kernel"].astype(int).tolist()
    [[[0, 1], [1, 1]], [[0, 0], [1, 1]]]
    """

    def select(scores: Leaves, sparsities: Leaves) -> Leaves:
        return {path: one(path, score, sparsities[path]) for path, score in scores.items()}

    def one(path: str, score: jax.Array, sparsity: jax.Array) -> jax.Array:
        try:
            return _over_layers(pattern, path)(score, sparsity)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from error

    return select


def together(scores: Leaves, sparsities: Leaves) -> Leaves:
    """The selection that ranks all scores of all parameters at once.

    The zeros are as many as by layer, but lie wherever the lowest scores are. Where kernels of
    different sizes of weight meet, as in Transformers, whole layers may go: `by_layer` is the
    default.

    >>> scores = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
    >>> together(scores, {"a": jnp.float32(0.5), "b": jnp.float32(0.5)})["a"].tolist()
    [False, False]
    """
    paths = list(scores)
    zeros, kept = jnp.int32(0), jnp.int32(0)
    ranked = []
    for path in paths:
        score, sparsity = scores[path].astype(jnp.float32), sparsities[path]
        size = score.size // max(sparsity.size, 1)
        zeros += zeros_of(sparsity, size).sum(dtype=jnp.int32)
        kept += jnp.int32(score.size)
        # A layer that asks for no zeros takes no part.
        untouched = (sparsity == 0).reshape(sparsity.shape + (1,) * (score.ndim - sparsity.ndim))
        ranked.append(jnp.where(untouched, jnp.inf, score))
    return dict(zip(paths, keep_top(ranked, kept - zeros), strict=True))


def check_selection(select: Selection, params: PyTree, targets: Mapping[str, np.ndarray]) -> None:
    """Raises what `select` would raise on the shapes of these parameters."""
    leaves = leaves_at(params, targets)
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for path, leaf in leaves.items()}
    wanted = {path: jax.ShapeDtypeStruct(t.shape, jnp.float32) for path, t in targets.items()}
    jax.eval_shape(select, shapes, wanted)


def all_kept(params: PyTree, targets: Mapping[str, Any]) -> PyTree:
    """Masks that keep everything.

    >>> all_kept({"head": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}, {"head/kernel": 0.5})
    {'head': {'kernel': Array([ True,  True], dtype=bool)}}
    """
    return nested({p: jnp.ones(leaf.shape, bool) for p, leaf in leaves_at(params, targets).items()})


def masked(params: PyTree, masks: PyTree) -> PyTree:
    """Returns the parameters with zeros where their masks say so.

    Raises:
      ValueError: a mask for a parameter that is not there.

    >>> params = {"head": {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.ones(1)}}
    >>> masked(params, {"head": {"kernel": jnp.array([True, False])}})["head"]["kernel"].tolist()
    [1.0, 0.0]
    """
    return map_masked(lambda w, mask: jnp.where(mask, w, jnp.zeros_like(w)), params, masks)


def map_masked(change: Callable[..., jax.Array], params: PyTree, masks: PyTree) -> PyTree:
    """Applies `change(w, mask)` to the parameters that have a mask; others stay as they are."""
    by_path = flat(masks)
    leaves_at(params, by_path)  # raises where one is missing

    def at(key_path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        mask = by_path.get(path_of(key_path))
        return leaf if mask is None else change(leaf, mask)

    return jax.tree_util.tree_map_with_path(at, params)


def masks_from(scores: PyTree, rules: Rules, select: Selection | None = None) -> PyTree:
    """Prunes once: the masks of the final sparsities, by scores shaped like the parameters.

    Args:
      scores: how much each weight matters, for instance `jax.tree.map(magnitude, params)`.
      rules: see `targets_of`.
      select: `by_layer()` if not given.

    Raises:
      ValueError: as `targets_of`, or a pattern that does not fit a shape.

    >>> params = {"head": {"kernel": jnp.array([[1.0, -3.0], [0.5, 2.0]])}}
    >>> scores = jax.tree.map(jnp.abs, params)
    >>> masked(params, masks_from(scores, [("kernel", 0.5)]))["head"]["kernel"].tolist()
    [[0.0, -3.0], [0.0, 2.0]]
    """
    select = by_layer() if select is None else select
    targets = targets_of(rules, scores)
    check_selection(select, scores, targets)
    wanted = {path: jnp.asarray(target) for path, target in targets.items()}
    return nested(jax.jit(select)(leaves_at(scores, targets), wanted))


def zero_counts(masks: PyTree) -> dict[str, tuple[int, int]]:
    """Returns by path how many weights are masked, and how many there are.

    >>> zero_counts({"head": {"kernel": jnp.array([True, False, False])}})
    {'head/kernel': (2, 3)}
    """
    return {path: (int((~mask).sum()), mask.size) for path, mask in flat(masks).items()}


def rewind(initial: PyTree, masks: PyTree) -> PyTree:
    """The lottery ticket: the initial (or early) parameters, pruned by masks found at the end.

    Train, find masks from what training ended with, put everything back, train again with the masks
    held (Frankle & Carbin 2019, arXiv:1803.03635; back to an early step rather than to the start,
    2020, arXiv:1912.05671).

    Args:
      initial: parameters at the step to go back to.
      masks: of `masks_from(scores of the final parameters, ...)`.

    Raises:
      ValueError: a mask for a parameter that is not there.

    >>> initial, final = {"head": jnp.array([0.1, 0.2])}, {"head": jnp.array([3.0, 0.1])}
    >>> masks = masks_from(jax.tree.map(jnp.abs, final), [("head", 0.5)])
    >>> [round(float(w), 3) for w in rewind(initial, masks)["head"]]
    [0.1, 0.0]
    """
    return masked(initial, masks)


def _over_layers(pattern: Pattern, path: str) -> Pattern:
    return jax.vmap(pattern) if is_stacked(path) else pattern
