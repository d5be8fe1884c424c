"""Which weights stay: pure functions from a matrix of scores to a boolean mask, True where kept.

A score says how much a weight matters; a pattern says which places may be zero together:

    scores: magnitude |w|, saliency |w g|, movement -w g, random
    patterns: (score, sparsity) -> mask: unstructured, n_of_m, blocks

Nothing is sorted. The k highest scores are those at or above a threshold that is found bit by bit
by counting, and equal scores at the threshold are taken by place, first ones first. So a mask has
exactly the number of zeros that was asked for, at the cost of some sixty counts whatever the size.
Sparsities may be traced. Stacked layers go through `jax.vmap`; see `compress.pruning.mask_trees`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Pattern = Callable[[jax.Array, jax.Array | float], jax.Array]
"""`(score of one matrix, sparsity) -> mask`."""

_FRACTION_BITS = 24  # of a sparsity, as many as the mantissa of float32 holds


def magnitude(w: jax.Array) -> jax.Array:
    """|w|.

    >>> magnitude(jnp.array([1.0, -2.0])).tolist()
    [1.0, 2.0]
    """
    return jnp.abs(w.astype(jnp.float32))


def saliency(w: jax.Array, g: jax.Array) -> jax.Array:
    """|w g|: to first order, by how much the loss changes when w goes.

    Args:
      w: weights.
      g: the gradient of the loss, like w (Mozer & Smolensky 1988; SNIP, Lee et al. 2018,
        arXiv:1810.02340).

    >>> saliency(jnp.array([1.0, -2.0]), jnp.array([3.0, 0.5])).tolist()
    [3.0, 1.0]
    """
    return jnp.abs(w.astype(jnp.float32) * g.astype(jnp.float32))


def movement(w: jax.Array, g: jax.Array) -> jax.Array:
    """-w g, whose sum over steps is high where training moves w away from 0.

    Args:
      w: weights.
      g: the gradient of the loss, like w (Sanh et al. 2020, arXiv:2005.07683).

    >>> movement(jnp.array([1.0, -2.0]), jnp.array([3.0, 0.5])).tolist()
    [-3.0, 1.0]
    """
    return -w.astype(jnp.float32) * g.astype(jnp.float32)


def random_score(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Uniform scores: what any other score has to beat.

    >>> random_score(jax.random.key(0), (2, 3)).shape
    (2, 3)
    """
    return jax.random.uniform(key, tuple(shape), jnp.float32)


def check_sparsity(sparsity: Any, of: str) -> None:
    """Raises ValueError unless `0 <= sparsity < 1`; `of` says in the message of what.

    >>> check_sparsity(1.0, "head/kernel")
    Traceback (most recent call last):
    ...
    ValueError: the sparsity of head/kernel is 1.0, which leaves no weight and nothing to train. \
Give 0 <= sparsity < 1, or remove layers for good with compress.pruning.structured
    """
    number = isinstance(sparsity, int | float) and not isinstance(sparsity, bool)
    if number and sparsity == 1:
        raise ValueError(
            f"the sparsity of {of} is {sparsity}, which leaves no weight and nothing to train. "
            "Give 0 <= sparsity < 1, or remove layers for good with compress.pruning.structured"
        )
    if not number or not 0 <= sparsity < 1:
        raise ValueError(
            f"the sparsity of {of} is {sparsity!r}; it is the share of zeros, 0 <= sparsity < 1"
        )


def zeros_of(sparsity: jax.Array | float, size: jax.Array | int) -> jax.Array:
    """Returns the whole number nearest to `sparsity * size`, halves up, int32, like `sparsity`.

    The sparsity is taken to 24 bits, and multiplied as a whole number: a float32 product of
    millions would be rounded a second time. What 24 bits leave out moves the result by at most one
    up to 32 million weights.

    Args:
      sparsity: from 0 to 1, of any shape, maybe traced.
      size: how many weights there are, below 2**31, maybe traced.

    >>> zeros_of(0.9, 768 * 3072).tolist()
    2123366
    """
    half = _FRACTION_BITS // 2
    low = jnp.uint32(2**half - 1)
    fraction = jnp.round(jnp.asarray(sparsity, jnp.float32) * 2.0**_FRACTION_BITS)
    s = jnp.broadcast_to(fraction.astype(jnp.uint32), jnp.broadcast_shapes(fraction.shape))
    n = jnp.broadcast_to(jnp.asarray(size, jnp.uint32), s.shape)
    s_high, s_low, n_high, n_low = s >> half, s & low, n >> half, n & low
    middle = n_high * s_low + n_low * s_high + ((n_low * s_low) >> half)
    return (n_high * s_high + ((middle + 2 ** (half - 1)) >> half)).astype(jnp.int32)


