"""Structured pruning of the residual stream: fewer features, with the norms corrected for it.

Shapes: L layers, D width, d what is left of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.pruning.structured import (
    Model,
    check_indices,
    check_no_shortcuts,
    cut_blocks,
    replace_linear,
)
from model.config import TransformerConfig

PyTree = Any

READERS = (
    ("attention", "q"),
    ("attention", "k"),
    ("attention", "v"),
    ("mlp", "up"),
    ("mlp", "gate"),
)
"""The linears of a block that read the stream."""
WRITERS = (("attention", "o"), ("mlp", "down"))
"""The linears of a block that are added to the stream."""
NORMS = {"attention_norm": READERS[:3], "mlp_norm": READERS[3:]}
"""Norm of a block -> the linears that read what it gives."""


def keep_width(config: TransformerConfig, params: PyTree, features_d: Any) -> Model:
    """Keeps these features of the residual stream, the same in every layer.

    **What must be corrected.** Let the D - d features that go be zero wherever the stream is read:
    their columns of the embeddings, `o` and `down` are zero, biases too. An RMSNorm over D sees the
    mean square (d / D) m, where m is that over the d that stay, so

        x / sqrt((d / D) m + epsilon) = sqrt(D / d) x / sqrt(m + epsilon D / d).

    The smaller model computes the same with scales multiplied by c = sqrt(D / d) and epsilon
    multiplied by c^2. The norms of queries and keys share that epsilon, but not the width. They
    give for c q with c^2 epsilon what they gave for q with epsilon, so with `qk_norm` the linears
    q and k are multiplied by c.

    **LayerNorm** also subtracts the mean: (d / D) u over D, and u over d. These are equal only for
    u = 0. So the same correction is exact for LayerNorm if the stream, besides being zero where it
    goes, sums to zero over the features that stay; otherwise the result is close where u is small
    beside the deviation. (`centre_stream` makes u zero without changing the function, but then
    features that were zero are so no longer.) A feature that goes is the bias alone after the norm,
    a constant, which moves into the biases of the linears that read it. The head has no bias to
    take that of the final norm: it is lost, unless those rows of the head are zero, as they are in
    a tied head.

    Args:
      config: of the model.
      params: its parameters; not moments, which would need another correction.
      features_d: whole numbers [d] without repetition.

    Raises:
      ValueError: indices of another shape, out of range or repeated; norms without scales, which
        the correction goes into.

    >>> from model.presets import gpt2_tiny
    >>> from model.transformer import Transformer
    >>> config = gpt2_tiny()
    >>> model = Transformer(config)
    >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> small, _ = keep_width(config, params, range(24))
    >>> small.width, small.head_width, small.ffn_width, round(small.norm_epsilon * 1e5, 4)
    (24, 8, 128, 1.3333)
    """
    names = ("embedding_norm", "embedding_shortcut", "value_embeddings", "bigram_rows")
    check_no_shortcuts(config, names)
    if not config.norm_scale:
        raise ValueError(
            "a narrower stream is corrected in the scales of the norms, and this model's have none "
            "(norm_scale is False); prune other parts of it"
        )
    index = check_indices(features_d, (), config.width, "features")
    gone = np.setdiff1d(np.arange(config.width), index)
    factor = config.width / len(index)
    layers_index = np.broadcast_to(index, (config.layers, len(index)))
    blocks = _fold_biases(params["blocks"], gone)
    if config.qk_norm:
        for name in ("q", "k"):
            scaled = {n: _times(w, factor**0.5) for n, w in blocks["attention"][name].items()}
            blocks = replace_linear(blocks, ("attention", name), scaled)
    cuts: dict[tuple[str, str], Any] = dict.fromkeys(READERS, (layers_index, None))
    cuts |= dict.fromkeys(WRITERS, (None, layers_index))
    blocks = cut_blocks(blocks, cuts)
    for name in NORMS:
        blocks = {**blocks, name: _cut_norm(blocks[name], index, factor)}
    small = {**params, "blocks": blocks}
    small["final_norm"] = _cut_norm(params["final_norm"], index, factor)
    for name in ("token_embedding", "position_embedding"):
        if name in params:
            small[name] = {"embedding": params[name]["embedding"][:, index]}
    if "head" in params:
        small["head"] = {"kernel": params["head"]["kernel"][index]}
    return (
        dataclasses.replace(
            config,
            width=len(index),
            head_width=config.head_width_,
            ffn_width=config.ffn_width_,
            norm_epsilon=config.norm_epsilon * factor,
        ),
        small,
    )


def centre_stream(config: TransformerConfig, params: PyTree) -> PyTree:
    """Returns parameters of the same function whose stream sums to zero over its features.

    LayerNorm does not see a constant that is added to all features, so each row that is written to
    the stream may be centred: the embeddings, `o` and `down` with their biases (Ashkboos et al.
    2024, arXiv:2401.15024, section 3).

    Args:
      config: of a model with LayerNorm and a head of its own.
      params: its parameters.

    Raises:
      ValueError: for RMSNorm, which does see it; for a tied head, which reads the embedding, too.

    >>> from model.presets import gpt2_tiny
    >>> from model.transformer import Transformer
    >>> config = gpt2_tiny(tied_head=False)
    >>> model = Transformer(config)
    >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> rows = centre_stream(config, params)["token_embedding"]["embedding"]
    >>> bool(abs(rows.sum(axis=1)).max() < 1e-6)
    True
    """
    if config.norm != "layernorm" or config.tied_head:
        raise ValueError(
            f"a stream is centred unseen with LayerNorm and an untied head, not with {config.norm} "
            f"and tied_head={config.tied_head}"
        )
    centre = lambda w: w - w.mean(axis=-1, keepdims=True)  # noqa: E731
    blocks = params["blocks"]
    for path in WRITERS:
        blocks = replace_linear(blocks, path, jax.tree.map(centre, blocks[path[0]][path[1]]))
    centred = {**params, "blocks": blocks}
    for name in ("token_embedding", "position_embedding"):
        if name in params:
            centred[name] = jax.tree.map(centre, params[name])
    return centred


def _cut_norm(norm: PyTree, index: np.ndarray, factor: float) -> PyTree:
    cut = {name: leaf[..., index] for name, leaf in norm.items()}
    return {**cut, "scale": _times(cut["scale"], factor**0.5)}


def _fold_biases(blocks: PyTree, gone: np.ndarray) -> PyTree:
    """Moves what the norms' biases give at features that go into the biases of their readers."""
    for name, readers in NORMS.items():
        if "bias" not in blocks[name]:
            continue
        constant = blocks[name]["bias"][:, gone]
        for path in readers:
            linear = blocks[path[0]].get(path[1])
            if linear is not None:
                more = jnp.einsum("li,lio->lo", constant, linear["kernel"][:, gone])
                blocks = replace_linear(blocks, path, {**linear, "bias": linear["bias"] + more})
    return blocks


def _times(w: jax.Array, factor: float) -> jax.Array:
    return w * jnp.asarray(factor, w.dtype)
