"""What to keep of a model: the importance of every neuron, head, feature or layer.

    importance = by_loss(loss, config, params, "groups")         [L, G], higher is more important
    config, params = keep_best(config, params, "groups", importance, 2)

Parts are "neurons" [L, F], "groups" [L, G] (key/value heads with their query heads), "width" [D]
and "layers" [L].

Shapes: L layers, D width, F feed-forward width, G key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.calibrate import observe
from compress.pruning.structured import Model, keep_groups, keep_layers, keep_neurons
from compress.pruning.structured_gates import gated, part_shape
from compress.pruning.structured_width import READERS, WRITERS, keep_width
from model.config import TransformerConfig
from model.transformer import Transformer, features

PyTree = Any
Loss = Callable[[PyTree], jax.Array]
"""`params -> loss` on some data, traceable."""

KEEP: dict[str, Callable[[TransformerConfig, PyTree, Any], Model]] = {
    "neurons": keep_neurons,
    "groups": keep_groups,
    "width": keep_width,
    "layers": keep_layers,
}
"""Part -> the function that keeps some of it."""


def by_magnitude(config: TransformerConfig, params: PyTree, part: str) -> jax.Array:
    """The Euclidean norm of all weights that would go with each unit.

    Args:
      config: of the model.
      params: its parameters.
      part: "neurons", "groups", "width" or "layers".

    Raises:
      ValueError: a part of another name.

    >>> from model.presets import gpt2_tiny
    >>> model = Transformer(gpt2_tiny())
    >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> by_magnitude(model.config, params, "groups").shape
    (2, 4)
    """
    shape = part_shape(config, part)
    squares = jax.tree.map(lambda w: jnp.square(w.astype(jnp.float32)), params)
    blocks = squares["blocks"]
    linears = [*READERS, *WRITERS]
    at = {path: blocks[path[0]][path[1]] for path in linears if path[1] in blocks[path[0]]}
    outputs = lambda path: at[path]["kernel"].sum(axis=-2) + at[path].get("bias", 0.0)  # noqa: E731
    inputs = lambda path: at[path]["kernel"].sum(axis=-1)  # noqa: E731
    if part == "neurons":
        readers = [outputs(path) for path in READERS[3:] if path in at]
        total = sum(readers, start=inputs(("mlp", "down")))
    elif part == "groups":
        rows = [outputs(path) for path in READERS[:3]] + [inputs(("attention", "o"))]
        total = sum((row.reshape(*shape, -1).sum(axis=-1) for row in rows), start=jnp.zeros(shape))
    elif part == "layers":
        total = sum((w["kernel"].sum(axis=(1, 2)) for w in at.values()), start=jnp.zeros(shape))
    else:
        rows = [inputs(path).sum(axis=0) for path in READERS if path in at]
        rows += [outputs(path).sum(axis=0) for path in WRITERS]
        tables = ("token_embedding", "position_embedding")
        rows += [squares[name]["embedding"].sum(axis=0) for name in tables if name in squares]
        rows += [squares["head"]["kernel"].sum(axis=1)] if "head" in squares else []
        total = sum(rows, start=jnp.zeros(shape))
    return jnp.sqrt(total)


def by_taylor(loss: Loss, config: TransformerConfig, params: PyTree, part: str) -> jax.Array:
    """|dL / dgate| at 1: the first-order change of the loss, |sum of w g| over what a unit adds.

    Molchanov et al. 2019 (arXiv:1906.10771); for heads Michel et al. 2019 (arXiv:1905.10650).

    Args:
      loss: `params -> loss`.
      config: of the model.
      params: its parameters.
      part: "neurons", "groups", "width" or "layers".

    Raises:
      ValueError: a part of another name.

    >>> from model.presets import gpt2_tiny
    >>> params = {"blocks": {"mlp": {"down": {"kernel": jnp.ones((2, 128, 32))}}}}
    >>> loss = lambda params: params["blocks"]["mlp"]["down"]["kernel"][0, 0].sum()
    >>> by_taylor(loss, gpt2_tiny(), params, "neurons")[0, :2].tolist()
    [32.0, 0.0]
    """
    ones = jnp.ones(part_shape(config, part))
    return jnp.abs(jax.grad(lambda gates: loss(gated(config, params, part, gates)))(ones))


def by_loss(loss: Loss, config: TransformerConfig, params: PyTree, part: str) -> jax.Array:
    """By how much the loss rises when one unit alone goes: as many evaluations as units.

    Args:
      loss: `params -> loss`.
      config: of the model.
      params: its parameters.
      part: "neurons", "groups", "width" or "layers".

    Raises:
      ValueError: a part of another name.

    >>> from model.presets import gpt2_tiny
    >>> params = {"blocks": {"mlp": {"down": {"kernel": jnp.ones((2, 128, 32))}}}}
    >>> loss = lambda params: -params["blocks"]["mlp"]["down"]["kernel"][0, 0].sum()
    >>> by_loss(loss, gpt2_tiny(), params, "neurons")[0, :2].tolist()
    [32.0, 0.0]
    """
    shape = part_shape(config, part)
    count = int(np.prod(shape))

    def without(unit: jax.Array) -> jax.Array:
        gates = (jnp.arange(count) != unit).astype(jnp.float32).reshape(shape)
        return loss(gated(config, params, part, gates))

    return (jax.lax.map(without, jnp.arange(count)) - loss(params)).reshape(shape)


def by_activation(
    model: Transformer, params: PyTree, batches: Iterable[Any], part: str
) -> jax.Array:
    """How strong each unit is on some tokens.

    The root mean square of what a neuron or a head gives to `down` and `o`, and of a feature of the
    stream before every block; for a layer 1 - cos(stream before it, stream after it), averaged over
    tokens (Men et al. 2024, arXiv:2403.03853).

    Args:
      model: the Transformer.
      params: its parameters.
      batches: token ids, int [B, T] each.
      part: "neurons", "groups", "width" or "layers".

    Raises:
      ValueError: a part of another name, or no batch.

    >>> from model.presets import gpt2_tiny
    >>> model = Transformer(gpt2_tiny())
    >>> tokens = jnp.arange(16).reshape(2, 8)
    >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    >>> by_activation(model, params, [tokens], "layers").shape
    (2,)
    """
    shape = part_shape(model.config, part)
    if part in ("neurons", "groups"):
        path = {"neurons": "mlp/down/kernel", "groups": "attention/o/kernel"}[part]
        seen = observe(model, params, batches, ("square_sum", "tokens"), kernels=[path])
        rows = [layer[path]["square_sum"] / layer[path]["tokens"] for layer in seen.layers]
        return jnp.sqrt(jnp.stack(rows).reshape(*shape, -1).mean(axis=-1))

    @jax.jit
    def measure(tokens_BT: jax.Array) -> jax.Array:
        hidden = features(model, params, tokens_BT, capture=("hidden",)).hidden
        assert hidden is not None
        x = hidden.astype(jnp.float32)
        if part == "width":
            return jnp.square(x[:-1]).mean(axis=(0, 1, 2))
        before, after = x[:-1], x[1:]
        norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
        cosine = (before * after).sum(axis=-1) / jnp.maximum(norms, 1e-30)
        return 1 - cosine.mean(axis=(1, 2))

    sums, total = jnp.zeros(shape), 0
    for batch in batches:
        tokens_BT = jnp.asarray(batch)
        sums, total = sums + measure(tokens_BT) * tokens_BT.size, total + tokens_BT.size
    if not total:
        raise ValueError("there is nothing to measure activations with: no batch of tokens")
    return jnp.sqrt(sums / total) if part == "width" else sums / total


def best(importance: Any, keep: int) -> np.ndarray:
    """Returns where the `keep` most important are along the last axis, in increasing order.

    Raises:
      ValueError: fewer than one, more than there are, or importance that is not finite.

    >>> best([[1.0, 3.0, 2.0], [5.0, 0.0, 5.0]], 2).tolist()
    [[1, 2], [0, 2]]
    """
    scores = np.asarray(importance)
    if not 1 <= keep <= scores.shape[-1]:
        raise ValueError(
            f"cannot keep {keep} of {scores.shape[-1]}; keep at least 1 and at most all"
        )
    if not np.isfinite(scores).all():
        raise ValueError("the importance holds NaN or infinity, so nothing can be chosen by it")
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :keep], axis=-1)


def keep_best(
    config: TransformerConfig, params: PyTree, part: str, importance: Any, keep: int
) -> Model:
    """Returns the smaller model that keeps what is most important, in every layer by itself.

    Args:
      config: of the model.
      params: its parameters.
      part: "neurons", "groups", "width" or "layers".
      importance: of the part's shape.
      keep: how many (of each layer).

    Raises:
      ValueError: a part of another name, importance of another shape, or a number that cannot be
        kept.

    >>> from model.presets import gpt2_tiny
    >>> model = Transformer(gpt2_tiny())
    >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> config, smaller = keep_best(model.config, params, "layers", [0.1, 0.2], 1)
    >>> config.layers
    1
    """
    shape = np.shape(importance)
    if shape != part_shape(config, part):
        raise ValueError(
            f"importance of {part!r} has the shape {part_shape(config, part)}, not {shape}"
        )
    return KEEP[part](config, params, best(importance, keep))
