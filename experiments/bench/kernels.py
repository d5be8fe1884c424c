"""Which kernels a compiled program really runs, and how long each of them takes."""

from __future__ import annotations

import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

_CALL = re.compile(r'custom_call_target="([^"]+)"')
_TRITON = re.compile(r'"kind":"(__triton[^"]*)"')
_NUMBER = re.compile(r"(?:[._]\d+)+$")
_PRODUCT = re.compile(r"stablehlo\.dot_general.*: \(tensor<([^>]*)>, tensor<([^>]*)>\)")
_NAMED = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = \(?(\w+)\[", re.M)
_DOES_PRODUCT = re.compile(
    r"%[\w.\-]+ = \(?(\w+)\[.*? (dot|custom-call)\(%([\w.\-]+), %([\w.\-]+)[^\n]*"
)
MOST = 60  # kernels that are named; the others are summed


def kernels(compiled: str) -> dict[str, int]:
    """Counts calls of libraries and products in Triton in the text of a compiled program.

    >>> kernels('custom-call(a), custom_call_target="__cublas$gemm"')
    {'__cublas$gemm': 1}
    """
    return dict(Counter([*_CALL.findall(compiled), *_TRITON.findall(compiled)]))


def products(compiled: str) -> dict[str, int]:
    r"""Counts products by the types of operands and result, and by what computes them.

    A product inside a fusion is one that XLA's own code generator, as a rule Triton, computes.

    >>> text = '%a = s8[2,3] parameter(0)\n%b = s8[3,2] parameter(1)\n%c = s32[2,2] dot(%a, %b)'
    >>> products(text)
    {'s8 x s8 -> s32 by a fusion': 1}
    """
    types, found = dict(_NAMED.findall(compiled)), Counter[str]()
    for match in _DOES_PRODUCT.finditer(compiled):
        result, kind, left, right = match.groups()
        target = _CALL.search(match[0])
        if kind == "custom-call" and (target is None or "cublas" not in target[1]):
            continue
        by = target[1] if target and kind == "custom-call" else "a fusion"
        found[f"{types.get(left, '?')} x {types.get(right, '?')} -> {result} by {by}"] += 1
    return dict(found)


def float32_products(lowered: str) -> list[str]:
    """Returns the shapes of the products with a float32 operand in the text of a lowered program.

    >>> line = "%1 = stablehlo.dot_general %a, %b : (tensor<2x3xbf16>, tensor<3x2xf32>) -> x"
    >>> float32_products(line)
    ['2x3xbf16 3x2xf32']
    """
    found = [" ".join(match) for match in _PRODUCT.findall(lowered)]
    return [operands for operands in found if re.search(r"x?f32\b", operands)]


def kernel_seconds(run: Callable[[], Any], steps: int) -> dict[str, list[float]]:
    """Returns name -> [seconds, launches] of one of the steps that `run` makes, slowest first.

    Numbers at the end of a name are left out, so that a kernel of every layer counts as one. The
    last entry is the sum of all others; "device busy" is the sum of all. Empty where the profiler
    sees no device.
    """
    with tempfile.TemporaryDirectory() as name:
        with jax.profiler.trace(name):
            jax.block_until_ready(run())
        files = sorted(Path(name).rglob("*.xplane.pb"))
        if not files:
            return {}
        data = jax.profiler.ProfileData.from_file(str(files[-1]))
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for plane in data.planes:
            if "/device:" not in plane.name.lower():
                continue
            for line in plane.lines:
                if not line.name.lower().startswith("stream"):
                    continue  # lines of modules and steps repeat what the streams hold
                for event in line.events:
                    part = sums[_NUMBER.sub("", event.name)]
                    part[0] += event.duration_ns * 1e-9 / steps
                    part[1] += 1 / steps
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])
    total = [sum(v[0] for _, v in ordered), sum(v[1] for _, v in ordered)]
    rest = ordered[MOST:]
    found = dict(ordered[:MOST])
    found["others"] = [sum(v[0] for _, v in rest), sum(v[1] for _, v in rest)]
    return {"device busy": total, **found} if ordered else {}
