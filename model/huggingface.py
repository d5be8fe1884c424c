"""Weights in from and out to Hugging Face folders: `config.json` and safetensors, without torch.

Which parameter is which tensor, and which entry of `config.json` is which field, is said once, as
data, in `model.huggingface_kinds`; both directions read the same tables.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, get_args

import flax
import jax
import jax.numpy as jnp
import numpy as np

from model.config import TransformerConfig
from model.huggingface_config import read_config, write_config
from model.huggingface_files import (
    CONFIG,
    Stored,
    open_tensors,
    read_json,
    write_shards,
)
from model.huggingface_layouts import (
    HEAD,
    SCORE,
    Layout,
    Tensor,
    exchange_halves,
    expected_tensors,
    full_key,
    layer_keys,
    stored_shapes,
)
from model.mismatch import by_path, mismatches, some

DType = Literal["float32", "bfloat16", "float16", "float64"]

CLASSIFIER = "ForSequenceClassification"
"""How transformers ends the name of a model with a head of classes in place of that of tokens."""
_HEADED = "LMHeadModel|ForCausalLM"

_STORED_FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' words
_COMPARED_ROWS = 4096  # of an embedding at a time: some 10 MB at the usual widths


def load(
    directory: str | os.PathLike[str], *, dtype: DType = "float32", classes: int | None = None
) -> tuple[TransformerConfig, dict[str, Any]]:
    """Reads a GPT-2, Llama, Qwen3 or nanochat model from a folder in the format of transformers.

    Read are `config.json` and `model.safetensors`, or the shards that
    `model.safetensors.index.json` names; tensors may be of any floating-point type. Keys with and
    without the prefix of the base model (`transformer.`, `model.`) are known, causal masks and
    rotary frequencies among them are passed over. One parameter at a time is held twice.

    Args:
      directory: the folder.
      dtype: what the parameters are returned as, and `parameter_dtype` of the config.
      classes: outputs of the head of a classifier, which is then read as `score/kernel`, [D, C];
        see `model.huggingface_classifier`.

    Returns:
      The config and the parameters, `model.apply({"params": params}, tokens)` with
      `model = Transformer(config)`. How to run it (`dtype`, `scan_layers`, `remat`) is for the
      caller to set.

    Raises:
      ValueError: if the folder or a file is missing or damaged, the model is of another kind or
        asks for something that ours does not compute, tensors are missing, unexpected, of the wrong
        shape or not floating point, or the weights are pickled (they are never opened).

    >>> import tempfile
    >>> from model.presets import llama_tiny
    >>> from model.transformer import Transformer
    >>> config = llama_tiny()
    >>> params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, config, params)
    ...     same, again = load(folder)
    >>> same == config
    True
    >>> all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), params, again)))
    True
    """
    directory = Path(directory)
    _check_dtype(dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"dtype {dtype} needs jax.config.update('jax_enable_x64', True) first")
    with ExitStack() as stack:
        stored = open_tensors(directory, stack)
        fields = read_json(directory / CONFIG)
        try:
            layout, config = read_config(fields)
        except ValueError as error:
            raise ValueError(f"{directory / CONFIG}: {error}") from error
        stored = _without_prefix(stored, layout, directory)
        if classes is None and SCORE.key in stored:
            raise ValueError(
                f"{directory} holds a classifier ({SCORE.key}); open it as one, with "
                "model.huggingface_classifier, or make a run of it with experiments.convert --hf"
            )
        if classes is not None and HEAD not in stored:
            config = dataclasses.replace(config, tied_head=True)  # no other is there
        shapes, tensors = expected_tensors(layout, config, classes)
        if config.tied_head:
            stored = _without_tied_head(stored, layout, directory)
        _check_stored(stored, tensors, shapes, layout, directory)
        leaves: dict[str, jax.Array] = {}
        for tensor in tensors:
            leaves |= _read(tensor, stored, shapes, dtype, config.head_width_)
    config = dataclasses.replace(config, parameter_dtype=dtype)
    return config, flax.traverse_util.unflatten_dict(leaves, sep="/")


def save(
    directory: str | os.PathLike[str],
    config: TransformerConfig,
    params: Mapping[str, Any],
    *,
    dtype: DType | None = None,
    max_shard_bytes: int = 5 * 10**9,
    extra: Mapping[str, Any] | None = None,
    classes: int | None = None,
) -> None:
    """Writes a model as a folder that `AutoModelForCausalLM.from_pretrained` reads.

    The folder appears under its name when it is complete. Where it exists it must be empty: nothing
    is ever overwritten. One shard is held beside the parameters.

    Args:
      directory: the folder to make; its parents are made too.
      config: which of the formats is written follows from it. What only says how to run or to start
        the model (`dtype`, `scan_layers`, `remat`, `zero_init_projections`) is not kept.
      params: as `Transformer(config)` has them. Weights that have a `dequantize()` are written as
        what it returns.
      dtype: what tensors are written as, by default `config.parameter_dtype`.
      max_shard_bytes: where the weights are larger they are split into several files, none larger
        unless a single tensor is. The default bounds the memory that saving takes.
      extra: more entries of `config.json`, such as `eos_token_id`; `bos_token_id` and
        `eos_token_id` are null if not given, since a model does not know them.
      classes: outputs of a classifier's head among the parameters, as in `load`.

    Raises:
      ValueError: if no format holds the config (the fields in the way are named), the parameters
        are not those of the config, a weight is neither an array nor can be dequantized, a value
        is too large for `dtype`, an extra entry is one that the config decides, or the directory
        is in use.
    """
    directory = Path(directory)
    layout, fields = write_config(config)
    dtype = config.parameter_dtype if dtype is None else dtype
    _check_dtype(dtype)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    fields |= {"dtype": dtype, "torch_dtype": dtype}  # for transformers 5 and 4
    if classes is not None and not layout.classifies:
        raise ValueError(
            f"transformers has no classifier of the kind {layout.model_type}, which alone holds "
            "this config; keep the model as a run of ours"
        )
    if classes is not None:
        fields["architectures"] = [re.sub(_HEADED, CLASSIFIER, layout.architecture)]
    if taken := sorted(set(fields) & set(extra or {})):
        raise ValueError(f"the config decides {', '.join(taken)}; leave them out of extra")
    fields |= {"bos_token_id": None, "eos_token_id": None, **(extra or {})}
    text = json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n"

    shapes, tensors = expected_tensors(layout, config, classes)
    leaves = _leaves(params)
    _check_params(leaves, shapes)
    _check_free(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    name = f".{directory.resolve().name}.{secrets.token_hex(8)}.tmp"
    temporary = directory.resolve().parent / name
    temporary.mkdir()
    try:
        stream = _tensors(tensors, leaves, shapes, layout, dtype, config.head_width_)
        plan = _plan(tensors, shapes, layout, np.dtype(jnp.dtype(dtype)).itemsize, max_shard_bytes)
        write_shards(temporary, stream, plan)
        (temporary / CONFIG).write_text(text, encoding="utf-8")
        _check_free(directory)
        os.replace(temporary, directory.resolve())
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- in ---------------------------------------------------------------------------------------


def _without_prefix(
    stored: dict[str, Stored], layout: Layout, directory: Path
) -> dict[str, Stored]:
    """Keys as the tables have them, what holds no parameters left out."""
    plain: dict[str, Stored] = {}
    for key, tensor in stored.items():
        name = key.removeprefix(layout.prefix)
        if re.fullmatch(layout.stray, name):
            continue
        if name in plain:
            raise ValueError(f"{directory} holds both {key} and {plain[name].key}")
        plain[name] = tensor
    return plain


def _without_tied_head(
    stored: dict[str, Stored], layout: Layout, directory: Path
) -> dict[str, Stored]:
    """The embedding once, though the file may hold it as the head too, or as the head alone."""
    if HEAD not in stored:
        return stored
    head = stored[HEAD]
    rest = {key: tensor for key, tensor in stored.items() if key != HEAD}
    (embedding,) = (t.key for t in layout.tensors if t.paths == ("token_embedding/embedding",))
    if embedding not in rest:
        return rest | {embedding: head}
    if not _same(head, rest[embedding]):
        raise ValueError(
            f"{directory} is tied (tie_word_embeddings), yet its {HEAD} and {embedding} differ. "
            'If the head is meant, set "tie_word_embeddings": false in config.json; otherwise '
            "remove the tensor"
        )
    return rest


def _same(a: Stored, b: Stored) -> bool:
    if a.shape != b.shape:
        return False
    x, y = (each.file.get_slice(each.key) for each in (a, b))
    rows = a.shape[0]
    spans = [(i, min(i + _COMPARED_ROWS, rows)) for i in range(0, rows, _COMPARED_ROWS)]
    return all(np.array_equal(x[i:j], y[i:j]) for i, j in spans)


def _check_stored(
    stored: dict[str, Stored],
    tensors: list[Tensor],
    shapes: dict[str, tuple[int, ...]],
    layout: Layout,
    directory: Path,
) -> None:
    expected = dict(stored_shapes(tensors, shapes))
    problems = {
        "lacks": [key for key in expected if key not in stored],
        "holds what such a model has no place for:": [key for key in stored if key not in expected],
        "holds tensors of the wrong shape:": [
            f"{key} {list(stored[key].shape)} instead of {list(shape)}"
            for key, shape in expected.items()
            if key in stored and stored[key].shape != shape
        ],
        "holds tensors that are not floating point:": [
            f"{key} ({tensor.dtype})"
            for key, tensor in stored.items()
            if key in expected and tensor.dtype not in _STORED_FLOATS
        ],
    }
    said = [f"{what} {some(names)}" for what, names in problems.items() if names]
    if said:
        raise ValueError(
            f"{directory} is not the {layout.model_type} model that its config.json describes: "
            f"it {'; it '.join(said)}"
        )


def _read(
    tensor: Tensor,
    stored: dict[str, Stored],
    shapes: dict[str, tuple[int, ...]],
    dtype: str,
    head_width: int,
) -> dict[str, jax.Array]:
    """The parameters that one entry of the table holds, all layers."""
    stacks = [np.empty(shapes[path], jnp.dtype(dtype)) for path in tensor.paths]
    for layer, key in layer_keys(tensor, shapes):
        values = stored[key].read()
        values = values.T if tensor.transposed else values
        values = exchange_halves(values, head_width) if tensor.exchanged else values
        ends = np.cumsum([stack.shape[-1] for stack in stacks])
        for stack, part in zip(stacks, np.split(values, ends[:-1], axis=-1), strict=True):
            stack[... if layer is None else layer] = _cast(part, stack.dtype, key)
    return {path: jnp.asarray(stack) for path, stack in zip(tensor.paths, stacks, strict=True)}


# --- out --------------------------------------------------------------------------------------


def _leaves(params: Mapping[str, Any]) -> dict[str, Any]:
    """Weights by path; a weight that is not an array counts as one."""
    leaves = by_path(params)
    for path, leaf in leaves.items():
        if not (isinstance(leaf, jax.Array | np.ndarray) or hasattr(leaf, "dequantize")):
            raise ValueError(
                f"{path} is a {type(leaf).__name__}: neither an array nor a weight that can be "
                "dequantized. Merge adapters and low-rank weights into arrays first"
            )
    return leaves


def _check_params(leaves: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    said = mismatches(leaves, shapes)
    if whole := [
        f"{path} ({leaf.dtype})"
        for path, leaf in leaves.items()
        if not hasattr(leaf, "dequantize") and not jnp.issubdtype(leaf.dtype, jnp.floating)
    ]:
        said.append(f"hold other than floating-point numbers: {some(whole)}")
    if said:
        raise ValueError(f"the parameters are not those of the config: they {'; '.join(said)}")


def _check_free(directory: Path) -> None:
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ValueError(
            f"{directory} exists already and nothing is overwritten; "
            "give the name of a new or an empty folder, or remove it"
        )


def _tensors(
    tensors: list[Tensor],
    leaves: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    layout: Layout,
    dtype: str,
    head_width: int,
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of theirs, one after the other, in the order of `stored_shapes`."""
    for tensor in tensors:
        stacks = [_array(leaves[path]) for path in tensor.paths]
        for layer, key in layer_keys(tensor, shapes):
            parts = [stack if layer is None else stack[layer] for stack in stacks]
            values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
            values = exchange_halves(values, head_width) if tensor.exchanged else values
            values = _cast(values.T if tensor.transposed else values, jnp.dtype(dtype), key)
            # safetensors writes memory as it lies, whatever the strides.
            yield full_key(key, layout), np.ascontiguousarray(values)


