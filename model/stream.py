"""Decoding that is seen token by token: a state that reads ids, and draws the next.

    decoding = read(model, weights, begin(model, slots), prompt)
    while ...:
        token = draw(decoding, key, sampling)
        decoding = read(model, weights, decoding, [token])

`weights` are those of `model.stack.apart`, and the cache is by layer as well, so that a step copies
neither. Two programs are compiled, one for a chunk of ids and one for a single one.

Shapes: C ids of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.cache import WHOLE, Cache, init_cache
from model.config import TransformerConfig
from model.generate import CHUNK, Sampling, sample
from model.stack import layers_of, stack_of, together
from model.transformer import Model, features, head


class Decoding(NamedTuple):
    """How far a text has been read.

    Attributes:
      cache: by layer; of one row.
      length: ids in it.
      slots: ids that it can hold.
      logits: float32 [1, V] of the next id, or None before the first.
    """

    cache: Any
    length: int
    slots: int
    logits: jax.Array | None = None


def begin(
    model: Model,
    slots: int,
    make_cache: Callable[[TransformerConfig, int, int], Cache] = init_cache,
) -> Decoding:
    """Returns the decoding of an empty text.

    Raises:
      ValueError: learned positions end before `slots`.
    """
    config = model.config
    return Decoding(_by_layer(make_cache(config, 1, slots), config.layers), 0, slots)


def read(
    model: Model,
    weights: Any,
    decoding: Decoding,
    ids: Sequence[int],
    inputs: Mapping[str, jax.Array] | None = None,
) -> Decoding:
    """Returns the decoding with more ids; the one that was given is used up.

    Args:
      model: a `Transformer` or an `EncoderDecoder`.
      weights: its parameters, from `model.stack.apart`.
      decoding: so far.
      ids: at least one.
      inputs: what the model takes besides, with the first ids: `source` and `source_segments`, or a
        `prefix`, which is then read in one pass.

    Raises:
      ValueError: no ids, or more than there is room for.

    >>> from model.presets import gpt2_tiny
    >>> from model.stack import apart
    >>> from model.transformer import Transformer
    >>> model = Transformer(gpt2_tiny(dropout=0.0))
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> decoding = read(model, apart(params), begin(model, 8), [1, 2, 3])
    >>> decoding.length, decoding.logits.shape
    (3, (1, 64))
    """
    if not len(ids):
        raise ValueError("there is nothing to read; start from end-of-document")
    if decoding.length + len(ids) > decoding.slots:
        raise ValueError(
            f"{len(ids)} tokens after {decoding.length} do not fit the {decoding.slots} that there "
            "is room for; shorten the text"
        )
    inputs = dict(inputs or {})
    chunk = CHUNK if len(ids) > 1 else 1
    if "prefix" in inputs:
        chunk = -(-len(ids) // CHUNK) * CHUNK
    chunk = min(chunk, decoding.slots)
    for first in range(0, len(ids), chunk):
        part = ids[first : first + chunk]
        block_1C = np.zeros((1, chunk), np.int32)
        block_1C[0, : len(part)] = part
        count = jnp.int32(len(part))
        args = (decoding.cache, block_1C, count, inputs)
        cache, logits = _read(model, decoding.slots, weights, *args)
        decoding = Decoding(cache, decoding.length + len(part), decoding.slots, logits)
        inputs = {}
    return decoding


def draw(decoding: Decoding, key: jax.Array, sampling: Sampling) -> int:
    """Returns the next id; ValueError before anything was read."""
    if decoding.logits is None:
        raise ValueError("nothing has been read that a token could follow")
    return int(_sample(decoding.logits, key, sampling)[0])


_sample = jax.jit(sample, static_argnums=2)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _read(
    model: Model,
    slots: int,
    weights: Any,
    cache_by_layer: Any,
    ids_1C: jax.Array,
    count: jax.Array,
    inputs: dict[str, Any],
) -> tuple[Any, jax.Array]:
    stacked = {n: part if n in WHOLE else stack_of(part) for n, part in cache_by_layer.items()}
    first_B = stacked["length"]
    # Padding may reach past the slots, and so the learned positions; nothing sees it.
    places_1C = first_B[:, None] + jnp.arange(ids_1C.shape[1])[None]
    positions_1C = jnp.minimum(places_1C, slots - 1)
    params = together(weights)
    out = features(model, params, ids_1C, positions_1C, cache=stacked, **inputs)
    assert out.cache is not None
    last_1D = jax.lax.dynamic_index_in_dim(out.final, count - 1, axis=1, keepdims=False)
    cache = {**out.cache, "length": first_B + count}
    return _by_layer(cache, model.config.layers), head(model, params, last_1D)


def _by_layer(cache: Cache, layers: int) -> dict[str, Any]:
    return {n: part if n in WHOLE else layers_of(part, layers) for n, part in cache.items()}
