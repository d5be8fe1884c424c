"""Structured pruning: a smaller Transformer and its parameters, with whole parts taken out.

    (config, params) -> (smaller config, smaller params)

What comes out is a plain model of smaller dense matrices, which trains and exports like any other.
Four parts can go: neurons of the feed-forward layers, key/value heads with their query heads (or
query heads alone), features of the residual stream, and layers. In each layer others may go, but in
every layer equally many, so that the layers stay one stack.

If what is taken out added nothing, the function stays the same. Features of the stream are
`compress.pruning.structured_width`, because norms must be corrected there; what to keep is chosen
with `compress.pruning.structured_importance`.

Shapes: L layers, D width, F feed-forward width, H query heads, G key/value heads, R = H / G,
K head width; small letters for what is left of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import TransformerConfig

PyTree = Any
Model = tuple[TransformerConfig, PyTree]


def keep_neurons(config: TransformerConfig, params: PyTree, neurons_Lf: Any) -> Model:
    """Keeps these neurons of the feed-forward layers.

    Exact where the rows of `down` that go are zero, or where the neurons are never active.

    Args:
      config: of the model.
      params: its parameters (or anything shaped like them, such as moments).
      neurons_Lf: whole numbers [L, f], by layer and without repetition.

    Raises:
      ValueError: indices of another shape, out of range or repeated.

    >>> from model.presets import gpt2_tiny
    >>> from model.transformer import Transformer
    >>> config = gpt2_tiny()
    >>> model = Transformer(config)
    >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> small, fewer = keep_neurons(config, params, [[0, 5, 7], [1, 2, 3]])
    >>> small.ffn_width, fewer["blocks"]["mlp"]["down"]["kernel"].shape
    (3, (2, 3, 32))
    """
    index = check_indices(neurons_Lf, (config.layers,), config.ffn_width_, "neurons")
    cuts: dict[tuple[str, str], Any] = {("mlp", "down"): (index, None)}
    cuts |= dict.fromkeys((("mlp", "up"), ("mlp", "gate")), (None, index))
    blocks = cut_blocks(params["blocks"], cuts)
    return dataclasses.replace(config, ffn_width=index.shape[-1]), {**params, "blocks": blocks}


def keep_groups(config: TransformerConfig, params: PyTree, groups_Lg: Any) -> Model:
    """Keeps these key/value heads, each with all query heads that read it.

    Without grouped queries these are the attention heads. Exact where the rows of `o` that go are
    zero.

    Args:
      config: of the model; the width of a head stays as it is.
      params: its parameters (or anything shaped like them).
      groups_Lg: whole numbers [L, g], by layer and without repetition.

    Raises:
      ValueError: indices of another shape, out of range or repeated.

    >>> from model.presets import llama_tiny
    >>> from model.transformer import Transformer
    >>> config = llama_tiny()
    >>> model = Transformer(config)
    >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> small, _ = keep_groups(config, params, [[0], [1]])
    >>> small.heads, small.kv_heads, small.head_width
    (2, 1, 8)
    """
    check_no_shortcuts(config, ("value_embeddings",))
    index = check_indices(groups_Lg, (config.layers,), config.kv_heads_, "key/value heads")
    ratio = config.heads // config.kv_heads_
    keys = _spans(index, config.head_width_)
    queries = _spans(index, ratio * config.head_width_)
    blocks = _cut_attention(params["blocks"], queries, keys)
    small = dataclasses.replace(
        config,
        heads=index.shape[-1] * ratio,
        kv_heads=None if config.kv_heads is None else index.shape[-1],
        head_width=config.head_width_,
    )
    return small, {**params, "blocks": blocks}


def keep_queries(config: TransformerConfig, params: PyTree, heads_LGr: Any) -> Model:
    """Keeps these query heads of every key/value head, equally many of each.

    Exact where the rows of `o` that go are zero.

    Args:
      config: of a model with grouped queries.
      params: its parameters (or anything shaped like them).
      heads_LGr: whole numbers [L, G, r] from 0 to R - 1, without repetition.

    Raises:
      ValueError: indices of another shape, out of range or repeated.

    >>> from model.presets import llama_tiny
    >>> from model.transformer import Transformer
    >>> config = llama_tiny()
    >>> model = Transformer(config)
    >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> small, _ = keep_queries(config, params, [[[0], [1]], [[1], [1]]])
    >>> small.heads, small.kv_heads
    (2, 2)
    """
    G = config.kv_heads_
    ratio = config.heads // G
    index = check_indices(heads_LGr, (config.layers, G), ratio, "query heads of a group")
    heads = (index + ratio * np.arange(G)[None, :, None]).reshape(config.layers, -1)
    blocks = _cut_attention(params["blocks"], _spans(heads, config.head_width_), None)
    small = dataclasses.replace(
        config, heads=heads.shape[-1], kv_heads=G, head_width=config.head_width_
    )
    return small, {**params, "blocks": blocks}


def keep_layers(config: TransformerConfig, params: PyTree, layers_l: Any) -> Model:
    """Keeps these layers, in their order.

    Exact where `o` and `down` of the layers that go are zero, biases too.

    Args:
      config: of the model.
      params: its parameters (or anything shaped like them).
      layers_l: increasing whole numbers [l].

    Raises:
      ValueError: layers that are not there, or not in increasing order.

    >>> from model.presets import gpt2_tiny
    >>> from model.transformer import Transformer
    >>> config = gpt2_tiny(window=(4, 8))
    >>> model = Transformer(config)
    >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> keep_layers(config, params, [1])[0].window
    (8,)
    """
    check_no_shortcuts(config, ("value_embeddings",))
    index = check_indices(layers_l, (), config.layers, "layers")
    if (np.diff(index) <= 0).any():
        raise ValueError(f"layers keep their order: give {sorted(index.tolist())}, not {layers_l}")
    window = config.window
    if isinstance(window, tuple):
        window = tuple(window[i] for i in index)
    small = dataclasses.replace(config, layers=len(index), window=window)
    blocks = jax.tree.map(lambda leaf: leaf[index], params["blocks"])
    return small, {**params, "blocks": blocks}


def check_no_shortcuts(config: TransformerConfig, names: Sequence[str]) -> None:
    """Raises ValueError if the model has a shortcut past its blocks that would have to be cut too.

    >>> check_no_shortcuts(TransformerConfig(value_embeddings=True), ["embedding_norm"])
    """
    if there := [name for name in names if getattr(config, name) not in (None, False)]:
        raise ValueError(
            f"{', '.join(there)} is not cut with the blocks; prune a model without, or other parts "
            "of it"
        )


def check_indices(values: Any, lead: tuple[int, ...], size: int, what: str) -> np.ndarray:
    """Returns indices into `size` things as whole numbers [*lead, n].

    Raises:
      ValueError: another shape, none at all, an index out of range, or one that is there twice.

    >>> check_indices([[2, 0]], (1,), 2, "neurons")
    Traceback (most recent call last):
    ...
    ValueError: there are 2 neurons, from 0 to 1; [[2, 0]] has others
    """
    index = np.asarray(list(values) if isinstance(values, range) else values)
    if index.shape[:-1] != lead or index.ndim != len(lead) + 1 or not index.size:
        raise ValueError(
            f"the {what} to keep need the shape {[*lead, 'how many']}, not {list(index.shape)}"
        )
    if not np.issubdtype(index.dtype, np.integer):
        raise ValueError(f"the {what} to keep are indices, not {index.dtype}")
    if index.min() < 0 or index.max() >= size:
        raise ValueError(
            f"there are {size} {what}, from 0 to {size - 1}; {index.tolist()} has others"
        )
    if (np.diff(np.sort(index, axis=-1), axis=-1) == 0).any():
        raise ValueError(f"{index.tolist()} keeps some {what} twice")
    return index


def cut_blocks(blocks: PyTree, cuts: Mapping[tuple[str, str], Any]) -> PyTree:
    """Takes some inputs and outputs of linears, in every layer by itself.

    Args:
      blocks: stacked parameters.
      cuts: ("mlp", "up") -> (places [L, n] of inputs or None for all, the same for outputs).
        Linears that the blocks do not have, such as the gate, are passed over.

    >>> blocks = {"mlp": {"up": {"kernel": jnp.arange(4.0).reshape(1, 2, 2)}}}
    >>> cut_blocks(blocks, {("mlp", "up"): (np.array([[1]]), None)})["mlp"]["up"]["kernel"]
    Array([[[2., 3.]]], dtype=float32)
    """
    for path, (inputs, outputs) in cuts.items():
        linear = blocks[path[0]].get(path[1])
        if linear is None:
            continue
        cut = dict(linear)
        if inputs is not None:
            cut["kernel"] = _take(cut["kernel"], inputs, -2)
        if outputs is not None:
            cut = {name: _take(leaf, outputs, -1) for name, leaf in cut.items()}
        blocks = replace_linear(blocks, path, cut)
    return blocks


def replace_linear(blocks: PyTree, path: Sequence[str], linear: PyTree) -> PyTree:
    """Returns the blocks with another linear at a path.

    >>> replace_linear({"mlp": {"up": 1, "down": 2}}, ("mlp", "up"), 3)
    {'mlp': {'up': 3, 'down': 2}}
    """
    return {**blocks, path[0]: {**blocks[path[0]], path[1]: linear}}


def _spans(index_LN: np.ndarray, width: int) -> np.ndarray:
    """Places [L, N * width] of blocks of `width` neighbours."""
    return (index_LN[..., None] * width + np.arange(width)).reshape(len(index_LN), -1)


def _cut_attention(blocks: PyTree, queries: np.ndarray, keys: np.ndarray | None) -> PyTree:
    cuts: dict[tuple[str, str], Any] = {("attention", "q"): (None, queries)}
    cuts[("attention", "o")] = (queries, None)
    if keys is not None:
        cuts |= dict.fromkeys((("attention", "k"), ("attention", "v")), (None, keys))
    return cut_blocks(blocks, cuts)


def _take(leaf: jax.Array, index_LN: np.ndarray, axis: int) -> jax.Array:
    return jax.vmap(lambda w, i: jnp.take(w, i, axis=axis))(leaf, jnp.asarray(index_LN))
