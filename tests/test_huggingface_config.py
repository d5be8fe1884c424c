"""`config.json`: what it says is read, what it asks for beyond our model is refused, both ways."""

import dataclasses

import pytest

from model.config import TransformerConfig
from model.huggingface_config import NOT_HELD, read_config, write_config
from model.presets import gpt2, gpt2_tiny, llama, llama_tiny, modern_tiny
from tests.huggingface_cases import NANOCHAT


def with_entries(config, entries):
    """The `config.json` of a config, some entries changed or (None) taken out."""
    theirs = write_config(config)[1] | entries
    return {name: value for name, value in theirs.items() if value is not None}


def test_config_of_gpt2_on_the_hub_is_our_preset():
    hub = {  # as published; what means nothing to us included
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_type": "cls_index",
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    }
    assert read_config(hub)[1] == gpt2()


def test_config_of_llama_2_on_the_hub_is_our_preset():
    hub = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": 32000,
    }
    assert read_config(hub)[1] == llama()


def test_config_of_qwen3_on_the_hub_is_understood():
    hub = {  # Qwen3-0.6B as published; what means nothing to us included
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    expected = llama(
        vocabulary_size=151_936,
        max_length=40_960,
        layers=28,
        width=1024,
        heads=16,
        kv_heads=8,
        head_width=128,
        ffn_width=3072,
        rotary_base=1e6,
        norm_epsilon=1e-6,
        qk_norm=True,
        tied_head=True,
    )
    assert read_config(hub)[1] == expected


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"model_type": "bert"}, "'bert' is not supported; there are gpt2, llama"),
        ({"model_type": None}, "None is not supported; there are gpt2, llama"),
        ({"n_head": None}, "the entry n_head is missing"),
        ({"n_layer": "2x"}, "n_layer is '2x', not of type int"),
        ({"n_layer": True}, "n_layer is True, not of type int"),
        ({"n_embd": 30}, "width 30 does not divide into 4 heads"),
        ({"activation_function": "relu"}, "'relu' is not supported; there are gelu_new"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config is .*must be absent"),
    ],
)
def test_gpt2_configs_that_cannot_be_meant(entries, words):
    with pytest.raises(ValueError, match=words):
        read_config(with_entries(gpt2_tiny(), entries))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; there are silu, swish"),
        ({"attention_bias": True}, "attention_bias is True and mlp_bias is False"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type is 'linear'"),
        ({"rope_scaling": {"factor": 2.0}}, r"rope_scaling\.factor is 2\.0"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type is 'yarn'"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        ({"rope_theta": 9.0}, "rope_theta is 10000.0 but rope_theta, which means the same, is 9"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3 key/value heads"),
    ],
)
def test_llama_configs_that_cannot_be_meant(entries, words):
    with pytest.raises(ValueError, match=words):
        read_config(with_entries(llama_tiny(), entries))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ({"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"head_dim": None}, "head_dim is missing"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type is 'yarn'"),
    ],
)
def test_qwen3_configs_that_cannot_be_meant(entries, words):
    config = llama_tiny(qk_norm=True)
    whole = {"layer_types": ["full_attention"] * 2, "sliding_window": 4096}
    assert read_config(with_entries(config, whole))[1] == read_config(write_config(config)[1])[1]
    with pytest.raises(ValueError, match=words):
        read_config(with_entries(config, entries))


