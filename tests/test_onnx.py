"""ONNX files under ONNX Runtime: our logits."""

import numpy as np
import pytest

from compress.export import onnx as onnx_file
from compress.export.onnx import write_onnx
from compress.quantization.quantize import quantize_params, weight_rules
from compress.quantization.w8a8 import Activation, integer_products
from model.presets import gpt2_tiny, llama_tiny
from model.transformer import Transformer
from tests.compiled import logits_of
from tests.huggingface_cases import drawn

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

TOKENS = np.arange(24).reshape(2, 12) * 5 % 64


def run(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"tokens": TOKENS.astype(np.int64)})[0]


def logits(config, params):
    return np.asarray(logits_of(Transformer(config), params, TOKENS))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", [None, "q4_0"])
def test_float_graphs_are_the_model(tmp_path, format, tied):
    config = gpt2_tiny(tied_head=tied)
    params = drawn(config, std=0.2)
    if format is not None:
        params = quantize_params(params, weight_rules(params, format))
    write_onnx(tmp_path / "a.onnx", config, params)
    expected = logits(config, params)
    np.testing.assert_allclose(run(tmp_path / "a.onnx"), expected, atol=1e-4 * abs(expected).max())
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


@pytest.mark.parametrize("tied", [True, False])
def test_integer_graphs_are_our_integer_products(tmp_path, tied):
    config = gpt2_tiny(tied_head=tied)
    plain = drawn(config, std=0.2)
    params = quantize_params(plain, weight_rules(plain, "int8"))
    write_onnx(tmp_path / "a.onnx", config, params)
    kinds = [node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node]
    assert kinds.count("MatMulInteger") == 2 * 6 + 1
    assert kinds.count("MatMul") == 2 * 2  # attention's own
    rules = [("kernel", True), *([("token_embedding/embedding", True)] if tied else [])]
    ours = integer_products(params, Activation("dynamic", "tensor", "zero_point"), rules=rules)
    theirs, expected, dense = run(tmp_path / "a.onnx"), logits(config, ours), logits(config, plain)
    off = np.linalg.norm(theirs - expected) / np.linalg.norm(expected)
    # A tie that rounds to the other side moves an activation by one step; some do.
    assert off < 0.5 * np.linalg.norm(theirs - dense) / np.linalg.norm(dense)
    assert off < 0.01


@pytest.mark.parametrize("format", [None, "int8"])
def test_a_tied_table_is_written_once_as_it_is_stored(tmp_path, format):
    config = gpt2_tiny(tied_head=True)
    params = drawn(config, std=0.2)
    if format is not None:
        params = quantize_params(params, weight_rules(params, format))
    write_onnx(tmp_path / "a.onnx", config, params)
    constants = onnx.load(tmp_path / "a.onnx").graph.initializer
    sizes = {c.name: len(c.raw_data) for c in constants if len(c.dims) == 2}
    each, kernels = (1, 2 * 6) if format else (4, 2 * 6)
    assert sizes["token_embedding"] == each * 64 * 32
    assert sizes["position_embedding"] == 4 * config.max_length * 32
    assert len(sizes) == kernels + 2
    assert sum(sizes.values()) - sizes["position_embedding"] == each * (64 * 32 + 2 * 12 * 32**2)


def test_what_it_does_not_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)
    with pytest.raises(ValueError, match="pass the 2 GB of one ONNX file"):
        write_onnx(tmp_path / "a.onnx", gpt2_tiny(), drawn(gpt2_tiny()))
    assert not list(tmp_path.iterdir())
    others = {
        "positions is 'rotary' and must be 'learned'": llama_tiny(),
        "activation is 'gelu_exact'": gpt2_tiny(activation="gelu_exact"),
        "kv_heads is 2 and must be 4": gpt2_tiny(kv_heads=2),
        "4 heads of 16 must fill 32": gpt2_tiny(head_width=16),
        "window is 4": gpt2_tiny(window=4),
    }
    for what, config in others.items():
        with pytest.raises(ValueError, match=f"GPT-2's kind.*{what}.*StableHLO format") as refused:
            write_onnx(tmp_path / "a.onnx", config, {})
        assert "GGUF" not in str(refused.value)
    (tmp_path / "a.onnx").touch()
    with pytest.raises(ValueError, match="exists already"):
        write_onnx(tmp_path / "a.onnx", gpt2_tiny(), drawn(gpt2_tiny()))