@jax.jit
def keep_top(scores: Sequence[jax.Array], keep: jax.Array | int) -> list[jax.Array]:
    """Marks the `keep` highest of all scores together.

    Args:
      scores: arrays of any shapes, compared as float32. NaN counts as the highest.
      keep: how many to mark, maybe traced; at least 0, and what is more than there are marks all.

    Returns:
      Masks like the scores, with exactly `keep` marks. Of equal scores the earlier are marked: by
      array, then in row-major order.

    Raises:
      ValueError: for 2**31 scores or more.

    >>> keep_top([jnp.array([3.0, 1.0]), jnp.array([2.0, 3.0])], 3)
    [Array([ True, False], dtype=bool), Array([ True,  True], dtype=bool)]
    """
    total = sum(math.prod(score.shape) for score in scores)
    if total >= 2**31:
        raise ValueError(
            f"{total} scores are too many to be ranked together (2**31 - 1 at most): rank each "
            "layer by itself"
        )
    keep = jnp.asarray(keep, jnp.int32)
    keys = [_ordered_bits(score) for score in scores]

    def count(marks: Sequence[jax.Array]) -> jax.Array:
        return sum((jnp.sum(m, dtype=jnp.int32) for m in marks), start=jnp.int32(0))

    threshold = _largest(32, lambda t: count([key >= t for key in keys]) >= keep)
    above = [key > threshold for key in keys]
    ties = [key == threshold for key in keys]
    missing = keep - count(above)
    places, start = [], 0
    for score in scores:
        places.append(_places(score.shape) + jnp.uint32(start))
        start += math.prod(score.shape)

    def early(end: jax.Array) -> list[jax.Array]:
        return [tie & (place < end) for tie, place in zip(ties, places, strict=True)]

    end = _largest(total.bit_length(), lambda end: count(early(end)) <= missing)
    return [one | other for one, other in zip(above, early(end), strict=True)]


def unstructured(score: jax.Array, sparsity: jax.Array | float) -> jax.Array:
    """Pattern: the lowest scores are zero, wherever they lie.

    Args:
      score: any shape.
      sparsity: share of zeros; their number is `zeros_of(sparsity, score.size)`.

    >>> unstructured(jnp.array([[4.0, 1.0], [2.0, 3.0]]), 0.5).tolist()
    [[True, False], [False, True]]
    """
    return keep_top([score], score.size - zeros_of(sparsity, score.size))[0]


def n_of_m(m: int, *, axis: int = -2) -> Pattern:
    """Returns the pattern that keeps equally many of every m neighbours along an axis.

    With m = 4 and sparsity 0.5 this is the 2:4 of sparse tensor cores (Mishra et al. 2021,
    arXiv:2104.08378); with a sparsity that grows it passes through 3:4.

    Args:
      m: neighbours in a group.
      axis: the contraction axis: -2 of a kernel [in, out], -1 of a table [rows, width].

    Raises:
      ValueError: m is below 2; when called, if m does not divide the axis.

    >>> n_of_m(4)(jnp.array([[1.0, 9.0], [2.0, 8.0], [3.0, 7.0], [4.0, 6.0]]), 0.5).T.tolist()
    [[False, False, True, True], [True, True, False, False]]
    """
    if m < 2:
        raise ValueError(f"a group of {m} has nothing to choose from; give m of 2 or more, like 4")

    def pattern(score: jax.Array, sparsity: jax.Array | float) -> jax.Array:
        length = _divide(score, axis, m, "groups along the contraction axis")
        rows = jnp.moveaxis(score.astype(jnp.float32), axis, -1)
        groups = rows.reshape(*rows.shape[:-1], length // m, m)
        mine, theirs = groups[..., :, None], groups[..., None, :]
        earlier = (jnp.arange(m)[None] < jnp.arange(m)[:, None]).reshape(
            *(1,) * (mine.ndim - 2), m, m
        )
        rank = ((theirs > mine) | ((theirs == mine) & earlier)).sum(axis=-1, dtype=jnp.int32)
        mask = rank < m - zeros_of(sparsity, m)
        return jnp.moveaxis(mask.reshape(rows.shape), -1, axis)

    return pattern


def blocks(rows: int, columns: int) -> Pattern:
    """Returns the pattern whose zeros come as whole blocks, the ones with the lowest mean score.

    Args:
      rows: height of a block, along axis -2.
      columns: width of a block, along axis -1.

    Raises:
      ValueError: a size below 1; when called, if blocks do not divide the matrix.

    >>> blocks(1, 2)(jnp.array([[1.0, 5.0, 2.0, 3.0]]), 0.5).tolist()
    [[True, True, False, False]]
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"a block of {rows} x {columns} holds no weight; give sizes of at least 1")

    def pattern(score: jax.Array, sparsity: jax.Array | float) -> jax.Array:
        height = _divide(score, -2, rows, "blocks")
        width = _divide(score, -1, columns, "blocks")
        lead = score.shape[:-2]
        tiles = score.astype(jnp.float32).reshape(
            *lead, height // rows, rows, width // columns, columns
        )
        kept = unstructured(tiles.mean(axis=(-3, -1)), sparsity)
        wide = jnp.broadcast_to(kept[..., :, None, :, None], tiles.shape)
        return wide.reshape(score.shape)

    return pattern


def _divide(score: jax.Array, axis: int, size: int, what: str) -> int:
    """Length of the axis, once it is known that `size` divides it."""
    if score.ndim < 2:
        raise ValueError(
            f"{what} are cut from matrices, not from shape {score.shape}; choose kernels only"
        )
    length = score.shape[axis]
    if length % size:
        fitting = [d for d in range(2, min(length, 64) + 1) if length % d == 0]
        raise ValueError(
            f"{what} of {size} do not divide the {length} along axis {axis} of a weight of shape "
            f"{score.shape}; {fitting or length} would"
        )
    return length


def _ordered_bits(score: jax.Array) -> jax.Array:
    """uint32 in the order of the float32 values, both zeros alike."""
    x = score.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(bits: int, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest number of so many bits for which `holds`, which holds from 0 up to it."""

    def body(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, found)

    return jax.lax.fori_loop(0, bits, body, jnp.uint32(0))


def _places(shape: Sequence[int]) -> jax.Array:
    """Row-major place of each element, as a sum over axes so that each axis may be divided."""
    shape = tuple(shape)
    places = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :])
        places += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return places
