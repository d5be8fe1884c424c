"""The forward pass as StableHLO, for whoever runs it without our code: needs JAX alone.

    forward.stablehlo     `jax.export.deserialize(bytes).call(weights, tokens) -> logits`
    native/               the weights (`compress.export.native`), arguments of the program by their
    paths

Weights are arguments and no constants, so the program is small and says nothing twice.
"""

from __future__ import annotations

import functools
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from compress.export.native import WEIGHTS, flat, load_native, save_native, unflat
from model.attention import dot_product_attention
from model.transformer import Transformer

PyTree = Any

PROGRAM = "forward.stablehlo"
NATIVE = "native"


def save_stablehlo(
    folder: Path,
    model: Transformer,
    params: PyTree,
    *,
    batch: int = 1,
    length: int,
    platforms: Sequence[str] | None = None,
) -> None:
    """Writes a forward pass of one shape, and the weights, in one piece or not at all.

    Args:
      folder: to make; it must not exist.
      model: the Transformer.
      params: its parameters, quantized or not.
      batch: rows of tokens.
      length: tokens of a row.
      platforms: what the program shall run on ("cpu", "cuda", "tpu"), by default where we are.

    Raises:
      ValueError: `folder` exists, or the length does not fit the model's positions.
      ImportError: flatbuffers is not installed, which JAX needs for this.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already and nothing is overwritten; give a free name")
    arrays = flat(params)
    elsewhere = platforms is not None or jax.default_backend() == "gpu"
    if elsewhere and model.attention is dot_product_attention:
        # Otherwise it takes the form that suits where we are. One program for several takes the
        # form that suits all, and so does one for a GPU: no file can hold a call of cuDNN.
        only = set(platforms or ()) in ({"cpu"}, {"tpu"})
        target = platforms[0] if platforms and only else "any"
        suited = functools.partial(dot_product_attention, platform=target)
        model = model.clone(attention=suited)

    def forward(weights: dict[str, jax.Array], tokens_BT: jax.Array) -> Any:
        return model.apply({"params": unflat(params, weights)}, tokens_BT)

    shapes = {path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in arrays.items()}
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    program = export.export(jax.jit(forward), platforms=platforms)(shapes, tokens).serialize()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        (temporary / PROGRAM).write_bytes(bytes(program))
        save_native(temporary / NATIVE, model.config, params)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_stablehlo(folder: Path) -> Callable[[jax.Array], jax.Array]:
    """Returns `tokens -> logits` of what `save_stablehlo` wrote.

    Raises:
      ValueError: there is no program in the folder, or its weights are damaged.
    """
    if not (folder / PROGRAM).is_file():
        raise ValueError(f"{folder} holds no {PROGRAM} and {NATIVE}/{WEIGHTS}")
    program = export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    weights = flat(load_native(folder / NATIVE)[1])
    return lambda tokens_BT: program.call(weights, tokens_BT)
