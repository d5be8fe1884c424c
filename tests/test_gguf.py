"""GGUF files: read by the gguf package, they stand for our weights bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.export.gguf import Vocabulary, compare, read_gguf, tensors, write_gguf
from compress.export.gguf_layouts import architecture_of
from compress.pruning.structured import keep_groups, keep_layers, keep_neurons
from compress.quantization.quantize import dequantize_params, quantize_params, weight_rules
from compress.quantization.w8a8 import integer_products
from model.presets import gpt2_tiny, llama_tiny, modern_tiny
from model.transformer import Transformer
from tests.compiled import logits_of
from tests.huggingface_cases import drawn

gguf = pytest.importorskip("gguf")

TOKENS = np.arange(12)[None] * 5 % 64
CONFIGS = {
    "gpt2": gpt2_tiny(),
    "gpt2 untied": gpt2_tiny(tied_head=False, ffn_width=96),
    "llama": llama_tiny(),
    "llama wide heads": llama_tiny(head_width=16, tied_head=True),
    "qwen3": llama_tiny(qk_norm=True, rotary_base=500.0),
    "qwen3 tied": llama_tiny(qk_norm=True, tied_head=True, head_width=16),
}


def fields_of(path):
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, reader.tensors


def layer_norm(x, scale, bias, epsilon):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * scale + bias


def rms_norm(x, scale, epsilon):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * scale


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def attend(q, k, v):
    """[H, T, K]; k and v may have fewer heads."""
    repeat = len(q) // len(k)
    k, v = np.repeat(k, repeat, axis=0), np.repeat(v, repeat, axis=0)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    y = softmax(scores) @ v
    return y.transpose(1, 0, 2).reshape(q.shape[1], -1)


def turn(x, base, arch):
    """What of a head turns together in llama.cpp: neighbours (2i, 2i + 1) for llama, which is its
    LLAMA_ROPE_TYPE_NORM, and (i, i + K/2) for qwen3, LLAMA_ROPE_TYPE_NEOX."""
    T, K = x.shape[-2:]
    angle = np.arange(T)[:, None] * base ** (-np.arange(0, K, 2) / K)
    a, b = (x[..., 0::2], x[..., 1::2]) if arch == "llama" else np.split(x, 2, axis=-1)
    pair = (a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle))
    return np.stack(pair, axis=-1 if arch == "llama" else -2).reshape(x.shape)


def run_file(path, ids):
    """The model as the file describes it, in NumPy, from its own fields and names alone."""
    f, _ = fields_of(path)
    w = {name: np.asarray(value, np.float64) for name, value in read_gguf(path).items()}
    arch = f["general.architecture"]
    heads = f[f"{arch}.attention.head_count"]
    x = w["token_embd.weight"][ids]
    split = lambda y, n: y.reshape(len(ids), n, -1).transpose(1, 0, 2)
    if arch == "gpt2":
        epsilon = f["gpt2.attention.layer_norm_epsilon"]
        x = x + w["position_embd.weight"][: len(ids)]
        of = lambda name, y: y @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        normed = lambda name, y: layer_norm(y, w[f"{name}.weight"], w[f"{name}.bias"], epsilon)
    else:
        epsilon = f[f"{arch}.attention.layer_norm_rms_epsilon"]
        of = lambda name, y: y @ w[f"{name}.weight"].T
        normed = lambda name, y: rms_norm(y, w[f"{name}.weight"], epsilon)
    for i in range(f[f"{arch}.block_count"]):
        h = normed(f"blk.{i}.attn_norm", x)
        if arch == "gpt2":
            q, k, v = (split(y, heads) for y in np.split(of(f"blk.{i}.attn_qkv", h), 3, axis=-1))
        else:
            kv, base = f[f"{arch}.attention.head_count_kv"], f[f"{arch}.rope.freq_base"]
            q, k, v = (
                split(of(f"blk.{i}.attn_{name}", h), n)
                for name, n in (("q", heads), ("k", kv), ("v", kv))
            )
            if arch == "qwen3":
                q, k = normed(f"blk.{i}.attn_q_norm", q), normed(f"blk.{i}.attn_k_norm", k)
            q, k = turn(q, base, arch), turn(k, base, arch)
        x = x + of(f"blk.{i}.attn_output", attend(q, k, v))
        h = normed(f"blk.{i}.ffn_norm", x)
        up = of(f"blk.{i}.ffn_up", h)
        if arch == "gpt2":
            up = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        else:
            gate = of(f"blk.{i}.ffn_gate", h)
            up = up * gate / (1 + np.exp(-gate))
        x = x + of(f"blk.{i}.ffn_down", up)
    return normed("output_norm", x) @ w.get("output.weight", w["token_embd.weight"]).T


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen3"])
def test_names_are_those_that_the_architecture_has(tmp_path, arch):
    """As the gguf package lists them for llama.cpp, and what it lists is there."""
    config = next(c for c in CONFIGS.values() if architecture_of(c) == arch)
    config = dataclasses.replace(config, tied_head=False)
    write_gguf(tmp_path / "a.gguf", config, drawn(config))
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    known = [gguf.TENSOR_NAMES[each] for each in gguf.MODEL_TENSORS[kinds[arch]]]
    known = {name.format(bid=i) for name in known for i in range(config.layers)}
    found = {t.name.rpartition(".")[0] for t in fields_of(tmp_path / "a.gguf")[1]}
    assert found <= known
    left_out = {name.rpartition(".")[-1] for name in known - found}
    # What Llama's list has besides is of models of experts, and Qwen3's of longer rotations.
    assert not left_out & {"attn_q_norm", "attn_k_norm", "output_norm", "output", "ffn_gate"}


@pytest.mark.variants(6)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("format", [None, "q8_0", "q4_0", "q4_1"])
def test_the_file_is_the_model(tmp_path, name, format):
    """Logits of the file, computed in NumPy by llama.cpp's conventions, are ours."""
    config = CONFIGS[name]
    params = drawn(config, std=0.2)
    if format is not None:
        params = quantize_params(params, weight_rules(params, format))
    write_gguf(tmp_path / "a.gguf", config, params)
    ours = logits_of(Transformer(config), params, TOKENS)[0]
    theirs = run_file(tmp_path / "a.gguf", TOKENS[0])
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(np.abs(theirs).max()), rtol=1e-4)
    fields, read = fields_of(tmp_path / "a.gguf")
    kinds = {t.name: t.tensor_type.name.lower() for t in read}
    assert kinds["blk.1.ffn_down.weight"] == kinds["token_embd.weight"] == (format or "f32")
    assert ("output.weight" in kinds) == (not config.tied_head)
    assert fields["general.file_type"] == {None: 0, "q4_0": 2, "q4_1": 3, "q8_0": 7}[format]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("format", ["q8_0", "q4_0", "q4_1"])
