"""Llama weights as llama2.c keeps them (Karpathy 2023): one `.bin` file of its first format.

Seven int32 (width, feed-forward width, layers, heads, key/value heads, vocabulary, positions), then
every tensor in float32, stacked over layers, matrices as [out, in]. A negative vocabulary says that
the head is a matrix of its own. Rotary pairs lie side by side there, (2i, 2i + 1), and half a head
apart here, (i, i + K/2), so the rows of queries and keys are put in another order.

Shapes: L layers, O outputs, I inputs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from model.config import TransformerConfig
from model.presets import llama

PyTree = Any
HEADER = 7


def load(path: str | os.PathLike[str]) -> tuple[TransformerConfig, PyTree]:
    """Returns config and parameters (float32) of a llama2.c `.bin` file of version 0.

    Args:
      path: of the file.

    Raises:
      ValueError: the file is too short, of a later version, or not of the size in its header.
    """
    path = Path(path)
    content = path.read_bytes()
    if content[:4] == b"24ka":  # "ak42", little-endian
        raise ValueError(
            f"{path} is of version 1 or 2 of llama2.c; export it with --version 0, its first format"
        )
    if len(content) < 4 * HEADER:
        raise ValueError(f"{path} has {len(content)} bytes, fewer than a header of {4 * HEADER}")
    header = np.frombuffer(content, "<i4", HEADER).tolist()
    width, hidden, layers, heads, kv_heads, vocabulary, positions = header
    if min(width, hidden, layers, heads, kv_heads, abs(vocabulary), positions) < 1:
        raise ValueError(f"{path} is no llama2.c file: its header says {header}")
    config = llama(
        vocabulary_size=abs(vocabulary),
        max_length=positions,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        ffn_width=hidden,
        tied_head=vocabulary > 0,
    )
    shapes = _shapes(config)
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    if len(content) != 4 * (HEADER + count):
        raise ValueError(
            f"{path} has {len(content)} bytes, but {4 * (HEADER + count)} belong to its header "
            f"{header}; copy it again"
        )
    numbers = np.frombuffer(content, "<f4", count, 4 * HEADER)
    tensors, start = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        tensors[name] = numbers[start : start + size].reshape(shape)
        start += size
    return config, _params(config, tensors)


def halves(kernel_LOI: np.ndarray, head_width: int) -> np.ndarray:
    """Returns rows of every head with pairs (2i, 2i + 1) moved to (i, i + K/2).

    >>> halves(np.arange(4)[None, :, None], 4).ravel().tolist()
    [0, 2, 1, 3]
    """
    layers, outputs, inputs = kernel_LOI.shape
    pairs = kernel_LOI.reshape(layers, outputs // head_width, head_width // 2, 2, inputs)
    return pairs.swapaxes(2, 3).reshape(kernel_LOI.shape)


def _shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in the order of the file."""
    c, kv_width = config, config.kv_heads_ * config.head_width_
    L, D, F = c.layers, c.width, c.ffn_width_
    return {
        "embedding": (c.vocabulary_size, D),
        "attention_norm": (L, D),
        "q": (L, D, D),
        "k": (L, kv_width, D),
        "v": (L, kv_width, D),
        "o": (L, D, D),
        "mlp_norm": (L, D),
        "gate": (L, F, D),
        "down": (L, D, F),
        "up": (L, F, D),
        "final_norm": (D,),
        "angles": (2, c.max_length, c.head_width_ // 2),  # cosines and sines: follow from positions
        **({} if c.tied_head else {"head": (c.vocabulary_size, D)}),
    }


def _params(config: TransformerConfig, tensors: dict[str, np.ndarray]) -> PyTree:
    import jax.numpy as jnp

    def kernel(name: str) -> PyTree:
        t = tensors[name]
        if name in ("q", "k"):
            t = halves(t, config.head_width_)
        return {"kernel": jnp.asarray(t.swapaxes(-2, -1).copy())}

    def scale(name: str) -> PyTree:
        return {"scale": jnp.asarray(tensors[name].copy())}

    return {
        "token_embedding": {"embedding": jnp.asarray(tensors["embedding"].copy())},
        "blocks": {
            "attention_norm": scale("attention_norm"),
            "attention": {name: kernel(name) for name in ("q", "k", "v", "o")},
            "mlp_norm": scale("mlp_norm"),
            "mlp": {name: kernel(name) for name in ("gate", "up", "down")},
        },
        "final_norm": scale("final_norm"),
        **({} if config.tied_head else {"head": kernel("head")}),
    }
