"""Writes a GPT-2-like model as ONNX: float32, or integer products for int8 kernels.

A kernel of the format "int8" becomes `DynamicQuantizeLinear` of what it is multiplied with and
`MatMulInteger`, which is how ONNX Runtime reaches a CPU's 8-bit instructions; a table of that
format stays int8. All other quantized matrices become float32. Batch and length are free.

Shapes: B batch, T time, D width, H heads, K head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import secrets
from pathlib import Path
from typing import Any

import jax
import numpy as np

from compress.quantization.formats import FORMATS
from compress.quantization.quantize import is_qtensor
from model.config import TransformerConfig
from model.extras import from_extra

PyTree = Any

OPSET = 20  # the first with a Gelu
LARGEST = 2**31 - 2**20  # protobuf counts in int32; something is left for the nodes
IR_VERSION = 10  # that runtimes of the same age read
HOLD_ANY = "The native and the StableHLO format hold any model"
# Fields of a config that are sizes, or that say nothing of what a finished model computes.
FREE = {
    *("vocabulary_size", "max_length", "layers", "width", "heads", "kv_heads", "head_width"),
    *("ffn_width", "norm_epsilon", "tied_head", "rotary_base", "zero_init_projections"),
    *("init_std", "dropout", "layer_drop", "token_drop", "dtype", "parameter_dtype"),
    *("scan_layers", "remat", "bigram_width"),
}


class _Graph:
    """Nodes and constants, as they are added; every method returns the name of its result."""

    def __init__(self):
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def constant(self, value: Any, name: str | None = None) -> str:
        from onnx import numpy_helper

        name = name or f"constant_{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        from onnx import helper

        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def weight(self, w: Any, name: str) -> tuple[str, str | None]:
        """A matrix as it lies in storage, and the scales of its numbers where they are int8."""
        if not _is_int8(w):
            return self.constant(_real(w), name), None
        scales = self.constant(np.asarray(w.scales, np.float32).reshape(-1), f"{name}_scales")
        numbers = np.asarray(w.values)
        return self.constant(numbers.T if w.transposed else numbers, name), scales

    def product(self, x: str, kernel: str, scales: str | None) -> str:
        """x @ kernel, kernel [in, out] with a scale for each output or none."""
        if scales is None:
            return self.add("MatMul", x, kernel)
        q, scale, zero = self.add("DynamicQuantizeLinear", x, outputs=3)
        y = self.add("Cast", self.add("MatMulInteger", q, kernel, zero), to=1)
        return self.add("Mul", y, self.add("Mul", scale, scales))

    def rows(self, ids: str, table: str, scales: str | None) -> str:
        """The rows `ids` of a table [rows, width] with a scale for each row or none."""
        rows = self.add("Gather", table, ids)
        if scales is None:
            return rows
        wide = self.constant(np.array([-1], np.int64))
        of_each = self.add("Unsqueeze", self.add("Gather", scales, ids), wide)
        return self.add("Mul", self.add("Cast", rows, to=1), of_each)


def write_onnx(path: Path, config: TransformerConfig, params: PyTree) -> None:
    """Writes `tokens int64 [B, T] -> logits float32 [B, T, V]`.

    Args:
      path: the file to make; it must not exist.
      config: of the model.
      params: its parameters.

    Raises:
      ValueError: `path` exists, the model is not of GPT-2's kind, or the graph passes the 2 GB that
        one file holds.
    """
    onnx = from_extra("onnx", "onnx")
    from onnx import TensorProto, helper

    if differs := _differences(config):
        raise ValueError(
            f"ONNX is written for GPT-2's kind of block alone, and {'; '.join(differs)}. {HOLD_ANY}"
        )
    if path.exists():
        raise ValueError(f"{path} exists already and nothing is overwritten; give a free name")
    g = _Graph()
    logits = _forward(g, config, params)
    g.nodes[-1].output[0] = "logits"
    assert logits
    if (size := sum(len(value.raw_data) for value in g.constants.values())) > LARGEST:
        raise ValueError(f"{size:,} bytes of weights pass the 2 GB of one ONNX file; use StableHLO")
    free = [
        helper.make_tensor_value_info("tokens", TensorProto.INT64, ["B", "T"]),
        helper.make_tensor_value_info(
            "logits", TensorProto.FLOAT, ["B", "T", config.vocabulary_size]
        ),
    ]
    graph = helper.make_graph(
        g.nodes, "transformer", free[:1], free[1:], list(g.constants.values())
    )
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        onnx.save(model, str(temporary))
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def _differences(config: TransformerConfig) -> list[str]:
    """What of a model is not as in GPT-2: a config's defaults are GPT-2's."""
    wrong = [
        f"{field.name} is {getattr(config, field.name)!r} and must be {field.default!r}"
        for field in dataclasses.fields(config)
        if field.name not in FREE and getattr(config, field.name) != field.default
    ]
    if config.kv_heads_ != config.heads:
        wrong.append(f"kv_heads is {config.kv_heads_} and must be {config.heads}")
    if config.heads * config.head_width_ != config.width:
        wrong.append(f"{config.heads} heads of {config.head_width_} must fill {config.width}")
    return wrong


def _forward(g: _Graph, c: TransformerConfig, params: PyTree) -> str:
    one = g.constant(np.array([1], np.int64))
    length = g.add("Gather", g.add("Shape", "tokens"), g.constant(np.int64(1)))
    places = g.add("Range", g.constant(np.int64(0)), length, g.constant(np.int64(1)))
    seen = g.add(
        "GreaterOrEqual",
        g.add("Unsqueeze", places, one),
        g.add("Unsqueeze", places, g.constant(np.array([0], np.int64))),
    )
    # Added to the scores: ONNX Runtime takes longer to choose among as many than over the softmax.
    mask = g.add("Where", seen, g.constant(np.float32(0)), g.constant(np.float32(-np.inf)))
    to_heads = g.constant(np.array([0, 0, c.heads, c.head_width_], np.int64))
    from_heads = g.constant(np.array([0, 0, c.width], np.int64))
    shrink = g.constant(np.float32(c.head_width_**-0.5))

    def norm(x: str, p: PyTree, name: str) -> str:
        scale, bias = (g.constant(_real(p[n]), f"{name}_{n}") for n in ("scale", "bias"))
        return g.add("LayerNormalization", x, scale, bias, epsilon=c.norm_epsilon)

    def linear(x: str, p: PyTree, name: str) -> str:
        y = g.product(x, *g.weight(p["kernel"], f"{name}_kernel"))
        return g.add("Add", y, g.constant(_real(p["bias"]), f"{name}_bias"))

    table, by_row = g.weight(params["token_embedding"]["embedding"], "token_embedding")
    at_places = g.weight(params["position_embedding"]["embedding"], "position_embedding")
    x = g.add("Add", g.rows("tokens", table, by_row), g.rows(places, *at_places))
    for i in range(c.layers):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        h = norm(x, p["attention_norm"], f"{i}_attention_norm")
        q, k, v = (
            g.add(
                "Transpose",
                g.add("Reshape", linear(h, p["attention"][n], f"{i}_{n}"), to_heads),
                perm=[0, 2, 3, 1] if n == "k" else [0, 2, 1, 3],
            )
            for n in "qkv"
        )
        scores = g.add("Mul", g.add("MatMul", q, k), shrink)
        weights = g.add("Softmax", g.add("Add", scores, mask), axis=-1)
        y = g.add("Transpose", g.add("MatMul", weights, v), perm=[0, 2, 1, 3])
        y = g.add("Reshape", y, from_heads)
        x = g.add("Add", x, linear(y, p["attention"]["o"], f"{i}_o"))
        h = norm(x, p["mlp_norm"], f"{i}_mlp_norm")
        h = g.add("Gelu", linear(h, p["mlp"]["up"], f"{i}_up"), approximate="tanh")
        x = g.add("Add", x, linear(h, p["mlp"]["down"], f"{i}_down"))
    final = norm(x, params["final_norm"], "final_norm")
    if c.tied_head:  # written once; a runtime turns it as it loads
        return g.product(final, g.add("Transpose", table, perm=[1, 0]), by_row)
    return g.product(final, *g.weight(params["head"]["kernel"], "head"))


def _is_int8(w: Any) -> bool:
    return is_qtensor(w) and w.format == FORMATS["int8"]


def _real(leaf: Any) -> np.ndarray:
    return np.asarray(leaf.dequantize() if hasattr(leaf, "dequantize") else leaf, np.float32)
