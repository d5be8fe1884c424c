"""Which arithmetic really runs: read from the program that XLA compiled, not from what was asked.

A product of integers is a `dot` (or a call of a library's) whose result is s32. A quantized weight
that is multiplied as floats shows as a buffer of floats with the weight's shape.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compress.export.stored import is_packed
from model.transformer import Transformer

PyTree = Any

TOKENS = 11  # no usual width: an activation is not taken for a weight
_BITS = {"f64": 64, "f32": 32, "bf16": 16, "f16": 16}
_RESULT = re.compile(r"= (\w+)\[([\d,]*)\]\S* ([\w-]+)\(")
_LIBRARY = re.compile(r"custom_call_target=\"[^\"]*(gemm|matmul|dot)", re.IGNORECASE)


class Audit(NamedTuple):
    """What a compiled forward pass does.

    Attributes:
      integer_dots: products whose sums are int32.
      float_dots: all others, attention's own among them.
      float_copies: buffers of floats that have the shape of a quantized weight.
      float_copy_bytes: their size.
    """

    integer_dots: int
    float_dots: int
    float_copies: int
    float_copy_bytes: int


def audit(model: Transformer, params: PyTree) -> Audit:
    """Compiles a forward pass over a few tokens and reads the program.

    Args:
      model: the Transformer.
      params: its parameters, quantized or not.

    >>> from model.presets import gpt2_tiny
    >>> model, tokens = Transformer(gpt2_tiny()), jnp.zeros((1, 4), jnp.int32)
    >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    >>> found = audit(model, params)
    >>> found.integer_dots, found.float_dots > 0, found.float_copies
    (0, True, 0)
    """
    length = TOKENS
    leaves = [w for w in jax.tree.leaves(params, is_leaf=is_packed) if is_packed(w)]
    shapes = {tuple(sorted(leaf.shape[-2:])) for leaf in leaves}
    while any(length in shape for shape in shapes):
        length += 2
    tokens = jnp.zeros((1, min(length, model.config.max_length)), jnp.int32)
    program = jax.jit(lambda p, t: model.apply({"params": p}, t)).lower(params, tokens).compile()
    return read_program(program.as_text() or "", shapes)


def read_program(text: str, shapes: set[tuple[int, ...]]) -> Audit:
    """Returns what a compiled program does.

    Args:
      text: optimized HLO.
      shapes: of the quantized matrices, each sorted.

    >>> line = "%a = s32[2,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}"
    >>> read_program(line, set()).integer_dots
    1
    """
    fused = set(re.findall(r"calls=(%[\w.-]+)", text))
    integers = floats = copies = size = 0
    inside = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            inside = line.removeprefix("ENTRY ").split(" ", 1)[0]
        found = _RESULT.search(line)
        if found is None:
            continue
        kind, dims, operation = found[1], found[2], found[3]
        if operation == "dot" or (operation == "custom-call" and _LIBRARY.search(line)):
            integers, floats = integers + (kind == "s32"), floats + (kind != "s32")
        # Inside a fusion nothing is stored; a parameter or bitcast is another's buffer.
        if kind not in _BITS or inside in fused or operation in ("parameter", "bitcast"):
            continue
        shape = tuple(sorted(int(n) for n in dims.split(",") if n not in ("", "1")))
        if shape in shapes:
            copies += 1
            size += shape[0] * shape[1] * _BITS[kind] // 8
    return Audit(integers, floats, copies, size)
