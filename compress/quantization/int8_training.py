"""Products in 8 or 16 bits while training: forward, and where wanted backward.

    y  = x @ w      x by row,   w by column     summed over I
    dx = g @ w'     g by row,   w by row        summed over O
    dw = x' @ g     x by column, g by column    summed over N, in float by default

Each operand gets scales of its own for each product, found as the product is taken, one for all
that is summed, so that scales come out of the sum. The weight's gradient suffers most from few
bits, since its sum runs over positions of very different sizes, and stays in float unless asked.
Bfloat16 has the range of float32 and takes no scales: sums, parameters and all that is no product
stay in float32, as in TPUs' own products of float32.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from compress.quantization.quantize import is_qtensor
from model.linear import product
from model.linear import take as take_rows
from model.rules import STACK, Rules, is_stacked, match, path_of

PyTree = Any
Kind = Literal["float", "bfloat16", "int8", "e4m3", "e5m2"]

_TYPES: dict[str, Any] = {
    "int8": jnp.int8,
    "e4m3": jnp.float8_e4m3fn,
    "e5m2": jnp.float8_e5m2,
}
_UNSCALED = ("float", "bfloat16")
_LARGEST = {"int8": 127.0, "e4m3": 448.0, "e5m2": 57344.0}
MOST_SUMMED = (2**31 - 1) // 127**2  # int8 products that int32 holds, whatever the numbers


@dataclass(frozen=True)
class Products:
    """In what numbers the three products of a kernel are taken.

    Attributes:
      forward: of y. "bfloat16" has the range of float32, and so no scales. "e4m3" and "e5m2" are
        float8 types (Micikevicius et al. 2022, arXiv:2209.05433), which a backend without them
        computes in wider floats.
      input_gradient: of dx.
      weight_gradient: of dw.
      rounding: of the operands of dx and dw. "stochastic" makes the gradients those of float
        products on average (Gupta et al. 2015, arXiv:1502.02551); needs a key, and int8.

    >>> Products(input_gradient="e5m2", rounding="stochastic")
    Traceback (most recent call last):
    ...
    ValueError: stochastic rounding is for int8 and float, not e5m2; round to nearest
    """

    forward: Kind = "int8"
    input_gradient: Kind = "int8"
    weight_gradient: Kind = "float"
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self):
        kinds = (self.forward, self.input_gradient, self.weight_gradient)
        for kind in kinds:
            if kind not in (*_UNSCALED, *_TYPES):
                known = ", ".join((*_UNSCALED, *_TYPES))
                raise ValueError(f"products are {known}, not {kind!r}")
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding is 'nearest' or 'stochastic', not {self.rounding!r}")
        if self.rounding == "stochastic":
            for kind in kinds[1:]:
                if kind not in ("int8", "float"):
                    raise ValueError(
                        f"stochastic rounding is for int8 and float, not {kind}; round to nearest"
                    )


def dot(
    x: jax.Array, w: jax.Array, key: jax.Array | None = None, products: Products = Products()
) -> jax.Array:
    """Returns x @ w, it and its gradients in few bits.

    Args:
      x: [..., I].
      w: [I, O].
      key: for stochastic rounding; None rounds to nearest.
      products: what is taken in which numbers.

    Returns:
      [..., O] in the type of x.

    Raises:
      ValueError: shapes that do not fit, or more products in a sum than int32 holds.

    >>> x, w = jnp.array([[1.0, -2.0]]), jnp.array([[3.0], [1.0]])
    >>> round(float(dot(x, w)[0, 0]), 1)
    1.0
    """
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"x [..., I] @ w [I, O] does not fit the shapes {x.shape} and {w.shape}")
    key = key if products.rounding == "stochastic" else None
    y_NO = _dot(products, x.reshape(-1, x.shape[-1]), w, key)
    return y_NO.reshape(*x.shape[:-1], w.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(products: Products, x_NI: jax.Array, w_IO: jax.Array, key: Any) -> jax.Array:
    return _product(products.forward, x_NI, w_IO, (1, 0), x_NI.dtype, None)


def _forward(products, x_NI, w_IO, key):
    return _dot(products, x_NI, w_IO, key), (x_NI, w_IO, key)


def _backward(products, saved, g_NO):
    x_NI, w_IO, key = saved
    for_x, for_w = (None, None) if key is None else jax.random.split(key)
    dx = _product(products.input_gradient, g_NO, w_IO, (1, 1), x_NI.dtype, for_x)
    dw = _product(products.weight_gradient, x_NI, g_NO, (0, 0), w_IO.dtype, for_w)
    return dx, dw, None


_dot.defvjp(_forward, _backward)


def _product(
    kind: Kind, a: jax.Array, b: jax.Array, axes: tuple[int, int], dtype: Any, key: Any
) -> jax.Array:
    """Sums a over axes[0] with b over axes[1], both matrices."""
    if kind in _UNSCALED:
        # As `linear` does: in the type of activations and their gradients.
        operands = a.dtype if kind == "float" else jnp.bfloat16
        return product(a.astype(operands), b.astype(operands), axes).astype(dtype)
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    if kind == "int8" and a.shape[axes[0]] > MOST_SUMMED:
        raise ValueError(
            f"{a.shape[axes[0]]:,} products of int8 are summed, and int32 holds {MOST_SUMMED:,} at "
            "their largest; take fewer rows a step by micro-batches, or this product in float"
        )
    one, two = (None, None) if key is None else jax.random.split(key)
    a_numbers, a_scale = round_to(kind, a, axes[0], one)
    b_numbers, b_scale = round_to(kind, b, axes[1], two)
    sums = jnp.int32 if kind == "int8" else jnp.float32
    whole = jax.lax.dot_general(a_numbers, b_numbers, dimensions, preferred_element_type=sums)
    scale = a_scale.reshape(-1, 1) * b_scale.reshape(1, -1)
    return (whole.astype(jnp.float32) * scale).astype(dtype)


def round_to(
    kind: Kind, a: jax.Array, axis: int, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns (numbers of the type, float32 scale), a being about `scale * numbers`.

    Args:
      kind: "int8", "e4m3" or "e5m2".
      a: any shape.
      axis: along which one scale holds.
      key: for stochastic rounding to int8: up with a chance of what is over the number below.

    >>> round_to("int8", jnp.array([[-1.0, 127.0]]), 1)[0].tolist()
    [[-1, 127]]
    """
    wide = a.astype(jnp.float32)
    scale = jnp.abs(wide).max(axis=axis, keepdims=True) * np.float32(1 / _LARGEST[kind])
    ratio = wide / jnp.where(scale == 0, jnp.float32(1), scale)
    if kind == "int8":
        if key is None:
            ratio = jnp.round(ratio)
        else:
            ratio = jnp.floor(ratio + jax.random.uniform(key, a.shape, jnp.float32))
    return jnp.clip(ratio, -_LARGEST[kind], _LARGEST[kind]).astype(_TYPES[kind]), scale


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kernel", "key"], meta_fields=["products"]
)
@dataclass(frozen=True)
class LowPrecision:
    """A plain kernel whose products are those of `dot`; a weight like any other.

    Attributes:
      kernel: [..., I, O].
      key: one a layer, for stochastic rounding, or None.
      products: see `Products`.

    >>> w = LowPrecision(jnp.eye(2), None, Products())
    >>> w.shape, (jnp.ones((1, 2)) @ w).shape
    ((2, 2), (1, 2))
    """

    kernel: Any
    key: Any
    products: Products

    # NumPy would otherwise take `array @ w` for itself.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.kernel.shape

    @property
    def ndim(self) -> int:
        """Logical number of axes."""
        return self.kernel.ndim

    @property
    def dtype(self) -> Any:
        """Type of the kernel."""
        return self.kernel.dtype

    @property
    def T(self) -> LowPrecision:
        """The transpose."""
        return replace(self, kernel=self.kernel.swapaxes(-1, -2))

    def take(self, ids: jax.Array) -> jax.Array:
        """Returns the rows `ids` as they are."""
        return take_rows(self.kernel, ids, self.dtype)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """Returns the kernel."""
        return self.kernel.astype(self.dtype if dtype is None else dtype)

    def __rmatmul__(self, x: Any) -> jax.Array:
        """Returns `dot(x, kernel)`."""
        return dot(jnp.asarray(x), self.kernel, self.key, self.products)


