"""The native folder and StableHLO: bit for bit, and in a process that has not our code at hand."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.export.native import MODEL, WEIGHTS, load_native, save_native
from compress.export.stablehlo import PROGRAM, load_stablehlo, save_stablehlo
from compress.quantization.quantize import quantize_params, weight_rules
from compress.quantization.w8a8 import Activation, activation_ranges, integer_products
from experiments import export
from experiments.export import Export, run_command, vocabulary_of
from experiments.runs.run import open_run
from model import huggingface
from model.presets import gpt2_tiny, llama_tiny, modern_tiny
from model.transformer import Transformer
from tests.huggingface_cases import assert_same, drawn
from tests.test_convert import call, make_run
from train.tokenizers.bpe import byte_alphabet
from train.tokenizers.tokenizer import load_tokenizer, train_sentencepiece

TOKENS = jnp.arange(24, dtype=jnp.int32).reshape(2, 12) * 5 % 64


def quantized(config, format):
    params = drawn(config, std=0.2)
    return quantize_params(params, weight_rules(params, format))


def integers(config):
    params = quantized(config, "int8")
    ranges = activation_ranges(Transformer(config), params, [TOKENS])
    activation = Activation("static", "tensor", "zero_point")
    return integer_products(params, activation, rules=[("kernel", True)], ranges=ranges)


@pytest.mark.parametrize("format", ["q4_0", "q4_1", "int16", "e4m3", "e5m2"])
def test_native_is_lossless(tmp_path, format):
    config = gpt2_tiny()
    params = quantized(config, format)
    save_native(tmp_path / "model", config, params)
    again, loaded = load_native(tmp_path / "model")
    assert again == config
    assert_same(loaded, params)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [MODEL, WEIGHTS]


def test_native_holds_integer_products_and_narrow_types(tmp_path):
    config = modern_tiny()
    for name, params in {
        "products": integers(config),
        "bfloat16": jax.tree.map(lambda x: x.astype(jnp.bfloat16), drawn(config)),
    }.items():
        save_native(tmp_path / name, config, params)
        assert_same(load_native(tmp_path / name)[1], params)


def test_native_refuses_what_is_damaged(tmp_path):
    config = gpt2_tiny()
    save_native(tmp_path / "model", config, drawn(config))
    with pytest.raises(ValueError, match="exists already"):
        save_native(tmp_path / "model", config, drawn(config))
    with pytest.raises(ValueError, match=r"holds no model.json"):
        load_native(tmp_path)
    path = tmp_path / "model" / MODEL
    content = json.loads(path.read_text())
    cases = [
        ({**content, "version": 9}, "version 9; this reads 1"),
        (
            {**content, "config": {**content["config"], "layers": 3}},
            r"float32\[2, .* not float32\[3",
        ),
        ({**content, "config": {**content["config"], "tied_head": False}}, "head/kernel: only one"),
    ]
    for value, message in cases:
        path.write_text(json.dumps(value))
        with pytest.raises(ValueError, match=message):
            load_native(tmp_path / "model")
    path.write_text(json.dumps(content))
    (tmp_path / "model" / WEIGHTS).write_bytes(b"12345678")
    with pytest.raises(ValueError, match="is damaged"):
        load_native(tmp_path / "model")


@pytest.mark.parametrize("kind", ["plain", "q4_0", "products"])
def test_stablehlo_gives_our_logits(tmp_path, kind):
    pytest.importorskip("flatbuffers")
    config = llama_tiny()
    make = {"plain": drawn, "q4_0": lambda c: quantized(c, "q4_0"), "products": integers}
    model, params = Transformer(config), make[kind](config)
    save_stablehlo(tmp_path / "out", model, params, batch=2, length=12)
    expected = jax.jit(lambda p, t: model.apply({"params": p}, t))(params, TOKENS)
    np.testing.assert_array_equal(load_stablehlo(tmp_path / "out")(TOKENS), expected)
    weights = (tmp_path / "out" / "native" / WEIGHTS).stat().st_size
    assert weights > sum(x.nbytes for x in jax.tree.leaves(params))
    with pytest.raises(ValueError, match="exists already"):
        save_stablehlo(tmp_path / "out", model, params, length=12)
    with pytest.raises(ValueError, match=r"holds no forward.stablehlo"):
        load_stablehlo(tmp_path)


@pytest.mark.parametrize("platforms", [None, ("cuda",), ("cuda", "tpu")])
def test_stablehlo_has_the_attention_of_its_platform(tmp_path, monkeypatch, platforms):
    """Blocks of queries, each with products of its own, are for a machine with one CPU device."""
    pytest.importorskip("flatbuffers")
    model, params = Transformer(llama_tiny()), drawn(llama_tiny())
    products = []
    for devices in (8, 1):
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        folder = tmp_path / str(devices)
        save_stablehlo(folder, model, params, length=130, platforms=platforms)
        program = jax.export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
        products.append(program.mlir_module().count("stablehlo.dot_general"))
    assert (products[0] == products[1]) == (platforms is not None)


@pytest.mark.slow
def test_stablehlo_runs_without_our_code(tmp_path):
    pytest.importorskip("flatbuffers")
    config = gpt2_tiny()
    model, params = Transformer(config), quantized(config, "q8_0")
    save_stablehlo(tmp_path / "out", model, params, batch=2, length=12)
    np.save(tmp_path / "tokens.npy", np.asarray(TOKENS))
    code = f"""
