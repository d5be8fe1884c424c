"""What of a parameter tree is no plain array, as JSON: numbers, products and factors."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from compress.lora import is_adapted
from compress.lowrank import LowRank, Sum
from compress.quantization.quantize import is_qtensor
from compress.quantization.spec import abstract_from_spec, spec_of
from compress.quantization.w8a8 import W8A8, Activation, Range
from model.rules import path_of

PyTree = Any


def is_product(node: Any) -> bool:
    """Whether a pytree node is a matrix with integer products."""
    return isinstance(node, W8A8)


def is_packed(node: Any) -> bool:
    """Whether a pytree node is a weight that is no plain array."""
    return is_qtensor(node) or is_product(node)


def describe(params: PyTree) -> dict[str, Any]:
    """Returns what the weights are, by path.

    {"quantized": see `compress.quantization.spec`, "products": fields of the activation, "factors":
    what `LowRank` and `Sum` weights need}.

    >>> from compress.quantization.rounding import quantize
    >>> describe({"head": {"kernel": quantize(jnp.ones((32, 2)), "int8")}})["products"]
    {}
    """
    factors = {
        path_of(key_path): _factors_of(path_of(key_path), leaf)
        for key_path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_adapted)[0]
        if is_adapted(leaf)
    }
    params = jax.tree.map(_without_factors, params, is_leaf=is_adapted)
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)[0]
    products = {
        path_of(key_path): dataclasses.asdict(leaf.activation)
        for key_path, leaf in leaves
        if is_product(leaf)
    }
    inside = jax.tree.map(lambda w: w.weight if is_product(w) else w, params, is_leaf=is_packed)
    return {"quantized": spec_of(inside), "products": products, "factors": factors}


def abstract_from(abstract_params: PyTree, description: dict[str, Any]) -> PyTree:
    """Returns the tree of shapes and types of parameters that `describe` has described.

    Args:
      abstract_params: shapes and types of the plain parameters (`model.flops.abstract_params`).
      description: from `describe`, maybe through JSON.

    Raises:
      ValueError: it names a parameter that there is not, or what does not fit it.

    >>> from compress.quantization.quantize import quantize_params
    >>> from compress.quantization.w8a8 import integer_products
    >>> plain = {"head": {"kernel": jnp.ones((32, 2))}}
    >>> params = integer_products(quantize_params(plain, [("head", "int8")]))
    >>> abstract_from(plain, describe(params))["head"]["kernel"].weight.values
    ShapeDtypeStruct(shape=(32, 2), dtype=int8)
    """
    tree = abstract_from_spec(abstract_params, description["quantized"])
    left = dict(description["products"])

    def one(key_path, leaf):
        path = path_of(key_path)
        if path not in left:
            return leaf
        activation = Activation(**left.pop(path))
        if not is_qtensor(leaf):
            raise ValueError(f"{path!r} has integer products, but nothing says how it is quantized")
        sums = seen = None
        if activation.offset == "zero_point":
            shape = list(leaf.values.shape)
            shape[leaf.axis] = 1
            sums = jax.ShapeDtypeStruct(tuple(shape), jnp.int32)
        if activation.range == "static":
            end: Any = jax.ShapeDtypeStruct(leaf.shape[:-2], jnp.float32)
            seen = Range(end, end)
        return W8A8(leaf, sums, seen, activation)

    tree = jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_qtensor)
    if left:
        raise ValueError(f"{', '.join(left)} shall have integer products, but are not there")
    factors = dict(description.get("factors", {}))  # not in what earlier versions wrote

    def with_factors(key_path, leaf):
        about = factors.pop(path_of(key_path), None)
        if about is None:
            return leaf
        *layers, rows, columns = leaf.shape
        rank, dtype = about["rank"], jnp.dtype(about["dtype"])
        low = LowRank(
            jax.ShapeDtypeStruct((*layers, rows, rank), dtype),
            jax.ShapeDtypeStruct((*layers, rank, columns), dtype),
        )
        return Sum(leaf, low) if about["base"] else low

    tree = jax.tree_util.tree_map_with_path(with_factors, tree, is_leaf=is_packed)
    if factors:
        raise ValueError(f"{', '.join(factors)} shall have factors, but are not there")
    return tree


def _factors_of(path: str, w: Any) -> dict[str, Any]:
    low = w.low if isinstance(w, Sum) else w
    if not isinstance(low, LowRank) or (isinstance(w, Sum) and is_adapted(w.base)):
        raise ValueError(
            f"{path!r} has factors that are no part of a stored model; merge them first "
            "(`compress.lora.merged`)"
        )
    return {"rank": low.rank, "dtype": jnp.dtype(low.dtype).name, "base": isinstance(w, Sum)}


def _without_factors(w: Any) -> Any:
    """The base of a sum; factors alone hide nothing that is quantized."""
    return w.base if isinstance(w, Sum) else w