def test_a_cap_that_is_null_is_none_and_one_that_is_absent_is_transformers_own():
    capped = modern_tiny(**NANOCHAT, logit_softcap=9.0)
    theirs = write_config(capped)[1]
    assert theirs["final_logit_softcapping"] == 9.0
    assert read_config(theirs | {"final_logit_softcapping": None})[1].logit_softcap is None
    del theirs["final_logit_softcapping"]
    assert read_config(theirs)[1].logit_softcap == 15.0
    free = dataclasses.replace(capped, logit_softcap=None)
    assert write_config(free)[1]["final_logit_softcapping"] is None
    with pytest.raises(ValueError, match="attention_bias is True"):
        read_config(theirs | {"attention_bias": True})


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_theta": None},
        {"rope_parameters": None},
        {"rope_parameters": None, "rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 500, "type": "default"}},
    ],
)
def test_rope_base_is_read_where_any_version_keeps_it(entries):
    theirs = with_entries(llama_tiny(rotary_base=500.0), entries)
    assert read_config(theirs)[1].rotary_base == 500.0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            modern_tiny(),
            "gpt2 cannot hold positions='rotary'.*; llama cannot hold activation='relu",
        ),
        (modern_tiny(), r"activation='relu_squared' \(it has 'swiglu'\), qk_norm=True"),
        (modern_tiny(), r"logit_softcap=15\.0 \(it has None\)"),
        (gpt2_tiny(qk_norm=True), r"gpt2 cannot hold qk_norm=True \(it has False\);"),
        (gpt2_tiny(biases=False), r"gpt2 cannot hold biases=False"),
        (gpt2_tiny(kv_heads=2), r"gpt2 cannot hold kv_heads=2"),
        (gpt2_tiny(head_width=7), r"gpt2 cannot hold head_width=7"),
        (gpt2_tiny(activation="swiglu"), r"gpt2 cannot hold activation='swiglu'"),
        (gpt2_tiny(norm="rmsnorm"), r"gpt2 cannot hold norm='rmsnorm'"),
        (llama_tiny(window=(4, 8)), r"llama cannot hold window=\(4, 8\)"),
        (llama_tiny(norm="layernorm"), r"llama cannot hold norm='layernorm'"),
        (llama_tiny(qk_norm=True, biases=True), r"qwen3 cannot hold biases=True"),
        (llama_tiny(width=30, head_width=8), "heads that divide the width"),
    ],
)
def test_configs_that_no_format_holds(config, words):
    with pytest.raises(ValueError, match=words):
        write_config(config)


STARTS = {
    "gpt2": gpt2_tiny(),
    "llama": llama_tiny(),
    "qwen3": llama_tiny(qk_norm=True),
    "nanochat": modern_tiny(**NANOCHAT),
}
OTHER = {  # a value that neither preset has, for every field
    "vocabulary_size": 96,
    "max_length": 48,
    "layers": 3,
    "width": 64,
    "heads": 8,
    "kv_heads": 1,
    "head_width": 16,
    "ffn_width": 40,
    "positions": {"learned": "rotary", "rotary": "learned"},
    "rotary_base": 77.0,
    "norm": {"layernorm": "rmsnorm", "rmsnorm": "layernorm"},
    "norm_epsilon": 1e-3,
    "norm_scale": {True: False, False: True},
    "biases": {True: False, False: True},
    "activation": "gelu_exact",
    "qk_norm": {True: False, False: True},
    "logit_softcap": 9.0,
    "tied_head": {True: False, False: True},
    "window": 8,
    "zero_init_projections": True,
    "init_std": 0.5,
    "embedding_norm": {True: False, False: True},
    "embedding_shortcut": 0.1,
    "value_embeddings": True,
    "bigram_rows": 64,
    "bigram_width": 8,
    "dropout": 0.25,
    "layer_drop": 0.1,
    "token_drop": 0.1,
    "dtype": "bfloat16",
    "parameter_dtype": "bfloat16",
    "scan_layers": True,
    "remat": "full",
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(TransformerConfig)])
@pytest.mark.parametrize("name", STARTS)
def test_every_field_is_held_or_refused_or_said_not_to_be(name, field):
    """A config field that nobody thought of must not be lost on the way."""
    start, other = STARTS[name], OTHER[field]
    if isinstance(other, dict):
        other = other[getattr(start, field)]
    changed = dataclasses.replace(start, **{field: other})
    assert changed != start
    if field == "rotary_base" and start.positions == "learned":
        return  # has no part in that model
    if (name, field) in NOT_IN:
        kind = (
            pytest.warns(UserWarning, match="training")
            if field == "dropout"
            else pytest.raises(ValueError)
        )
        with kind as caught:
            write_config(changed)
        said = caught.value if hasattr(caught, "value") else caught[0].message
        assert f"{field}={other!r}" in str(said)
    else:
        held = read_config(write_config(changed)[1])[1]
        expected = start if field in NOT_HELD else changed
        assert held == expected


_TABLES = ("value_embeddings", "bigram_rows", "bigram_width")
_NOWHERE = ("window", "norm_scale", "embedding_norm", "embedding_shortcut", *_TABLES)
_NOT_ROTARY = ("positions", "norm", "activation", "dropout")
NOT_IN = {
    *(("gpt2", name) for name in ("kv_heads", "head_width", "positions", "norm", "biases")),
    ("gpt2", "qk_norm"),
    *(("llama", name) for name in _NOT_ROTARY),
    *(("qwen3", name) for name in (*_NOT_ROTARY, "biases")),
    *(("nanochat", name) for name in ("positions", "norm", "dropout", "biases", "qk_norm")),
    *((kind, name) for kind in STARTS for name in _NOWHERE),
    *((kind, "logit_softcap") for kind in STARTS if kind != "nanochat"),
}
