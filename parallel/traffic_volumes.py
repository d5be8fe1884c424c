"""The bytes that formulas of traffic are made of, from the shapes of the model and the mesh.

Shapes: B batch, T time, D width, G key/value heads, K head width, M parts of a batch in a pipeline.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.config import TransformerConfig
from model.flops import abstract_params
from model.rules import leaf_paths
from parallel.mesh import AXES
from parallel.pipeline import steps_of
from parallel.vocabulary import padded_size


class Volumes(NamedTuple):
    """Bytes that the formulas are made of, on one group of devices.

    Attributes:
      sizes: devices by axis of the mesh.
      layers: of one stage of the pipeline.
      parts: M, or 1 without a pipeline.
      rounds: v, times that each part passes the pipeline.
      kernels: of one layer, by name, each as one device of `tensor` works with it, in the type of
        the computation: they are converted before they are gathered, and so are their gradients.
      kept: bytes of a kernel as it is kept, for one in the type of the computation.
      vectors: of one layer: scales and biases.
      divided_vectors: those among them that `tensor` divides.
      whole_heads: of one layer: what belongs to a head alone, and sees some heads on each device.
      table: of the token embedding, divided by `tensor`.
      ends: other parameters outside the blocks that are matrices, by name, divided by `tensor`.
      whole_ends: those that every device holds all of: vectors, and a table of pairs of tokens.
      borders: the token before a device's first, four bytes for each row, where a model reads it.
      stream: the activations [B, T, D] of one device, time whole but for `context`.
      embedded: the same as they come from the table, in its type.
      tokens: the ids of one device, four bytes each, and so any number for each token.
      rows: four bytes for each row of one device.
      keys: keys, or values, [B, T, G, K] of one device.
      key_gradients: their gradients, at least float32.
      branches: products that read each of the two branches' inputs, as (attention, feed-forward).
    """

    sizes: Mapping[str, int]
    layers: int
    parts: int
    rounds: int
    kernels: Mapping[str, int]
    kept: float
    vectors: Mapping[str, int]
    divided_vectors: Mapping[str, int]
    whole_heads: Mapping[str, int]
    table: int
    ends: Mapping[str, int]
    whole_ends: Mapping[str, int]
    borders: int
    stream: int
    embedded: int
    tokens: int
    rows: int
    keys: int
    key_gradients: int
    branches: tuple[int, int]

    @property
    def steps(self) -> int:
        """Times that a stage runs: M v + n - 1, see `parallel.pipeline`."""
        return steps_of(self.sizes["pipeline"], self.parts, self.rounds)

    @property
    def blocks(self) -> int:
        """Blocks that a device runs forwards, idle steps of a pipeline included.

        A stage has layers / v of a device's layers.
        """
        return self.layers // self.rounds * self.steps


def volumes(
    config: TransformerConfig,
    sizes: Mapping[str, int],
    *,
    rows: int,
    time: int,
    vocabulary_multiple: int = 1,
    parts: int | None = None,
    rounds: int = 1,
) -> Volumes:
    """Returns the bytes that the formulas are made of.

    Args:
      config: of the model.
      sizes: devices by axis; axes left out are 1.
      rows: B of the global batch.
      time: T of a row.
      vocabulary_multiple: what the vocabulary is padded to a multiple of.
      parts: M of a pipeline, by default its stages.
      rounds: v of a pipeline.

    >>> from model.presets import modern_tiny
    >>> volumes(modern_tiny(), {"tensor": 2}, rows=2, time=8).kernels["mlp/up"]
    8192
    """
    n = {name: sizes.get(name, 1) for name in AXES}
    t = n["tensor"]
    item, one = jnp.dtype(config.dtype).itemsize, jnp.dtype(config.parameter_dtype).itemsize
    kernels, vectors, divided, heads, ends, whole_ends = ({} for _ in range(6))
    table = 0
    for path, elements, axes in _leaves(config):
        name, size = path.removeprefix("blocks/").rpartition("/")[0], elements * one
        if path.startswith("blocks/"):
            size //= config.layers
            if path.endswith("kernel"):
                kernels[name] = size * item // (one * t)
            elif path.endswith("bias") and name.split("/")[-1] in ("q", "k", "v", "up", "gate"):
                divided[path] = size // t
            elif name.split("/")[-1] in ("q_norm", "k_norm"):
                heads[path] = size
            else:
                vectors[path] = size
        elif name in ("token_embedding", "head"):
            size = size // config.vocabulary_size
            size *= padded_size(config.vocabulary_size, vocabulary_multiple)
            if name == "head":
                ends[name] = size * item // (one * t)
            else:
                table = size // t
        elif axes > 1 and name != "bigram_embedding":
            ends[name] = size
        else:
            whole_ends[path] = size
    tokens = rows * time // (n["data"] * n["fsdp"] * n["context"])
    row_bytes = 4 * rows // (n["data"] * n["fsdp"])
    keys = tokens * config.kv_heads_ * config.head_width_ // t
    return Volumes(
        n,
        config.layers // n["pipeline"],
        (n["pipeline"] if parts is None else parts) if n["pipeline"] > 1 else 1,
        rounds if n["pipeline"] > 1 else 1,
        kernels,
        one / item,
        vectors,
        divided,
        heads,
        table,
        ends,
        whole_ends,
        row_bytes if config.bigram_rows is not None else 0,
        tokens * config.width * item,
        tokens * config.width * one,
        tokens * 4,
        row_bytes,
        keys * item,
        keys * max(4, item),
        (3, 2 if config.activation == "swiglu" else 1),
    )


@functools.lru_cache(maxsize=64)
def _leaves(config: TransformerConfig) -> tuple[tuple[str, int, int], ...]:
    """Path, elements and axes of each parameter."""
    shapes = abstract_params(config)
    leaves = zip(leaf_paths(shapes), jax.tree.leaves(shapes), strict=True)
    return tuple((path, leaf.size, leaf.ndim) for path, leaf in leaves)
