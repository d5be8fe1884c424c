"""Low-rank adaptation: what trains is a product of two thin factors beside a frozen matrix.

    x @ w = x @ base + s (x @ a) @ b          a [.., I, R], b [.., R, O]

s is alpha / R (LoRA, Hu et al. 2021, arXiv:2106.09685) or alpha / sqrt(R), which keeps the size of
the sum's gradient whatever the rank (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732). b begins as
zero, so that the first step computes what the base does. The base may be any weight: 4-bit numbers
under float factors are QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

DoRA trains the length of each output's column apart from its direction (Liu et al. 2024,
arXiv:2402.09353),

    w = m v / |v|,   v = base + s a b,   m [.., O] from |base|

with |v| held constant in the gradient, as their section 4.3 proposes.

Factors lie beside the matrix that they belong to, `blocks/attention/q/lora/kernel/a`, so that rules
for kernels find them and merging frozen with trained parameters puts them in place; `attach` then
turns base and factors into one weight, kept apart or merged.

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from compress.lowrank import HIGHEST, LowRank, Sum, plain_array
from compress.quantization.quantize import contraction_axis
from model.linear import at_least_float32
from model.rules import leaf_paths

PyTree = Any
Scale = Callable[[int], float]
Form = Literal["apart", "merged"]

KEY = "lora"
"""Name of the sub-tree that holds the factors of the matrix beside it."""

SCALINGS: dict[str, Callable[[float, int], float]] = {
    "lora": lambda alpha, rank: alpha / rank,
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),
}
"""Name -> `(alpha, rank) -> s`."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["sum", "magnitude"], meta_fields=["axis"]
)
@dataclass(frozen=True)
class Dora:
    """magnitude * sum / |sum|, [..., I, O], the length taken along `axis`.

    Attributes:
      sum: base and factors.
      magnitude: [..., O] for axis -2 (a kernel), [..., rows] for axis -1 (a table).
      axis: contraction axis, counted from the end.

    >>> w = Dora(Sum(jnp.eye(2), LowRank(jnp.ones((2, 1)), jnp.zeros((1, 2)))), jnp.full(2, 3.0))
    >>> (jnp.array([[1.0, 2.0]]) @ w).tolist(), w.T.axis
    ([[3.0, 6.0]], -1)
    """

    sum: Sum
    magnitude: Any
    axis: int = -2

    # NumPy would otherwise take `array @ w` for itself.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.sum.shape

    @property
    def ndim(self) -> int:
        """Logical number of axes."""
        return self.sum.ndim

    @property
    def dtype(self) -> Any:
        """Type of the weight that the base stands for."""
        return self.sum.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that are stored."""
        return self.sum.nbytes + self.magnitude.size * self.magnitude.dtype.itemsize

    @property
    def T(self) -> Dora:
        """The transpose."""
        return replace(self, sum=self.sum.T, axis=-3 - self.axis)

    def full(self, dtype: Any = None) -> jax.Array:
        """Returns the plain array that this stands for, in `dtype` (by default its own)."""
        wide = at_least_float32(self.dtype)
        scaled = self.sum.full(wide) * jnp.expand_dims(self._factors(wide), self.axis)
        return scaled.astype(self.dtype if dtype is None else dtype)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """`full`, by the name that it has for a quantized weight."""
        return self.full(dtype)

    def take(self, ids: jax.Array) -> jax.Array:
        """Returns the rows `ids` of a matrix [rows, width]; an id outside of it gives NaN."""
        rows = self.sum.take(ids)
        factors = self._factors(rows.dtype)
        if self.axis == -1:
            return rows * jnp.take(factors, ids, mode="fill")[..., None]
        return rows * factors.reshape((1,) * (rows.ndim - 1) + factors.shape)

    def __rmatmul__(self, x: Any) -> jax.Array:
        """Returns x @ self in the type of x."""
        x = jnp.asarray(x)
        factors = self._factors(x.dtype)
        if self.ndim == 2:
            factors = factors.reshape((1,) * (x.ndim - 1) + factors.shape)
        else:
            factors = factors[..., None, :]
        return (x @ self.sum) * factors if self.axis == -2 else (x * factors) @ self.sum

    def _factors(self, dtype: Any) -> jax.Array:
        """magnitude / |sum|, without gradient through the length; 0 where there is no direction."""
        v = self.sum if self.axis == -2 else self.sum.T
        length = jax.lax.stop_gradient(_column_lengths(v.base, v.low))
        safe = jnp.where(length == 0, jnp.ones_like(length), length)
        return (self.magnitude.astype(length.dtype) / safe).astype(dtype)


def _column_lengths(base: Any, low: LowRank | None = None) -> jax.Array:
    """|base + a b| of each column, [..., O], at least float32, without forming the sum.

    |base|^2 + 2 <base, a b> + |a b|^2, the last two through [R, O] and [R, R].
    """
    wide = at_least_float32(base.dtype)
    squares = jnp.square(plain_array(base, wide)).sum(axis=-2)
    if low is None:
        return jnp.sqrt(squares)
    a, b = low.a.astype(wide), low.b.astype(wide)
    a_RI = a.swapaxes(-1, -2)
    base_RO = jnp.matmul(a_RI, plain_array(base, wide), precision=HIGHEST)
    own_RO = jnp.matmul(jnp.matmul(a_RI, a, precision=HIGHEST), b, precision=HIGHEST)
    squares = squares + ((2 * base_RO + own_RO) * b).sum(axis=-2)
    return jnp.sqrt(jnp.maximum(squares, jnp.zeros_like(squares)))


def init_adapters(
    key: jax.Array,
    params: PyTree,
    ranks: Mapping[str, int],
    direction: Literal["lora", "dora"] = "lora",
) -> PyTree:
    """Returns the factors for the matrices at some paths, in nested dicts, traceable.

    Of the two factors that on the side of the inputs is drawn, N(0, 1 / I), so that what passes
    through it keeps its size, and the other is zero. A table [rows, width] has its inputs along the
    width, as `compress.quantization.quantize.contraction_axis` has it.

    Args:
      key: of the draws; each path folds its own name in, so that the choice of paths changes
        nothing in the factors of the others.
      params: what they adapt, plain or quantized.
      ranks: path -> rank, from `compress.lowrank_params.ranks_by_path`.
      direction: "dora" adds magnitudes.

    Raises:
      ValueError: a direction that is neither.

    >>> params = {"up": {"kernel": jnp.ones((4, 6))}}
    >>> tree = init_adapters(jax.random.key(0), params, {"up/kernel": 2})
    >>> jax.tree.map(jnp.shape, tree)
    {'up': {'lora': {'kernel': {'a': (4, 2), 'b': (2, 6)}}}}
    """
    if direction not in ("lora", "dora"):
        raise ValueError(f"the direction is 'lora' or 'dora', not {direction!r}")
    tree: PyTree = {}
    for path, rank in ranks.items():
        *parents, module, leaf = path.split("/")
        w = params
        for name in (*parents, module, leaf):
            w = w[name]
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        place = tree
        for name in (*parents, module):
            place = place.setdefault(name, {})
        place[KEY] = {leaf: _factors_of(own, w, rank, contraction_axis(path))}
        if direction == "dora":
            v = w if contraction_axis(path) == -2 else plain_array(w, w.dtype).swapaxes(-1, -2)
            # In float32 at least: rounded, it would not give back the weight that it came from.
            place[KEY]["magnitude"] = _column_lengths(v)
    return tree


def _factors_of(key: jax.Array, w: Any, rank: int, axis: int) -> dict[str, jax.Array]:
    *layers, rows, columns = w.shape
    a, b = (*layers, rows, rank), (*layers, rank, columns)
    inputs = rows if axis == -2 else columns
    drawn = jax.random.normal(key, a if axis == -2 else b, w.dtype) * inputs**-0.5
    if axis == -2:
        return {"a": drawn, "b": jnp.zeros(b, w.dtype)}
    return {"a": jnp.zeros(a, w.dtype), "b": drawn}


def attach(weights: PyTree, scale: Scale, form: Form = "apart") -> PyTree:
    """Returns the weights with each matrix that has factors beside it turned into one weight.

    Args:
      weights: nested dicts, factors under `KEY`; none are left in what is returned.
      scale: rank -> s, such as `functools.partial(SCALINGS["lora"], 16.0)`.
      form: "apart" keeps base and factors (x @ base + s (x @ a) @ b), "merged" adds them up to a
        plain array, which costs a product [I, R] @ [R, O] but lets what follows see a plain matrix.

    Raises:
      ValueError: a form that is neither; factors without their matrix.

    >>> factors = {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}
    >>> weights = {"up": {"kernel": jnp.eye(2), "lora": {"kernel": factors}}}
    >>> attach(weights, lambda rank: 0.5, "merged")["up"]["kernel"].tolist()
    [[1.5, 0.5], [0.5, 1.5]]
    """
    if form not in ("apart", "merged"):
        raise ValueError(f"the form is 'apart' or 'merged', not {form!r}")
    if not isinstance(weights, dict):
        return weights
    new = {name: attach(value, scale, form) for name, value in weights.items() if name != KEY}
    adapters = dict(weights.get(KEY, {}))
    magnitude = adapters.pop("magnitude", None)
    for name, factors in adapters.items():
        if name not in new:
            raise ValueError(f"there are factors for {name!r}, which is not among {list(new)}")
        a, b = factors["a"], factors["b"]
        s = jnp.asarray(scale(a.shape[-1]), b.dtype)
        w: Any = Sum(new[name], LowRank(a, b * s))
        if magnitude is not None:
            w = Dora(w, magnitude, contraction_axis(name))
        new[name] = w if form == "apart" else w.full()
    return new


def detach(params: PyTree) -> PyTree:
    """Returns the factors alone: what of the parameters lies under `KEY`, in nested dicts.

    >>> detach({"up": {"kernel": 1, "lora": {"kernel": {"a": 2, "b": 3}}}, "norm": {"scale": 4}})
    {'up': {'lora': {'kernel': {'a': 2, 'b': 3}}}}
    """
    found = {}
    for name, value in params.items():
        if name == KEY:
            found[name] = value
        elif isinstance(value, dict) and (inside := detach(value)):
            found[name] = inside
    return found


def factors_among(paths: Iterable[str], params: PyTree) -> list[str]:
    """Returns those of the paths that lead to factors, attached or beside their matrix.

    For methods that change matrices: done to thin factors, it says nothing of their product.

    >>> w = Sum(jnp.eye(2), LowRank(jnp.ones((2, 1)), jnp.ones((1, 2))))
    >>> factors_among(["up/kernel/low/a", "head"], {"up": {"kernel": w}, "head": jnp.eye(2)})
    ['up/kernel/low/a']
    >>> factors_among(["up/lora/kernel/a"], {"up": {"lora": {"kernel": {"a": jnp.eye(2)}}}})
    ['up/lora/kernel/a']
    """
    adapted = tuple(f"{path}/" for path in adapted_paths(params))
    return [path for path in paths if KEY in path.split("/") or path.startswith(adapted)]


def is_adapted(node: Any) -> bool:
    """Whether a pytree node is a weight that holds float factors: `LowRank`, `Sum` or `Dora`."""
    return isinstance(node, LowRank | Sum | Dora)


def merged(params: PyTree) -> PyTree:
    """Returns the parameters with a plain array in place of each weight that has factors.

    Raises:
      ValueError: factors that have not been attached to the weights beside them.

    >>> w = Sum(jnp.eye(2), LowRank(jnp.ones((2, 1)), jnp.ones((1, 2))))
    >>> merged({"up": {"kernel": w}})["up"]["kernel"].tolist()
    [[2.0, 1.0], [1.0, 2.0]]
    """
    if loose := leaf_paths(detach(params)):
        raise ValueError(
            f"{loose[0]} belongs to no weight yet, and would be left out; attach(params, scale) "
            "makes weights of matrices and factors"
        )
    return jax.tree.map(lambda w: w.full() if is_adapted(w) else w, params, is_leaf=is_adapted)


def adapted_paths(params: PyTree) -> list[str]:
    """Returns the paths of the weights that have factors.

    >>> adapted_paths({"up": {"kernel": LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))}})
    ['up/kernel']
    """
    leaves = jax.tree.leaves(params, is_leaf=is_adapted)
    paths = leaf_paths(params, is_leaf=is_adapted)
    return [path for path, leaf in zip(paths, leaves, strict=True) if is_adapted(leaf)]
