"""How llama.cpp calls our parameters, and which models it computes: tables for `export.gguf`."""

from __future__ import annotations

from typing import Any

from model.config import TransformerConfig

_NORMS = {"attn_norm": "attention_norm", "ffn_norm": "mlp_norm"}
_TABLES: list[tuple[str, tuple[str, ...]]] = [
    ("token_embd.weight", ("token_embedding/embedding",)),
    ("position_embd.weight", ("position_embedding/embedding",)),
    ("output_norm.weight", ("final_norm/scale",)),
    ("output_norm.bias", ("final_norm/bias",)),
    ("output.weight", ("head/kernel",)),
]


def _blocks(
    linears: dict[str, tuple[str, ...]], norms: dict[str, str]
) -> list[tuple[str, tuple[str, ...]]]:
    rows = [
        (f"blk.{{}}.{theirs}.{kind}", (f"blocks/{ours}/{leaf}",))
        for theirs, ours in norms.items()
        for kind, leaf in (("weight", "scale"), ("bias", "bias"))
    ]
    return rows + [
        (f"blk.{{}}.{theirs}.{kind}", tuple(f"blocks/{path}/{leaf}" for path in ours))
        for theirs, ours in linears.items()
        for kind, leaf in (("weight", "kernel"), ("bias", "bias"))
    ]


_LLAMA_LINEARS: dict[str, tuple[str, ...]] = {
    "attn_q": ("attention/q",),
    "attn_k": ("attention/k",),
    "attn_v": ("attention/v",),
    "attn_output": ("attention/o",),
    "ffn_gate": ("mlp/gate",),
    "ffn_up": ("mlp/up",),
    "ffn_down": ("mlp/down",),
}
_QK_NORMS = {"attn_q_norm": "attention/q_norm", "attn_k_norm": "attention/k_norm"}

TENSORS: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "gpt2": _TABLES
    + _blocks(
        {
            "attn_qkv": ("attention/q", "attention/k", "attention/v"),
            "attn_output": ("attention/o",),
            "ffn_up": ("mlp/up",),
            "ffn_down": ("mlp/down",),
        },
        _NORMS,
    ),
    "llama": _TABLES + _blocks(_LLAMA_LINEARS, _NORMS),
    "qwen3": _TABLES + _blocks(_LLAMA_LINEARS, _NORMS | _QK_NORMS),
}
"""Architecture -> (their name, our parameters joined along out)."""

_LLAMA = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "biases": False}
_FIXED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "positions": "learned",
        "norm": "layernorm",
        "activation": "gelu",
        "biases": True,
        "qk_norm": False,
    },
    "llama": {**_LLAMA, "qk_norm": False},
    "qwen3": {**_LLAMA, "qk_norm": True},
}
_ALWAYS: dict[str, Any] = {
    "logit_softcap": None,
    "window": None,
    "embedding_norm": False,
    "embedding_shortcut": None,
    "value_embeddings": False,
    "bigram_rows": None,
    "norm_scale": True,
}


def architecture_of(config: TransformerConfig) -> str:
    """Returns "gpt2", "llama" or "qwen3", which is Llama with norms of queries and keys.

    Raises:
      ValueError: none of them computes this model; the fields in the way are named.

    >>> from model.presets import gpt2_tiny, llama_tiny
    >>> architecture_of(gpt2_tiny()), architecture_of(llama_tiny(qk_norm=True))
    ('gpt2', 'qwen3')
    """
    name = "gpt2" if config.positions == "learned" else "qwen3" if config.qk_norm else "llama"
    wanted = {**_FIXED[name], **_ALWAYS}
    wrong = [
        f"{field} is {getattr(config, field)!r} and must be {value!r}"
        for field, value in wanted.items()
        if getattr(config, field) != value
    ]
    if name == "gpt2" and config.heads * config.head_width_ != config.width:
        wrong.append(f"{config.heads} heads of {config.head_width_} must fill {config.width}")
    if name == "gpt2" and config.kv_heads_ != config.heads:
        wrong.append(f"kv_heads is {config.kv_heads_} and must be {config.heads}")
    if wrong:
        raise ValueError(
            f"GGUF holds this model as none of {', '.join(_FIXED)}; as {name}: {'; '.join(wrong)}. "
            "The native and the StableHLO format hold any model"
        )
    return name
