"""One block at work: what it makes of the stream, and what the inputs of its kernels look like.

Shapes: B batch, T time, D width, N positions (B * T), I inputs of a kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from compress.lowrank import is_weight
from model.attention import Visibility
from model.block import Block
from model.linear import linear
from model.positions import rotation
from model.rules import STACK, path_of
from model.transformer import Transformer, features

PyTree = Any
Statistics = dict[str, jax.Array]
ByPath = dict[str, Statistics]


def _hessian(x_NI: jax.Array) -> jax.Array:
    # The sum of many squares in bfloat16, which some chips take by default, is useless to invert.
    return jnp.matmul(x_NI.T, x_NI, precision=jax.lax.Precision.HIGHEST)


# name -> (what one batch gives, how two batches are joined)
STATISTICS: dict[
    str,
    tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array, jax.Array], jax.Array]],
] = {
    "hessian": (_hessian, jnp.add),
    "square_sum": (lambda x_NI: jnp.square(x_NI).sum(axis=0), jnp.add),
    "absmax": (lambda x_NI: jnp.abs(x_NI).max(axis=0), jnp.maximum),
    "abs_sum": (lambda x_NI: jnp.abs(x_NI).sum(axis=0), jnp.add),
    "low": (lambda x_NI: x_NI.min(axis=0), jnp.minimum),
    "high": (lambda x_NI: x_NI.max(axis=0), jnp.maximum),
    "tokens": (lambda x_NI: jnp.float32(x_NI.shape[0]), jnp.add),
}
"""What can be asked for. For inputs x [N, I] of a kernel: "hessian" is x' x, [I, I]; "square_sum",
"abs_sum", "absmax", "low" and "high" are by input, [I]; "tokens" is N. All float32."""


def statistics_of(x: jax.Array, names: Sequence[str]) -> Statistics:
    """Returns statistics of the inputs x [..., I] of a kernel.

    >>> statistics_of(jnp.array([[1.0, -2.0], [3.0, 0.0]]), ("absmax", "tokens"))
    {'absmax': Array([3., 2.], dtype=float32), 'tokens': Array(2., dtype=float32)}
    """
    x_NI = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return {name: STATISTICS[name][0](x_NI) for name in names}


def join_statistics(one: Statistics, two: Statistics) -> Statistics:
    """Returns the statistics of two sets of inputs together.

    >>> a, b = ({"tokens": jnp.float32(n)} for n in (2, 3))
    >>> float(join_statistics(a, b)["tokens"])
    5.0
    """
    return {name: STATISTICS[name][1](one[name], two[name]) for name in one}


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for a statistic that there is not."""
    if unknown := [name for name in names if name not in STATISTICS]:
        raise ValueError(f"no statistic is called {unknown}; there are {', '.join(STATISTICS)}")


class _Observed:
    """A kernel that notes what it is multiplied with, for the one trace in which it lives."""

    __array_ufunc__ = None

    def __init__(self, kernel: Any, note: Callable[[jax.Array], None]):
        self.kernel, self.note = kernel, note
        self.shape = kernel.shape

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        self.note(x)
        return linear(x, self.kernel)


def run_layer(model: Transformer, layer: PyTree, x_BTD: jax.Array, window: Any) -> jax.Array:
    """Returns what one block makes of the stream x [B, T, D].

    Args:
      model: tells the config and the attention function.
      layer: parameters of the block, without layer axis.
      x_BTD: the stream.
      window: keys a query sees, a number (maybe traced) or None.
    """
    c = model.config
    turn = None
    if c.positions == "rotary":
        turn = rotation(jnp.arange(x_BTD.shape[1])[None], c.head_width_, c.rotary_base)
    block = Block(c, model.attention, parent=None)
    visibility = Visibility(window=window)
    return cast(Any, block.apply({"params": layer}, x_BTD, visibility, turn, None))[0]


def observe_layer(
    model: Transformer,
    layer: PyTree,
    x_BTD: jax.Array,
    window: Any,
    names: Sequence[str],
    kernels: Sequence[str],
) -> tuple[jax.Array, ByPath]:
    """Like `run_layer`, and path -> statistics of the input of some kernels of the block.

    Raises:
      ValueError: if a statistic is unknown.
    """
    check_names(names)
    seen: ByPath = {}

    def wrap(key_path, leaf):
        path = path_of(key_path)
        if path not in kernels:
            return leaf

        def note(x):
            seen[path] = statistics_of(x, names)

        return _Observed(leaf, note)

    wrapped = jax.tree_util.tree_map_with_path(wrap, layer, is_leaf=is_weight)
    return run_layer(model, wrapped, x_BTD, window), seen


def look_at_layer(
    model: Transformer,
    layer: PyTree,
    x_BTD: jax.Array,
    window: Any,
    names: Sequence[str],
    kernels: Sequence[str],
) -> ByPath:
    """Returns the statistics alone: compiled, what only the stream needs is not computed."""
    return observe_layer(model, layer, x_BTD, window, names, kernels)[1]


def embed(model: Transformer, params: PyTree, tokens_BT: jax.Array) -> jax.Array:
    """Returns the stream [B, T, D] before the first block."""
    # A model of one layer up to its "hidden"; under jit the layer itself is dropped as unused.
    config = dataclasses.replace(model.config, layers=1, window=None, scan_layers=False, dropout=0)
    one = {**params, STACK: jax.tree.map(lambda leaf: leaf[:1], params[STACK])}
    hidden = features(model.clone(config=config), one, tokens_BT, capture=("hidden",)).hidden
    assert hidden is not None
    return hidden[0]
