"""Which parameters are quantized and how, as JSON: what a checkpoint needs to be opened again."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from compress.quantization.formats import Format, format_to_json
from compress.quantization.qtensor import QTensor
from compress.quantization.quantize import is_qtensor
from compress.quantization.rounding import quantize
from model.rules import path_of

PyTree = Any
Spec = dict[str, dict[str, Any]]


def spec_of(params: PyTree) -> Spec:
    """Returns path -> {"format", "axis", "transposed", "dtype"} of every quantized matrix.

    >>> spec_of({"head": {"kernel": quantize(jnp.ones((32, 2)), "q4_1")}})["head/kernel"]["axis"]
    -2
    """
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)[0]
    return {
        path_of(key_path): {
            "format": format_to_json(leaf.format),
            "axis": leaf.axis,
            "transposed": leaf.transposed,
            "dtype": leaf.dtype_name,
        }
        for key_path, leaf in leaves
        if is_qtensor(leaf)
    }


def abstract_from_spec(abstract_params: PyTree, spec: Spec) -> PyTree:
    """Returns the tree of shapes and types of parameters that are quantized as `spec` says.

    Args:
      abstract_params: shapes and types of the plain parameters (`model.flops.abstract_params`).
      spec: from `spec_of`, maybe through JSON.

    Raises:
      ValueError: if the spec names a parameter that there is not, or a format that does not fit it.

    >>> params = {"head": {"kernel": jnp.ones((32, 2))}}
    >>> spec = spec_of({"head": {"kernel": quantize(params["head"]["kernel"], "q8_0")}})
    >>> abstract_from_spec(params, spec)["head"]["kernel"].values
    ShapeDtypeStruct(shape=(32, 2), dtype=int8)
    """
    left = dict(spec)

    def one(key_path, leaf):
        path = path_of(key_path)
        if path not in left:
            return leaf
        try:
            return _abstract(leaf, **left.pop(path))
        except (ValueError, TypeError) as error:
            raise ValueError(f"the spec does not fit {path!r}: {error}") from error

    tree = jax.tree_util.tree_map_with_path(one, abstract_params)
    if left:
        raise ValueError(
            f"the spec quantizes {', '.join(left)}, which these parameters do not hold; "
            "was it written for another config?"
        )
    return tree


def _abstract(leaf: Any, format: dict[str, Any], axis: int, transposed: bool, dtype: str) -> Any:
    shape = list(leaf.shape)
    if transposed:
        shape[-2], shape[-1] = shape[-1], shape[-2]
    stored = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
    q: QTensor = jax.eval_shape(lambda w: quantize(w, Format(**format), axis), stored)
    return q.T if transposed else q
