"""Calibration: what the inputs of each kernel look like, one layer at a time.

    batches = windows(tokens, length=128, batch=8)
    out = sequential(model, params, batches, ("hessian",), replace_layer)

Each layer runs on what the layers before it, already replaced, give it, so that whoever replaces a
layer sees the inputs that it will have in the end.

Shapes: B batch, T time, D width, N positions (B * T), I inputs of a kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from compress.lowrank import is_weight
from compress.quantize import MATRICES
from model.attention import Visibility
from model.block import Block, norm
from model.linear import linear
from model.positions import rotation
from model.rules import STACK, leaf_paths, path_of
from model.transformer import Transformer, features

PyTree = Any
Statistics = dict[str, jax.Array]
ByPath = dict[str, Statistics]
ReplaceLayer = Callable[[int, PyTree, ByPath], PyTree]


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


class Calibrated(NamedTuple):
    """What `sequential` gives.

    Attributes:
      params: with every layer replaced.
      head: the statistics of the head's input.
    """

    params: PyTree
    head: Statistics


def windows(tokens: Any, *, length: int, batch: int, count: int | None = None) -> list[np.ndarray]:
    """Cuts a stream of token ids into batches of windows, int32 [B, T]; the rest is dropped.

    Args:
      tokens: [N] ids.
      length: T, tokens a window.
      batch: B, windows a batch; the last one may hold fewer.
      count: at most so many windows, None for all.

    Raises:
      ValueError: if there are fewer tokens than one window.

    >>> [w.shape for w in windows(range(70), length=8, batch=3)]
    [(3, 8), (3, 8), (2, 8)]
    >>> windows(range(7), length=8, batch=3)
    Traceback (most recent call last):
    ...
    ValueError: calibration takes windows of 8 tokens, but there are 7 in all; give more text or a \
shorter window
    """
    ids = np.asarray(list(tokens) if isinstance(tokens, range) else tokens, np.int32).reshape(-1)
    if min(length, batch, 1 if count is None else count) < 1:
        raise ValueError(f"length {length}, batch {batch}, count {count}: each must be at least 1")
    if ids.size < length:
        raise ValueError(
            f"calibration takes windows of {length} tokens, but there are {ids.size} in all; "
            "give more text or a shorter window"
        )
    rows = ids[: ids.size // length * length].reshape(-1, length)[:count]
    return [rows[i : i + batch] for i in range(0, len(rows), batch)]


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
    model: Transformer, layer: PyTree, x_BTD: jax.Array, window: Any, names: Sequence[str]
) -> tuple[jax.Array, ByPath]:
    """Like `run_layer`, and path -> statistics of the input of every kernel of the block.

    Raises:
      ValueError: if a statistic is unknown.
    """
    check_names(names)
    seen: ByPath = {}

    def wrap(key_path, leaf):
        path = path_of(key_path)
        if path.rsplit("/", 1)[-1] not in MATRICES:
            return leaf

        def note(x):
            seen[path] = statistics_of(x, names)

        return _Observed(leaf, note)

    wrapped = jax.tree_util.tree_map_with_path(wrap, layer, is_leaf=is_weight)
    return run_layer(model, wrapped, x_BTD, window), seen


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for a statistic that there is not."""
    if unknown := [name for name in names if name not in STATISTICS]:
        raise ValueError(f"no statistic is called {unknown}; there are {', '.join(STATISTICS)}")


def embed(model: Transformer, params: PyTree, tokens_BT: jax.Array) -> jax.Array:
    """Returns the stream [B, T, D] before the first block."""
    # A model of one layer up to its "hidden"; under jit the layer itself is dropped as unused.
    config = dataclasses.replace(model.config, layers=1, window=None, scan_layers=False, dropout=0)
    one = {**params, STACK: jax.tree.map(lambda leaf: leaf[:1], params[STACK])}
    hidden = features(model.clone(config=config), one, tokens_BT, capture=("hidden",)).hidden
    assert hidden is not None
    return hidden[0]


