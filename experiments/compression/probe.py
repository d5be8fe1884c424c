"""Which kernels a quantized run should be computed with on this machine, by measuring them.

The probe (`compress.quantization.probe`) times every way of taking the products that the model
takes, by shape; the choice goes into report.json of the run, with what it was measured on, and is
for inference alone. `by_probe` turns a run's weights into those of the choice; the report audits
the program that then runs (`experiments.audit`).

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from compress.export.stored import is_packed, is_product
from compress.quantization.formats import Format
from compress.quantization.probe import PATHS, Path, Table, probe
from compress.quantization.qtensor import QTensor
from compress.quantization.quantize import contraction_axis, is_qtensor
from compress.quantization.rounding import quantize
from compress.quantization.w8a8 import W8A8, integer_products
from model.linear import linear
from model.rules import path_of

PyTree = Any
Shape = tuple[int, int, int]


def products_of(params: PyTree) -> dict[str, tuple[int, int, Format]]:
    """Returns path -> (I, O, format) of every quantized matrix that is multiplied with.

    The token embedding counts where it is the head, too, that is, where there is no other.

    Args:
      params: of a run, quantized.
    """
    tied = "head" not in params
    found = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)[0]:
        path = path_of(key_path)
        w = leaf.weight if is_product(leaf) else leaf
        if not is_qtensor(w) or (path.endswith("/embedding") and not path.startswith("token_")):
            continue
        if path.endswith("/embedding"):
            if tied:
                found[path] = (w.shape[-1], w.shape[-2], w.format)
            continue
        found[path] = (w.shape[-2], w.shape[-1], w.format)
    return found


def probe_run(
    params: PyTree, rows: int, *, repeats: int = 5, paths: Mapping[str, Path] | None = None
) -> dict[Format, Table]:
    """Times the products of a quantized model, by format of its weights.

    Args:
      params: of a run; without quantized matrices there is nothing to choose.
      rows: N, such as 512 for a prompt, or 1 for decoding one row.
      repeats: of every measurement.
      paths: what is timed, by name; by default those of `compress.quantization.probe`, "int8" only
        for formats that it is there for, and "dequantize" in the format at hand.

    Returns:
      One table for each format; empty where nothing is quantized.
    """
    by_format: dict[Format, list[Shape]] = {}
    for inputs, outputs, format in products_of(params).values():
        shapes = by_format.setdefault(format, [])
        if (rows, inputs, outputs) not in shapes:
            shapes.append((rows, inputs, outputs))
    return {
        format: probe(shapes, _paths(format) if paths is None else paths, repeats=repeats)
        for format, shapes in by_format.items()
    }


def by_probe(params: PyTree, tables: Mapping[Format, Table], rows: int) -> PyTree:
    """Returns the parameters with each quantized matrix in the form that was fastest at its shape.

    Args:
      params: of a run.
      tables: from `probe_run`.
      rows: N, as there.

    Raises:
      ValueError: a shape that was not probed.
    """
    products = products_of(params)

    def one(key_path: tuple[Any, ...], leaf: Any) -> Any:
        path = path_of(key_path)
        if path not in products:
            return leaf
        inputs, outputs, format = products[path]
        chosen = tables[format].fastest((rows, inputs, outputs))
        return FORMS[chosen](leaf.weight if is_product(leaf) else leaf)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_packed)


def choices(params: PyTree, tables: Mapping[Format, Table], rows: int) -> dict[str, str]:
    """Returns path -> name of the fastest way, for every quantized matrix.

    Args and Raises: as `by_probe`.
    """
    return {
        path: tables[format].fastest((rows, inputs, outputs))
        for path, (inputs, outputs, format) in products_of(params).items()
    }


def _integers(w: QTensor) -> W8A8:
    return integer_products({"w": w})["w"]


FORMS: dict[str, Callable[[QTensor], Any]] = {
    "float32": lambda w: w.dequantize(jnp.float32),
    "bfloat16": lambda w: w.dequantize(jnp.bfloat16),
    "dequantize": lambda w: w,
    "int8": _integers,
}
"""Name of a path of the probe -> the weight that is multiplied so."""


def _paths(format: Format) -> dict[str, Path]:
    axis = contraction_axis("kernel")

    def dequantize(x_NI: jax.Array, w_IO: jax.Array) -> Callable[[], Any]:
        w = quantize(w_IO, format, axis)
        compiled = jax.jit(linear).lower(x_NI, w).compile()
        return lambda: compiled(x_NI, w)

    paths = {**PATHS, "dequantize": dequantize}
    integers = (format.kind, format.storage, format.offset) == ("int", "int8", "none")
    if not integers or isinstance(format.group, int):
        del paths["int8"]
    return paths