def low_precision_products(rules: Rules) -> Callable[[PyTree, Any], PyTree]:
    """Returns `(weights, context) -> weights`, the `apply` of a weight transform.

    No model code changes: chosen kernels become weights that take their products in few bits, with
    gradients to the plain parameters. Keys come from `context.rng`, one for each kernel, layer and
    (micro-)batch; without one, as in evaluation, everything is rounded to nearest.

    Args:
      rules: ordered (regex, `Products` or None), first match wins, no match is None. Choose
        `blocks/.*/kernel`: a head suffers, and embeddings take no product.

    Raises:
      ValueError: a rule matches nothing or only some layers of a stack; what is chosen is no plain
        matrix; or nothing is chosen. All when the step is traced.

    >>> from collections import namedtuple
    >>> context = namedtuple("Context", "rng")(None)
    >>> apply = low_precision_products([("kernel", Products())])
    >>> apply({"up": {"kernel": jnp.eye(2)}}, context)["up"]["kernel"].products.forward
    'int8'
    """
    rules = [(regex, products or False) for regex, products in rules]

    def apply(weights: PyTree, context: Any) -> PyTree:
        chosen = jax.tree.leaves(match(rules, weights, False, is_leaf=is_qtensor))
        if not any(chosen):
            raise ValueError("the rules choose no kernel; give at least one its Products")
        leaves, structure = jax.tree_util.tree_flatten_with_path(weights, is_leaf=is_qtensor)
        new = []
        for place, ((key_path, leaf), products) in enumerate(zip(leaves, chosen, strict=True)):
            path = path_of(key_path)
            new.append(_wrapped(path, leaf, products, context.rng, place) if products else leaf)
        return jax.tree.unflatten(structure, new)

    return apply


def _wrapped(path: str, leaf: Any, products: Products, rng: Any, place: int) -> LowPrecision:
    stacked = is_stacked(path)
    array = not is_qtensor(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
    if not array or leaf.ndim - stacked != 2:
        raise ValueError(
            f"{path!r} of shape {leaf.shape} is no plain matrix; write rules for kernels, such as "
            f"'{STACK}/.*/kernel'"
        )
    if rng is None or products.rounding == "nearest":
        return LowPrecision(leaf, None, products)
    key = jax.random.fold_in(rng, place)
    return LowPrecision(leaf, jax.random.split(key, leaf.shape[0]) if stacked else key, products)
