"""Quantizing the parameters of a model by rules, and a report of what really is quantized.

    params = quantize_params(params, weight_rules(params, "q4_0"))
    print(report(params))

The result goes wherever the plain parameters went.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from compress.quantization.formats import Format, format_of
from compress.quantization.qtensor import QTensor
from compress.quantization.rounding import check_shape, quantize
from model.rules import Rules, is_stacked, leaf_paths, match, path_of

PyTree = Any
Quantize = Callable[[jax.Array, Format, int], QTensor]

MATRICES = ("kernel", "embedding")
POSITIONS = "position_embedding"


def is_qtensor(node: Any) -> bool:
    """Whether a pytree node is a quantized matrix: the `is_leaf` of `model.rules`."""
    return isinstance(node, QTensor)


def contraction_axis(path: str) -> int:
    """Returns the axis that is summed over in products with the weight at `path`.

    A table [rows, width] meets the stream through its transpose, as a tied head does, so it is cut
    into groups along its width; a kernel [in, out] along in.

    >>> contraction_axis("token_embedding/embedding"), contraction_axis("head/kernel")
    (-1, -2)
    """
    return -1 if path.rsplit("/", 1)[-1] == "embedding" else -2


def weight_rules(
    params: PyTree, format: str | Format, *, positions: str | Format | None = None
) -> list[tuple[str, Any]]:
    """Returns rules for all matrices of a model: kernels, token embedding and head.

    Biases and norms stay as they are.

    Args:
      params: the parameters, or their shapes.
      format: of every matrix but the position table.
      positions: format of the position table, None to leave it alone.

    >>> weight_rules({"head": {"kernel": 0.0}}, "int8")
    [('kernel|embedding', 'int8')]
    """
    rules: list[tuple[str, Any]] = [("|".join(MATRICES), format)]
    paths = leaf_paths(params, is_leaf=is_qtensor)
    if any(path.startswith(f"{POSITIONS}/") for path in paths):
        rules.insert(0, (POSITIONS, positions))
    elif positions is not None:
        raise ValueError(
            f"the position table shall be {positions!r}, but this model has none; leave it out"
        )
    return rules


def formats_by_path(params: PyTree, rules: Rules) -> dict[str, Format]:
    """Returns path -> format of every weight that the rules quantize, all checked against them.

    Args:
      params: parameters, or their shapes.
      rules: ordered (regex, format, its name, or None); first match wins, no match is None.

    Raises:
      ValueError: a rule matches nothing or only some layers of a stack; a format is unknown or does
        not fit; what shall be quantized is no matrix, or is quantized already; or nothing is.

    >>> import jax.numpy as jnp
    >>> formats_by_path({"head": {"kernel": jnp.ones((2, 2))}}, [("kernel", "int8")])["head/kernel"]
    Format(kind='int', bits=8, group='channel', offset='none', span='balanced', \
scale_dtype='float32')
    """
    rules = [(regex, None if f is None else format_of(f)) for regex, f in rules]
    chosen = match(rules, params, None, is_leaf=is_qtensor)
    found: dict[str, Format] = {}

    def check(key_path, leaf, format):
        if format is None:
            return
        path = path_of(key_path)
        if is_qtensor(leaf):
            raise ValueError(f"{path!r} is quantized already; give it the format None")
        axes = len(leaf.shape) - is_stacked(path)
        if axes != 2:
            raise ValueError(
                f"a rule gives {path!r} a format, but that is no matrix (its shape is {leaf.shape})"
                f"; write rules for {' and '.join(MATRICES)}"
            )
        try:
            check_shape(leaf, format, contraction_axis(path))
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from None
        found[path] = format

    # The rules' tree has None for leaves, which JAX takes for empty nodes.
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)[0]
    formats = jax.tree.leaves(chosen, is_leaf=lambda node: node is None)
    for (key_path, leaf), format in zip(leaves, formats, strict=True):
        check(key_path, leaf, format)
    if not found:
        raise ValueError("the rules leave every weight as it is; give at least one a format")
    return found


def quantize_params(
    params: PyTree, rules: Rules, quantize_one: Quantize = quantize, **settings: Any
) -> PyTree:
    """Returns the parameters with matrices quantized by rules.

    Args:
      params: parameters; matrices are [in, out] or, under "blocks", [layer, in, out].
      rules: see `formats_by_path`; `weight_rules` makes the usual ones.
      quantize_one: `(weight, format, axis, **settings) -> QTensor`, round to nearest by default.
      settings: for `quantize_one`, such as `candidates`.

    Raises:
      ValueError: as `formats_by_path`, before any weight is touched; or a weight is not finite.

    >>> import jax.numpy as jnp
    >>> params = {"head": {"kernel": jnp.ones((64, 8)), "bias": jnp.ones(8)}}
    >>> quantized = quantize_params(params, [("kernel", "q8_0")])
    >>> quantized["head"]["kernel"].nbytes, quantized["head"]["bias"].shape
    (544, (8,))
    """
    formats = formats_by_path(params, rules)

    def one(key_path, leaf):
        path = path_of(key_path)
        if path not in formats:
            return leaf
        try:
            return quantize_one(leaf, formats[path], contraction_axis(path), **settings)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from error

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_qtensor)


def dequantize_params(params: PyTree, dtype: Any = None) -> PyTree:
    """Returns the parameters with plain arrays in place of quantized matrices.

    >>> import jax.numpy as jnp
    >>> quantized = quantize_params({"head": {"kernel": -jnp.ones((2, 1))}}, [("head", "int4")])
    >>> dequantize_params(quantized)["head"]["kernel"].tolist()
    [[-1.0], [-1.0]]
    """
    return jax.tree.map(
        lambda leaf: leaf.dequantize(dtype) if is_qtensor(leaf) else leaf,
        params,
        is_leaf=is_qtensor,
    )


class Row(NamedTuple):
    """One parameter in a report; `format` is None where it is a plain array."""

    path: str
    format: Format | None
    weights: int
    bytes: int


class Report(NamedTuple):
    """What a parameter tree really holds; printing it gives a table.

    Attributes:
      rows: one a parameter.
      weights: all of them.
      quantized: weights that are quantized.
      bytes: of all arrays.
      plain_bytes: what the arrays would take in the types that were quantized.
    """

    rows: tuple[Row, ...]
    weights: int
    quantized: int
    bytes: int
    plain_bytes: int

    @property
    def share(self) -> float:
        """The share of weights that is quantized."""
        return self.quantized / self.weights

    def __str__(self) -> str:
        width = max(len(row.path) for row in self.rows)
        lines = [
            f"{row.path:{width}}  {row.weights:>12,}  {row.bytes:>13,} bytes  "
            f"{8 * row.bytes / row.weights:6.3f} bits a weight"
            for row in self.rows
        ]
        lines.append(
            f"{self.quantized:,} of {self.weights:,} weights are quantized ({self.share:.1%}); "
            f"{self.bytes:,} bytes instead of {self.plain_bytes:,} "
            f"({self.bytes / self.plain_bytes:.3f}x)"
        )
        return "\n".join(lines)


def report(params: PyTree) -> Report:
    """Counts weights and bytes of a parameter tree as it is, not as it was asked for.

    >>> import jax.numpy as jnp
    >>> params = {"head": {"kernel": jnp.ones((64, 8)), "bias": jnp.ones(8)}}
    >>> print(report(quantize_params(params, [("kernel", "q8_0")])))
    head/bias               8             32 bytes  32.000 bits a weight
    head/kernel           512            544 bytes   8.500 bits a weight
    512 of 520 weights are quantized (98.5%); 576 bytes instead of 2,080 (0.277x)
    """
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)[0]
    rows = tuple(
        Row(
            path_of(key_path),
            leaf.format if is_qtensor(leaf) else None,
            leaf.size,
            leaf.nbytes if is_qtensor(leaf) else leaf.size * leaf.dtype.itemsize,
        )
        for key_path, leaf in leaves
    )
    return Report(
        rows,
        sum(row.weights for row in rows),
        sum(row.weights for row in rows if row.format is not None),
        sum(row.bytes for row in rows),
        sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves),
    )
