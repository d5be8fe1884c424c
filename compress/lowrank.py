"""Weights of two factors, and what a product of factors can make up for.

    LowRank    x @ w = (x @ a) @ b                  a [.., I, R], b [.., R, O]
    Sum        x @ w = x @ base + (x @ a) @ b       base: quantized, pruned or plain

Both are weights like any other (see `model.linear`), stacked under a layer axis or not: slicing,
scanning and vmapping the leaves gives such weights again.

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from model.lapack import one_by_one
from model.linear import at_least_float32, linear, take

HIGHEST = jax.lax.Precision.HIGHEST


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=[])
@dataclass(frozen=True)
class LowRank:
    """The matrix a @ b, [..., I, O], of rank R; made by `factorize`.

    Attributes:
      a: [..., I, R].
      b: [..., R, O].

    >>> w = LowRank(jnp.ones((6, 2)), jnp.ones((2, 5)))
    >>> w.shape, w.rank, w.nbytes, (jnp.ones((3, 6)) @ w).shape, w.T.shape
    ((6, 5), 2, 88, (3, 5), (5, 6))
    """

    a: Any
    b: Any

    # NumPy would otherwise take `array @ w` for itself.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return (*self.a.shape[:-1], self.b.shape[-1])

    @property
    def ndim(self) -> int:
        """Logical number of axes."""
        return self.a.ndim

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[-1]

    @property
    def dtype(self) -> Any:
        """Type of the factors."""
        return self.a.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that are stored."""
        return _nbytes(self)

    @property
    def T(self) -> LowRank:
        """The transpose."""
        return LowRank(self.b.swapaxes(-1, -2), self.a.swapaxes(-1, -2))

    def full(self, dtype: Any = None) -> jax.Array:
        """Returns the plain array that this stands for, in `dtype` (by default its own)."""
        wide = at_least_float32(self.dtype)
        product = jnp.matmul(self.a.astype(wide), self.b.astype(wide), precision=HIGHEST)
        return product.astype(self.dtype if dtype is None else dtype)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """`full`, by the name that it has for a quantized weight."""
        return self.full(dtype)

    def take(self, ids: jax.Array) -> jax.Array:
        """Returns the rows `ids` of a matrix [rows, width]; an id outside of it gives NaN.

        Raises:
          ValueError: if there are layer axes left.
        """
        if self.ndim != 2:
            raise ValueError(f"rows are taken of a matrix, not of a stack of shape {self.shape}")
        return jnp.take(self.a, ids, axis=0, mode="fill") @ self.b

    def __rmatmul__(self, x: Any) -> jax.Array:
        """Returns x @ self in the type of x."""
        x = jnp.asarray(x)
        return (x @ self.a.astype(x.dtype)) @ self.b.astype(x.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "low"], meta_fields=[])
