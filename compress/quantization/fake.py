"""Training with quantized weights: rounded in the forward pass, as if not in the backward pass.

The forward pass sees exactly the numbers that quantizing afterwards will give (the same grid, the
same scales), so that what was trained is what is exported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from compress.lora import factors_among
from compress.quantization.formats import Format, format_of
from compress.quantization.quantize import contraction_axis, formats_by_path
from compress.quantization.rounding import quantize
from model.rules import Rules, path_of

PyTree = Any
Gradient = Literal["identity", "clipped"]


SLACK = 1e-5  # of a step: what float32 makes of a weight that lies half a step away


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _fake(w: jax.Array, format: Format, axis: int, candidates: int, gradient: Gradient):
    return quantize(w, format, axis, candidates=candidates).dequantize(w.dtype)


@_fake.defjvp
def _fake_jvp(format, axis, candidates, gradient, primals, tangents):
    (w,), (tangent,) = primals, tangents
    rounded = _fake(w, format, axis, candidates, gradient)
    if gradient == "identity":
        return rounded, tangent
    # What was rounded by more than half a step was cut off at an end of the grid.
    # Compared in float32: a difference in bfloat16 has an error of its own.
    stored = quantize(w, format, axis, candidates=candidates)
    apart = jnp.abs(w.astype(jnp.float32) - stored.dequantize(jnp.float32))
    inside = apart <= (0.5 + SLACK) * jnp.abs(stored.scale_of_each())
    return rounded, jnp.where(inside, tangent, jnp.zeros_like(tangent))


def fake_quantize(
    w: jax.Array,
    format: str | Format,
    axis: int = -2,
    *,
    candidates: int = 1,
    gradient: Gradient = "identity",
) -> jax.Array:
    """Returns w rounded to the grid, with the gradient of the identity (straight-through).

    `quantize(w, format, axis).dequantize()` bit for bit (Bengio et al. 2013, arXiv:1308.3432; Jacob
    et al. 2018, arXiv:1712.05877).

    Args:
      w: [..., rows, columns].
      format: a format or its name.
      axis: contraction axis, -2 or -1.
      candidates: scales tried for each group, see `compress.quantization.rounding.quantize`.
      gradient: "clipped" gives none to weights that the end of an integer grid cut off: there are
        such where a scale was searched for, and in "full" grids.

    Raises:
      ValueError: as `quantize`; a "clipped" gradient for a float8 format, whose steps differ.

    >>> w = jnp.array([[0.9], [-4.0], [2.2], [0.0]])
    >>> fake_quantize(w, "int3").tolist()
    [[1.0], [-4.0], [2.0], [0.0]]
    >>> jax.grad(lambda w: (3 * fake_quantize(w, "int3")).sum())(w).tolist()
    [[3.0], [3.0], [3.0], [3.0]]
    """
    format = format_of(format)
    if gradient not in ("identity", "clipped"):
        raise ValueError(f"the gradient is 'identity' or 'clipped', not {gradient!r}")
    if gradient == "clipped" and format.kind != "int":
        raise ValueError(f"a clipped gradient is for integer formats, not {format.kind}")
    return _fake(w, format, axis, candidates, gradient)


def fake_quantization(
    rules: Rules, *, candidates: int = 1, gradient: Gradient = "identity"
) -> Callable[[PyTree, Any], PyTree]:
    """Returns `(weights, context) -> weights`, the `apply` of a weight transform.

    Quantizing the trained parameters by the same rules changes nothing in what the model computes.

    Args:
      rules: ordered (regex, format, its name, or None), see
        `compress.quantization.quantize.formats_by_path`.
      candidates: see `fake_quantize`.
      gradient: see `fake_quantize`.

    Raises:
      ValueError: as `formats_by_path` and `fake_quantize`, when the step is traced; and for factors
        of an adapted matrix, which rounded by themselves would not be what is exported.

    >>> apply = fake_quantization([("kernel", "int3")])
    >>> apply({"head": {"kernel": jnp.array([[0.9], [-4.0]])}}, None)["head"]["kernel"].tolist()
    [[1.0], [-4.0]]
    """

    def apply(weights: PyTree, context: Any) -> PyTree:
        formats = formats_by_path(weights, rules)
        if factors := factors_among(formats, weights):
            raise ValueError(
                f"the rules round {factors[0]}, a factor of an adapted matrix; attach factors in "
                "the form 'merged' before this transform, or give them the format None"
            )

        def one(key_path, leaf):
            path = path_of(key_path)
            if path not in formats:
                return leaf
            axis = contraction_axis(path)
            return fake_quantize(
                leaf, formats[path], axis, candidates=candidates, gradient=gradient
            )

        return jax.tree_util.tree_map_with_path(one, weights)

    return apply
