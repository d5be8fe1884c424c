"""Writes a model as GGUF, the file that llama.cpp reads; quantized matrices keep every bit.

Its blocks of 32 hold what our formats q8_0, q4_0 and q4_1 hold. Kernels are [out, in] there. Where
two numbers share a byte, number i of a block shares it with number i + 16. A tied head is written
once, as the embedding. Every file is read back and compared bit for bit before it gets its name.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from compress.export.gguf_layouts import TENSORS, architecture_of
from compress.quantization.formats import FORMATS
from compress.quantization.qtensor import QTensor
from compress.quantization.quantize import is_qtensor
from model.config import TransformerConfig
from model.extras import from_extra
from model.rules import leaf_paths

PyTree = Any
Float = Literal["f32", "f16"]

BLOCK = 32
HOLDS = ("q8_0", "q4_0", "q4_1")
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7}
"""Type of most weights -> general.file_type."""


class Vocabulary(NamedTuple):
    """What the file says of the tokenizer.

    Attributes:
      model: "gpt2" (byte-level BPE) or "llama" (SentencePiece).
      tokens: one a row of the embedding, in its order.
      types: kind of each: 1 text, 3 control, 6 byte.
      end: id of the end of a document.
      merges: of BPE.
      scores: of SentencePiece.
    """

    model: str
    tokens: Sequence[str]
    types: Sequence[int]
    end: int
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()


def write_gguf(
    path: Path,
    config: TransformerConfig,
    params: PyTree,
    vocabulary: Vocabulary | None = None,
    *,
    dtype: Float = "f32",
) -> None:
    """Writes a GGUF file, reads it back, and compares.

    Args:
      path: the file to make; it must not exist.
      config: of the model.
      params: its parameters; quantized matrices must be q8_0, q4_0 or q4_1.
      vocabulary: of the tokenizer; without one, llama.cpp measures but does not generate.
      dtype: of matrices that are not quantized; vectors are float32 always.

    Raises:
      ValueError: `path` exists, the format does not hold the model or a weight, or (a defect) what
        is read back differs.
    """
    gguf = from_extra("gguf", "gguf")
    arch = architecture_of(config)
    check_params(arch, params)
    if path.exists():
        raise ValueError(f"{path} exists already and nothing is overwritten; give a free name")
    if vocabulary is not None and len(vocabulary.tokens) != config.vocabulary_size:
        raise ValueError(
            f"the tokenizer has {len(vocabulary.tokens)} tokens and the model "
            f"{config.vocabulary_size}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    writer = gguf.GGUFWriter(temporary, arch)
    try:
        weights: dict[str, int] = {}
        for name, kind, data, real in tensors(config, params, dtype):
            raw = getattr(gguf.GGMLQuantizationType, kind.upper())
            writer.add_tensor(name, data, raw_dtype=raw)
            weights[kind] = weights.get(kind, 0) + real.size
        writer.add_file_type(FILE_TYPES[max(weights, key=lambda kind: weights[kind])])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, config)
        if vocabulary is not None:
            _add_vocabulary(writer, vocabulary)
        else:
            # llama.cpp refuses a file that has no word on it.
            writer.add_tokenizer_model("no_vocab")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        compare(temporary, config, params, dtype)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_gguf(path: Path) -> dict[str, np.ndarray]:
    """Returns what the tensors of a file stand for, float32, by their names.

    Args:
      path: the file.
    """
    import gguf

    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


def compare(path: Path, config: TransformerConfig, params: PyTree, dtype: Float = "f32") -> None:
    """Raises ValueError unless a file stands for exactly these parameters."""
    read = read_gguf(path)
    for name, kind, _, real in tensors(config, params, dtype):
        expected = real.astype(np.float16).astype(np.float32) if kind == "f16" else real
        found = read.pop(name, None)
        if found is None or not np.array_equal(found, expected):
            raise ValueError(f"{name} of {path} is not what was written")
    if read:
        raise ValueError(f"{path} holds {', '.join(read)} besides")


def check_params(arch: str, params: PyTree) -> None:
    """Raises ValueError for parameters that have no place in the file."""
    known = {path for _, paths in TENSORS[arch] for path in paths}
    leaves = _leaves(params)
    if strange := sorted(set(leaves) - known):
        raise ValueError(f"GGUF's {arch} has no place for {', '.join(strange)}")
    for path, leaf in leaves.items():
        if is_qtensor(leaf) and type_of(leaf) is None:
            raise ValueError(
                f"{path} is quantized as {leaf.format}, which GGUF does not hold; compress with "
                f"one of {', '.join(HOLDS)}, or dequantize it "
                "(compress.quantization.quantize.dequantize_params)"
            )
        if not is_qtensor(leaf) and not hasattr(leaf, "astype"):
            raise ValueError(f"{path} is a {type(leaf).__name__}, which GGUF does not hold")


def type_of(q: QTensor) -> str | None:
    """Returns the GGUF type that holds this matrix bit for bit, None if none does.

    >>> import jax.numpy as jnp
    >>> from compress.quantization.rounding import quantize
    >>> type_of(quantize(jnp.ones((32, 2)), "q4_0"))
    'q4_0'
    """
    return next((name for name in HOLDS if FORMATS[name] == q.format), None)


def pack_blocks(numbers: np.ndarray, scales: np.ndarray, minima: Any, kind: str) -> np.ndarray:
    """Returns the blocks of rows, uint8 [..., rows, bytes].

    Args:
      numbers: of the grid, int8 [..., rows, width].
      scales: float16 [..., rows, width / 32].
      minima: float16 like scales, or None.
      kind: "q8_0", "q4_0" or "q4_1".

    >>> row = np.arange(-8, 24, dtype=np.int8)[None] % 16 - 8
    >>> pack_blocks(row.astype(np.int8), np.ones((1, 1), np.float16), None, "q4_0").shape
    (1, 18)
    """
    blocks = numbers.reshape(*scales.shape, BLOCK)
    heads = [scales] if minima is None else [scales, minima]
    parts = [head[..., None].astype("<f2").view(np.uint8) for head in heads]
    if kind == "q8_0":
        parts.append(blocks.astype(np.int8).view(np.uint8))
    else:
        nibbles = (blocks + (8 if kind == "q4_0" else 0)).astype(np.uint8)
        half = BLOCK // 2
        parts.append(nibbles[..., :half] | (nibbles[..., half:] << 4))
    joined = np.concatenate(parts, axis=-1)
    return joined.reshape(*numbers.shape[:-1], -1)


def tensors(
    config: TransformerConfig, params: PyTree, dtype: Float = "f32"
) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Yields (name, type, data, what it stands for in float32) of every tensor of the file.

    Args:
      config: of the model.
      params: its parameters.
      dtype: of matrices that are not quantized.

    Raises:
      ValueError: parameters that share a tensor are quantized differently, or pass float16.
    """
    arch, leaves = architecture_of(config), _leaves(params)
    for name, paths in TENSORS[arch]:
        if paths[0] not in leaves:
            continue
        sides = [_turned(config, arch, path, leaves[path], dtype) for path in paths]
        if len({kind for kind, _, _ in sides}) > 1:
            raise ValueError(
                f"{', '.join(paths)} are one tensor {name} in GGUF and need one format, not "
                f"{', '.join(kind for kind, _, _ in sides)}"
            )
        axis = sides[0][1].ndim - (1 if sides[0][2].ndim == 1 + name.startswith("blk") else 2)
        data, real = (np.concatenate([side[i] for side in sides], axis=axis) for i in (1, 2))
        if not name.startswith("blk"):
            yield name, sides[0][0], data, real
            continue
        for layer in range(config.layers):
            yield name.format(layer), sides[0][0], data[layer], real[layer]


