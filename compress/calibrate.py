"""Calibration: what the inputs of each kernel look like, one layer at a time.

    batches = windows(tokens, length=128, batch=8)
    out = sequential(model, params, batches, ("hessian",), replace_layer)
    seen = observe(model, params, batches, ("low", "high"))                  replaces nothing

Each layer runs on what the layers before it, already replaced, give it, so that whoever replaces a
layer sees the inputs that it will have in the end.

Shapes: B batch, T time, D width, N positions (B * T), I inputs of a kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from compress.lowrank import is_weight
from compress.observed import (
    ByPath,
    Statistics,
    check_names,
    embed,
    join_statistics,
    look_at_layer,
    observe_layer,
    run_layer,
    statistics_of,
)
from compress.quantization.quantize import MATRICES
from model.block import norm
from model.rules import STACK, leaf_paths, path_of
from model.transformer import Transformer

PyTree = Any
ReplaceLayer = Callable[[int, PyTree, ByPath], PyTree]


class Calibrated(NamedTuple):
    """What `sequential` gives.

    Attributes:
      params: with every layer replaced.
      head: the statistics of the head's input.
    """

    params: PyTree
    head: Statistics


class Seen(NamedTuple):
    """What `observe` gives.

    Attributes:
      layers: of each layer, path -> statistics.
      head: the statistics of the head's input.
    """

    layers: list[ByPath]
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


def not_finite(params: PyTree) -> list[str]:
    """Returns the paths of the parameters that hold NaN or infinity.

    >>> not_finite({"head": {"kernel": jnp.array([1.0, jnp.nan]), "bias": jnp.ones(2)}})
    ['head/kernel']
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    floats = [(at, leaf) for at, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return [path_of(at) for at, leaf in floats if not bool(_all_finite(leaf))]


def check_finite(params: PyTree) -> None:
    """Raises ValueError for parameters that hold NaN or infinity, and names them.

    >>> check_finite({"head": {"kernel": jnp.array([1.0, jnp.nan])}})
    Traceback (most recent call last):
    ...
    ValueError: head/kernel holds NaN or infinity, of which nothing can be calibrated; choose a \
checkpoint from before training diverged
    """
    if bad := not_finite(params):
        raise ValueError(
            f"{', '.join(bad)} holds NaN or infinity, of which nothing can be calibrated; choose a "
            "checkpoint from before training diverged"
        )


def sequential(
    model: Transformer,
    params: PyTree,
    batches: Iterable[Any],
    statistics: Sequence[str],
    replace_layer: ReplaceLayer,
    *,
    stages: Sequence[Sequence[str]] | None = None,
    kernels: Iterable[str] | None = None,
) -> Calibrated:
    """Walks the layers: observes one, lets it be replaced, goes on with what it gives then.

    Args:
      model: the Transformer.
      params: its parameters, plain or quantized.
      batches: token ids, int [B, T] each; kept on the device as streams [B, T, D].
      statistics: names in `compress.observed.STATISTICS`.
      replace_layer: `(layer number, layer, path -> statistics) -> layer`; paths are those inside
        the block, "attention/q/kernel". All layers must come back with one structure.
      stages: groups of paths that are replaced one after the other, each on inputs that the earlier
        groups have changed, as ("attention/q/kernel", ...), ("attention/o/kernel",), ...; by
        default all at once. Every group costs a forward pass. A stage sees its own paths only.
      kernels: paths whose statistics are wanted, by default all; others are not found.

    Raises:
      ValueError: no batch, a batch that is no matrix, tokens outside of the vocabulary, parameters
        that are not finite, an unknown statistic, or a stage or `kernels` that name no kernel.

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
    names, c = tuple(statistics), model.config
    streams = _streams(model, params, batches, names)
    there = _kernels(params)
    wanted = there if kernels is None else tuple(dict.fromkeys(kernels))
    groups = [there] if stages is None else stages
    for path in (p for group in (*groups, wanted) for p in group):
        if path not in there:
            raise ValueError(f"no kernel {path!r} is in a block; there are {', '.join(there)}")

    def walk(number: int) -> PyTree:
        layer, window = _layer(model, params, number)
        for group in groups:
            seen: ByPath = {}
            if mine := tuple(path for path in group if path in wanted):
                each = (_look(model, layer, x_BTD, window, names, mine) for x_BTD in streams)
                seen = functools.reduce(_joined, each)
            layer = replace_layer(number, layer, seen)
        streams[:] = [_run(model, layer, x_BTD, window) for x_BTD in streams]
        return layer

    layers = [walk(number) for number in range(c.layers)]
    structures = {jax.tree.structure(layer) for layer in layers}
    if len(structures) > 1:
        raise ValueError(
            "the layers came back with different structures (formats?), but they share one stack"
        )
    new = {**params, STACK: jax.tree.map(lambda *each: jnp.stack(each), *layers)}
    return Calibrated(new, _head(model, params, streams, names))


def observe(
    model: Transformer,
    params: PyTree,
    batches: Iterable[Any],
    statistics: Sequence[str],
    *,
    kernels: Iterable[str] | None = None,
) -> Seen:
    """Walks the layers as they are: one pass, where `sequential` takes two.

    Args:
      model: the Transformer.
      params: its parameters, plain or quantized.
      batches: token ids, int [B, T] each.
      statistics: names in `compress.observed.STATISTICS`.
      kernels: paths whose statistics are wanted, by default all.

    Raises:
      ValueError: as `sequential`.

    >>> from model.presets import gpt2_tiny
    >>> model = Transformer(gpt2_tiny())
    >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> seen = observe(model, params, windows(range(64), length=16, batch=2), ("tokens",))
    >>> len(seen.layers), float(seen.head["tokens"])
    (2, 64.0)
    """
    names = tuple(statistics)
    streams = _streams(model, params, batches, names)
    there = _kernels(params)
    wanted = there if kernels is None else tuple(dict.fromkeys(kernels))
    if unknown := [path for path in wanted if path not in there]:
        raise ValueError(f"no kernel {unknown[0]!r} is in a block; there are {', '.join(there)}")
    layers: list[ByPath] = []
    for number in range(model.config.layers):
        layer, window = _layer(model, params, number)
        seen: ByPath = {}
        for place, x_BTD in enumerate(streams):
            streams[place], new = _observe(model, layer, x_BTD, window, names, wanted)
            seen = _joined(seen, new) if seen else new
        layers.append(seen)
    return Seen(layers, _head(model, params, streams, names))


def _streams(
    model: Transformer, params: PyTree, batches: Iterable[Any], names: Sequence[str]
) -> list[jax.Array]:
    """The batches before the first block, everything checked first."""
    check_names(names)
    tokens = [jnp.asarray(batch) for batch in batches]
    if not tokens:
        raise ValueError("there is nothing to calibrate with: no batch of tokens")
    size = model.config.vocabulary_size
    for ids in tokens:
        if ids.ndim != 2 or not ids.size or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"a batch is token ids [B, T], not {ids.dtype} of shape {ids.shape}")
        if not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise ValueError(
                f"calibration holds the token ids {int(ids.min())} to {int(ids.max())}, but the "
                f"vocabulary has 0 to {size - 1}; cut the text with the model's own tokenizer"
            )
    check_finite(params)
    return [_embed(model, params, ids) for ids in tokens]


def _kernels(params: PyTree) -> tuple[str, ...]:
    """Paths of the matrices of a block."""
    paths = leaf_paths(params[STACK], is_weight)
    return tuple(path for path in paths if path.rsplit("/", 1)[-1] in MATRICES)


def _layer(model: Transformer, params: PyTree, number: int) -> tuple[PyTree, Any]:
    window: Any = model.config.window
    window = window[number] if isinstance(window, tuple) else window
    layer = jax.tree.map(lambda leaf: leaf[number], params[STACK])
    return layer, None if window is None else jnp.int32(window)


def _head(
    model: Transformer, params: PyTree, streams: Sequence[jax.Array], names: Sequence[str]
) -> Statistics:
    at_head = [_at_head(model, params.get("final_norm", {}), x_BTD, names) for x_BTD in streams]
    return functools.reduce(join_statistics, at_head)


def _statistics_at_head(
    model: Transformer, scales: PyTree, x_BTD: jax.Array, names: Sequence[str]
) -> Statistics:
    final_norm = norm(model.config, "final_norm")
    return statistics_of(cast(jax.Array, final_norm.apply({"params": scales}, x_BTD)), names)


# Compiled once for each model and shape, however often a model is calibrated.
_embed = jax.jit(embed, static_argnums=0)
_run = jax.jit(run_layer, static_argnums=0)
_look = jax.jit(look_at_layer, static_argnums=(0, 4, 5))
_observe = jax.jit(observe_layer, static_argnums=(0, 4, 5))
_at_head = jax.jit(_statistics_at_head, static_argnums=(0, 3))


def _joined(one: ByPath, two: ByPath) -> ByPath:
    return {path: join_statistics(one[path], two[path]) for path in one}


@jax.jit
def _all_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf.astype(jnp.float32)).all()  # of float8, too