@dataclass(frozen=True)
class Sum:
    """base + low, [..., I, O]; made by `compensate`.

    Attributes:
      base: any weight: a plain array (with zeros where it is pruned), or a quantized one.
      low: factors of what the base lacks.

    >>> w = Sum(jnp.eye(2), LowRank(jnp.ones((2, 1)), jnp.ones((1, 2))))
    >>> (jnp.array([[1.0, 2.0]]) @ w).tolist(), w.take(jnp.array([1])).tolist()
    ([[4.0, 5.0]], [[1.0, 2.0]])
    """

    base: Any
    low: LowRank

    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.low.shape

    @property
    def ndim(self) -> int:
        """Logical number of axes."""
        return self.low.ndim

    @property
    def dtype(self) -> Any:
        """Type of the weight that the base stands for."""
        return self.base.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that are stored, in the base and in the factors."""
        return _nbytes(self)

    @property
    def T(self) -> Sum:
        """The transpose."""
        plain = isinstance(self.base, jax.Array)
        return Sum(self.base.swapaxes(-1, -2) if plain else self.base.T, self.low.T)

    def full(self, dtype: Any = None) -> jax.Array:
        """Returns the plain array that this stands for, in `dtype` (by default its own)."""
        wide = at_least_float32(self.dtype)
        total = plain_array(self.base, wide) + self.low.full(wide)
        return total.astype(self.dtype if dtype is None else dtype)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """`full`, by the name that it has for a quantized weight."""
        return self.full(dtype)

    def take(self, ids: jax.Array) -> jax.Array:
        """Returns the rows `ids` of a matrix [rows, width]; an id outside of it gives NaN."""
        rows = self.low.take(ids)
        return take(self.base, ids, rows.dtype) + rows

    def __rmatmul__(self, x: Any) -> jax.Array:
        """Returns x @ self in the type of x."""
        x = jnp.asarray(x)
        return linear(x, self.base) + x @ self.low


def is_weight(node: Any) -> bool:
    """Whether a pytree node is a whole weight that is no plain array.

    Quantized, low-rank, adapted: the `is_leaf` of `model.rules`.

    >>> is_weight({"kernel": 0}), is_weight(LowRank(jnp.ones((2, 1)), jnp.ones((1, 2))))
    (False, True)
    """
    return hasattr(type(node), "dequantize") and hasattr(type(node), "__rmatmul__")


def plain_array(w: Any, dtype: Any) -> jax.Array:
    """Returns what a weight of any kind stands for, as an array.

    >>> plain_array(LowRank(jnp.ones((1, 2)), jnp.ones((2, 1))), jnp.float32).tolist()
    [[2.0]]
    """
    return w.astype(dtype) if isinstance(w, jax.Array) else w.dequantize(dtype)


def factorize(
    w: jax.Array,
    rank: int,
    hessian: jax.Array | None = None,
    axis: int = -2,
    *,
    damping: float = 0.01,
) -> LowRank:
    """Returns the factors nearest to a matrix: truncated singular values.

    Without a Hessian nearest in |w - a b| (Eckart & Young 1936); with one in the outputs
    |X (w - a b)|, where H = X' X = L L' and the singular values are those of L' w (as in SVD-LLM,
    Wang et al. 2024, arXiv:2403.07378).

    Args:
      w: [..., rows, columns].
      rank: R, from 1 to the shorter side.
      hessian: [..., I, I], from `compress.calibrate`; I is the contraction axis of w.
      axis: contraction axis, -2 for a kernel [I, O], -1 for a table [O, I].
      damping: what is added to the diagonal of H, as a share of its mean.

    Raises:
      ValueError: a rank or shapes that do not fit, numbers that are not finite, or a Hessian that
        is not positive definite in spite of the damping.

    >>> w = jnp.outer(jnp.arange(1.0, 5.0), jnp.array([1.0, -1.0, 2.0]))
    >>> bool(jnp.allclose(factorize(w, 1).full(), w, atol=1e-5))
    True
    """
    if axis not in (-1, -2):
        raise ValueError(f"the contraction axis is -1 or -2, counted from the end, not {axis}")
    if w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"floating-point matrices have factors, not {w.dtype} of shape {w.shape}")
    most = min(w.shape[-2:])
    if not 1 <= rank <= most:
        raise ValueError(f"a matrix of shape {w.shape} has ranks from 1 to {most}, not {rank}")
    inputs = w.shape[axis]
    if hessian is not None and hessian.shape != (*w.shape[:-2], inputs, inputs):
        raise ValueError(
            f"a weight of shape {w.shape} with contraction axis {axis} needs a Hessian of shape "
            f"{(*w.shape[:-2], inputs, inputs)}, not {hessian.shape}"
        )
    for name, array in (("weight", w), ("Hessian", hessian)):
        if array is None or isinstance(array, jax.core.Tracer):
            continue
        if not bool(jnp.isfinite(array).all()):
            raise ValueError(f"a {name} of shape {array.shape} holds NaN or infinity")
    low = _factorize(w, hessian, damping, rank, axis)
    if not isinstance(low.a, jax.core.Tracer) and not bool(jnp.isfinite(low.a).all()):
        raise ValueError(
            f"the Hessian is not positive definite with damping {damping}; give more calibration "
            "tokens or a larger damping"
        )
    return low


def compensate(
    base: Any,
    w: jax.Array,
    rank: int,
    hessian: jax.Array | None = None,
    axis: int = -2,
    *,
    damping: float = 0.01,
) -> Sum:
    """Returns a compressed weight with factors of what it lacks: LoRC and LQER.

    The factors of w - base (Yao et al. 2023, arXiv:2303.08302), with a Hessian those that correct
    the outputs best (after Zhang et al. 2024, arXiv:2402.02446).

    Args:
      base: the compressed weight, any kind.
      w: what it stands for, [..., rows, columns].
      rank: see `factorize`.
      hessian: see `factorize`.
      axis: see `factorize`.
      damping: see `factorize`.

    Raises:
      ValueError: as `factorize`, or shapes that differ.

    >>> from compress.quantization.rounding import quantize
    >>> w = jax.random.normal(jax.random.key(0), (32, 8))
    >>> base = quantize(w, "int3")
    >>> before = jnp.square(w - base.dequantize()).sum()
    >>> bool(jnp.square(w - compensate(base, w, 4).full()).sum() < 0.5 * before)
    True
    """
    if tuple(base.shape) != tuple(w.shape):
        raise ValueError(
            f"a base of shape {tuple(base.shape)} cannot stand for a weight of shape {w.shape}"
        )
    wide = at_least_float32(w.dtype)
    lack = w.astype(wide) - plain_array(base, wide)
    low = factorize(lack, rank, hessian, axis, damping=damping)
    return Sum(base, replace(low, a=low.a.astype(w.dtype), b=low.b.astype(w.dtype)))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _factorize(
    w: jax.Array, hessian: jax.Array | None, damping: float, rank: int, axis: int
) -> LowRank:
    wide = at_least_float32(w.dtype)
    w_IO = w.astype(wide) if axis == -2 else w.astype(wide).swapaxes(-1, -2)
    root_II = None
    if hessian is not None:
        H = hessian.astype(wide)
        mean = jnp.diagonal(H, axis1=-2, axis2=-1).mean(axis=-1)[..., None, None]
        identity = jnp.eye(H.shape[-1], dtype=wide).reshape((1,) * (H.ndim - 2) + H.shape[-2:])
        damped = H + damping * mean * identity
        root_II = one_by_one(jnp.linalg.cholesky, damped).swapaxes(-1, -2)
        w_IO = jnp.matmul(root_II, w_IO, precision=HIGHEST)
    svd = functools.partial(jnp.linalg.svd, full_matrices=False)
    left, values, right = one_by_one(svd, w_IO)
    # Each factor gets half of the size, so that both train at one learning rate.
    half = jnp.sqrt(values[..., :rank])
    a, b = left[..., :rank] * half[..., None, :], half[..., :, None] * right[..., :rank, :]
    if root_II is not None:
        a = one_by_one(jax.scipy.linalg.solve_triangular, root_II, a)
    low = LowRank(a.astype(w.dtype), b.astype(w.dtype))
    return low if axis == -2 else low.T


def _nbytes(w: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(w))