def _array(leaf: Any) -> np.ndarray:
    return np.asarray(leaf.dequantize() if hasattr(leaf, "dequantize") else leaf)


def _plan(
    tensors: list[Tensor],
    shapes: dict[str, tuple[int, ...]],
    layout: Layout,
    itemsize: int,
    max_shard_bytes: int,
) -> list[dict[str, int]]:
    """Keys and sizes in bytes of each shard."""
    shards: list[dict[str, int]] = [{}]
    for key, shape in stored_shapes(tensors, shapes):
        size = int(np.prod(shape)) * itemsize
        if shards[-1] and sum(shards[-1].values()) + size > max_shard_bytes:
            shards.append({})
        shards[-1][full_key(key, layout)] = size
    return shards


def _cast(values: np.ndarray, dtype: Any, key: str) -> np.ndarray:
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    limit = jnp.finfo(dtype).max
    narrower = limit < jnp.finfo(values.dtype).max
    if narrower and not np.array_equal(np.isfinite(cast), np.isfinite(values)):
        raise ValueError(
            f"{key} holds values beyond {jnp.dtype(dtype).name} ({float(limit):.5g}); "
            "take a type of larger range, such as bfloat16 or float32"
        )
    return cast


def _check_dtype(dtype: str) -> None:
    if dtype not in get_args(DType):
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(get_args(DType))}")
