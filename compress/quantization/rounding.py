"""Rounding to the nearest number of a grid: what quantization is before anything cleverer.

The scale of a group maps its extreme weight onto the end of the grid. Weights are rounded with the
scale *as it is stored*, so no error comes from storing it.

float32 scales are kept to 16 significant bits. Their product with an integer of 8 bits is then
exact in float32, whatever a compiler fuses, and quantizing what was dequantized gives the same
bits.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress.quantization.formats import Format, format_of
from compress.quantization.qtensor import QTensor, join_axis, pack, split_axis, to_real

SMALLEST_FACTOR = 0.5  # of the plain scale, in a search: 3 bits want about 0.6, 4 about 0.8


class Scales(NamedTuple):
    """Scales and offsets (or None) of a matrix, one a group: see `QTensor`."""

    scales: jax.Array
    offsets: jax.Array | None


def quantize(w: jax.Array, format: str | Format, axis: int = -2, *, candidates: int = 1) -> QTensor:
    """Rounds a matrix, or a stack of them, to the nearest numbers of a format.

    Args:
      w: [..., rows, columns], floating point.
      format: a format or its name in `compress.quantization.formats.FORMATS`.
      axis: the contraction axis: -2 for a kernel [in, out], -1 for a table [rows, width] (whose
        transpose is the kernel of a tied head).
      candidates: how many scales to try for each group, from the plain one down to half of it;
        the one with the least squared error is kept. 1 takes the plain one.

    Raises:
      ValueError: if the format does not fit the shape, w holds a number that is not finite, or a
        scale does not fit its type (the last two where w is concrete, so not under jit).

    >>> w = quantize(jnp.array([[1.0, -4.0], [-2.0, 3.0]]), "int4")
    >>> w.dequantize().tolist()
    [[1.0, -4.0], [-2.0, 3.0]]
    """
    format = format_of(format)
    check_shape(w, format, axis)
    if candidates < 1:
        raise ValueError(f"{candidates} candidates are too few: 1 takes the plain scale")
    concrete = not isinstance(w, jax.core.Tracer)
    if concrete and not bool(jnp.isfinite(w).all()):
        raise ValueError(
            f"a weight of shape {w.shape} holds NaN or infinity and cannot be quantized"
        )
    q = _quantize(w, format, axis, candidates)
    if concrete and not all(bool(jnp.isfinite(a.astype(jnp.float32)).all()) for a in _scales_of(q)):
        raise ValueError(
            f"weights up to {float(jnp.abs(w).max()):.3g} need a scale or minimum that "
            f"{format.scale_dtype} cannot hold; choose a format with float32 scales"
        )
    return q


def check_shape(w: Any, format: Format, axis: int) -> None:
    """Raises ValueError where weights of this shape and type do not fit the format."""
    if axis not in (-1, -2):
        raise ValueError(f"the contraction axis is -1 or -2, counted from the end, not {axis}")
    if len(w.shape) < 2:
        raise ValueError(f"only matrices and stacks of them are quantized, not shape {w.shape}")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"only floating-point weights are quantized, not {w.dtype}")
    format.groups(w.shape[axis])


def find_scales(w: jax.Array, format: Format, axis: int, candidates: int = 1) -> Scales:
    """Returns the scales of all groups of w [..., rows, columns]; see `quantize`.

    >>> find_scales(jnp.array([[1.0, -4.0], [-2.0, 3.0]]), format_of("int4"), -2).scales.tolist()
    [[0.25, 0.5]]
    """
    w = _in_groups(w.astype(jnp.float32), format, axis)
    axes = _shared_axes(format, axis)
    scales, offsets = _EXTREMES[_rule(format)](w, format, axes)
    if candidates > 1:
        scales, offsets = _search(w, scales, format, axis, candidates)
    return Scales(scales.squeeze(axis), None if offsets is None else offsets.squeeze(axis))


def to_numbers(
    w: jax.Array, scales: jax.Array, offsets: jax.Array | None, format: Format
) -> jax.Array:
    """Returns the nearest numbers of the grid, integers as int32.

    Args:
      w: weights of any shape, float32.
      scales: broadcasts against w (same rank).
      offsets: like scales, or None.
      format: the grid.

    >>> to_numbers(jnp.array([0.9, -9.0]), jnp.array([1.0]), None, format_of("int8")).tolist()
    [1, -9]
    """
    scales = scales.astype(jnp.float32)
    shift = jnp.float32(0)
    if offsets is not None and format.offset == "minimum":
        w = w - offsets.astype(jnp.float32)
    elif offsets is not None:
        shift = offsets.astype(jnp.float32)
    # Where the scale is 0 (or too small for its type), every number stands for the same weight.
    ratio = w / jnp.where(scales == 0, jnp.float32(1), scales)
    if format.kind != "int":
        return jnp.clip(ratio, format.low, format.high).astype(format.storage)
    return jnp.clip(jnp.round(ratio) + shift, format.low, format.high).astype(jnp.int32)


def assemble(
    numbers: jax.Array, scales: Scales, format: Format, axis: int, dtype: Any = jnp.float32
) -> QTensor:
    """Returns the quantized matrix of grid numbers [..., rows, columns] and their scales.

    Args:
      numbers: as `to_numbers` gives them.
      scales: as `find_scales` gives them.
      format: the grid.
      axis: contraction axis.
      dtype: what `dequantize()` shall return.
    """
    stored = pack(numbers, format, axis) if format.packed else numbers.astype(format.storage)
    return QTensor(stored, *scales, format=format, axis=axis, dtype_name=jnp.dtype(dtype).name)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize(w: jax.Array, format: Format, axis: int, candidates: int) -> QTensor:
    scales = find_scales(w, format, axis, candidates)
    offsets = None if scales.offsets is None else jnp.expand_dims(scales.offsets, axis)
    grouped = _in_groups(w.astype(jnp.float32), format, axis)
    numbers = to_numbers(grouped, jnp.expand_dims(scales.scales, axis), offsets, format)
    return assemble(join_axis(numbers, axis), scales, format, axis, w.dtype)


def _scales_of(q: QTensor) -> list[jax.Array]:
    return [a for a in (q.scales, q.offsets) if a is not None]


def _in_groups(w: jax.Array, format: Format, axis: int) -> jax.Array:
    return split_axis(w, axis, format.groups(w.shape[axis]))


def _shared_axes(format: Format, axis: int) -> tuple[int, ...]:
    """Axes of the grouped array along which one scale holds."""
    if format.group != "tensor":
        return (axis,)
    return (axis, -1 if axis == -2 else -3)


def _stored_scale(scale: jax.Array, format: Format) -> jax.Array:
    if format.scale_dtype == "float32":
        return jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=15)
    return scale.astype(format.scale_dtype)


# Constants are multiplied by, never divided by: XLA turns a division by a constant into a product
# with its inverse under jit only, and a bit would differ.


def _balanced(w: jax.Array, format: Format, axes: tuple[int, ...]) -> Scales:
    largest = jnp.abs(w).max(axis=axes, keepdims=True)
    return Scales(_stored_scale(largest * np.float32(1 / format.high), format), None)


def _full(w: jax.Array, format: Format, axes: tuple[int, ...]) -> Scales:
    high, low = w.max(axis=axes, keepdims=True), w.min(axis=axes, keepdims=True)
    extreme = jnp.where(high > -low, high, low)
    return Scales(_stored_scale(extreme * np.float32(1 / format.low), format), None)


def _minimum(w: jax.Array, format: Format, axes: tuple[int, ...]) -> Scales:
    high, low = w.max(axis=axes, keepdims=True), w.min(axis=axes, keepdims=True)
    scale = _stored_scale((high - low) * np.float32(1 / format.high), format)
    return Scales(scale, low.astype(format.scale_dtype))


def _zero_point(w: jax.Array, format: Format, axes: tuple[int, ...]) -> Scales:
    # Zero is always on the grid, so that padding and pruned weights stay exactly zero.
    high = jnp.maximum(w.max(axis=axes, keepdims=True), 0)
    low = jnp.minimum(w.min(axis=axes, keepdims=True), 0)
    scale = _stored_scale((high - low) * np.float32(1 / (format.high - format.low)), format)
    return Scales(scale, _zero_for(scale, low, format))


def _zero_for(scale: jax.Array, low: jax.Array, format: Format) -> jax.Array:
    wide = scale.astype(jnp.float32)
    zero = format.low - jnp.round(low / jnp.where(wide == 0, jnp.float32(1), wide))
    return jnp.clip(zero, format.low, format.high).astype(format.storage)


_EXTREMES = {
    "balanced": _balanced,
    "full": _full,
    "minimum": _minimum,
    "zero_point": _zero_point,
}


def _rule(format: Format) -> str:
    return format.span if format.offset == "none" else format.offset


def _search(w: jax.Array, scales: jax.Array, format: Format, axis: int, candidates: int) -> Scales:
    """Returns the best of scales between the plain one and half of it, by squared error."""
    axes = _shared_axes(format, axis)
    low = w.min(axis=axes, keepdims=True)
    step = np.float32((1 - SMALLEST_FACTOR) / (candidates - 1))

    def offsets_for(scale):
        if format.offset == "minimum":
            return low.astype(format.scale_dtype)
        return _zero_for(scale, jnp.minimum(low, 0), format) if format.offset != "none" else None

    def attempt(best, number):
        error, scale, offsets = best
        factor = 1 - step * number.astype(jnp.float32)
        new = _stored_scale(scales.astype(jnp.float32) * factor, format)
        shift = offsets_for(new)
        real = to_real(to_numbers(w, new, shift, format), new, shift, format, jnp.float32)
        new_error = jnp.square(real - w).sum(axis=axes, keepdims=True)
        better = new_error < error
        keep = functools.partial(jnp.where, better)
        return (keep(new_error, error), *jax.tree.map(keep, (new, shift), (scale, offsets))), None

    first = (jnp.full_like(scales, jnp.inf, jnp.float32), scales, offsets_for(scales))
    (_, *found), _ = jax.lax.scan(attempt, first, jnp.arange(candidates))
    return Scales(*found)
