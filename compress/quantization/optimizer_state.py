"""Optimizer state in 8 bits: the moments of any Optax transformation, kept on a logarithmic grid.

Decoded before each update and encoded after it, in blocks of their own scale, as Dettmers et al.
2021 (arXiv:2110.02861) do; but where their grid is a dynamic one, ours is

    scale * 2^(-n / 8)        scale: the largest of the block; n = 0 .. 126 and a sign,
                              or 0 .. 254 without one; and zero

so that one bound, 2^(1/16) - 1 or 4.4 %, holds for the relative error of every number down to the
grid's smallest, whatever its size. Adam divides one moment by the root of another: this bounds what
the division sees, and nothing but zero becomes zero under the root.

Numbers lie where the moments lay, in their shapes, so that they are laid out over devices like
them. Blocks are cut along the last axis, so none reaches over two rows, or over two layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from model.rules import leaf_paths

PyTree = Any

BLOCK = 256
SMALLEST = 4096  # numbers; below, Dettmers et al. keep 32 bits, since there is little to save
STEPS = 8  # grid numbers an octave
NONNEGATIVE = ("nu", "nu_max", "sum_of_squares", "exp_avg_sq", "e_g", "e_x", "n")
"""What Optax and ours call moments without a sign."""
MOMENTS = (*NONNEGATIVE, "mu", "trace", "ema", "exp_avg", "m", "m1", "m2", "v")
"""What Optax and ours call running sums of gradients and of their squares.

Other arrays of a parameter's shape bear no relative error of 4.4 %: averages of weights, weights of
the start, covariances, their roots and bases.
"""


class EightBitState(NamedTuple):
    """State of `eight_bit`.

    Attributes:
      inner: the state of the wrapped transformation, with int8 (or, without sign, uint8) arrays in
        place of its moments.
      scales: path in `inner` -> scales of a moment, shaped like it with one entry a block along the
        last axis, in its type.
      key: for stochastic rounding, new after each update; or None.
    """

    inner: PyTree
    scales: dict[str, jax.Array]
    key: jax.Array | None


def eight_bit(
    tx: optax.GradientTransformation,
    *,
    block: int = BLOCK,
    smallest: int = SMALLEST,
    moments: tuple[str, ...] = MOMENTS,
    nonnegative: tuple[str, ...] = NONNEGATIVE,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` with its moments kept in 8 bits.

    A moment is an array of the state that is called so and lies under the path of a parameter of
    its shape. Everything else stays as it is: counts, factored moments, averages of weights.

    Args:
      tx: any transformation.
      block: numbers that share a scale, at most.
      smallest: parameters with fewer numbers (in all layers) keep their moments as they are.
      moments: names of moments in the state.
      nonnegative: those of them that have no sign; these get twice the range.
      key: rounds stochastically, without bias; None rounds to the nearest power, and what moves by
        less than half of the 9 % between two powers stays where it is, for ever.

    Raises:
      ValueError: a block below 1; at `init`, if the state holds no moment that is large enough.

    >>> params = {"kernel": jnp.ones((64, 256))}
    >>> tx = eight_bit(optax.adam(1e-3))
    >>> state = tx.init(params)
    >>> state.inner[0].mu["kernel"].dtype.name, state.inner[0].nu["kernel"].dtype.name
    ('int8', 'uint8')
    >>> sum(a.nbytes for a in jax.tree.leaves(state))  # of 131,076
    33284
    """
    if block < 1:
        raise ValueError(f"a block of {block} numbers has no scale; give at least 1")
    wrapped = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> EightBitState:
        inner = wrapped.init(params)
        found = _moments(inner, params, smallest, moments)
        if not found:
            raise ValueError(
                f"the optimizer's state has no moment ({', '.join(moments)}) of a parameter of "
                f"{smallest} numbers or more, so nothing would be kept in 8 bits; lower "
                "`smallest`, or leave the wrapper out"
            )
        signs = {p: not set(before.split("/")) & set(nonnegative) for p, before in found.items()}
        return _encoded(inner, signs, block, key)

    def update(
        updates: PyTree, state: EightBitState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, EightBitState]:
        leaves, structure = jax.tree.flatten(state.inner)
        paths = leaf_paths(state.inner)
        signs = {
            path: leaf.dtype == jnp.int8
            for path, leaf in zip(paths, leaves, strict=True)
            if path in state.scales
        }
        plain = [
            decode(leaf, state.scales[path]) if path in signs else leaf
            for path, leaf in zip(paths, leaves, strict=True)
        ]
        inner = jax.tree.unflatten(structure, plain)
        updates, inner = wrapped.update(updates, inner, params, **extra_args)
        return updates, _encoded(inner, signs, block, state.key)

    return optax.GradientTransformationExtraArgs(init, update)