def test_bits_and_bytes(tmp_path, format):
    config = gpt2_tiny()
    params = drawn(config, std=0.2)
    params = quantize_params(params, weight_rules(params, format, positions=format))
    write_gguf(tmp_path / "a.gguf", config, params)
    read = read_gguf(tmp_path / "a.gguf")
    plain = dequantize_params(params)
    for i in range(2):
        kernel = np.asarray(plain["blocks"]["mlp"]["down"]["kernel"][i])
        np.testing.assert_array_equal(read[f"blk.{i}.ffn_down.weight"], kernel.T)
        qkv = [np.asarray(plain["blocks"]["attention"][n]["kernel"][i]).T for n in "qkv"]
        np.testing.assert_array_equal(read[f"blk.{i}.attn_qkv.weight"], np.concatenate(qkv))
    stored = {t.name: t.n_bytes for t in fields_of(tmp_path / "a.gguf")[1]}
    assert sum(stored.values()) == sum(x.nbytes for x in jax.tree.leaves(params))


def test_float16(tmp_path):
    config = llama_tiny()
    params = drawn(config)
    write_gguf(tmp_path / "a.gguf", config, params, dtype="f16")
    kernel = np.asarray(params["blocks"]["mlp"]["up"]["kernel"][1])
    read = read_gguf(tmp_path / "a.gguf")
    np.testing.assert_array_equal(read["blk.1.ffn_up.weight"], kernel.T.astype(np.float16))
    np.testing.assert_array_equal(read["output_norm.weight"], params["final_norm"]["scale"])
    params["blocks"]["mlp"]["up"]["kernel"] = jnp.full((2, 32, 96), 1e6)
    with pytest.raises(ValueError, match=r"mlp/up/kernel holds values that float16 does not"):
        write_gguf(tmp_path / "b.gguf", config, params, dtype="f16")
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_smaller_models(tmp_path):
    config, params = keep_layers(gpt2_tiny(), drawn(gpt2_tiny()), [1])
    config, params = keep_neurons(config, params, [range(64)])
    write_gguf(tmp_path / "a.gguf", config, params)
    ours = logits_of(Transformer(config), params, TOKENS)[0]
    theirs = run_file(tmp_path / "a.gguf", TOKENS[0])
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(np.abs(theirs).max()), rtol=1e-4)
    with pytest.raises(ValueError, match=r"2 heads of 8 must fill 32.*StableHLO"):
        architecture_of(keep_groups(gpt2_tiny(), drawn(gpt2_tiny()), [[0, 1]] * 2)[0])


