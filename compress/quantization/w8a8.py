"""Products of integers: 8-bit weights times 8-bit activations, summed in 32 bits.

    x @ w  ~  s_x * s_w * (q_x @ q_w - z_x * sum(q_w))

where q_x = round(x / s_x) + z_x is found as the product is taken ("dynamic") or uses a range that
calibration has seen ("static").

Shapes: L layers, I inputs, O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress.calibrate import observe
from compress.quantization.qtensor import QTensor
from compress.quantization.quantize import is_qtensor
from model.rules import STACK, Rules, match, path_of
from model.transformer import Transformer

PyTree = Any


@dataclass(frozen=True)
class Activation:
    """How the left side of a product is quantized to int8.

    Attributes:
      range: "dynamic" is found in the activations at hand, "static" comes from calibration.
      share: one scale for each "token" (dynamic only), or for the whole "tensor".
      offset: "none" uses -127 to 127; "zero_point" fits lowest and highest to -128 to 127.

    >>> Activation(range="static", share="token")
    Traceback (most recent call last):
    ...
    ValueError: a static range is one for the whole tensor: tokens are not known beforehand
    """

    range: Literal["dynamic", "static"] = "dynamic"
    share: Literal["token", "tensor"] = "token"
    offset: Literal["none", "zero_point"] = "none"

    def __post_init__(self):
        choices = {
            "range": ("dynamic", "static"),
            "share": ("token", "tensor"),
            "offset": ("none", "zero_point"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}"
                )
        if self.range == "static" and self.share == "token":
            raise ValueError(
                "a static range is one for the whole tensor: tokens are not known beforehand"
            )


class Range(NamedTuple):
    """Lowest and highest activation at a kernel: scalars, or [L] for a stack."""

    low: jax.Array
    high: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "sums", "seen"],
    meta_fields=["activation"],
)
@dataclass(frozen=True)
class W8A8:
    """An int8 matrix whose products are integer products; a weight like any other.

    Made by `integer_products`.

    Attributes:
      weight: the quantized matrix, one scale a channel or in all, no offset.
      sums: int32, the sum of its integers over the contraction axis, shaped like scales by channel;
        None where activations have no zero point.
      seen: the static range, or None.
      activation: how the left side is quantized.
    """

    weight: QTensor
    sums: Any
    seen: Range | None
    activation: Activation

    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.weight.shape

    @property
    def ndim(self) -> int:
        """Logical number of axes."""
        return self.weight.ndim

    @property
    def dtype(self) -> Any:
        """Type of the weight that was quantized."""
        return self.weight.dtype

    @property
    def T(self) -> W8A8:
        """The transpose; moves no data."""
        return replace(self, weight=self.weight.T)

    def take(self, ids: jax.Array) -> jax.Array:
        """Returns the rows `ids` as `QTensor.take` does."""
        return self.weight.take(ids)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """Returns the plain array that the weight stands for."""
        return self.weight.dequantize(dtype)

    def __rmatmul__(self, x: Any) -> jax.Array:
        """Returns x @ self in the type of x, through int8 x int8 -> int32."""
        x = jnp.asarray(x)
        w = self.weight
        contracted = w.axis if not w.transposed else -3 - w.axis
        if contracted != -2 or w.ndim != 2:
            raise ValueError(
                f"integer products sum over the contraction axis of one matrix, but {w.shape} "
                "has its scales along the other axis, or layers before it; dequantize it first"
            )
        numbers, scale, zero = quantize_activations(x, self.activation, self.seen)
        axes = (((x.ndim - 1,), (w.ndim + w.axis,)), ((), ()))
        product = jax.lax.dot_general(numbers, w.values, axes, preferred_element_type=jnp.int32)
        if zero is not None:
            product = product - zero * self.sums.reshape((1,) * (x.ndim - 1) + (-1,))
        by_channel = w.scales.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (product.astype(jnp.float32) * scale * by_channel).astype(x.dtype)


def quantize_activations(
    x: jax.Array, activation: Activation, seen: Range | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns (int8 numbers, float32 scale, int32 zero point or None) of x [..., I].

    x is about `scale * (numbers - zero)`; scale and zero have the rank of x.

    Args:
      x: activations.
      activation: how.
      seen: the range, for a static one; what lies outside is cut off.

    >>> quantize_activations(jnp.array([[-1.0, 127.0]]), Activation())[0].tolist()
    [[-1, 127]]
    """
    x = x.astype(jnp.float32)
    if seen is None:
        axes = (x.ndim - 1,) if activation.share == "token" else tuple(range(x.ndim))
        low, high = x.min(axis=axes, keepdims=True), x.max(axis=axes, keepdims=True)
    else:
        low, high = (jnp.reshape(a, (1,) * x.ndim).astype(jnp.float32) for a in seen)
    if activation.offset == "none":
        scale = jnp.maximum(high, -low) * np.float32(1 / 127)
        ratio = jnp.round(x / jnp.where(scale == 0, jnp.float32(1), scale))
        return jnp.clip(ratio, -127, 127).astype(jnp.int8), scale, None
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    scale = (high - low) * np.float32(1 / 255)
    safe = jnp.where(scale == 0, jnp.float32(1), scale)
    zero = -128 - jnp.round(low / safe)
    numbers = jnp.clip(jnp.round(x / safe) + zero, -128, 127).astype(jnp.int8)
    return numbers, scale, zero.astype(jnp.int32)


