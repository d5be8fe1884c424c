"""What of a parameter tree is no plain array, as JSON: quantized matrices and integer products."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from compress.quantize import is_qtensor
from compress.spec import abstract_from_spec, spec_of
from compress.w8a8 import W8A8, Activation, Range
from model.rules import path_of

PyTree = Any


def is_product(node: Any) -> bool:
    """Whether a pytree node is a matrix with integer products."""
    return isinstance(node, W8A8)


def is_packed(node: Any) -> bool:
    """Whether a pytree node is a weight that is no plain array."""
    return is_qtensor(node) or is_product(node)


def describe(params: PyTree) -> dict[str, Any]:
    """Returns {"quantized": see `compress.spec`, "products": path -> fields of the activation}.

    >>> from compress.rounding import quantize
    >>> describe({"head": {"kernel": quantize(jnp.ones((32, 2)), "int8")}})["products"]
    {}
    """
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)[0]
    products = {
        path_of(key_path): dataclasses.asdict(leaf.activation)
        for key_path, leaf in leaves
        if is_product(leaf)
    }
    inside = jax.tree.map(lambda w: w.weight if is_product(w) else w, params, is_leaf=is_packed)
    return {"quantized": spec_of(inside), "products": products}


def abstract_from(abstract_params: PyTree, description: dict[str, Any]) -> PyTree:
    """Returns the tree of shapes and types of parameters that `describe` has described.

    Args:
      abstract_params: shapes and types of the plain parameters (`model.flops.abstract_params`).
      description: from `describe`, maybe through JSON.

    Raises:
      ValueError: it names a parameter that there is not, or what does not fit it.

    >>> from compress.quantize import quantize_params
    >>> from compress.w8a8 import integer_products
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
    return tree