def test_the_vocabulary_is_written(tmp_path):
    tokens = [chr(256 + i) for i in range(64)]
    vocabulary = Vocabulary("gpt2", tokens, [1] * 63 + [3], 63, merges=["a b"])
    write_gguf(tmp_path / "a.gguf", gpt2_tiny(), drawn(gpt2_tiny()), vocabulary)
    fields = fields_of(tmp_path / "a.gguf")[0]
    assert fields["tokenizer.ggml.tokens"] == tokens
    assert fields["tokenizer.ggml.merges"] == ["a b"]
    assert fields["tokenizer.ggml.eos_token_id"] == 63
    short = vocabulary._replace(tokens=tokens[1:])
    with pytest.raises(ValueError, match="has 63 tokens and the model 64"):
        write_gguf(tmp_path / "b.gguf", gpt2_tiny(), drawn(gpt2_tiny()), short)


@pytest.mark.parametrize("preset", [gpt2_tiny, llama_tiny])
def test_without_a_vocabulary_the_file_says_so(tmp_path, preset):
    """llama.cpp loads no file that names neither a tokenizer nor "no_vocab" and how many tokens."""
    write_gguf(tmp_path / "a.gguf", preset(), drawn(preset()))
    fields = fields_of(tmp_path / "a.gguf")[0]
    assert fields["tokenizer.ggml.model"] == "no_vocab"
    assert fields[f"{fields['general.architecture']}.vocab_size"] == 64


def test_a_file_that_differs_is_found(tmp_path):
    config, params = gpt2_tiny(), drawn(gpt2_tiny())
    write_gguf(tmp_path / "a.gguf", config, params)
    compare(tmp_path / "a.gguf", config, params)
    params["blocks"]["mlp"]["up"]["bias"] = params["blocks"]["mlp"]["up"]["bias"].at[1, 3].add(1e-3)
    with pytest.raises(ValueError, match=r"blk.1.ffn_up.bias .* is not what was written"):
        compare(tmp_path / "a.gguf", config, params)


def test_what_it_does_not_hold(tmp_path):
    config, plain = gpt2_tiny(), drawn(gpt2_tiny())
    q = quantize_params(plain, weight_rules(plain, "int8"))
    mixed = quantize_params(plain, [("attention/q/kernel", "q8_0")])
    cases = [
        (config, q, "compress with one of q8_0, q4_0, q4_1"),
        (config, integer_products(q), "is a W8A8"),
        (config, mixed, "are one tensor"),
        (config, {**plain, "adapter": {"kernel": jnp.ones((2, 2))}}, "no place for adapter/kernel"),
        (modern_tiny(), plain, "as qwen3: activation is 'relu_squared'.*logit_softcap is 15.0"),
        (llama_tiny(norm_scale=False), plain, "norm_scale is False and must be True"),
        (gpt2_tiny(qk_norm=True), plain, "none of gpt2, llama, qwen3; as gpt2: qk_norm is True"),
        (dataclasses.replace(config, window=4), plain, "window is 4 and must be None"),
    ]
    for config, params, message in cases:
        with pytest.raises(ValueError, match=message):
            write_gguf(tmp_path / "a.gguf", config, params)
        assert not list(tmp_path.iterdir())
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ValueError, match="exists already"):
        write_gguf(tmp_path / "a.gguf", gpt2_tiny(), plain)
    assert len(list(tensors(gpt2_tiny(), plain))) == 4 + 2 * 12
