"""How fast a compressed model is beside the dense one: measured in turn, in one process."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.cache import init_cache
from model.transformer import Transformer, features, head

PyTree = Any
Model = tuple[Transformer, PyTree]

PROMPT = 512
BATCHES = (1, 8)
STEPS = 16  # tokens decoded a call: dispatch is spread over them


class Timing(NamedTuple):
    """One kind of work by one model.

    Attributes:
      work: what was done.
      model: by which.
      tokens_per_second: the median of the repeats.
      spread: (largest - smallest) / median of the repeats.
      ratio: to the float32 dense model; above 1 is faster.
    """

    work: str
    model: str
    tokens_per_second: float
    spread: float
    ratio: float


def variants(dense: Model, small: Model) -> dict[str, Model]:
    """Returns the models to time, by name: the dense one in float32 and bfloat16, and the small."""
    model, params = dense
    found = {}
    for name in ("float32", "bfloat16"):
        config = dataclasses.replace(model.config, dtype=name, parameter_dtype=name)
        cast = jax.tree.map(lambda leaf, name=name: leaf.astype(name), params)
        found[f"dense {name}"] = (model.clone(config=config), cast)
    return {**found, "compressed": small}


def timings(dense: Model, small: Model, *, repeats: int = 5) -> list[Timing]:
    """Times prefill of 512 tokens, and decoding at batch 1 and 8, all models in turn.

    Where learned positions end before 512 tokens, the prompt is as long as they allow.

    Args:
      dense: model and plain parameters.
      small: model and compressed parameters.
      repeats: of every measurement, after one that compiles.

    Raises:
      ValueError: fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; it must be at least 1")
    models = variants(dense, small)
    length = min(PROMPT, *(model.config.max_length for model, _ in models.values()))
    work: dict[str, tuple[int, Mapping[str, Callable[[], Any]]]] = {
        f"prefill {length} tokens": (
            length,
            {name: prefill(*pair, length) for name, pair in models.items()},
        )
    }
    steps = min(STEPS, length - 1)
    for batch in BATCHES:
        calls = {name: decode(*pair, batch, length, steps) for name, pair in models.items()}
        work[f"decode batch {batch}"] = (batch * steps, calls)
    return [
        row for name, (tokens, calls) in work.items() for row in _race(name, tokens, calls, repeats)
    ]


def _race(
    name: str, tokens: int, calls: Mapping[str, Callable[[], Any]], repeats: int
) -> list[Timing]:
    for call in calls.values():
        jax.block_until_ready(call())
    speeds: dict[str, list[float]] = {model: [] for model in calls}
    for _ in range(repeats):
        for model, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            speeds[model].append(tokens / (time.perf_counter() - start))
    middle = {model: statistics.median(each) for model, each in speeds.items()}
    first = next(iter(middle.values()))
    return [
        Timing(
            name,
            model,
            middle[model],
            (max(each) - min(each)) / middle[model],
            middle[model] / first,
        )
        for model, each in speeds.items()
    ]


def prefill(model: Transformer, params: PyTree, length: int) -> Callable[[], Any]:
    """A prompt read, and the logits of what follows it."""
    tokens = jnp.zeros((1, length), jnp.int32)

    @jax.jit
    def read(params: PyTree, tokens_BT: jax.Array) -> jax.Array:
        return head(model, params, features(model, params, tokens_BT).final[:, -1])

    return lambda: read(params, tokens)


def decode(
    model: Transformer, params: PyTree, batch: int, length: int, steps: int
) -> Callable[[], Any]:
    """The last tokens of `length`, one after the other, greedily."""
    cache = init_cache(model.config, batch, length)
    cache = {**cache, "length": jnp.full((batch,), length - steps, jnp.int32)}

    @jax.jit
    def go(params: PyTree, cache: Any) -> jax.Array:
        def one(carry, _):
            ids_B, cache = carry
            out = features(model, params, ids_B[:, None], cache=cache)
            ids_B = head(model, params, out.final[:, 0]).argmax(axis=-1).astype(jnp.int32)
            return (ids_B, out.cache), ids_B

        return jax.lax.scan(one, (jnp.zeros((batch,), jnp.int32), cache), None, length=steps)[1]

    return lambda: go(params, cache)