def sequential(
    model: Transformer,
    params: PyTree,
    batches: Iterable[Any],
    statistics: Sequence[str],
    replace_layer: ReplaceLayer,
    *,
    stages: Sequence[Sequence[str]] | None = None,
) -> Calibrated:
    """Walks the layers: observes one, lets it be replaced, goes on with what it gives then.

    Args:
      model: the Transformer.
      params: its parameters, plain or quantized.
      batches: token ids, int [B, T] each; kept on the device as streams [B, T, D].
      statistics: names in `STATISTICS`.
      replace_layer: `(layer number, layer, path -> statistics) -> layer`; paths are those inside
        the block, "attention/q/kernel". All layers must come back with one structure.
      stages: groups of paths that are replaced one after the other, each on inputs that the earlier
        groups have changed, as ("attention/q/kernel", ...), ("attention/o/kernel",), ...; by
        default all at once. Every group costs a forward pass. A stage sees its own paths only.

    Raises:
      ValueError: no batch, a batch that is no matrix, an unknown statistic, or a stage that names
        no kernel.

    >>> from model.presets import gpt2_tiny
    >>> model = Transformer(gpt2_tiny())
    >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> batches = windows(range(64), length=16, batch=2)
    >>> def show(number, layer, seen):
    ...     print(number, seen["mlp/down/kernel"]["absmax"].shape, seen["mlp/up/kernel"]["tokens"])
    ...     return layer
    >>> _ = sequential(model, params, batches, ("absmax", "tokens"), show)
    0 (128,) 64.0
    1 (128,) 64.0
    """
    check_names(statistics)
    names = tuple(statistics)
    tokens = [jnp.asarray(batch) for batch in batches]
    if not tokens:
        raise ValueError("there is nothing to calibrate with: no batch of tokens")
    for ids in tokens:
        if ids.ndim != 2 or not ids.size or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"a batch is token ids [B, T], not {ids.dtype} of shape {ids.shape}")
    streams = [_embed(model, params, ids) for ids in tokens]

    def walk(number: int) -> PyTree:
        layer = jax.tree.map(lambda leaf: leaf[number], params[STACK])
        window = c.window[number] if isinstance(c.window, tuple) else c.window
        window = None if window is None else jnp.int32(window)
        kernels = [p for p in leaf_paths(layer, is_weight) if p.rsplit("/", 1)[-1] in MATRICES]
        groups = [kernels] if stages is None else stages
        if unknown := [p for group in groups for p in group if p not in kernels]:
            raise ValueError(f"no kernel {unknown} is in a block; there are {', '.join(kernels)}")
        for group in groups:
            sums: ByPath = {}
            for x_BTD in streams:
                seen = _observe(model, layer, x_BTD, window, names)[1]
                sums = {p: _joined(sums, seen, p) for p in group}
            layer = replace_layer(number, layer, sums)
        streams[:] = [_run(model, layer, x_BTD, window) for x_BTD in streams]
        return layer

    c = model.config
    layers = [walk(number) for number in range(c.layers)]
    structures = {jax.tree.structure(layer) for layer in layers}
    if len(structures) > 1:
        raise ValueError(
            "the layers came back with different structures (formats?), but they share one stack"
        )
    new = {**params, STACK: jax.tree.map(lambda *each: jnp.stack(each), *layers)}
    at_head = [_at_head(model, params["final_norm"], x_BTD, names) for x_BTD in streams]
    return Calibrated(new, functools.reduce(join_statistics, at_head))


def _statistics_at_head(
    model: Transformer, scales: PyTree, x_BTD: jax.Array, names: Sequence[str]
) -> Statistics:
    final_norm = norm(model.config, "final_norm")
    return statistics_of(cast(jax.Array, final_norm.apply({"params": scales}, x_BTD)), names)


# Compiled once for each model and shape, however often a model is calibrated.
_embed = jax.jit(embed, static_argnums=0)
_run = jax.jit(run_layer, static_argnums=0)
_observe = jax.jit(observe_layer, static_argnums=(0, 4))
_at_head = jax.jit(_statistics_at_head, static_argnums=(0, 3))


def _joined(sums: ByPath, seen: ByPath, path: str) -> Statistics:
    return join_statistics(sums[path], seen[path]) if path in sums else seen[path]