import sys, jax, jax.export, numpy as np
from safetensors.numpy import load_file
program = jax.export.deserialize(bytearray(open("{tmp_path}/out/forward.stablehlo", "rb").read()))
weights = load_file("{tmp_path}/out/native/weights.safetensors")
np.save("{tmp_path}/logits.npy", program.call(weights, np.load("{tmp_path}/tokens.npy")))
assert not [name for name in sys.modules if name.split(".")[0] in ("model", "compress", "flax")]
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    expected = jax.jit(lambda p, t: model.apply({"params": p}, t))(params, TOKENS)
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), expected)


def test_the_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    pytest.importorskip("flatbuffers")
    run = open_run(make_run(tmp_path / "run", gpt2_tiny(), load_tokenizer("bytes")))
    for format in ("native", "gguf", "stablehlo", "huggingface"):
        words = ["--run", tmp_path / "run", "--format", format, "--out", tmp_path / format]
        call(export, monkeypatch, *words)
        assert f"{format:12} {tmp_path / format}\n" in capsys.readouterr().out
    assert_same(load_native(tmp_path / "native")[1], run.params)
    assert_same(huggingface.load(tmp_path / "huggingface")[1], run.params)
    tokens = TOKENS[:1].repeat(2, axis=1)[:, :16]
    assert load_stablehlo(tmp_path / "stablehlo")(tokens).shape == (1, 16, 257)

    import gguf

    fields = gguf.GGUFReader(tmp_path / "gguf").fields
    names = fields["tokenizer.ggml.tokens"].contents()
    assert len(names) == 257
    assert names[ord("a")] == "a"
    assert fields["tokenizer.ggml.token_type"].contents()[256] == 3
    cases = [
        (
            Export(tmp_path / "run", "native", tmp_path / "a", dtype="float16"),
            "native has no dtype",
        ),
        (Export(tmp_path / "run", "gguf", tmp_path / "a", length=4), "gguf has no length"),
        (Export(tmp_path / "run", "native", tmp_path / "native"), "exists already"),
    ]
    for command, message in cases:
        with pytest.raises(ValueError, match=message):
            run_command(command)


def test_tokenizers_become_vocabularies(tmp_path):
    text = "it was the best of times; it was (the) <worst> of times, age 17."
    train_sentencepiece([text] * 9, 310).save(tmp_path / "pieces")
    pieces = load_tokenizer(tmp_path / "pieces")
    end, size = pieces.end_of_document, pieces.vocabulary_size
    found = vocabulary_of(tmp_path / "pieces", end, size)
    assert (found.model, len(found.tokens), len(found.scores), found.end) == (
        "llama",
        310,
        310,
        end,
    )
    assert found.types.count(6) == 256
    assert found.types[end] == 3
    ids = pieces.encode("the best").tolist()
    assert "".join(found.tokens[i] for i in ids).replace("\u2581", " ").strip() == "the best"

    alphabet = [*byte_alphabet(), "th", "the", "<|endoftext|>"]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(alphabet)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    load_tokenizer(f"gpt2:{folder}").save(tmp_path / "saved")
    found = vocabulary_of(tmp_path / "saved", 258, 260)
    assert found.merges == ["t h", "th e"]
    assert found.tokens == [*alphabet, "[unused 259]"]
    assert found.types[-4:] == [1, 1, 3, 5]