def encode(
    x: jax.Array, block: int = BLOCK, *, signed: bool = True, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the grid numbers of x, int8 or uint8 like x, and its scales [..., blocks].

    Where x is never below zero, numbers under the grid's smallest, but not zero, become the
    smallest: others are divided by their root. Signed ones fall to zero, or with a key to the
    smallest with a probability that keeps their mean: a floor under both would leave a ratio of
    about one where there is no gradient any more, and move such weights for ever.

    Args:
      x: [..., width], floating point.
      block: numbers along the last axis that share a scale; the last block may hold fewer.
      signed: whether x may be below zero; if not, the grid reaches down to 2^-31 of the largest
        number of a block instead of 2^-15.
      key: for stochastic rounding.

    >>> encode(jnp.array([-8.0, 4.0, 0.0, 1.0]))[0].tolist()
    [-127, 119, 0, 103]
    """
    width = x.shape[-1]
    grid = _grid(signed)
    top = grid.size - 1
    scales = _blocks_of(jnp.abs(x), block).max(axis=-1)
    wide = scales.astype(jnp.float32)
    each = _spread(jnp.where(wide == 0, jnp.float32(1), wide), width)
    ratio = jnp.abs(x).astype(jnp.float32) / each
    power = top + STEPS * jnp.log2(jnp.where(ratio == 0, jnp.float32(1), ratio))
    if key is None:
        level = jnp.round(power)
    else:
        below = jnp.clip(jnp.floor(power), 1, top - 1).astype(jnp.int32)
        low, high = jnp.asarray(grid)[below], jnp.asarray(grid)[below + 1]
        up = jax.random.uniform(key, x.shape, jnp.float32) < (ratio - low) / (high - low)
        level = (below + up.astype(jnp.int32)).astype(jnp.float32)
    level = jnp.where(ratio == 0, jnp.float32(0), jnp.clip(level, 1, top))
    if signed:
        smallest = jnp.asarray(grid)[1]
        stays = jnp.float32(0)
        if key is not None:
            drawn = jax.random.uniform(jax.random.fold_in(key, 1), x.shape, jnp.float32)
            stays = (drawn < ratio / smallest).astype(jnp.float32)
        level = jnp.where(ratio < smallest, stays, level)
    if signed:
        return (level * jnp.sign(x).astype(jnp.float32)).astype(jnp.int8), scales
    return level.astype(jnp.uint8), scales


def decode(numbers: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns what `encode` was given, nearly, in the type of the scales.

    Args:
      numbers: [..., width].
      scales: [..., blocks].

    >>> decode(*encode(jnp.array([-8.0, 4.0, 0.0, 1.0]))).tolist()
    [-8.0, 4.0, 0.0, 1.0]
    """
    signed = numbers.dtype == jnp.int8
    level = jnp.abs(numbers.astype(jnp.int32))
    each = _spread(scales.astype(jnp.float32), numbers.shape[-1])
    real = jnp.asarray(_grid(signed))[level] * each
    real = jnp.where(numbers < 0, -real, real) if signed else real
    return real.astype(scales.dtype)


def _grid(signed: bool) -> np.ndarray:
    """Magnitudes by number, float32, up to 1 at the end; 0 first."""
    top = 127 if signed else 255
    levels = np.exp2((np.arange(top + 1) - top) / STEPS)
    levels[0] = 0
    return levels.astype(np.float32)


def _blocks_of(x: jax.Array, block: int) -> jax.Array:
    """[..., width] in blocks, [..., blocks, block], with zeros at the end.

    Blocks are as even as can be, so that the number of scales tells their length.
    """
    width = x.shape[-1]
    count = -(-width // block)
    length = -(-width // count)
    x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, count * length - width),))
    return x.reshape(*x.shape[:-1], count, length)


def _spread(scales: jax.Array, width: int) -> jax.Array:
    """The scale of each number: [..., blocks] to [..., width]."""
    return jnp.repeat(scales, -(-width // scales.shape[-1]), axis=-1)[..., :width]


def _moments(
    inner: PyTree, params: PyTree, smallest: int, names: tuple[str, ...]
) -> dict[str, str]:
    """Path of each moment that is kept in 8 bits -> what comes before the parameter's path."""
    shapes = {
        path: leaf.shape
        for path, leaf in zip(leaf_paths(params), jax.tree.leaves(params), strict=True)
        if leaf.size >= smallest and leaf.ndim
    }
    found = {}
    for path, leaf in zip(leaf_paths(inner), jax.tree.leaves(inner), strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        for parameter, shape in shapes.items():
            before = f"/{path}".removesuffix(f"/{parameter}")
            if leaf.shape == shape and before != f"/{path}" and before.split("/")[-1] in names:
                found[path] = before
    return found


def _encoded(
    inner: PyTree, signs: dict[str, bool], block: int, key: jax.Array | None
) -> EightBitState:
    leaves, structure = jax.tree.flatten(inner)
    used, key = (None, None) if key is None else jax.random.split(key)
    scales = {}
    for place, path in enumerate(leaf_paths(inner)):
        if path in signs:
            mine = None if used is None else jax.random.fold_in(used, place)
            leaves[place], scales[path] = encode(leaves[place], block, signed=signs[path], key=mine)
    return EightBitState(jax.tree.unflatten(structure, leaves), scales, key)