def activation_ranges(
    model: Transformer, params: PyTree, batches: Iterable[Any]
) -> dict[str, Range]:
    """Returns path -> range of the input of every kernel of the blocks [L], and of the head.

    Args:
      model: the Transformer.
      params: its parameters, plain or quantized.
      batches: calibration tokens, int [B, T] each.
    """
    layers, head = observe(model, params, batches, ("low", "high"))
    at_head = "token_embedding/embedding" if model.config.tied_head else "head/kernel"
    ranges = {at_head: Range(head["low"].min(), head["high"].max())}
    for path in layers[0]:
        ranges[f"{STACK}/{path}"] = Range(
            jnp.stack([by_path[path]["low"].min() for by_path in layers]),
            jnp.stack([by_path[path]["high"].max() for by_path in layers]),
        )
    return ranges


def integer_products(
    params: PyTree,
    activation: Activation = Activation(),
    *,
    rules: Rules = ((".*", True),),
    ranges: Mapping[str, Range] | None = None,
) -> PyTree:
    """Returns quantized parameters whose 8-bit matrices take their products in integers.

    Args:
      params: from `quantize_params`.
      activation: how activations are quantized.
      rules: (regex, whether), first match wins; no match is False.
      ranges: from `activation_ranges`, for a static range.

    Raises:
      ValueError: nothing that the rules choose is an int8 matrix with one scale a channel or in
        all, or a static range lacks that of a matrix.

    >>> from compress.quantization.quantize import quantize_params
    >>> q = quantize_params({"head": {"kernel": jnp.eye(4)}}, [("head", "int8")])
    >>> bool(jnp.allclose(jnp.ones((1, 4)) @ integer_products(q)["head"]["kernel"], 1))
    True
    """
    chosen = match(rules, params, False, is_leaf=is_qtensor)
    count = 0

    def one(key_path, leaf, asked):
        nonlocal count
        if not (asked and is_qtensor(leaf) and _fits(leaf)):
            return leaf
        count += 1
        path = path_of(key_path)
        seen = None
        if activation.range == "static":
            if ranges is None or path not in ranges:
                raise ValueError(
                    f"a static range needs that of the input of {path!r}: pass "
                    "ranges=activation_ranges(...), or leave it out by a rule"
                )
            seen = ranges[path]
        sums = None
        if activation.offset == "zero_point":
            sums = leaf.values.astype(jnp.int32).sum(axis=leaf.axis, keepdims=True)
        return W8A8(leaf, sums, seen, activation)

    new = jax.tree_util.tree_map_with_path(one, params, chosen, is_leaf=is_qtensor)
    if not count:
        raise ValueError(
            "none of the chosen parameters is an int8 matrix with one scale a channel or in all; "
            "quantize_params(params, rules) with the format 'int8' makes them"
        )
    return new


def _fits(q: QTensor) -> bool:
    f = q.format
    return (f.kind, f.storage, f.offset) == ("int", "int8", "none") and not isinstance(f.group, int)
