"""A quantized matrix: stored numbers and scales that behave as the weight they stand for.

`x @ w`, `w.take(ids)`, `w.T` and `w.shape` speak of the logical matrix, whatever is stored, so a
model runs with quantized weights unchanged (see `model.linear`). All children carry the same
leading axes (layers): slicing, scanning and vmapping the leaves gives quantized matrices again.

Axes are counted from the end, -2 or -1, so that they stay true when a leading axis goes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from compress.quantization.formats import Format
from model.linear import at_least_float32


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales", "offsets"],
    meta_fields=["format", "axis", "transposed", "dtype_name"],
)
@dataclass(frozen=True)
class QTensor:
    """A quantized matrix [..., rows, columns].

    Made by `compress.quantization.rounding.quantize`. The numbers that share a scale lie along
    `axis`, the contraction axis, which is cut into groups.

    Attributes:
      values: [..., rows, columns] in `format.storage`; where two values share a byte, `axis` has
        half the length and the earlier one is in the low half.
      scales: like values, with one entry a group along `axis` (and one in all, by tensor).
      offsets: zero points or minima, like scales, or None.
      format: the grid.
      axis: contraction axis of what is stored, -2 for a kernel [in, out], -1 for a table
        [rows, width].
      transposed: whether the logical matrix is the transpose of what is stored.
      dtype_name: type of the weight that was quantized.

    >>> from compress.quantization.rounding import quantize
    >>> w = quantize(jnp.linspace(-1, 1, 64 * 4).reshape(64, 4), "q4_0")
    >>> w.shape, w.values.shape, w.nbytes, (jnp.ones((2, 64)) @ w).shape
    ((64, 4), (32, 4), 144, (2, 4))
    """

    values: Any
    scales: Any
    offsets: Any
    format: Format
    axis: int
    transposed: bool = False
    dtype_name: str = "float32"

    # NumPy would otherwise take `array @ w` for itself.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        shape = list(self.values.shape)
        shape[self.axis] *= 2 if self.format.packed else 1
        if self.transposed:
            shape[-2], shape[-1] = shape[-1], shape[-2]
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Logical number of axes."""
        return self.values.ndim

    @property
    def size(self) -> int:
        """Number of weights."""
        size = 1
        for length in self.shape:
            size *= length
        return size

    @property
    def dtype(self) -> Any:
        """Type of the weight that was quantized, and of `dequantize()`."""
        return jnp.dtype(self.dtype_name)

    @property
    def nbytes(self) -> int:
        """Bytes that are stored: values, scales and offsets."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def T(self) -> QTensor:
        """The transpose; moves no data."""
        return replace(self, transposed=not self.transposed)

    def numbers(self) -> jax.Array:
        """Returns the unpacked, unscaled numbers of what is stored: int8, int16 or float8."""
        if not self.format.packed:
            return self.values
        return unpack(self.values, self.format, self.axis)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """Returns the plain array that this stands for, in `dtype` (by default its own)."""
        real = self._stored()
        real = real.swapaxes(-1, -2) if self.transposed else real
        return real.astype(self.dtype if dtype is None else dtype)

    def scale_of_each(self) -> jax.Array:
        """Returns the scale of every stored number, float32 [..., rows, columns]."""
        groups = self.scales.shape[self.axis]
        numbers = split_axis(self.numbers(), self.axis, groups)
        scales = jnp.expand_dims(self.scales, self.axis).astype(jnp.float32)
        return join_axis(jnp.broadcast_to(scales, numbers.shape), self.axis)

    def take(self, ids: jax.Array) -> jax.Array:
        """Returns the rows `ids` of a matrix [rows, width]: float32 [..., width].

        An id outside the matrix gives NaN.

        Raises:
          ValueError: if there are layer axes left.
        """
        if self.ndim != 2:
            raise ValueError(f"rows are taken of a matrix, not of a stack of shape {self.shape}")
        if self.transposed or self.axis != -1:
            return jnp.take(self.dequantize(jnp.float32), ids, axis=0, mode="fill")
        rows = self.shape[0]

        def pick(array):
            whole = jnp.broadcast_to(array, (rows, array.shape[-1]))
            # An integer has no NaN: the scale of an unknown row has, and carries it on.
            return jnp.take(whole, ids, axis=0, mode="fill")

        picked = jax.tree.map(pick, replace(self, values=None))
        values = jnp.take(self.values, ids, axis=0, mode="fill")
        return replace(picked, values=values)._stored()

    def __rmatmul__(self, x: Any) -> jax.Array:
        """Returns x @ self in the type of x; sums are at least float32."""
        x = jnp.asarray(x)
        if x.ndim == 1:
            return (x[None] @ self)[..., 0, :]
        axis = -3 - self.axis if self.transposed else self.axis
        # One scale for all that is summed comes out of the sum; several do not.
        factors = axis == -2 and not isinstance(self.format.group, int) and self.format.bits <= 8
        if not factors:
            return x @ self.dequantize(x.dtype)
        wide = at_least_float32(x.dtype)
        numbers, scales, offsets = self.numbers(), self.scales, self.offsets
        if self.transposed:
            numbers, scales = numbers.swapaxes(-1, -2), scales.swapaxes(-1, -2)
            offsets = None if offsets is None else offsets.swapaxes(-1, -2)
        y = jnp.matmul(x, numbers.astype(x.dtype), preferred_element_type=wide)
        if offsets is None:
            return (y * _like(scales, y)).astype(x.dtype)
        sums = x.sum(axis=-1, keepdims=True, dtype=wide)
        if self.format.offset == "zero_point":
            return ((y - sums * _like(offsets, y)) * _like(scales, y)).astype(x.dtype)
        return (y * _like(scales, y) + sums * _like(offsets, y)).astype(x.dtype)

    def _stored(self) -> jax.Array:
        """What is stored, as real numbers, float32 or wider."""
        wide = at_least_float32(self.dtype)
        numbers = split_axis(self.numbers(), self.axis, self.scales.shape[self.axis])
        scales, offsets = jnp.expand_dims(self.scales, self.axis), self.offsets
        if offsets is not None:
            offsets = jnp.expand_dims(offsets, self.axis)
        real = to_real(numbers, scales, offsets, self.format, wide)
        return join_axis(real, self.axis)


def to_real(
    numbers: jax.Array, scales: jax.Array, offsets: jax.Array | None, format: Format, dtype: Any
) -> jax.Array:
    """Returns what grid numbers stand for: see `compress.quantization.formats`.

    Args:
      numbers: of the grid, any type.
      scales: broadcasts against numbers (same rank).
      offsets: like scales, or None.
      format: says what offsets are.
      dtype: of the result.
    """
    numbers, scales = numbers.astype(dtype), scales.astype(dtype)
    if offsets is None:
        return numbers * scales
    offsets = offsets.astype(dtype)
    if format.offset == "zero_point":
        return (numbers - offsets) * scales
    return numbers * scales + offsets


def pack(numbers: jax.Array, format: Format, axis: int) -> jax.Array:
    """Returns neighbours along `axis`, -2 or -1, two to a uint8, the earlier one low.

    >>> from compress.quantization.formats import FORMATS
    >>> pack(jnp.array([[-8, 7]]), FORMATS["q4_0"], -1).tolist()
    [[240]]
    """
    nibbles = (numbers.astype(jnp.int32) - _base(format)).astype(jnp.uint8)
    pairs = split_axis(nibbles, axis, nibbles.shape[axis] // 2)
    low, high = (jax.lax.index_in_dim(pairs, i, pairs.ndim + axis, keepdims=False) for i in (0, 1))
    return low | (high << 4)


def unpack(packed: jax.Array, format: Format, axis: int) -> jax.Array:
    """The inverse of `pack`, int8.

    >>> from compress.quantization.formats import FORMATS
    >>> unpack(jnp.array([[240]], jnp.uint8), FORMATS["q4_0"], -1).tolist()
    [[-8, 7]]
    """
    pairs = jnp.stack([packed & 0xF, packed >> 4], axis=packed.ndim + axis + 1)
    return join_axis(pairs, axis).astype(jnp.int8) + jnp.int8(_base(format))


def _like(scales: jax.Array, y: jax.Array) -> jax.Array:
    """Scales in the type and with the rank of a product."""
    return scales.astype(y.dtype).reshape((1,) * (y.ndim - scales.ndim) + scales.shape)


def _base(format: Format) -> int:
    """The number that nibble 0 stands for: as in GGUF, -8 where there are negative ones."""
    return 0 if format.offset == "minimum" else -8


def split_axis(array: jax.Array, axis: int, parts: int) -> jax.Array:
    """Cuts negative `axis` into (parts, length / parts); the second of them is `axis` now."""
    at = array.ndim + axis
    shape = array.shape
    return array.reshape(*shape[:at], parts, shape[at] // parts, *shape[at + 1 :])


def join_axis(array: jax.Array, axis: int) -> jax.Array:
    """The inverse of `split_axis`."""
    at = array.ndim + axis
    shape = array.shape
    return array.reshape(*shape[: at - 1], shape[at - 1] * shape[at], *shape[at + 1 :])
