"""The native format: a folder with what is stored, bit for bit, and what it means.

weights.safetensors    every array under its path, `blocks/mlp/up/kernel/values` and so on
model.json             the config, which matrices are quantized and how
                       (`compress.export.stored`), and the shapes of what lies beside the model
                       (a prompt, scores of a task), which no config tells
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import shutil
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from compress.export.stored import abstract_from, describe
from model.check import beside_model, check_params
from model.config import TransformerConfig, config_from_dict
from model.extras import from_extra
from model.flops import abstract_params
from model.mismatch import by_path
from model.rules import leaf_paths
from model.safetensors_files import write_safetensors

PyTree = Any

MODEL = "model.json"
WEIGHTS = "weights.safetensors"
VERSION = 1
_NUMPY = ("float64", "float32", "float16", "int32", "int16", "int8", "uint8", "uint16")


def flat(params: PyTree) -> dict[str, jax.Array]:
    """Returns all arrays by path, those of quantized matrices apart.

    >>> flat({"head": {"bias": jnp.ones(2)}})
    {'head/bias': Array([1., 1.], dtype=float32)}
    """
    return dict(zip(leaf_paths(params), jax.tree.leaves(params), strict=True))


def unflat(abstract: PyTree, arrays: dict[str, Any]) -> PyTree:
    """The inverse of `flat`, for a tree of the structure of `abstract`.

    Raises:
      ValueError: arrays that are missing, too many, or of another shape or type.
    """
    paths, leaves = leaf_paths(abstract), jax.tree.leaves(abstract)
    if set(paths) != set(arrays):
        wrong = sorted(set(paths) ^ set(arrays))
        raise ValueError(f"{', '.join(wrong)}: only one of the file and the model has these")
    for path, leaf in zip(paths, leaves, strict=True):
        array = arrays[path]
        if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"{path} is {array.dtype}{list(array.shape)}, not {leaf.dtype}{list(leaf.shape)}"
            )
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[path] for path in paths])


def save_native(folder: Path | str, config: TransformerConfig, params: PyTree) -> None:
    """Writes a model, in one piece or not at all.

    Args:
      folder: to make; it must not exist.
      config: of the model.
      params: its parameters, quantized or not.

    Raises:
      ValueError: `folder` exists, or the parameters are not those of the config.

    >>> import tempfile
    >>> from model.presets import gpt2_tiny
    >>> from model.transformer import Transformer
    >>> model = Transformer(gpt2_tiny())
    >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> with tempfile.TemporaryDirectory() as name:
    ...     save_native(Path(name) / "model", model.config, params)
    ...     config, again = load_native(Path(name) / "model")
    >>> config == model.config, again["final_norm"]["scale"].shape
    (True, (32,))
    """
    folder = Path(folder)
    check_params(config, params)
    if folder.exists():
        raise ValueError(f"{folder} exists already and nothing is overwritten; give a free name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        arrays = {path: np.asarray(leaf) for path, leaf in flat(params).items()}
        types = {path: array.dtype.name for path, array in arrays.items()}
        plain = {path: _bits(array) for path, array in arrays.items()}
        write_safetensors(temporary / WEIGHTS, plain)
        content = {
            "version": VERSION,
            "config": dataclasses.asdict(config),
            "weights": describe(params),
            "types": types,
            "beside": {path: list(leaf.shape) for path, leaf in beside_model(params).items()},
        }
        (temporary / MODEL).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_native(folder: Path | str) -> tuple[TransformerConfig, PyTree]:
    """Reads what `save_native` wrote: config and parameters, bit for bit.

    Raises:
      ValueError: no such folder, one of another version, or a file that is damaged.
    """
    folder = Path(folder)
    safetensors = from_extra("safetensors", "hf")
    load_file = from_extra("safetensors.numpy", "hf").load_file

    if not (folder / MODEL).is_file() or not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no {MODEL} and {WEIGHTS}")
    try:
        content = json.loads((folder / MODEL).read_text(encoding="utf-8"))
        stored = load_file(folder / WEIGHTS)
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder} is damaged ({error})") from error
    if content.get("version") != VERSION:
        raise ValueError(f"{folder} is of version {content.get('version')}; this reads {VERSION}")
    config = config_from_dict(content["config"])
    try:
        whole = by_path(abstract_params(config))
        for path, shape in content.get("beside", {}).items():
            whole[path] = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
        plain = flax.traverse_util.unflatten_dict(whole, sep="/")
        abstract = abstract_from(_of_types(plain, content["types"]), content["weights"])
        arrays = {
            path: jnp.asarray(array.view(jnp.dtype(content["types"][path])))
            for path, array in stored.items()
        }
        return config, unflat(abstract, arrays)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder} does not hold what its {MODEL} says: {error}") from error


def _bits(array: np.ndarray) -> np.ndarray:
    """The array in a type that every reader of safetensors for NumPy knows."""
    # safetensors writes memory as it lies; this, unlike ascontiguousarray, leaves scalars scalars.
    array = np.asarray(array, order="C")
    known = array.dtype.name in _NUMPY
    return array if known else array.view(f"uint{8 * array.dtype.itemsize}")


def _of_types(abstract: PyTree, types: dict[str, str]) -> PyTree:
    """Plain parameters in the types that were written, which the config need not name."""
    paths, leaves = leaf_paths(abstract), jax.tree.leaves(abstract)
    typed = [
        jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(types.get(path, leaf.dtype.name)))
        for path, leaf in zip(paths, leaves, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), typed)
