"""The checkpoint formats of Hugging Face as tables: entries of `config.json`, names of tensors.

A `Layout` is data, read in both directions by `model.huggingface_config` and `model.huggingface`.
To support another kind of model, add one to `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax

from model.config import TransformerConfig
from model.flops import abstract_params
from model.rules import is_stacked

REQUIRED = object()
"""Default of an entry without which a `config.json` is not complete."""


class Entry(NamedTuple):
    """An entry of `config.json` that stands for a field of ours.

    Attributes:
      theirs: its name, dotted where it is nested; further names are the places where other versions
        of transformers keep it: all are written, and all that are present must agree.
      ours: field of `TransformerConfig`. Two entries for one field must agree.
      kind: type of the value.
      default: what transformers takes where the entry is missing or null. None leaves our default,
        which means the same.
      choices: their word -> ours, where they differ; the first word for a meaning is written.
    """

    theirs: tuple[str, ...]
    ours: str
    kind: type
    default: Any = REQUIRED
    choices: Mapping[str, str] | None = None


class Constant(NamedTuple):
    """An entry of `config.json` that has one meaning here, and is refused where it has another.

    Attributes:
      theirs: its name, dotted where it is nested.
      accepted: the values that mean what our model computes, absence (None) always included. The
        first is written.
      training_only: another value is not refused, but warned about and taken for the first.
    """

    theirs: str
    accepted: tuple[Any, ...]
    training_only: bool = False


class Tensor(NamedTuple):
    """A tensor of theirs and the parameters of ours that it holds.

    Attributes:
      key: their name without the prefix of the base model; `{}` is the layer.
      paths: our parameters, joined along their last axis.
      transposed: whether theirs is [out, in]; ours is [in, out].
    """

    key: str
    paths: tuple[str, ...]
    transposed: bool = False


class Layout(NamedTuple):
    """One kind of model.

    Attributes:
      model_type, architecture: what `config.json` calls it.
      prefix: of the keys of the base model, everything but the head. Files of the base model alone
        lack it.
      fixed: fields of ours that every model of this kind has.
      entries, constants: of `config.json`.
      tensors: parameters that a config does not have (a tied head, biases) are passed over.
      stray: regex of keys, without prefix, that hold no parameters: buffers of older versions.
    """

    model_type: str
    architecture: str
    prefix: str
    fixed: Mapping[str, Any]
    entries: tuple[Entry, ...]
    constants: tuple[Constant, ...]
    tensors: tuple[Tensor, ...]
    stray: str


HEAD = "lm_head.weight"
SCORE = Tensor("score.weight", ("score/kernel",), transposed=True)
"""The head of a classifier, of any layout; [C, D] as theirs, [D, C] as ours."""

_COMMON_CONSTANTS = (
    Constant("quantization_config", (None,)),
    Constant("is_encoder_decoder", (None, False)),
    Constant("add_cross_attention", (None, False)),
    Constant("pruned_heads", (None, {})),
)

_QKV = tuple(f"blocks/attention/{name}/" for name in "qkv")

GPT2 = Layout(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    fixed={"positions": "learned", "norm": "layernorm", "biases": True},
    entries=(
        Entry(("vocab_size",), "vocabulary_size", int),
        Entry(("n_positions",), "max_length", int),
        Entry(("n_layer",), "layers", int),
        Entry(("n_embd",), "width", int),
        Entry(("n_head",), "heads", int),
        Entry(("n_inner",), "ffn_width", int, None),
        Entry(
            ("activation_function",),
            "activation",
            str,
            "gelu_new",
            {
                "gelu_new": "gelu",
                "gelu_pytorch_tanh": "gelu",
                "gelu_fast": "gelu",
                "gelu": "gelu_exact",
                "relu2": "relu_squared",
            },
        ),
        Entry(("layer_norm_epsilon",), "norm_epsilon", float, 1e-5),
        Entry(("initializer_range",), "init_std", float, 0.02),
        Entry(("resid_pdrop",), "dropout", float, 0.1),
        Entry(("embd_pdrop",), "dropout", float, 0.1),
        Entry(("attn_pdrop",), "dropout", float, 0.1),
        Entry(("tie_word_embeddings",), "tied_head", bool, True),
    ),
    constants=(
        Constant("scale_attn_weights", (True,)),
        Constant("scale_attn_by_inverse_layer_idx", (False,)),
        Constant("reorder_and_upcast_attn", (False,)),
        *_COMMON_CONSTANTS,
    ),
    # Its linear layers are "Conv1D": kernels [in, out] as ours.
    tensors=(
        Tensor("wte.weight", ("token_embedding/embedding",)),
        Tensor("wpe.weight", ("position_embedding/embedding",)),
        Tensor("h.{}.ln_1.weight", ("blocks/attention_norm/scale",)),
        Tensor("h.{}.ln_1.bias", ("blocks/attention_norm/bias",)),
        Tensor("h.{}.attn.c_attn.weight", tuple(path + "kernel" for path in _QKV)),
        Tensor("h.{}.attn.c_attn.bias", tuple(path + "bias" for path in _QKV)),
        Tensor("h.{}.attn.c_proj.weight", ("blocks/attention/o/kernel",)),
        Tensor("h.{}.attn.c_proj.bias", ("blocks/attention/o/bias",)),
        Tensor("h.{}.ln_2.weight", ("blocks/mlp_norm/scale",)),
        Tensor("h.{}.ln_2.bias", ("blocks/mlp_norm/bias",)),
        Tensor("h.{}.mlp.c_fc.weight", ("blocks/mlp/up/kernel",)),
        Tensor("h.{}.mlp.c_fc.bias", ("blocks/mlp/up/bias",)),
        Tensor("h.{}.mlp.c_proj.weight", ("blocks/mlp/down/kernel",)),
        Tensor("h.{}.mlp.c_proj.bias", ("blocks/mlp/down/bias",)),
        Tensor("ln_f.weight", ("final_norm/scale",)),
        Tensor("ln_f.bias", ("final_norm/bias",)),
        Tensor(HEAD, ("head/kernel",), transposed=True),
    ),
    stray=r"h\.\d+\.attn\.(masked_)?bias",  # causal masks
)

_LLAMA_LINEAR = {
    "self_attn.q_proj": "blocks/attention/q",
    "self_attn.k_proj": "blocks/attention/k",
    "self_attn.v_proj": "blocks/attention/v",
    "self_attn.o_proj": "blocks/attention/o",
    "mlp.gate_proj": "blocks/mlp/gate",
    "mlp.up_proj": "blocks/mlp/up",
    "mlp.down_proj": "blocks/mlp/down",
}

LLAMA = Layout(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    fixed={"positions": "rotary", "norm": "rmsnorm"},
    entries=(
        Entry(("vocab_size",), "vocabulary_size", int),
        Entry(("max_position_embeddings",), "max_length", int, 2048),
        Entry(("num_hidden_layers",), "layers", int),
        Entry(("hidden_size",), "width", int),
        Entry(("num_attention_heads",), "heads", int),
        Entry(("num_key_value_heads",), "kv_heads", int, None),
        Entry(("head_dim",), "head_width", int, None),
        Entry(("intermediate_size",), "ffn_width", int),
        Entry(("hidden_act",), "activation", str, "silu", {"silu": "swiglu", "swish": "swiglu"}),
        Entry(("rms_norm_eps",), "norm_epsilon", float, 1e-6),
        # transformers 5 keeps it in `rope_parameters`, 4 beside.
        Entry(("rope_parameters.rope_theta", "rope_theta"), "rotary_base", float, 10_000.0),
        Entry(("initializer_range",), "init_std", float, 0.02),
        Entry(("attention_bias",), "biases", bool, False),
        Entry(("mlp_bias",), "biases", bool, False),
        Entry(("tie_word_embeddings",), "tied_head", bool, False),
    ),
    constants=(
        Constant("attention_dropout", (0.0,), training_only=True),
        Constant("rope_parameters.rope_type", ("default",)),
        Constant("rope_parameters.type", (None, "default")),
        Constant("rope_parameters.factor", (None, 1.0)),
        Constant("rope_parameters.partial_rotary_factor", (None, 1.0)),
        Constant("rope_scaling.rope_type", (None, "default")),
        Constant("rope_scaling.type", (None, "default")),
        Constant("rope_scaling.factor", (None, 1.0)),
        Constant("rope_scaling.rope_theta", (None,)),
        Constant("partial_rotary_factor", (None, 1.0)),
        *_COMMON_CONSTANTS,
    ),
    tensors=(
        Tensor("embed_tokens.weight", ("token_embedding/embedding",)),
        Tensor("layers.{}.input_layernorm.weight", ("blocks/attention_norm/scale",)),
        Tensor("layers.{}.post_attention_layernorm.weight", ("blocks/mlp_norm/scale",)),
        *(
            Tensor(f"layers.{{}}.{theirs}.weight", (f"{ours}/kernel",), transposed=True)
            for theirs, ours in _LLAMA_LINEAR.items()
        ),
        *(
            Tensor(f"layers.{{}}.{theirs}.bias", (f"{ours}/bias",))
            for theirs, ours in _LLAMA_LINEAR.items()
        ),
        Tensor("norm.weight", ("final_norm/scale",)),
        Tensor(HEAD, ("head/kernel",), transposed=True),
    ),
    stray=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)

LAYOUTS: dict[str, Layout] = {layout.model_type: layout for layout in (GPT2, LLAMA)}


def parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters by path."""
    leaves = flax.traverse_util.flatten_dict(abstract_params(config), sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def expected_tensors(
    layout: Layout, config: TransformerConfig, classes: int | None = None
) -> tuple[dict[str, tuple[int, ...]], list[Tensor]]:
    """Shapes of our parameters by path, and the tensors that hold them.

    Args:
      layout: of the files.
      config: of the model.
      classes: outputs of a classifier's head, if there is one.
    """
    shapes = parameter_shapes(config)
    tensors = [tensor for tensor in layout.tensors if tensor.paths[0] in shapes]
    if classes is not None:
        shapes[SCORE.paths[0]] = (config.width, classes)
        tensors.append(SCORE)
    return shapes, tensors


def layer_keys(
    tensor: Tensor, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[int | None, str]]:
    """(layer, key without prefix); the layer of what is outside the blocks is None."""
    path = tensor.paths[0]
    if not is_stacked(path):
        yield None, tensor.key
        return
    for layer in range(shapes[path][0]):
        yield layer, tensor.key.format(layer)


def stored_shapes(
    tensors: Iterable[Tensor], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys without prefix and shapes, as they are in their files."""
    for tensor in tensors:
        for layer, key in layer_keys(tensor, shapes):
            parts = [shapes[path][layer is not None :] for path in tensor.paths]
            shape = (*parts[0][:-1], sum(part[-1] for part in parts))
            yield key, shape[::-1] if tensor.transposed else shape


def full_key(key: str, layout: Layout) -> str:
    """The key as it is written: all but the heads belong to the base model."""
    return key if key in (HEAD, SCORE.key) else layout.prefix + key
