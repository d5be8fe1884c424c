"""The kinds of models that come in from Hugging Face and go out to it, as tables.

To support another kind of model, add one to `LAYOUTS`.
"""

from __future__ import annotations

from model.huggingface_layouts import HEAD, Constant, Entry, Layout, Tensor

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

_ROPE_CONSTANTS = (
    Constant("rope_parameters.rope_type", ("default",)),
    Constant("rope_parameters.type", (None, "default")),
    Constant("rope_parameters.factor", (None, 1.0)),
    Constant("rope_parameters.partial_rotary_factor", (None, 1.0)),
    Constant("rope_scaling.rope_type", (None, "default")),
    Constant("rope_scaling.type", (None, "default")),
    Constant("rope_scaling.factor", (None, 1.0)),
    Constant("rope_scaling.rope_theta", (None,)),
    Constant("partial_rotary_factor", (None, 1.0)),
)
# transformers 5 keeps it in `rope_parameters`, 4 beside.
_ROPE_BASE = Entry(("rope_parameters.rope_theta", "rope_theta"), "rotary_base", float, 10_000.0)
_SILU = {"silu": "swiglu", "swish": "swiglu"}

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
        Entry(("hidden_act",), "activation", str, "silu", _SILU),
        Entry(("rms_norm_eps",), "norm_epsilon", float, 1e-6),
        _ROPE_BASE,
        Entry(("initializer_range",), "init_std", float, 0.02),
        Entry(("attention_bias",), "biases", bool, False),
        Entry(("mlp_bias",), "biases", bool, False),
        Entry(("tie_word_embeddings",), "tied_head", bool, False),
    ),
    constants=(
        Constant("attention_dropout", (0.0,), training_only=True),
        *_ROPE_CONSTANTS,
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

_QK_NORMS = {
    "self_attn.q_norm": "blocks/attention/q_norm",
    "self_attn.k_norm": "blocks/attention/k_norm",
}

QWEN3 = LLAMA._replace(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fixed={"positions": "rotary", "norm": "rmsnorm", "biases": False, "qk_norm": True},
    entries=(
        Entry(("vocab_size",), "vocabulary_size", int),
        Entry(("max_position_embeddings",), "max_length", int, 32_768),
        Entry(("num_hidden_layers",), "layers", int),
        Entry(("hidden_size",), "width", int),
        Entry(("num_attention_heads",), "heads", int),
        # Absent they are 32 and 128 there, whatever the rest is, and null is something else.
        Entry(("num_key_value_heads",), "kv_heads", int),
        Entry(("head_dim",), "head_width", int),
        Entry(("intermediate_size",), "ffn_width", int),
        Entry(("hidden_act",), "activation", str, "silu", _SILU),
        Entry(("rms_norm_eps",), "norm_epsilon", float, 1e-6),
        _ROPE_BASE,
        Entry(("initializer_range",), "init_std", float, 0.02),
        Entry(("tie_word_embeddings",), "tied_head", bool, False),
    ),
    constants=(
        Constant("attention_bias", (False,)),
        Constant("attention_dropout", (0.0,), training_only=True),
        # Where it is off, what `sliding_window` and `max_window_layers` say has no effect.
        Constant("use_sliding_window", (False,)),
        Constant("layer_types", (None, "full_attention"), each=True),
        *_ROPE_CONSTANTS,
        *_COMMON_CONSTANTS,
    ),
    tensors=(
        *LLAMA.tensors,
        *(
            Tensor(f"layers.{{}}.{theirs}.weight", (f"{ours}/scale",))
            for theirs, ours in _QK_NORMS.items()
        ),
    ),
)

# Its rotation goes the other way, and its norms of queries and keys stand after it, which without
# scales is the same as before it.
NANOCHAT = Layout(
    model_type="nanochat",
    architecture="NanoChatForCausalLM",
    prefix="model.",
    fixed={
        "positions": "rotary",
        "norm": "rmsnorm",
        "norm_scale": False,
        "qk_norm": True,
        "embedding_norm": True,
        "biases": False,
    },
    entries=(
        Entry(("vocab_size",), "vocabulary_size", int, 50_304),
        Entry(("max_position_embeddings",), "max_length", int, 2048),
        Entry(("num_hidden_layers",), "layers", int),
        Entry(("hidden_size",), "width", int),
        Entry(("num_attention_heads",), "heads", int),
        Entry(("num_key_value_heads",), "kv_heads", int, None),
        Entry(("head_dim",), "head_width", int, None),
        Entry(("intermediate_size",), "ffn_width", int, 8192),
        Entry(
            ("hidden_act",),
            "activation",
            str,
            "relu2",
            {"relu2": "relu_squared", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"},
        ),
        Entry(("rms_norm_eps",), "norm_epsilon", float, 1e-6),
        _ROPE_BASE,
        Entry(("final_logit_softcapping",), "logit_softcap", float, 15.0, nullable=True),
        Entry(("initializer_range",), "init_std", float, 0.02),
        Entry(("tie_word_embeddings",), "tied_head", bool, False),
    ),
    constants=(
        Constant("attention_bias", (False,)),
        Constant("attention_dropout", (0.0,), training_only=True),
        *_ROPE_CONSTANTS,
        *_COMMON_CONSTANTS,
    ),
    tensors=(
        Tensor("embed_tokens.weight", ("token_embedding/embedding",)),
        *(
            Tensor(f"layers.{{}}.{theirs}.weight", (f"blocks/{ours}/kernel",), True, turned)
            for theirs, ours, turned in (
                ("self_attn.q_proj", "attention/q", True),
                ("self_attn.k_proj", "attention/k", True),
                ("self_attn.v_proj", "attention/v", False),
                ("self_attn.o_proj", "attention/o", False),
                ("mlp.fc1", "mlp/up", False),
                ("mlp.fc2", "mlp/down", False),
            )
        ),
        Tensor(HEAD, ("head/kernel",), transposed=True),
    ),
    stray=r"rotary_emb\.inv_freq",
    classifies=False,
)

LAYOUTS: dict[str, Layout] = {
    layout.model_type: layout for layout in (GPT2, LLAMA, QWEN3, NANOCHAT)
}
"""By `model_type`; a config is written as the first that holds it."""
