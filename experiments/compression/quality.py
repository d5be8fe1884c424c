"""How well a compressed model predicts a text, beside the dense model that it was made of.

    before, after = quality(dense, small, batches, text_bytes)

Where several models are compared with one, `before_head` finds once what that one's blocks say.

Shapes: B batch, T time, D width, V vocabulary, N positions (B * T).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from model.transformer import Transformer, features, head

PyTree = Any
Side = dict[str, float]
Model = tuple[Transformer, PyTree]


def before_head(dense: Model, batches: Iterable[dict[str, Any]]) -> tuple[jax.Array, ...]:
    """Returns what the head of a model is given for each batch, [B, T, D].

    Args:
      dense: model and parameters.
      batches: of `train.data.evaluation_batches`.

    >>> from model.presets import gpt2_tiny
    >>> model = Transformer(gpt2_tiny())
    >>> tokens = jnp.zeros((2, 8), jnp.int32)
    >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    >>> [final.shape for final in before_head((model, params), [{"tokens": tokens}])]
    [(2, 8, 32)]
    """
    model, params = dense
    return tuple(_before_head(model, params, _inputs(batch)) for batch in batches)


def quality(
    dense: Model,
    small: Model,
    batches: Iterable[dict[str, Any]],
    text_bytes: int,
    finals: Sequence[jax.Array] | None = None,
) -> tuple[Side, Side]:
    """Returns loss, perplexity and bits per byte of both, and how the second differs.

    KL is `sum_v p log(p / q)` with p of the dense model, the mean over tokens, in nats.

    Args:
      dense: model and parameters.
      small: model and parameters.
      batches: of `train.data.evaluation_batches`.
      text_bytes: UTF-8 bytes of the text.
      finals: what `before_head` gives for the dense model and these batches, if that is known; the
        figures are the same.
    """
    sums = [0.0] * 5
    for number, batch in enumerate(batches):
        (final_BTD,) = before_head(dense, [batch]) if finals is None else (finals[number],)
        texts = (_inputs(batch), batch["targets"], batch["weights"])
        compared = _compare(dense[0], small[0], dense[1], small[1], final_BTD, *texts)
        sums = [a + b for a, b in zip(sums, jax.device_get(compared).tolist(), strict=True)]
    count = sums[4]
    before, after = (
        {
            "loss": nats / count,
            "perplexity": math.exp(min(nats / count, 700.0)),
            "bits per byte": nats / math.log(2) / text_bytes,
        }
        for nats in sums[:2]
    )
    before |= {"KL to the dense model": 0.0, "top-1 agreement": 1.0}
    return before, after | {
        "KL to the dense model": sums[2] / count,
        "top-1 agreement": sums[3] / count,
    }


def _inputs(batch: dict[str, Any]) -> tuple[Any, Any, Any]:
    return batch["tokens"], batch.get("positions"), batch.get("segments")


# Compiled once for each kind of weights, however many models of that kind are compared.
@functools.partial(jax.jit, static_argnums=0)
def _before_head(model: Transformer, params: PyTree, inputs: tuple[Any, Any, Any]) -> jax.Array:
    return features(model, params, *inputs).final


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compare(
    dense: Transformer,
    small: Transformer,
    dense_params: PyTree,
    small_params: PyTree,
    final_BTD: jax.Array,
    inputs: tuple[Any, Any, Any],
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> jax.Array:
    """Sums over a batch: nats of both, KL, agreement, and the weights."""
    finals = (final_BTD, features(small, small_params, *inputs).final)
    p_NV, q_NV = (
        jax.nn.log_softmax(head(model, params, final.reshape(-1, final.shape[-1])))
        for model, params, final in zip(
            (dense, small), (dense_params, small_params), finals, strict=True
        )
    )
    targets_N, weights_N = targets_BT.reshape(-1, 1), weights_BT.reshape(-1).astype(jnp.float32)
    columns = [-jnp.take_along_axis(logs, targets_N, axis=-1)[:, 0] for logs in (p_NV, q_NV)]
    columns.append((jnp.exp(p_NV) * (p_NV - q_NV)).sum(axis=-1))
    columns.append((_largest(p_NV) == _largest(q_NV)).astype(jnp.float32))
    columns.append(jnp.ones_like(weights_N))
    return jnp.stack([(column * weights_N).sum() for column in columns])


def _largest(logs_NV: jax.Array) -> jax.Array:
    """`argmax` over the last axis, as a float (exact below 2^24).

    Of XLA:CPU's reductions only those of floats are fast: an `argmax` takes ten times as long.
    """
    V = logs_NV.shape[-1]
    found = logs_NV == logs_NV.max(axis=-1, keepdims=True)
    return jnp.where(found, jnp.arange(V, dtype=jnp.float32), jnp.float32(V)).min(axis=-1)
