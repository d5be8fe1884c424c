"""Gates on the parts of a model that structured pruning can take out: 1 leaves, 0 takes out.

Parts are "neurons" [L, F], "groups" [L, G] (key/value heads with their query heads), "width" [D]
and "layers" [L]. Gates multiply what a unit adds, so that a gate of 0 is what
`compress.pruning.structured` removes, and the gradient of a gate tells what removing would change.

Shapes: L layers, D width, F feed-forward width, G key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from compress.pruning.structured import replace_linear
from compress.pruning.structured_width import WRITERS
from model.config import TransformerConfig

PyTree = Any


def part_shape(config: TransformerConfig, part: str) -> tuple[int, ...]:
    """Returns the shape of the importance of a part.

    Raises:
      ValueError: a part of another name.

    >>> from model.presets import gpt2_tiny
    >>> part_shape(gpt2_tiny(), "neurons")
    (2, 128)
    """
    shapes = {
        "neurons": (config.layers, config.ffn_width_),
        "groups": (config.layers, config.kv_heads_),
        "width": (config.width,),
        "layers": (config.layers,),
    }
    if part not in shapes:
        raise ValueError(f"no part is called {part!r}; there are {', '.join(shapes)}")
    return shapes[part]


def gated(config: TransformerConfig, params: PyTree, part: str, gates: jax.Array) -> PyTree:
    """Multiplies what each neuron, head, feature or layer adds by a gate: 0 takes it out.

    Args:
      config: of the model.
      params: its parameters.
      part: "neurons", "groups", "width" or "layers".
      gates: of the part's shape.

    Raises:
      ValueError: a part of another name, or gates of another shape.

    >>> from model.presets import gpt2_tiny
    >>> params = {"blocks": {"mlp": {"down": {"kernel": jnp.ones((2, 128, 32))}}}}
    >>> silent = gated(gpt2_tiny(), params, "neurons", jnp.zeros((2, 128)))
    >>> float(silent["blocks"]["mlp"]["down"]["kernel"].sum())
    0.0
    """
    if gates.shape != part_shape(config, part):
        raise ValueError(
            f"gates for {part!r} have the shape {part_shape(config, part)}, not {gates.shape}"
        )
    return _GATED[part](config, params, gates)


def _gate_neurons(config: TransformerConfig, params: PyTree, gates_LF: jax.Array) -> PyTree:
    return _gate_inputs(params, ("mlp", "down"), gates_LF)


def _gate_groups(config: TransformerConfig, params: PyTree, gates_LG: jax.Array) -> PyTree:
    each = config.heads // config.kv_heads_ * config.head_width_
    return _gate_inputs(params, ("attention", "o"), jnp.repeat(gates_LG, each, axis=1))


def _gate_layers(config: TransformerConfig, params: PyTree, gates_L: jax.Array) -> PyTree:
    ones = jnp.ones((1, config.width))
    return _gate_writers(params, gates_L[:, None] * ones)


def _gate_width(config: TransformerConfig, params: PyTree, gates_D: jax.Array) -> PyTree:
    params = _gate_writers(params, jnp.broadcast_to(gates_D, (config.layers, config.width)))
    for name in ("token_embedding", "position_embedding"):
        if name in params:
            table = params[name]["embedding"]
            params = {**params, name: {"embedding": table * gates_D.astype(table.dtype)[None]}}
    return params


def _gate_inputs(params: PyTree, path: tuple[str, str], gates_LI: jax.Array) -> PyTree:
    linear = params["blocks"][path[0]][path[1]]
    kernel = linear["kernel"] * gates_LI.astype(linear["kernel"].dtype)[:, :, None]
    blocks = replace_linear(params["blocks"], path, {**linear, "kernel": kernel})
    return {**params, "blocks": blocks}


def _gate_writers(params: PyTree, gates_LD: jax.Array) -> PyTree:
    blocks = params["blocks"]
    for path in WRITERS:
        linear = dict(blocks[path[0]][path[1]])
        linear["kernel"] *= gates_LD.astype(linear["kernel"].dtype)[:, None]
        if "bias" in linear:
            linear["bias"] *= gates_LD.astype(linear["bias"].dtype)
        blocks = replace_linear(blocks, path, linear)
    return {**params, "blocks": blocks}


_GATED: dict[str, Callable[[TransformerConfig, PyTree, jax.Array], PyTree]] = {
    "neurons": _gate_neurons,
    "groups": _gate_groups,
    "width": _gate_width,
    "layers": _gate_layers,
}