def _turned(
    config: TransformerConfig, arch: str, path: str, leaf: Any, dtype: Float
) -> tuple[str, np.ndarray, np.ndarray]:
    """(type, data, real) of a parameter, out before in; of all its layers."""
    kernel = path.endswith("kernel")
    turn = (lambda a: np.ascontiguousarray(a.swapaxes(-1, -2))) if kernel else (lambda a: a)
    heads = {"attention/q": config.heads, "attention/k": config.kv_heads_}
    count = heads.get(path.removeprefix("blocks/").rpartition("/")[0])
    # What it calls qwen3 turns halves, as we do.
    order = (lambda a: _interleaved(a, count)) if arch == "llama" and count else (lambda a: a)
    real = leaf.dequantize() if is_qtensor(leaf) else leaf
    real = order(turn(np.asarray(real).astype(np.float32)))
    if is_qtensor(leaf):
        kind = type_of(leaf)
        assert kind is not None
        assert not leaf.transposed
        numbers, scales = turn(np.asarray(leaf.numbers())), turn(np.asarray(leaf.scales))
        minima = None if leaf.offsets is None else turn(np.asarray(leaf.offsets))
        return kind, order(pack_blocks(numbers, scales, minima, kind)), real
    matrix = path.rsplit("/", 1)[-1] in ("kernel", "embedding")
    if dtype == "f32" or not matrix:
        return "f32", real, real
    with np.errstate(over="ignore"):
        half = real.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(f"{path} holds values that float16 does not; write it as f32")
    return "f16", half, real


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [..., out, n] in the order of llama.cpp, which turns neighbours and not halves."""
    lead, (out, width) = rows.shape[:-2], rows.shape[-2:]
    halves = rows.reshape(*lead, heads, 2, out // heads // 2, width)
    return np.ascontiguousarray(halves.swapaxes(-3, -2)).reshape(rows.shape)


def _leaves(params: PyTree) -> dict[str, Any]:
    import jax

    is_leaf = lambda node: hasattr(node, "dequantize")  # noqa: E731
    leaves = jax.tree.leaves(params, is_leaf=is_leaf)
    return dict(zip(leaf_paths(params, is_leaf), leaves, strict=True))


def _add_shape(writer: Any, config: TransformerConfig) -> None:
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.ffn_width_)
    writer.add_head_count(config.heads)
    writer.add_vocab_size(config.vocabulary_size)
    if config.norm == "layernorm":
        writer.add_layer_norm_eps(config.norm_epsilon)
        return
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_head_count_kv(config.kv_heads_)
    writer.add_key_length(config.head_width_)
    writer.add_value_length(config.head_width_)
    writer.add_rope_dimension_count(config.head_width_)
    writer.add_rope_freq_base(config.rotary_base)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.model == "gpt2":
        writer.add_tokenizer_pre("gpt-2")
        # An empty list has no type in the file, so that it cannot be written.
        if vocabulary.merges:
            writer.add_token_merges(list(vocabulary.merges))
    else:
        writer.add_token_scores(list(vocabulary.scores))
    writer.add_eos_token_id(vocabulary.end)
    writer.add_bos_token_id(vocabulary.end)
